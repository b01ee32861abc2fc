"""The policy and the critic: log-probabilities, optimizer steps, shards, what is saved."""

import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import error, spawn, tiny_critic, tiny_lm
from programs import BASE
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_hpt
from common import attention, flags, model
from common.model import Critic, Network, Policy
from toy import make

# Two sequences, one after the other, and which of their tokens are the response's.
IDS = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 11])
RESPONSE = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
LENGTHS = [5, 4]
BATCH = IDS, RESPONSE, LENGTHS

# ------------------------------------------------------------------------- log-probabilities


def plain(lm, temperature):
    """(logp, entropy) of the marked tokens, each sequence by itself, with plain transformers."""
    lm.set_attn_implementation("eager")
    chosen, entropies = [], []
    for ids, response in zip(IDS.split(LENGTHS), RESPONSE.split(LENGTHS), strict=True):
        logp = (lm(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        chosen.append(logp.gather(-1, ids[1:, None])[response[1:], 0])
        entropies.append(-(logp.exp() * logp).sum(-1)[response[1:]])
    return torch.cat(chosen), torch.cat(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_divided_by_the_temperature(temperature):
    lm = tiny_lm()
    wanted, entropy = plain(lm, temperature)
    got, got_entropy = Policy(lm, temperature)(*BATCH, with_entropy=True)
    assert torch.allclose(got, wanted) and torch.allclose(got_entropy, entropy)
    assert Policy(lm, temperature)(*BATCH)[1] is None
    assert not torch.allclose(got, plain(lm, 1.3)[0], atol=1e-4)  # negative control


def test_log_probabilities_and_values_of_bfloat16_models_are_float32():
    logp, entropy = Policy(tiny_lm().bfloat16(), 1.0)(*BATCH, with_entropy=True)
    values = Critic(tiny_critic().bfloat16())(*BATCH)
    assert logp.dtype == entropy.dtype == values.dtype == torch.float32


def with_large_logits(family, **settings):
    """A small model of a family, whose logits are so large that a cap or a scale matters."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **heads, **settings)
    lm = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(50)
    return lm


@pytest.mark.parametrize(
    "family, settings, wrong",
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0}, "final_logit_softcapping"),
        ("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.3}, "logits_scaling"),
        ("cohere", {"logit_scale": 0.25}, "logit_scale"),
        ("llama", {}, "logit_scale"),
    ],
)
def test_a_familys_cap_or_scale_of_logits_is_applied(family, settings, wrong):
    lm = with_large_logits(family, **settings)
    wanted, _ = plain(lm, 0.7)
    assert torch.allclose(Policy(lm, 0.7)(*BATCH)[0], wanted, atol=1e-5)
    setattr(lm.config, wrong, 3.0)  # negative control
    assert not torch.allclose(Policy(lm, 0.7)(*BATCH)[0], wanted, atol=1e-2)


def test_the_critic_reads_the_state_before_each_token():
    lm = tiny_critic()
    hidden = [lm.base_model(ids[None]).last_hidden_state[0] for ids in IDS.split(LENGTHS)]
    values = lm.score(torch.cat(hidden))[:, 0]  # (9,)
    got = Critic(lm)(*BATCH)
    assert torch.allclose(got, values[:-1][RESPONSE[1:]])
    assert not torch.allclose(got, values[RESPONSE])  # negative control


# ----------------------------------------------------------------------------- optimizer steps


class TwoWeights(Network):
    """A network with two weights of 1."""

    def __init__(self, weight_decay=0.0):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.AdamW([self.weight], lr=9.0, weight_decay=weight_decay)

    def reshard(self):
        """FSDP's, which has nothing to do here."""


def stepped(gradient, lr=0.1, max_norm=1.0, weight_decay=0.0):
    network = TwoWeights(weight_decay)
    network.weight.grad = None if gradient is None else torch.tensor(gradient)
    return network, network.step(lr, max_norm)


@pytest.fixture
def full_tensor(monkeypatch):
    """A plain tensor's norm, asked for as FSDP's would be."""
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda self: self, raising=False)


def test_a_step_uses_its_rate_clips_the_gradient_and_returns_the_norm_before(full_tensor):
    network, norm = stepped([3.0, 4.0], lr=0.1)
    assert norm == pytest.approx(5.0)
    assert network.weight.tolist() == pytest.approx([0.9, 0.9])  # Adam's first step is lr
    moment = network.optimizer.state[network.weight]["exp_avg"]
    assert moment.tolist() == pytest.approx([0.06, 0.08])  # (1 - beta1) times a norm of 1
    loose, _ = stepped([3.0, 4.0], max_norm=math.inf)  # negative control
    assert loose.optimizer.state[loose.weight]["exp_avg"].tolist() == pytest.approx([0.3, 0.4])


def test_without_a_gradient_adamw_still_steps(full_tensor):
    network, norm = stepped(None, weight_decay=0.5)
    assert network.weight.tolist() == pytest.approx([0.95, 0.95]) and norm == 0
    network, _ = stepped([3.0, 4.0])
    before = network.weight.detach().clone()
    assert network.step(0.1, 1.0) == 0 and (before - network.weight > 0.01).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(full_tensor, bad, capsys):
    network, norm = stepped([bad, 1.0])
    assert network.weight.tolist() == [1.0, 1.0] and not math.isfinite(norm)
    assert network.weight.grad is None and not network.optimizer.state
    assert capsys.readouterr().out == f"the gradient norm of the network is {bad}: update skipped\n"


def test_too_many_skipped_updates_in_a_row_end_the_run(full_tensor, monkeypatch):
    monkeypatch.setattr(model, "MOST_SKIPPED", 2)
    network = TwoWeights()
    for value in (math.nan, math.inf, 1.0, math.nan, math.nan):
        network.weight.grad = torch.tensor([value, 1.0])
        network.step(0.1, 1.0)
    network.weight.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(SystemExit, match=r"^error: 3 updates in a row were skipped"):
        network.step(0.1, 1.0)


# --------------------------------------------------------- compiled, and kept on the host

PACKINGS = [[5, 4], [3, 3, 3], [9], [2, 7], [1, 3, 5], [6, 6, 6], [4], [2, 2, 2, 2], [11, 1]]


def gradient_of(policy, lengths):
    """The gradient, flat, of the sum of the log-probabilities of all tokens but the first ones."""
    ids = torch.arange(sum(lengths)) % 29 + 3
    is_response = torch.cat([torch.arange(n) > 0 for n in lengths])
    policy(ids, is_response, lengths)[0].sum().backward()
    grads = torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()])
    policy.zero_grad()
    return grads


class Visible(list):
    """Lengths into which torch.compile looks."""

    tokens = property(lambda self: self)


def build_in_several_ways(_rank, folder):
    """The same policy, compiled, with --offload and so on; notes graphs, gradients, weights."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    facts, args = {}, flags_of(folder)
    on_host = SimpleNamespace(**vars(args) | {"offload": True})
    for name, its_args, checkpointing, lengths_of in (
        ("plain", args, False, attention.Lengths),
        ("checkpointing", args, True, attention.Lengths),
        ("offload", on_host, False, attention.Lengths),
        ("compiled", args, True, attention.Lengths),
        ("compiled, visible", args, True, Visible),
    ):
        lm, counter = tiny_lm(), CompileCounterWithBackend("aot_eager")
        if name.startswith("compiled"):
            torch._dynamo.reset()
            model.compile_blocks(lm.model.layers, backend=counter)
        policy = model.shard(Policy(lm, 1.0), its_args, torch.device("cpu"), checkpointing)
        gradients, graphs = [], []
        with mock.patch.object(attention, "Lengths", lengths_of):
            for lengths in PACKINGS:
                gradients.append(gradient_of(policy, lengths))
                graphs.append(counter.frame_count)
        policy(*BATCH)[0].sum().backward()
        policy.step(0.1, 1.0)
        facts[name] = {"gradients": torch.stack(gradients), "graphs": graphs}
        facts[name]["weights"] = dict(policy.weights())
        fsdp = policy.lm.model.layers[0]._get_fsdp_state()._fsdp_param_group
        facts[name]["policy"] = type(fsdp.offload_policy).__name__
    torch.save(facts, folder / "facts.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """{way to build a policy: its facts}."""
    folder = tmp_path_factory.mktemp("ways")
    spawn(build_in_several_ways, folder)
    return torch.load(folder / "facts.pt")


def test_the_same_graphs_serve_all_blocks_and_all_lengths(ways):
    graphs = ways["compiled"]["graphs"]
    assert graphs[0] == graphs[-1] > 0 == ways["plain"]["graphs"][-1]
    visible = ways["compiled, visible"]["graphs"]  # negative control
    assert visible[-1] > visible[0]


def test_attention_itself_is_not_compiled():
    assert attention.packed_attention._torchdynamo_disable


@pytest.mark.parametrize("device, compiles", [("cuda", True), ("cpu", False)])
def test_blocks_are_compiled_on_a_gpu_before_they_are_sharded(monkeypatch, device, compiles):
    """Stand-ins for FSDP: there is no GPU here."""
    done = []
    monkeypatch.setattr(model, "compile_blocks", lambda blocks: done.append("compile"))
    monkeypatch.setattr(model, "fully_shard", lambda network, **_: done.append("shard"))
    monkeypatch.setattr(dist.device_mesh, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)

    def shard(compile, can_pack):
        done.clear()
        network = Policy(tiny_lm(), 1.0)
        network.can_pack = can_pack
        args = SimpleNamespace(offload=False, compile=compile, lr=0.1, weight_decay=0.0)
        model.shard(network, args, SimpleNamespace(type=device), False)
        return list(done)

    sharded = ["shard"] * 3  # two blocks, and the rest
    assert shard(compile=True, can_pack=True) == ["compile"] * compiles + sharded
    assert shard(compile=False, can_pack=True) == shard(compile=True, can_pack=False) == sharded


def test_a_compiled_policy_has_the_gradient_of_the_plain_one(ways):
    gradients, plain = ways["compiled"]["gradients"], ways["plain"]["gradients"]
    assert max(map(error, gradients, plain)) < 1e-5
    assert error(gradients[0], plain[1]) > 0.1  # negative control


@pytest.mark.parametrize("way", ["offload", "checkpointing"])
def test_offload_and_checkpointing_change_no_bit(ways, way):
    for name in ("gradients", "weights"):
        found, plain = ways[way][name], ways["plain"][name]
        keys = plain if name == "weights" else range(len(plain))
        assert all(torch.equal(found[key], plain[key]) for key in keys)
    policies = {name: facts["policy"] for name, facts in ways.items()}
    assert policies["offload"] == "CPUOffloadPolicy" != policies["plain"]


# ------------------------------------------- sharded over two ranks, given away, saved and read


def flags_of(directory):
    settings = {"temperature": 0.7, "lr": 0.1, "weight_decay": 0.3, "offload": False}
    return SimpleNamespace(model=directory, **settings)


def build_and_save(rank, folder):
    """In two processes: build policy and critic from checkpoints, save them, note what they are."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cpu, facts = torch.device("cpu"), {}
    for name in ("tied", "untied"):
        config = AutoConfig.from_pretrained(folder / name)
        policy = model.build_policy(flags_of(folder / name), config, cpu, True)
        facts[name] = facts_of(policy) | {"temperature": policy.temperature}
        policy.save(folder / f"{name}-saved", make.tokenizer(), [1, 5] if name == "tied" else [1])
    with torch.no_grad():  # as the old-policy pass of a later mini-batch
        policy(*BATCH)
    facts["norm without gradient"] = policy.step(0.1, 1.0)
    facts["after a step without gradient"] = dict(policy.weights())
    facts["critic"] = facts_of(model.build_critic(flags_of(folder / "tied"), config, cpu, True))
    with torch.no_grad():
        next(policy.parameters()).mul_(math.nan)
    try:
        policy.save(folder / "nan", make.tokenizer(), [1])
    except SystemExit as stop:
        facts["sentence"] = str(stop)
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
    for name, tied in (("tied", True), ("untied", False)):  # in bfloat16, as most on the hub are
        config = tiny_lm().config
        config.tie_word_embeddings = tied
        lm = AutoModelForCausalLM.from_config(config).bfloat16()
        lm.save_pretrained(folder / name)
        # transformers reads this, and refuses to write it: there is no "do_sample".
        (folder / name / "generation_config.json").write_text('{"temperature": 0.6}')
    spawn(build_and_save, folder, processes=2)
    return folder, torch.load(folder / "facts.pt")


def whole(directory, **settings):
    lm = AutoModelForCausalLM.from_pretrained(directory, **settings)
    return lm, dict(lm.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_sampler_is_given_every_weight_whole_and_under_each_name(saved, name):
    given, (_, wanted) = saved[1][name]["weights"], whole(saved[0] / name, dtype=torch.float32)
    assert given.keys() == wanted.keys() and "lm_head.weight" in given
    assert all(torch.equal(given[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_saved_policy_is_a_plain_model_with_the_same_weights(saved, name):
    (old_lm, old), (lm, new) = whole(saved[0] / name), whole(saved[0] / f"{name}-saved")
    assert lm.config.tie_word_embeddings == old_lm.config.tie_word_embeddings == (name == "tied")
    assert old.keys() == new.keys() and all(torch.equal(old[key].float(), new[key]) for key in old)
    assert lm.generation_config.temperature is None
    tokenizer = AutoTokenizer.from_pretrained(saved[0] / f"{name}-saved")
    assert tokenizer.encode("1+2") == make.tokenizer().encode("1+2")


@pytest.mark.parametrize("name, root", [("tied", "FSDPPolicy"), ("critic", "FSDPCritic")])
def test_networks_are_float32_and_sharded_block_by_block(saved, name, root):
    facts = saved[1][name]
    assert facts["dtypes"] == {"torch.float32"}  # though the checkpoint is bfloat16
    assert facts["units"] == [root, "FSDPQwen2DecoderLayer", "FSDPQwen2DecoderLayer"]
    assert facts["shares"] == {True} and facts["checkpointing"]
    assert facts["settings"] == {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.3}
    assert saved[1]["tied"]["temperature"] == 0.7
    parameters = sum(p.numel() for p in whole(saved[0] / "tied")[0].parameters())
    assert saved[1]["tied"]["parameters"] == parameters  # of all shards


def test_a_new_critic_is_the_base_model_and_values_all_states_at_0(saved):
    given, (_, base) = saved[1]["critic"]["weights"], whole(saved[0] / "tied")
    assert not given["score.weight"].any() and not given["score.bias"].any()
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(given[key], base[key].float())


def test_a_step_without_gradient_on_two_ranks_only_decays_the_weights(saved):
    facts = saved[1]
    assert facts["norm without gradient"] == 0
    before, after = facts["untied"]["weights"], facts["after a step without gradient"]
    assert all(torch.allclose(after[key], before[key] * (1 - 0.1 * 0.3)) for key in before)


def test_weights_that_are_not_finite_are_not_saved(saved):
    assert "embed_tokens.weight of the policy is infinite or nan" in saved[1]["sentence"]
    assert not (saved[0] / "nan").exists()


# ------------------------------------------------------------------------- what ends a response


def end_ids(folder):
    args = flags.parse_training_args(["--model", str(folder)])
    return model.end_token_ids(str(folder), *model.load_config_and_tokenizer(args))


def test_every_file_that_names_an_end_is_read(tmp_path):
    """The tokenizer's comes first: it is the one that training teaches."""
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert end_ids(tmp_path) == [1]
    for name, ends in (("config.json", 5), ("generation_config.json", [7, 6])):
        text = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(text | {"eos_token_id": ends}))
    assert end_ids(tmp_path) == [1, 5, 7, 6]


@pytest.mark.parametrize("name, wanted", [("tied", [1, 5]), ("untied", [1])])
def test_a_saved_model_knows_every_end(saved, name, wanted):
    assert end_ids(saved[0] / f"{name}-saved") == wanted


def test_the_end_token_is_trained_and_the_sampler_and_the_saved_model_get_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"prompt": "1", "answer": "1", "demonstration": "\\boxed{1}"}')
    words = ["--model", str(BASE), "--data", str(path), "--max-prompt-tokens", "64"]
    args = flags.parse_training_args([*words, "--max-response-tokens", "64"])
    with mock.patch("rollout.check_vllm"):
        inputs = train_hpt.load_inputs(args, train_hpt.METHODS["hpt"])
    end = inputs.tokenizer.eos_token_id
    assert inputs.problems[0]["demo_ids"] == [*inputs.tokenizer.encode(r"\boxed{1}"), end]
    assert inputs.end_token_ids == [end]
