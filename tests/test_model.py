"""The policy and the critic: log-probabilities, temperature, soft-cap, weights, checkpoints."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from common import distributed, model
from common.model import Critic, Policy
from test_upge import spawn, tiny_critic, tiny_lm

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 0]])
RESPONSE = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()


def plain_log_probabilities(lm, temperature):
    """(logp, entropy) of the marked tokens, with plain transformers."""
    logits = lm(IDS).logits[:, :-1] / temperature
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, IDS[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return chosen[RESPONSE[:, 1:]], entropy[RESPONSE[:, 1:]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_divided_by_the_temperature(temperature):
    lm = tiny_lm()
    wanted, entropy = plain_log_probabilities(lm, temperature)
    got, got_entropy = Policy(lm, temperature)(IDS, RESPONSE, with_entropy=True)
    assert torch.allclose(got, wanted) and torch.allclose(got_entropy, entropy)
    other, _ = plain_log_probabilities(lm, 1.3)  # negative control
    assert not torch.allclose(got, other, atol=1e-4)


def test_chunks_do_not_change_the_result_or_the_gradient():
    gradients = []
    for chunk in (1, 4, 1000):
        lm = tiny_lm()
        logp, _ = Policy(lm, 1.0, chunk)(IDS, RESPONSE)
        logp.sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lm.parameters()]))
    assert torch.allclose(gradients[0], gradients[1]) and torch.allclose(*gradients[1:])


def test_without_a_wish_for_it_there_is_no_entropy():
    assert Policy(tiny_lm(), 1.0)(IDS, RESPONSE)[1] is None


def test_log_probabilities_come_row_by_row_without_padding():
    lm = tiny_lm()
    both, _ = Policy(lm, 1.0)(IDS, RESPONSE)
    second, _ = Policy(lm, 1.0)(IDS[1:, :4], RESPONSE[1:, :4])
    assert torch.allclose(both[3:], second)


def gemma2(cap):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=cap,
    )
    lm = Gemma2ForCausalLM(config).double()
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(50)  # so that the cap matters
    return lm


def test_gemma_2s_soft_cap_on_logits_is_applied():
    lm = gemma2(1.0)
    wanted, _ = plain_log_probabilities(lm, 1.0)
    assert torch.allclose(Policy(lm, 1.0)(IDS, RESPONSE)[0], wanted)
    uncapped = Policy(lm, 1.0)
    uncapped.softcap = None  # negative control
    assert not torch.allclose(uncapped(IDS, RESPONSE)[0], wanted, atol=1e-2)


def test_the_critic_reads_the_state_before_each_token():
    lm = tiny_critic()
    hidden = lm.base_model(IDS).last_hidden_state  # (2, 5, D)
    values = lm.score(hidden).squeeze(-1)  # (2, 5)
    wanted = values[:, :-1][RESPONSE[:, 1:]]
    assert torch.allclose(Critic(lm)(IDS, RESPONSE), wanted)
    assert not torch.allclose(Critic(lm)(IDS, RESPONSE), values[RESPONSE])  # negative control


def save_and_weights(rank, port, tied, folder):
    """In two processes: shard a model, save it, and list what the sampler would be given."""
    from transformers import AutoConfig

    from toy.make import tokenizer

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    lm = tiny_lm().float()
    if not tied:
        config = AutoConfig.for_model(**lm.config.to_dict() | {"tie_word_embeddings": False})
        torch.manual_seed(1)
        lm = type(lm)(config)
    whole = {name: p.detach().clone() for name, p in lm.named_parameters(remove_duplicate=False)}
    policy = fully_shard(Policy(lm, 1.0))
    given = dict(policy.weights())
    policy.save(folder / "saved", tokenizer())
    if rank == 0:
        same = all(torch.equal(whole[name], given[name]) for name in whole)
        (folder / "given.json").write_text(json.dumps([same, sorted(given)]))
        torch.save(whole, folder / "whole.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_reach_sampler_and_checkpoint_whole(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    spawn(save_and_weights, distributed.free_port(), tied, tmp_path, processes=2)
    same, names = json.loads((tmp_path / "given.json").read_text())
    assert same and "lm_head.weight" in names and "model.embed_tokens.weight" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    whole = torch.load(tmp_path / "whole.pt")
    assert loaded.config.tie_word_embeddings == tied
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_a_family_without_a_value_model_is_refused():
    from transformers import Gemma3TextConfig, Qwen2Config

    with pytest.raises(SystemExit, match="no token classification model for gemma3_text"):
        model.check_critic(Gemma3TextConfig())
    model.check_critic(Qwen2Config())  # negative control


def test_a_directory_without_a_critic_is_refused(tmp_path):
    from transformers import Qwen2Config

    tiny_lm().save_pretrained(tmp_path / "lm")
    with pytest.raises(SystemExit, match=r"--critic .*lm: its weights have no score.weight"):
        model.check_critic(Qwen2Config(), tmp_path / "lm")
    tiny_critic().save_pretrained(tmp_path / "critic")
    model.check_critic(Qwen2Config(), tmp_path / "critic")  # negative control
