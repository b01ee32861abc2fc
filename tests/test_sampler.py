"""The samplers of rollout.py: vLLM, and transformers in its place; what a step asks them for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import BASE, ROOT, SMALL, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
import train_hpt
from common import distributed, flags
from upge import METHODS

MAXIMUM = 14  # tokens per response
TEMPERATURE, TOP_P = 1.5, 0.95  # the toy's model is sure of most tokens at temperature 1
SETTINGS = {
    "max_response_tokens": MAXIMUM,
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "end_token_ids": [1],
    "config_overrides": lambda config: config,
}
tokenizer = AutoTokenizer.from_pretrained(BASE)
# The right answer to the first has MAXIMUM tokens, that to the second has more. vLLM's cache holds
# blocks of 128 tokens: all of the third prompt but its last token.
SHORT, LONG = tokenizer.encode("7+2\n"), tokenizer.encode("73+52\n")
CACHED = tokenizer.encode("12+34\n2+4+0=6;1+3+0=4;\\boxed{46}\n" * 6)[-123:]
CACHED += tokenizer.encode("12+34\n")
PROMPTS, SEEDS = [SHORT, LONG, CACHED], [1, 2, 3]


def toy_model(scale=1.0):
    """The toy's base in float32. The scale is that of its tied embeddings, and so of its logits."""
    lm = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        lm.get_input_embeddings().weight.mul_(scale)
    return lm


def named_weights(scale=1.0):
    """(name, weight) pairs, the tied weights under both names."""
    named = toy_model(scale).named_parameters(remove_duplicate=False)
    return [(name, weight.detach()) for name, weight in named]


def use(sampler):
    """What a sampler does, as lists: each response is [ids, logp, truncated, text]."""
    first, moved = named_weights(), named_weights(0.3)
    found = {"together": sampler.generate(PROMPTS, SEEDS, n=16)}
    found["alone"] = sampler.generate([SHORT], [1], n=16)
    found["another seed"] = sampler.generate([SHORT], [4], n=16)
    found["without logp"] = sampler.generate([SHORT], [1], n=16, with_logp=False)
    sampler.sleep()
    sampler.load(moved)
    found["moved"] = sampler.generate([CACHED], [3], n=16)
    sampler.load(first)
    found["loaded again"] = sampler.generate(PROMPTS, SEEDS, n=16)
    sampler.load(pair for pair in moved if pair[0] != "lm_head.weight")
    found["one name"] = sampler.generate([CACHED], [3], n=16)
    sampler.load(first)
    found["none"] = sampler.generate([], [], n=4)
    return json.loads(json.dumps(found))


def use_vllm(out):
    """Write to a file what an engine does, greedy tokens too. It has a process of its own."""
    sampler = rollout.Sampler(str(BASE), max_prompt_tokens=200, **SETTINGS)
    found = use(sampler)
    sampler.temperature, sampler.top_p = 0, 1.0
    found["greedy"] = sampler.generate(PROMPTS, SEEDS, n=1)
    Path(out).write_text(json.dumps(found))
    sampler.close()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """What an engine has done, and under "output" what vLLM has said, warnings too."""
    out = tmp_path_factory.mktemp("engine") / "found.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING"}
    line = [sys.executable, __file__, out]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return json.loads(out.read_text()) | {"output": done.stdout + done.stderr}


def transformers_sampler(**more):
    return rollout.TransformersSampler(str(BASE), **SETTINGS | more)


@pytest.fixture(scope="module")
def transformers():
    """What a TransformersSampler has done."""
    return use(transformers_sampler())


both = pytest.mark.parametrize("kind", ["vllm", "transformers"])

# ------------------------------------------------------------------------------ both samplers


@both
def test_a_response_is_truncated_if_it_has_no_end(kind, request):
    """A response of exactly the maximum that ends by itself is whole; most of SHORT are."""
    short, long, _ = request.getfixturevalue(kind)["together"]
    for ids, logp, truncated, _ in short + long:
        assert 1 not in ids[:-1] and len(logp) == len(ids) <= MAXIMUM
        assert truncated == (ids[-1] != 1) and (len(ids) == MAXIMUM or not truncated)
    assert [len(ids) == MAXIMUM and not truncated for ids, _, truncated, _ in short].count(True) > 4
    assert all(truncated for _, _, truncated, _ in long)


@both
def test_a_text_is_the_decoded_response_without_its_end(kind, request):
    texts = [text for _, _, _, text in request.getfixturevalue(kind)["together"][0]]
    assert "7+2+0=9;\\boxed{9}" in texts


@both
def test_samples_depend_on_their_seed_alone(kind, request):
    """Not on the other prompts of the call, nor on what was sampled before."""
    found = request.getfixturevalue(kind)
    assert [r[0] for r in found["alone"][0]] == [r[0] for r in found["together"][0]]
    assert [r[0] for r in found["without logp"][0]] == [r[0] for r in found["together"][0]]
    assert [r[0] for r in found["another seed"][0]] != [r[0] for r in found["together"][0]]
    assert len({tuple(ids) for ids, *_ in found["together"][1]}) > 4  # those of a prompt differ
    assert found["none"] == []


def sampled_logp(lm, prompt, response, temperature, top_p):
    """Log-probabilities (n,) of a response under temperature and top-p, by the definition."""
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # (n, V)
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    before = p.cumsum(-1) - p  # probability of the likelier tokens
    p = torch.where(before < top_p, p, 0.0)
    p = torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))
    return p[torch.arange(len(response)), response].log()


def largest_gap(lm, groups, prompts, temperature=TEMPERATURE, top_p=TOP_P):
    """How far log-probabilities are from those of the definition, at most."""
    gaps = [
        (torch.tensor(logp) - sampled_logp(lm, prompt, ids, temperature, top_p)).abs().max()
        for prompt, group in zip(prompts, groups)
        for ids, logp, _, _ in group[:4]
    ]
    return max(gaps).item()


@both
def test_log_probabilities_are_those_after_temperature_and_top_p(kind, request):
    groups, lm = request.getfixturevalue(kind)["together"], toy_model()
    assert largest_gap(lm, groups, PROMPTS) < 1e-4
    assert largest_gap(lm, groups, PROMPTS, temperature=1.0) > 1e-2  # negative controls
    assert largest_gap(lm, groups, PROMPTS, top_p=1.0) > 1e-2


@both
def test_new_weights_are_sampled_from_although_the_prompt_was_cached(kind, request):
    """Of them the tied embeddings are new: so the output layer must be, too."""
    found, prompts = request.getfixturevalue(kind), [CACHED]
    assert len(CACHED) == 129
    assert largest_gap(toy_model(0.3), found["moved"], prompts) < 1e-4
    assert largest_gap(toy_model(), found["moved"], prompts) > 1e-2  # negative control
    assert found["loaded again"] == found["together"]


def test_vllm_needs_tied_weights_under_both_names(vllm):
    """Else it goes on with the old output layer: this is why Network.weights gives both."""
    assert largest_gap(toy_model(0.3), vllm["one name"], [CACHED]) > 1e-2


def test_a_load_leaves_no_weight_out(vllm):
    """vLLM warns of a layer without new weights: of the output layer in that load alone."""
    assert "not loaded" not in vllm["output"]
    failed = re.findall(r"(\w+): Failed to load weights", vllm["output"])
    loads = failed.count("RotaryEmbedding")  # it has no weights, and is named in every load
    assert loads == 4 and [name for name in failed if name != "RotaryEmbedding"] == [
        "ParallelLMHead"
    ]


def test_greedy_tokens_are_those_of_vllm(vllm):
    groups = transformers_sampler(temperature=0, top_p=1.0).generate(PROMPTS, SEEDS, n=1)
    assert [group[0].ids for group in groups] == [group[0][0] for group in vllm["greedy"]]


def test_transformers_is_given_a_part_of_the_prompts_at_a_time(transformers, monkeypatch):
    monkeypatch.setattr(rollout.TransformersSampler, "at_a_time", 32)  # two prompts
    groups = transformers_sampler().generate(PROMPTS, SEEDS, n=16)
    wanted = [[response[0] for response in group] for group in transformers["together"]]
    assert [[response.ids for response in group] for group in groups] == wanted


BLOCKED = "import runpy, sys; sys.modules['vllm'] = None; del sys.argv[0]; "
BLOCKED += "runpy.run_path('train_hpt.py', run_name='__main__')"


def test_the_toy_trains_where_vllm_cannot_be_imported(easy, tmp_path):
    flags = ["--sampler", "transformers", *SMALL, "--steps", 2, "--eval-data", easy[1]]
    flags += ["--max-response-tokens", 64]
    line = [sys.executable, "-c", BLOCKED, "train_hpt.py", *flags, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, line)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stderr == ""  # no progress bars of transformers
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["mismatch/logp_max"] < 1e-4 for row in rows[1:])


# -------------------------------------------------------------------------- what a step asks for


class SeedKeeper:
    """In the place of a sampler: its responses are the seeds that it was given."""

    tensor_parallel = 1

    def generate(self, prompts, seeds, n, with_logp=True):
        return [[(tuple(ids), seed)] * n for ids, seed in zip(prompts, seeds, strict=True)]


def seeds_of(step, seed=0, count=4, method="hpt"):
    """The seeds with which a step samples its problems."""
    args = flags.parse_training_args(["--seed", str(seed), "--samples-per-prompt", "8"])
    problems = [{"prompt_ids": [i]} for i in range(count)]
    groups = train_hpt.sample_rollouts(SeedKeeper(), problems, step, METHODS[method], args)
    assert [group[0][0] for group in groups] == [(i,) for i in range(count)]  # each its own prompt
    return [group[0][1] for group in groups]


def test_no_two_samples_of_a_run_have_the_same_seed():
    """Not in one step, not in the next steps, and not in a run with another seed."""
    seeds = [*seeds_of(1), *seeds_of(2), *seeds_of(3), *seeds_of(1, seed=1)]
    assert len(set(seeds)) == 16 and seeds[:4] == seeds_of(1)


@pytest.mark.parametrize("ranks, per_engine", [(2, 1), (4, 1), (4, 2)])
def test_seeds_and_their_order_do_not_depend_on_the_ranks(monkeypatch, ranks, per_engine):
    """Each rank's share of the work, put together as share_work does it."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    items, shares = list(range(5)), []
    for rank in range(ranks):  # what each rank is given to do
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distributed.share_work(items, lambda part: shares.append(part) or part, per_engine)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda x, _: x.__init__(shares))
    assert sorted(sum(shares[::per_engine], [])) == items
    assert distributed.share_work(items, lambda part: part, per_engine) == items


@pytest.mark.parametrize("method, n", [("hpt", 8), ("grpo", 8), ("luffy", 7), ("sft", 0)])
def test_rollouts_per_prompt(method, n):
    """In LUFFY's group of 8 the demonstration is one; SFT samples nothing."""
    args = flags.parse_training_args(["--samples-per-prompt", "8"])
    problems = [{"prompt_ids": [0]}] * 2
    groups = train_hpt.sample_rollouts(SeedKeeper(), problems, 1, METHODS[method], args)
    assert [len(group) for group in groups] == [n, n]


# --------------------------------------------------------------------- what an engine is given


@pytest.fixture
def settings(monkeypatch):
    """settings(gpu): what rollout.Sampler gives to a stand-in of vLLM's engine, and its calls."""

    def build(gpu):
        given = {"calls": []}
        engine = SimpleNamespace(
            get_tokenizer=lambda: None,
            sleep=lambda level: given["calls"].append(f"sleep {level}"),
            wake_up=lambda tags: given["calls"].extend(tags),
            collective_rpc=lambda name, kwargs: given["calls"].append(name),
            reset_prefix_cache=lambda: given["calls"].append("reset"),
            apply_model=lambda function: [True],
        )

        def new_engine(model, **more):
            torch.backends.cuda.enable_cudnn_sdp(False)  # as vLLM for GPUs does
            given.update(more)
            return engine

        module = SimpleNamespace(LLM=new_engine)
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(rollout, "set_vllm_environment", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        sampler = rollout.Sampler("m", max_prompt_tokens=20_000, **SETTINGS)
        sampler.sleep()
        sampler.load([])
        return given

    return build


def test_an_engine_on_a_gpu_sleeps_and_wakes_in_two_halves(settings):
    """The cache is the larger half: it would not fit beside weights that are being gathered."""
    given = settings(gpu=True)
    assert given["calls"] == ["sleep 2", "weights", "reload_weights", "kv_cache", "reset"]
    assert given["dtype"] == "bfloat16" and given["max_model_len"] == 20_000 + MAXIMUM
    assert given["hf_overrides"](SimpleNamespace()).head_dtype == "float32"
    assert given["max_num_batched_tokens"] == 20_000 + MAXIMUM  # as the plan counts them


def test_an_engine_leaves_cudnns_attention_as_it_was(settings):
    for wanted in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(wanted)
        settings(gpu=True)
        assert torch.backends.cuda.cudnn_sdp_enabled() == wanted


def test_an_engine_on_a_cpu_reads_a_long_prompt_whole(settings):
    given = settings(gpu=False)
    assert given["calls"] == ["reload_weights", "reset"] and given["dtype"] == "float32"
    assert given["max_num_batched_tokens"] >= given["max_model_len"]
    assert given["enable_chunked_prefill"] is False


def test_an_engine_runs_no_code_and_reads_no_pickle(settings):
    given = settings(gpu=False)
    assert given["load_format"] == "safetensors" and given["trust_remote_code"] is False
    assert given["generation_config"] == "vllm"  # not the model's own temperature, top-k and so on


if __name__ == "__main__":
    use_vllm(sys.argv[1])
