"""The sampler (rollout.py): what it asks of a stand-in engine, and what a real engine does."""

import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import rollout
import train_hpt
from common import data, distributed, flags
from rollout import Sampler
from toy import make

REPOSITORY = Path(__file__).resolve().parents[1]

# -------------------------------------------------------------------------------- a stand-in engine


class StandInEngine:
    """Answers each request with as many tokens 7 as its prompt's first token says.

    The requests are done one per step, the last one first. `calls` says what was called, in order.
    """

    has_head = True
    has_nan = False

    def __init__(self, model, **settings):
        self.model, self.settings, self.calls = model, settings, []
        self.requests, self.waiting = {}, []
        self.llm_engine = self  # vLLM has two objects
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))

    def add_request(self, request_id, prompt, sampling):
        self.requests[request_id] = (prompt["prompt_token_ids"], sampling)
        self.waiting.append(request_id)

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        request_id = self.waiting.pop()
        prompt, sampling = self.requests[request_id]
        logp = None if sampling.logprobs is None else -0.5
        outputs = [completion(prompt[0], sampling.max_tokens, logp) for _ in range(sampling.n)]
        busy = [SimpleNamespace(request_id=other, finished=False) for other in self.waiting]
        return [*busy, SimpleNamespace(request_id=request_id, finished=True, outputs=outputs)]

    def apply_model(self, function):
        model = torch.nn.Linear(2, 2)
        if self.has_nan:
            model.weight.data[1, 1] = torch.nan
        if self.has_head:
            model.lm_head = 0
        return [function(model)]

    def get_tokenizer(self):
        return StandInTokenizer()

    def wake_up(self, tags):
        self.calls += [f"wake {tag}" for tag in tags]

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.loaded = [name for name, _ in kwargs["weights_iterator"]]
        self.calls.append("reload")

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")


class StandInTokenizer:
    """Every token is a digit; 7 is special."""

    def batch_decode(self, batch, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return ["".join(str(token) for token in ids if token != 7) for ids in batch]

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)


def completion(wanted, maximum, logp=-0.5):
    """A completion of `wanted` tokens, which is cut at the maximum."""
    ids = [8] * min(max(0, wanted - 1), maximum) + [7] * (0 < wanted <= maximum)
    logprobs = None if logp is None else SimpleNamespace(logprobs=[logp] * len(ids))
    reason = "stop" if wanted <= maximum else "length"
    return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)


@pytest.fixture
def engine(monkeypatch):
    """The module vllm with StandInEngine in the place of its engine; a class of this test alone."""
    vllm, sampling_params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.LLM = type("Engine", (StandInEngine,), {})
    vllm.SamplingParams = SimpleNamespace
    sampling_params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final only")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling_params)
    monkeypatch.setattr(rollout, "set_vllm_environment", lambda: None)
    return vllm.LLM


def a_sampler(**more):
    """A sampler with settings of which no two are equal."""
    settings = {"max_prompt_tokens": 30, "max_response_tokens": 12, "temperature": 0.7}
    return Sampler("some/model", **(settings | {"top_p": 0.9, "seed": 5} | more))


@pytest.fixture
def on_a_gpu(engine, monkeypatch):
    """A sampler that believes that it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return a_sampler()


# -------------------------------------------------------------------------- what a request asks for


@pytest.mark.parametrize(
    "setting, value",
    [("temperature", 0.7), ("top_p", 0.9), ("max_tokens", 12), ("n", 3), ("logprobs", 0)],
)
def test_a_request_has_the_settings_of_the_sampler(engine, setting, value):
    sampler = a_sampler()
    sampler.generate([[4]], [11], n=3)
    ((_, sampling),) = sampler.llm.requests.values()
    assert getattr(sampling, setting) == value


def test_every_prompt_has_its_own_seed(engine):
    sampler = a_sampler()
    sampler.generate([[4], [5], [6]], [11, 22, 33], n=2)
    assert [(ids, s.seed) for ids, s in sampler.llm.requests.values()] == [
        ([4], 11),
        ([5], 22),
        ([6], 33),
    ]


def test_a_seed_is_needed_for_every_prompt(engine):
    with pytest.raises(ValueError):
        a_sampler().generate([[4], [5]], [11], n=1)


def test_responses_come_in_the_order_of_the_prompts(engine):
    """The stand-in finishes the last prompt first."""
    groups = a_sampler().generate([[3], [4], [5]], [11, 22, 33], n=2)
    assert [[len(r.ids) for r in group] for group in groups] == [[3, 3], [4, 4], [5, 5]]


def test_a_stream_names_each_prompt_as_it_is_done(engine):
    stream = a_sampler().stream([[3], [4], [5]], [11, 22, 33], n=1)
    assert [(i, len(group[0].ids)) for i, group in stream] == [(2, 5), (1, 4), (0, 3)]


def test_without_prompts_there_are_no_responses(engine):
    """A rank whose share is empty."""
    assert a_sampler().generate([], [], n=4) == []


@pytest.mark.parametrize(
    "wanted, tokens, truncated", [(11, 11, False), (12, 12, False), (13, 12, True)]
)
def test_a_response_is_truncated_if_it_does_not_fit(engine, wanted, tokens, truncated):
    ((response,),) = a_sampler().generate([[wanted]], [11], n=1)
    assert (len(response.ids), response.truncated) == (tokens, truncated)


def test_a_response_has_its_tokens_their_log_probabilities_and_its_text(engine):
    ((response,),) = a_sampler().generate([[3]], [11], n=1)
    assert response == rollout.Rollout([8, 8, 7], [-0.5] * 3, False, "88")


def test_an_evaluation_asks_for_no_log_probabilities(engine):
    sampler = a_sampler()
    [(_, [response])] = sampler.stream([[3]], [11], n=1)
    ((_, sampling),) = sampler.llm.requests.values()
    assert sampling.logprobs is None and response.logp is None


def test_the_engine_decodes_no_text(engine):
    sampler = a_sampler()
    sampler.generate([[3]], [11], n=1)
    ((_, sampling),) = sampler.llm.requests.values()
    assert not sampling.detokenize and sampling.flat_logprobs


def failing(*_):
    raise ValueError("planted")


def test_a_failure_of_vllm_names_the_request(engine, monkeypatch):
    prompts, seeds = [[3], [4], [5]], [11, 22, 33]
    stream = a_sampler().stream(prompts, seeds, n=1)
    next(stream)  # request 2 is done
    monkeypatch.setattr(StandInEngine, "step", failing)
    wanted = "request 0 of 3, a prompt of 1 tokens that begins with '<3>' or at one of the 1 others"
    with pytest.raises(RuntimeError, match=f"{wanted} that it works on: planted"):
        next(stream)
    monkeypatch.setattr(StandInEngine, "add_request", failing)
    with pytest.raises(RuntimeError, match=r"request 0 of 3, a prompt .* with '<3>': planted"):
        next(a_sampler().stream(prompts, seeds, n=1))


def test_a_response_without_a_token_names_its_request(engine):
    with pytest.raises(RuntimeError, match=r"request 1 of 2, .* '<0>': a response without a token"):
        a_sampler().generate([[4], [0]], [1, 2], n=1)


def test_probabilities_that_are_not_numbers_end_in_a_sentence():
    with pytest.raises(SystemExit, match=r"^error: the model's probabilities are not numbers"):
        rollout.to_rollout(completion(3, 12, logp=math.nan), "88")


def test_an_engine_with_weights_that_are_not_numbers_is_refused(engine):
    engine.has_nan = True
    with pytest.raises(SystemExit, match=r"^error: --model some/model: its weights .* in weight"):
        a_sampler()


# -------------------------------------------------------------------------- what an engine is given


@pytest.mark.parametrize(
    "setting, value",
    [
        ("max_model_len", 42),  # prompt and response
        ("seed", 5),
        ("generation_config", "vllm"),  # not the model's own temperature, top-k and so on
        ("logprobs_mode", "processed_logprobs"),
        ("tensor_parallel_size", 1),
        ("distributed_executor_backend", None),
        ("load_format", "safetensors"),  # pickled weights can run code when they are read
        ("trust_remote_code", False),
    ],
)
def test_an_engine_has_the_settings_of_the_sampler(engine, setting, value):
    assert a_sampler().llm.settings[setting] == value


def test_the_overrides_of_the_config_reach_the_engine(engine):
    def override(config):
        config.rope_theta = 5
        return config

    overrides = a_sampler(config_overrides=override).llm.settings["hf_overrides"]
    assert vars(overrides(SimpleNamespace())) == {"rope_theta": 5}


def test_on_a_gpu_logits_are_float32(on_a_gpu):
    config = on_a_gpu.llm.settings["hf_overrides"](SimpleNamespace())
    assert config.head_dtype == "float32"


def test_on_a_cpu_it_computes_in_float32_and_never_sleeps(engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sampler = a_sampler()
    sampler.sleep()
    sampler.load([])
    assert sampler.llm.settings["dtype"] == "float32"
    assert sampler.llm.calls == ["reload", "reset"]


def test_on_a_cpu_a_long_prompt_is_read_whole(engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = a_sampler(max_prompt_tokens=20_000).llm.settings
    assert settings["max_num_batched_tokens"] >= settings["max_model_len"] == 20_012
    assert settings["enable_chunked_prefill"] is False


def test_on_a_gpu_it_computes_in_bfloat16_and_can_sleep(on_a_gpu):
    on_a_gpu.sleep()
    settings = on_a_gpu.llm.settings
    assert (settings["dtype"], settings["enable_sleep_mode"]) == ("bfloat16", True)
    assert on_a_gpu.llm.calls == ["sleep 2"]  # level 2 copies no weights to the host


def test_the_share_of_the_gpu_is_the_one_that_was_set(engine):
    settings = a_sampler(gpu_memory_utilization=0.35).llm.settings
    assert settings["gpu_memory_utilization"] == 0.35


def test_ranks_that_share_an_engine_must_divide_the_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(SystemExit, match=r"--tensor-parallel 3 must divide the number of ranks, 4"):
        a_sampler(tensor_parallel=3)


def test_under_torchrun_the_engine_joins_the_process_group(engine, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    sampler = a_sampler(tensor_parallel=2)
    assert sampler.tensor_parallel == 2
    assert sampler.llm.settings["tensor_parallel_size"] == 2
    assert sampler.llm.settings["distributed_executor_backend"] == "external_launcher"


def test_what_the_user_has_set_for_vllm_is_kept(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "disable", torch._dynamo.config.disable)
    monkeypatch.setattr(os, "environ", {"VLLM_CPU_KVCACHE_SPACE": "8"})
    rollout.set_vllm_environment()
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "8"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"  # not set by the user


def test_a_build_of_the_right_version_has_a_local_name(monkeypatch):
    """vLLM's own wheels are called 0.32.0+cu130 and the like."""
    monkeypatch.setattr(rollout.metadata, "version", lambda name: f"{rollout.VLLM_VERSION}+cu130")
    rollout.check_vllm()


# -------------------------------------------------------------------------------------- new weights

WEIGHTS = [("model.embed_tokens.weight", 0), ("lm_head.weight", 1), ("model.norm.weight", 2)]


def test_new_weights_come_between_the_two_halves_of_waking_up(on_a_gpu):
    """The cache is the larger half; it would not fit beside weights that are being gathered."""
    on_a_gpu.load(WEIGHTS)
    assert on_a_gpu.llm.calls == ["wake weights", "reload", "wake kv_cache", "reset"]


def test_tied_weights_are_loaded_under_both_names(engine):
    sampler = a_sampler()
    sampler.load(iter(WEIGHTS))
    assert sampler.llm.loaded == [name for name, _ in WEIGHTS]


def test_a_model_without_an_output_layer_is_not_given_one(engine):
    engine.has_head = False
    sampler = a_sampler()
    sampler.load(iter(WEIGHTS))
    assert sampler.llm.loaded == ["model.embed_tokens.weight", "model.norm.weight"]


def test_weights_are_gathered_one_by_one(engine):
    """All of them at once would not fit on a GPU."""
    sampler, alive = a_sampler(), []

    def gathered():
        for name, _ in WEIGHTS:
            alive.append(name)
            yield name, 0
            alive.remove(name)

    def collective_rpc(_, kwargs):
        for name, _ in kwargs["weights_iterator"]:
            assert alive == [name]

    sampler.llm.collective_rpc = collective_rpc
    sampler.load(gathered())


def test_closing_ends_the_engine_before_the_process_group(engine, monkeypatch):
    sampler = a_sampler()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def end_group():
        sampler.llm.calls.append("end of the group")

    monkeypatch.setattr(torch.distributed, "destroy_process_group", end_group)
    sampler.close()
    assert sampler.llm.calls == ["shutdown", "end of the group"]


# ------------------------------------------------------------------------------- work of many ranks


class Ranks:
    """Threads that stand in for ranks: each has a rank, and all meet in all_gather_object."""

    def __init__(self, monkeypatch, world_size):
        self.world_size, self.own = world_size, threading.local()
        self.meeting = threading.Barrier(world_size, timeout=20)
        self.given = [None] * world_size
        monkeypatch.setattr(distributed, "rank", lambda: self.own.rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self.all_gather_object)

    def all_gather_object(self, everyone, mine):
        self.given[self.own.rank] = mine
        self.meeting.wait()
        everyone[:] = self.given
        self.meeting.wait()

    def run(self, function):
        """What `function` returns on each rank."""

        def on_rank(rank):
            self.own.rank = rank
            return function()

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(on_rank, range(self.world_size)))


@pytest.mark.parametrize("ranks, ranks_per_engine", [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_every_rank_gets_all_results_in_order(monkeypatch, ranks, ranks_per_engine, count):
    items = list(range(count))

    def squares():
        return distributed.share_work(items, lambda part: [x**2 for x in part], ranks_per_engine)

    assert Ranks(monkeypatch, ranks).run(squares) == [[x**2 for x in items]] * ranks


def test_each_item_is_done_once_and_evenly(monkeypatch):
    done = each_ranks_share(Ranks(monkeypatch, 4), list(range(10)), 1)
    assert sorted(sum(done, [])) == list(range(10))
    assert sorted(map(len, done)) == [2, 2, 3, 3]


def test_ranks_that_share_an_engine_do_the_same_share(monkeypatch):
    """Four ranks in groups of two."""
    done = each_ranks_share(Ranks(monkeypatch, 4), list(range(10)), 2)
    assert done[0] == done[1] and done[2] == done[3]
    assert sorted(done[0] + done[2]) == list(range(10))


def each_ranks_share(ranks, items, ranks_per_engine):
    """What each rank was given to do."""

    def share():
        given = []

        def work(part):
            given.extend(part)
            return part

        distributed.share_work(items, work, ranks_per_engine)
        return given

    return ranks.run(share)


def test_totals_are_sums_and_the_largest_of_maxima(monkeypatch):
    ranks = Ranks(monkeypatch, 3)

    def total():
        counts = {"tokens": 10.0 + ranks.own.rank, "gap": 5.0 - ranks.own.rank}
        return distributed.total_over_ranks(counts, ("gap",))

    assert ranks.run(total) == [{"tokens": 33.0, "gap": 5.0}] * 3


# ------------------------------------------------------------------ what the training loop asks for


class SeedKeeper:
    """In the place of a sampler: its responses are the seeds that it was given."""

    tensor_parallel = 1

    def generate(self, prompts, seeds, n, label=None):
        return [[(tuple(ids), seed)] * n for ids, seed in zip(prompts, seeds, strict=True)]


def seeds_of(step, seed=0, count=4):
    """The seeds with which a step samples its problems."""
    args = flags.parse_training_args(["--seed", str(seed)])
    problems = [{"prompt_ids": [i]} for i in range(count)]
    groups = train_hpt.sample_rollouts(SeedKeeper(), problems, step, args)
    assert [group[0][0] for group in groups] == [(i,) for i in range(count)]  # each its own prompt
    return [group[0][1] for group in groups]


def test_no_two_samples_of_a_run_have_the_same_seed():
    """Not in one step, not in the next steps, and not in a run with another seed."""
    seeds = [*seeds_of(1), *seeds_of(2), *seeds_of(3), *seeds_of(1, seed=1)]
    assert len(set(seeds)) == 16


def test_a_step_samples_with_the_same_seeds_again():
    assert seeds_of(2) == seeds_of(2)


def test_seeds_do_not_depend_on_the_ranks(monkeypatch):
    alone = seeds_of(1, count=5)
    assert Ranks(monkeypatch, 2).run(lambda: seeds_of(1, count=5)) == [alone, alone]


@pytest.mark.parametrize("method, n", [("hpt", 8), ("grpo", 8), ("luffy", 7), ("sft", 0)])
def test_rollouts_per_prompt(method, n):
    """In LUFFY's group of 8 the demonstration is one; SFT samples nothing."""
    args = flags.parse_training_args(["--method", method, "--samples-per-prompt", "8"])
    groups = train_hpt.sample_rollouts(SeedKeeper(), [{"prompt_ids": [0]}] * 2, 1, args)
    assert [len(group) for group in groups] == [n, n]


# ------------------------------------------------------------------------------------ a real engine

SHORT, LONG = "7+2", "73+52"  # right answers of 14 tokens, the maximum below, and of more
MAXIMUM = 14
TEMPERATURE, TOP_P = 1.5, 0.95  # the toy's model is sure of most tokens at temperature 1


def use_a_real_engine(out):
    """Write to a file what a real engine does. It runs in a process of its own."""
    from transformers import AutoModelForCausalLM

    _, tokenizer = data.load_config_and_tokenizer(str(make.BASE))
    sampler = Sampler(
        str(make.BASE),
        max_prompt_tokens=200,
        max_response_tokens=MAXIMUM,
        temperature=TEMPERATURE,
        top_p=TOP_P,
    )
    short, long = (tokenizer.encode(f"{text}\n") for text in (SHORT, LONG))
    # The cache holds blocks of 128 tokens: the whole prompt but for its last token.
    earlier_sums = tokenizer.encode("12+34\n2+4+0=6;1+3+0=4;\\boxed{46}\n" * 6)
    cached = earlier_sums[-123:] + tokenizer.encode("12+34\n")
    model = AutoModelForCausalLM.from_pretrained(make.BASE, dtype=torch.float32)
    weights = list(model.named_parameters(remove_duplicate=False))
    moved = [(name, weight.detach() * 0.9) for name, weight in weights]

    groups = {"together": sampler.generate([short, long, cached], [1, 2, 3], n=32)}
    groups["short alone"] = sampler.generate([short], [1], n=32)[0]
    groups["another seed"] = sampler.generate([short], [4], n=32)[0]
    sampler.load(moved)
    groups["moved"] = sampler.generate([cached], [3], n=32)[0]
    sampler.load(weights)
    groups["loaded again"] = sampler.generate([short, long, cached], [1, 2, 3], n=32)
    sampler.load((name, weight * math.nan) for name, weight in weights)
    try:
        sampler.generate([short], [1], n=1)
        sentence = None
    except SystemExit as stop:
        sentence = str(stop)
    found = groups | {
        "prompts": [short, long, cached],
        "nan": sentence,
        "eos": tokenizer.eos_token_id,
    }
    Path(out).write_text(json.dumps(found))
    sampler.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What a real engine did; a rollout is a list of ids, logp, truncated, text."""
    out = tmp_path_factory.mktemp("engine") / "found.json"
    command = [sys.executable, "-m", "tests.test_sampler", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return json.loads(out.read_text())


def test_a_real_response_is_truncated_if_it_has_no_end(real):
    """A response of exactly the maximum that ends by itself is whole; most of SHORT are."""
    short, long, _ = real["together"]
    for ids, _, truncated, _ in short + long:
        assert truncated == (ids[-1] != real["eos"])
        assert len(ids) == MAXIMUM if truncated else len(ids) <= MAXIMUM
    assert [len(ids) == MAXIMUM and not truncated for ids, _, truncated, _ in short].count(True) > 9
    assert all(truncated for _, _, truncated, _ in long)


def test_a_real_text_is_the_decoded_response_without_its_end(real):
    texts = [text for _, _, _, text in real["together"][0]]
    assert "7+2+0=9;\\boxed{9}" in texts


def test_real_samples_depend_on_their_seed_alone(real):
    """Not on the other prompts of the call; another seed gives others."""
    assert real["short alone"] == real["together"][0]
    assert real["another seed"] != real["together"][0]


def test_the_responses_of_a_prompt_differ(real):
    assert len({tuple(ids) for ids, _, _, _ in real["together"][1]}) > 8


def test_real_log_probabilities_are_those_after_temperature_and_top_p(real):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make.BASE, dtype=torch.float32)
    for prompt, group in zip(real["prompts"], real["together"]):
        for ids, logp, _, _ in group[:8]:
            expected = sampled_logp(model, prompt, ids)
            assert torch.tensor(logp) == pytest.approx(expected, abs=1e-4)


def sampled_logp(model, prompt, response):
    """Log-probabilities (n,) of a response under temperature and top-p, by the definition."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # (n, V)
    p, order = (logits / TEMPERATURE).softmax(-1).sort(descending=True)
    before = p.cumsum(-1) - p  # probability of the likelier tokens
    p = torch.where(before < TOP_P, p, 0.0)
    p = torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))
    return p[torch.arange(len(response)), response].log()


def test_new_weights_are_sampled_from_although_the_prompt_was_cached(real):
    from transformers import AutoModelForCausalLM

    assert len(real["prompts"][2]) == 129
    model = AutoModelForCausalLM.from_pretrained(make.BASE, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    for ids, logp, _, _ in real["moved"][:8]:
        expected = sampled_logp(model, real["prompts"][2], ids)
        assert torch.tensor(logp) == pytest.approx(expected, abs=1e-4)


def test_the_first_weights_loaded_again_give_the_first_samples(real):
    assert real["loaded again"] == real["together"]


def test_weights_that_are_not_numbers_end_in_a_sentence(real):
    assert real["nan"].startswith("error: the model's probabilities are not numbers")


if __name__ == "__main__":
    use_a_real_engine(sys.argv[1])
