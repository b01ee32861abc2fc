"""The policy and the critic: log-probabilities, temperature, soft-cap, weights, checkpoints."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import model
from common.model import Critic, Policy
from test_upge import spawn, tiny_critic, tiny_lm
from toy import make

# Two sequences, one after the other, and which of their tokens are the response's.
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]])
RESPONSE = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1]]).bool()
LENGTHS = [5, 4]


def plain_log_probabilities(lm, temperature):
    """(logp, entropy) of the marked tokens, each sequence by itself, with plain transformers."""
    lm.set_attn_implementation("eager")
    chosen, entropies = [], []
    for ids, response in zip(IDS[0].split(LENGTHS), RESPONSE[0].split(LENGTHS), strict=True):
        logp = (lm(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        chosen.append(logp.gather(-1, ids[1:, None])[response[1:], 0])
        entropies.append(-(logp.exp() * logp).sum(-1)[response[1:]])
    return torch.cat(chosen), torch.cat(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_divided_by_the_temperature(temperature):
    lm = tiny_lm()
    wanted, entropy = plain_log_probabilities(lm, temperature)
    got, got_entropy = Policy(lm, temperature)(IDS, RESPONSE, LENGTHS, with_entropy=True)
    assert torch.allclose(got, wanted) and torch.allclose(got_entropy, entropy)
    other, _ = plain_log_probabilities(lm, 1.3)  # negative control
    assert not torch.allclose(got, other, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_do_not_change_log_probabilities_entropies_or_gradient(chunk):
    results = []
    for size in (chunk, 1000):
        lm = tiny_lm()
        logp, entropy = Policy(lm, 0.7, size)(IDS, RESPONSE, LENGTHS, with_entropy=True)
        logp.sin().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lm.parameters()])
        results.append((logp, entropy, gradient))
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_log_probabilities_of_a_bfloat16_model_are_float32():
    logp, entropy = Policy(tiny_lm().bfloat16(), 1.0)(IDS, RESPONSE, LENGTHS, with_entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32


def test_values_of_a_bfloat16_critic_are_float32():
    assert Critic(tiny_critic().bfloat16())(IDS, RESPONSE, LENGTHS).dtype == torch.float32


def test_without_a_wish_for_it_there_is_no_entropy():
    assert Policy(tiny_lm(), 1.0)(IDS, RESPONSE, LENGTHS)[1] is None


def with_large_logits(family, **settings):
    """A small model of a family, whose logits are so large that a cap or a scale matters."""
    config = AutoConfig.for_model(
        family,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(50)
    return lm


def test_gemma_2s_soft_cap_on_logits_is_applied():
    lm = with_large_logits("gemma2", head_dim=8, final_logit_softcapping=1.0)
    wanted, _ = plain_log_probabilities(lm, 1.0)
    assert torch.allclose(Policy(lm, 1.0)(IDS, RESPONSE, LENGTHS)[0], wanted)
    lm.config.final_logit_softcapping = None  # negative control
    assert not torch.allclose(Policy(lm, 1.0)(IDS, RESPONSE, LENGTHS)[0], wanted, atol=1e-2)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.3}),
        ("cohere", {"logit_scale": 0.25}),
        ("llama", {}),
    ],
)
def test_a_familys_scale_of_logits_is_applied(family, settings):
    lm = with_large_logits(family, **settings)
    wanted, _ = plain_log_probabilities(lm, 0.7)
    policy = Policy(lm, 0.7)
    assert torch.allclose(policy(IDS, RESPONSE, LENGTHS)[0], wanted, atol=1e-5)
    lm.config.logit_scale = 3.0  # negative control
    assert not torch.allclose(policy(IDS, RESPONSE, LENGTHS)[0], wanted, atol=1e-2)


def test_the_critic_reads_the_state_before_each_token():
    lm = tiny_critic()
    hidden = [lm.base_model(ids[None]).last_hidden_state[0] for ids in IDS[0].split(LENGTHS)]
    values = lm.score(torch.cat(hidden))[None, :, 0]  # (1, 9)
    wanted = values[:, :-1][RESPONSE[:, 1:]]
    assert torch.allclose(Critic(lm)(IDS, RESPONSE, LENGTHS), wanted)
    assert not torch.allclose(
        Critic(lm)(IDS, RESPONSE, LENGTHS), values[RESPONSE]
    )  # negative control


def test_float32_logits_of_bfloat16_operands_and_their_derivative():
    """Against float64; bfloat16 logits, the negative control, are a hundred times as far off."""
    torch.manual_seed(0)
    hidden = torch.randn(6, 64).bfloat16().requires_grad_()
    head = torch.nn.Linear(64, 50, bias=True).bfloat16()
    exact = hidden.detach().double() @ head.weight.detach().double().T + head.bias.detach().double()
    logits = model.wide_logits(head, hidden)
    assert logits.dtype == torch.float32
    error = (logits - exact).abs().max()
    assert error < 1e-5 and (head(hidden).double() - exact).abs().max() > 100 * error

    logits.logsumexp(-1).sum().backward()
    share = exact.softmax(-1)  # the derivative of logsumexp
    wanted_hidden = share @ head.weight.detach().double()
    wanted_weight = share.T @ hidden.detach().double()
    for got, wanted in ((hidden.grad, wanted_hidden), (head.weight.grad, wanted_weight)):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() < 5e-3 * wanted.norm()  # bfloat16 has 3 digits


def test_logits_of_other_models_are_computed_by_their_own_layer():
    head = torch.nn.Linear(8, 5).double()
    hidden = torch.randn(3, 8).double()
    assert torch.equal(model.wide_logits(head, hidden), head(hidden))


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_logits_of_a_large_vocabulary_never_exist_all_at_once():
    """With 152k words and 16k tokens, all logits would take 10 GB.

    What an operation returns is at most a chunk's logits (0.6 GB for the default of 1024 tokens),
    and what waits for the backward pass is a few numbers per token.
    """
    vocabulary, tokens, width = 152_000, 1_000, 4
    policy = Policy(tiny_lm().float(), 1.0, chunk=64)
    policy.lm.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
    states = torch.randn(tokens, width, requires_grad=True)
    policy.states_before = lambda ids, response, lengths: states
    ids = torch.randint(0, vocabulary, (1, tokens))
    kept = []  # sizes of what waits for the backward pass

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), Sizes() as sizes:
        logp, _ = policy(ids, torch.ones_like(ids).bool(), [tokens])
    assert logp.shape == (tokens,)
    assert sizes.largest <= max(64, width) * vocabulary
    assert sum(kept) <= 20 * tokens


# ------------------------------------------- sharded over two ranks, given away, saved and read


def flags_of(directory, critic=None):
    return SimpleNamespace(
        model=directory,
        critic=critic,
        trust_remote_code=False,
        replicas=1,
        temperature=0.7,
        gradient_checkpointing=True,
        lr=0.1,
        weight_decay=0.3,
    )


def save_bases(folder):
    """Checkpoints in bfloat16, as most on the hub are: tied and untied embeddings."""
    for name, tied in (("tied", True), ("untied", False)):
        config = tiny_lm().config
        config.tie_word_embeddings = tied
        torch.manual_seed(1)
        lm = AutoModelForCausalLM.from_config(config).bfloat16()
        lm.generation_config.max_length = 77
        lm.save_pretrained(folder / name)


def build_and_save(rank, folder):
    """In two processes: build policy and critic from checkpoints, save them, note what they are."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cpu, facts = torch.device("cpu"), {}
    for name in ("tied", "untied"):
        config = AutoConfig.from_pretrained(folder / name)
        policy = model.build_policy(flags_of(folder / name), config, cpu)
        facts[name] = facts_of(policy) | {"temperature": policy.temperature}
        policy.save(folder / f"{name}-saved", make.tokenizer())
    replicated = flags_of(folder / "untied")
    replicated.replicas = 2
    facts["replicated"] = facts_of(model.build_policy(replicated, config, cpu))
    with torch.no_grad():  # as the old-policy pass of a later mini-batch
        policy(IDS, RESPONSE, LENGTHS)
    facts["norm without gradient"] = policy.step(0.1, 1.0)
    facts["after a step without gradient"] = dict(policy.weights())
    critic = model.build_critic(flags_of(folder / "tied"), config, cpu)
    facts["critic"] = facts_of(critic)
    with torch.no_grad():
        critic.lm.score.weight.add_(0.5)
        critic.lm.score.bias.add_(0.25)
    critic.save(folder / "critic-saved", make.tokenizer())
    dist.barrier()  # rank 0 alone writes
    restored = model.build_critic(flags_of(folder / "tied", folder / "critic-saved"), config, cpu)
    facts["restored critic"] = facts_of(restored)
    if rank == 0:
        torch.save(facts, folder / "facts.pt")
    dist.destroy_process_group()


def facts_of(network):
    return {
        "weights": dict(network.weights()),
        "dtypes": {str(p.dtype) for p in network.parameters()},
        "shares": {p.to_local().shape[0] < p.shape[0] for p in network.parameters() if len(p) > 1},
        "units": [type(m).__name__ for m in network.modules() if isinstance(m, FSDPModule)],
        "checkpointing": network.lm.is_gradient_checkpointing and network.lm.training,
        "settings": {k: network.optimizer.defaults[k] for k in ("lr", "betas", "weight_decay")},
        "parameters": network.num_parameters(),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of bases and of what was saved, and the facts of each network."""
    folder = tmp_path_factory.mktemp("model")
    save_bases(folder)
    spawn(build_and_save, folder, processes=2)
    return folder, torch.load(folder / "facts.pt")


def whole_weights(directory, **settings):
    lm = AutoModelForCausalLM.from_pretrained(directory, **settings)
    return lm, dict(lm.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_sampler_is_given_every_weight_whole_and_under_each_name(saved, name):
    folder, facts = saved
    given, (_, wanted) = facts[name]["weights"], whole_weights(folder / name, dtype=torch.float32)
    assert given.keys() == wanted.keys() and "lm_head.weight" in given
    assert all(torch.equal(given[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_saved_policy_is_a_plain_model_with_the_same_weights(saved, name):
    folder, _ = saved
    (old_lm, old), (lm, new) = whole_weights(folder / name), whole_weights(folder / f"{name}-saved")
    assert lm.config.tie_word_embeddings == old_lm.config.tie_word_embeddings == (name == "tied")
    assert old.keys() == new.keys() and all(torch.equal(old[key].float(), new[key]) for key in old)


def test_a_saved_policy_keeps_its_generation_config_and_has_a_tokenizer(saved):
    lm, _ = whole_weights(saved[0] / "tied-saved")
    assert lm.generation_config.max_length == 77
    tokenizer = AutoTokenizer.from_pretrained(saved[0] / "tied-saved")
    assert tokenizer.encode("1+2") == make.tokenizer().encode("1+2")


@pytest.mark.parametrize("name", ["tied", "critic"])
def test_master_weights_are_float32_whatever_the_checkpoint_is(saved, name):
    assert saved[1][name]["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("name", ["tied", "critic"])
def test_every_block_and_every_parameter_is_sharded(saved, name):
    root = "FSDPCritic" if name == "critic" else "FSDPPolicy"
    assert saved[1][name]["units"] == [root, "FSDPQwen2DecoderLayer", "FSDPQwen2DecoderLayer"]
    assert saved[1][name]["shares"] == {True}


def test_a_replica_on_each_rank_is_not_sharded(saved):
    facts = saved[1]["replicated"]
    assert facts["shares"] == {False} and saved[1]["untied"]["shares"] == {True}
    assert facts["weights"].keys() == saved[1]["untied"]["weights"].keys()


def test_replicas_must_divide_the_ranks(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    args = flags_of("m")
    args.replicas = 3
    with pytest.raises(
        SystemExit, match=r"^error: --replicas 3 must divide the number of ranks, 4"
    ):
        model.shard(Policy(tiny_lm(), 1.0), args, torch.device("cpu"))


@pytest.mark.parametrize("name", ["tied", "critic"])
def test_gradient_checkpointing_is_on_if_the_flag_says_so(saved, name):
    assert saved[1][name]["checkpointing"]


@pytest.mark.parametrize("name", ["tied", "critic"])
def test_the_optimizer_has_the_settings_of_the_flags(saved, name):
    wanted = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.3}
    assert saved[1][name]["settings"] == wanted


def test_the_policy_has_the_temperature_of_the_flags(saved):
    assert saved[1]["tied"]["temperature"] == 0.7


def test_shards_are_counted_as_whole_parameters(saved):
    folder, facts = saved
    lm, _ = whole_weights(folder / "tied")
    assert facts["tied"]["parameters"] == sum(p.numel() for p in lm.parameters())


def test_a_new_critic_is_the_base_model_and_values_all_states_at_0(saved):
    folder, facts = saved
    given, (_, base) = facts["critic"]["weights"], whole_weights(folder / "tied")
    assert not given["score.weight"].any() and not given["score.bias"].any()
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(given[key], base[key].float())


def test_a_saved_critic_is_restored_with_its_head(saved):
    given = saved[1]["restored critic"]["weights"]
    assert (given["score.weight"] == 0.5).all() and (given["score.bias"] == 0.25).all()


def test_a_step_without_gradient_on_two_ranks_only_decays_the_weights(saved):
    facts = saved[1]
    assert facts["norm without gradient"] == 0
    before, after = facts["untied"]["weights"], facts["after a step without gradient"]
    assert all(torch.allclose(after[key], before[key] * (1 - 0.1 * 0.3)) for key in before)


# --------------------------------------------------------------------- critics that cannot be made


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
