"""common/model.py on one rank: what a saved model knows, and weights that are not numbers."""

import json
import math

import pytest
import torch
import torch.distributed as dist

import train_hpt
from common import data, flags, metrics, model
from toy import make


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def base(tmp_path):
    """A copy of the toy's base model, which a test may change."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in make.BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_json(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def load(folder):
    """Return (args, config, tokenizer, end-of-response tokens) of a model."""
    args = flags.parse_training_args(["--model", str(folder), "--max-prompt-tokens", "16"])
    config, tokenizer = data.load_config_and_tokenizer(str(folder))
    return args, config, tokenizer, data.end_token_ids(str(folder), config, tokenizer)


def end_ids(folder):
    return load(folder)[3]


# ------------------------------------------------------------------------- what ends a response


def test_the_toy_ends_in_its_end_of_sequence_token_alone(base):
    assert end_ids(base) == [1]


def test_every_file_that_names_an_end_is_read(base):
    change_json(base / "config.json", eos_token_id=5)
    change_json(base / "generation_config.json", eos_token_id=[7, 6])
    assert end_ids(base) == [1, 5, 7, 6]


def test_a_model_without_a_generation_config(base):
    (base / "generation_config.json").unlink()
    change_json(base / "config.json", eos_token_id=[5, 1])
    assert end_ids(base) == [1, 5]


@pytest.mark.parametrize("nothing", [None, -1, [100_000]])
def test_an_end_outside_the_vocabulary_is_none(base, nothing):
    change_json(base / "config.json", eos_token_id=nothing)
    assert end_ids(base) == [1]


@pytest.mark.parametrize("more, saved", [({}, 1), ({"eos_token_id": 5}, [1, 5])])
def test_a_saved_model_knows_every_end(base, tmp_path, one_rank, more, saved):
    """The tokenizer's is the one that training has taught."""
    change_json(base / "config.json", **more)
    change_json(base / "generation_config.json", **more)
    args, config, tokenizer, ids = load(base)
    policy = model.build_policy(args, config, torch.device("cpu"))
    policy.save(tmp_path / "final", tokenizer, ids)
    generation_config = json.loads((tmp_path / "final/generation_config.json").read_text())
    assert generation_config["eos_token_id"] == saved
    assert end_ids(tmp_path / "final") == [1, *more.values()]


class Engine:
    """Stands in for vLLM's engine, and keeps the settings of every request."""

    def __init__(self):
        self.llm_engine = self
        self.settings = []

    def get_tokenizer(self):
        return None

    def apply_model(self, function):
        return [None]

    def add_request(self, name, prompt, settings):
        self.settings.append(settings)

    def has_unfinished_requests(self):
        return False


@pytest.mark.parametrize("ids, wanted", [(None, []), ([1], []), ([1, 5, 7], [5, 7])])
def test_the_sampler_stops_where_the_saved_model_does(ids, wanted, monkeypatch):
    import rollout

    rollout.set_vllm_environment()
    import vllm

    engine = Engine()
    monkeypatch.setattr(vllm, "LLM", lambda *_, **__: engine)
    sampler = rollout.Sampler(
        "m", max_prompt_tokens=9, max_response_tokens=9, temperature=1.0, end_token_ids=ids
    )
    list(sampler.stream([[3]], [0], 1))
    assert engine.settings[0].stop_token_ids == wanted


def test_the_trainer_gives_its_ends_to_the_sampler_and_to_the_saved_model(base, monkeypatch):
    change_json(base / "config.json", eos_token_id=5)
    path = base.parent / "a.jsonl"
    path.write_text(json.dumps({"prompt": "1", "answer": "1", "demonstration": "\\boxed{1}"}))
    args, config, _, ids = load(base)
    args.data, args.max_response_tokens = str(path), 32
    assert train_hpt.load_inputs(args, train_hpt.METHODS["hpt"]).end_token_ids == ids == [1, 5]


# ----------------------------------------------------------------------------- not a number


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers_are_not_trained(base, one_rank, value):
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][-1, -1] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    args, config, _, _ = load(base)
    sentence = r"^error: --model .*base: its weights are not finite .*layers.2.mlp.up_proj.weight"
    with pytest.raises(SystemExit, match=sentence):
        model.build_policy(args, config, torch.device("cpu"))
    with pytest.raises(SystemExit, match=sentence):
        model.build_critic(args, config, torch.device("cpu"))


def test_a_missing_weight_is_never_made_up(base, one_rank):
    """Other names in a file may be translated by transformers: it is asked what was missing."""
    from safetensors.torch import load_file, save_file

    args, config, _, _ = load(base)
    weights = load_file(base / "model.safetensors")
    kept = weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"the weights have no model.layers.2.mlp.up_proj.weight"):
        data.check_weights(str(base), config)
    weights["another.layout"] = kept
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    data.check_weights(str(base), config)
    with pytest.raises(
        SystemExit, match=r"^error: --model .* have no .*2.mlp.up_proj.weight: take"
    ):
        model.build_policy(args, config, torch.device("cpu"))


def set_gradient(policy, value):
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_training_that_never_took_a_step_is_no_success(base, one_rank, tmp_path, capsys):
    args, config, tokenizer, ids = load(base)
    policy = model.build_policy(args, config, torch.device("cpu"))
    inputs = train_hpt.Inputs(tokenizer, config, [], "", [], "", ids)
    set_gradient(policy, math.nan)
    policy.step(1e-3, 1.0)
    assert "update skipped" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="every optimizer step of the policy was skipped"):
        train_hpt.save_checkpoint(tmp_path / "out", args.steps, args, policy, None, inputs)
    assert not (tmp_path / "out").exists()

    set_gradient(policy, 1.0)  # negative control: one step is enough
    policy.step(1e-3, 1.0)
    set_gradient(policy, math.nan)
    policy.step(1e-3, 1.0)
    train_hpt.save_checkpoint(tmp_path / "out", args.steps, args, policy, None, inputs)
    assert (tmp_path / "out/final").exists()


def test_a_divergence_is_never_negative():
    """r - 1 - log r in float32 falls below 0 for tiny log r, by rounding."""
    gap = torch.logspace(-9, -1, 4001)
    gap = torch.cat([gap, -gap])[None]
    naive = gap.exp() - 1 - gap
    assert naive.min() < 0  # negative control
    counts = metrics.Counts()
    for column in gap[0]:
        one = metrics.divergence(column[None])
        assert one >= 0
    counts.add_mismatch(gap, torch.zeros_like(gap))
    assert counts.mismatch_kl == pytest.approx(float((gap.double() ** 2 / 2).sum()), rel=0.05)
    assert math.isnan(metrics.divergence(torch.tensor([math.nan])))
