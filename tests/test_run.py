"""The real program with real vLLM, on the toy and on tiny models of other families."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from terminals import run_on_terminal, screen, transient
from test_machines import run_on_two_machines, two_machines

from common import distributed
from toy import make

ROOT = Path(__file__).parents[1]
BASE = ROOT / "toy/base"
SMALL = ["--prompts-per-step", 8, "--samples-per-prompt", 4, "--eval-samples", 1]
PHASES = ["imports", "model and data", "verifier", "sampler (vLLM)", "policy under FSDP"]


def run(program, *flags, ranks=None, fails=False, folder=ROOT, errors=None):
    """Run a program as a user would, under torchrun if `ranks` says so; return what it prints.

    errors: a file that gets what it prints to standard error.
    """
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    line = [*launcher, ROOT / program, *flags]
    line = list(map(str, line))
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
    if errors:
        errors.write_text(done.stderr)
    return done.stderr if fails else done.stdout


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder):
    """metrics.jsonl without what the clock says."""
    rows = read(folder / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "perf/")) or "padding" in k}
        for r in rows
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """40 held-out sums of one and two digits, which the base often gets right."""
    rows = read(ROOT / "toy/held_out.jsonl")
    folder = tmp_path_factory.mktemp("easy")
    return write_rows(folder / "easy.jsonl", [r for r in rows if r["level"] <= 2][12:52])


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, easy):
    """Three steps of HPT on the toy; (flags, directory, what was printed)."""
    out = tmp_path_factory.mktemp("toy") / "run"
    flags = [*SMALL, "--steps", 3, "--save-every", 2, "--eval-every", 2, "--eval-data", easy]
    errors = out.with_name("errors.txt")
    return flags, out, run("train_hpt.py", *flags, "--out", out, ranks=1, errors=errors)


# ------------------------------------------------------------------- what a run must show


def test_the_held_out_problems_are_evaluated_when_they_are_due(toy_run):
    _, out, _ = toy_run
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval/pass@1" in row] == [0, 2, 3]
    held_out = read(out / "held_out.jsonl")
    assert [row["step"] for row in held_out] == [0] * 40 + [2] * 40 + [3] * 40


def test_the_learning_rate_warms_up_as_the_toy_says(toy_run):
    _, out, _ = toy_run
    rates = [row["optim/lr"] for row in metrics(out)[1:]]
    assert rates == pytest.approx([2.5e-4 * share for share in (0.4, 0.8, 1.0)])


def test_every_step_trains_and_samples_with_the_trainers_weights(toy_run):
    _, out, _ = toy_run
    for row in metrics(out)[1:]:
        assert row["optim/skipped"] == 0 and row["optim/grad_norm"] > 0
        assert row["mismatch/logp_max"] < 1e-4 and row["data/rollouts"] == 32


def test_the_steps_have_different_problems_and_the_gate_follows_the_rewards(toy_run):
    _, out, _ = toy_run
    samples = read(out / "samples.jsonl")
    assert len({s["prompt"] for s in samples}) == len(samples) == 9
    for sample in samples:
        assert (sample["trained_on"] == "demonstration") == (sample["P"] == 0)


def test_a_run_prints_its_plan_its_steps_and_its_table(toy_run):
    _, out, printed = toy_run
    assert "the first problem, as the model sees it" in printed
    words = [line.split() or [""] for line in printed.splitlines()]
    numbers = [line[0] for line in words if line[0].endswith("/3")]
    assert numbers == ["0/3", "1/3", "2/3", "3/3"]
    assert [line[-1] for line in words].count("left") == 1  # one header
    phases = [" ".join(line[:-2]) for line in words if line[-1] == "s"]
    assert [phase for phase in phases if phase != "process group"] == PHASES  # it takes no time
    assert "From the first step to the last, the mean reward went from" in printed
    table = printed.split("held-out accuracy")[1].split("\n\n")[0].splitlines()
    assert len(table) == 1 + 1 + 2 + 1  # title, head, two levels, all
    assert f"--model {out / 'final'}" in printed


def test_a_file_gets_lines_of_text_and_nothing_of_other_libraries(toy_run):
    """Nothing at all goes to standard error."""
    _, out, printed = toy_run
    assert distributed.printable(printed) == printed
    assert out.with_name("errors.txt").read_text() == ""


def test_a_run_writes_what_it_was_asked(toy_run):
    _, out, _ = toy_run
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["steps"] == 3 and config["ranks"] == 1
    assert config["versions"]["vllm"] and config["versions"]["torch"]
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def weights(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def test_checkpoints_are_plain_models_that_training_has_moved(toy_run):
    from transformers import AutoTokenizer

    _, out, _ = toy_run
    saved = sorted(path.parent.name for path in out.glob("*/model.safetensors"))
    assert saved == ["final", "step_000002"]
    base, middle, final = (weights(f) for f in (BASE, out / "step_000002", out / "final"))
    assert base.keys() == final.keys()
    for name in base:
        assert 0 < (final[name] - base[name]).abs().max() < 0.01
        assert not torch.equal(final[name], middle[name])
    encode = AutoTokenizer.from_pretrained(out / "final").encode
    assert encode("1+2") == make.tokenizer().encode("1+2")


def test_the_same_command_gives_the_same_numbers_from_any_folder(toy_run, tmp_path):
    flags, out, _ = toy_run
    run("train_hpt.py", *flags, "--out", tmp_path / "again", ranks=1, folder=tmp_path)
    assert metrics(tmp_path / "again") == metrics(out)


def test_a_run_goes_on_by_itself_after_a_rank_was_killed(toy_run, tmp_path):
    """It repeats the step of which no checkpoint was made, and nothing shows in its files."""
    flags, wanted, _ = toy_run
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    line = [sys.executable, *launcher, "train_hpt.py", *flags, "--out", out, "--resume"]
    with subprocess.Popen(list(map(str, line)), cwd=ROOT, stdout=subprocess.DEVNULL) as launched:
        while not (out / "step_000002").exists():
            assert launched.poll() is None
            time.sleep(0.01)
        [rank] = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        assert launched.wait(120) == 0
    assert metrics(out) == metrics(wanted)
    for name in ("held_out.jsonl", "samples.jsonl", "final/model.safetensors"):
        assert (out / name).read_bytes() == (wanted / name).read_bytes()


@pytest.fixture(scope="module")
def on_terminal(toy_run, tmp_path_factory):
    """A step of the toy with another seed, on a terminal; (directory, all that was written)."""
    flags, _, _ = toy_run
    out = tmp_path_factory.mktemp("terminal") / "run"
    command = [sys.executable, ROOT / "train_hpt.py", *flags]
    status, written = run_on_terminal([*command, "--steps", 1, "--seed", 1, "--out", out])
    assert status == 0, written
    return out, written


def test_another_seed_gives_other_rollouts(toy_run, on_terminal):
    _, out, _ = toy_run
    assert metrics(on_terminal[0])[1] != metrics(out)[1]


def first_words(lines):
    """The words that begin a line, but for the phase that a single process may do in no time."""
    words = [line.split()[0] for line in lines if line]
    return [word for word in words if word.isalpha() and word != "process"]


def test_a_terminal_keeps_the_lines_that_a_file_gets(toy_run, on_terminal):
    _, _, printed = toy_run
    kept, wanted = first_words(screen(on_terminal[1])), first_words(printed.splitlines())
    assert kept == [word for word in wanted if word != "From"]  # one step has no trend
    assert [line.split()[0] for line in screen(on_terminal[1]) if "/1 " in line] == ["0/1", "1/1"]


def test_a_terminal_shows_what_goes_on(on_terminal):
    seen = "\n".join(transient(on_terminal[1]))
    for part in ("imports  0:0", "model and data  0:0", "sampler (vLLM)  0:0"):
        assert part in seen
    assert "held-out problems" in seen and "step 1/1  " in seen and "/40  0:0" in seen


def test_an_output_directory_is_never_overwritten(toy_run):
    _, out, _ = toy_run
    before = (out / "metrics.jsonl").read_text()
    assert "exists already" in run("train_hpt.py", "--out", out, fails=True)
    assert (out / "metrics.jsonl").read_text() == before


def test_evaluate_on_two_ranks_gives_the_numbers_of_the_training_run_on_one(
    toy_run, easy, tmp_path
):
    _, out, _ = toy_run
    files = ["--model", out / "final", "--data", easy, "--out", tmp_path / "out"]
    sampling = ["--samples", 1, "--temperature", 1, "--top-p", 1, "--max-response-tokens", 112]
    run("evaluate.py", *files, *sampling, ranks=2)
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert results["easy"]["avg@1"][0] == metrics(out)[3]["eval/avg@1"]
    by_problem = [row["correct"] for row in read(tmp_path / "out/results.jsonl")]
    in_training = [row["correct"] for row in read(out / "held_out.jsonl") if row["step"] == 3]
    assert by_problem == in_training


def test_training_raises_the_accuracy(tmp_path, easy):
    """From 0.63 to 0.92 when this was written; the standard errors are 0.04 and 0.02."""
    flags = ["--steps", 6, "--eval-every", 0, "--eval-samples", 4, "--samples-per-prompt", 4]
    run("train_hpt.py", *flags, "--lr", 3e-4, "--eval-data", easy, "--out", tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert rows[-1]["eval/pass@1"] > rows[0]["eval/pass@1"] + 0.15


# ---------------------------------------------------------------------------------- two ranks

TOY_SIZES = ["--max-prompt-tokens", 16, "--max-response-tokens", 112]
ONE_UPDATE = [*SMALL, "--steps", 1, "--minibatches-per-step", 1]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, easy):
    out = tmp_path_factory.mktemp("one_rank") / "run"
    run("train_hpt.py", *ONE_UPDATE, "--data", easy, "--model", BASE, *TOY_SIZES, "--out", out)
    return metrics(out)[0]


@pytest.mark.parametrize("shared", [[], ["--tensor-parallel", 2, "--replicas", 2]])
def test_two_ranks_sample_the_same_and_have_the_same_gradient(one_rank, easy, tmp_path, shared):
    """With an engine per rank, and sharded weights; with one engine for both, and replicas."""
    inputs = ["--data", easy, "--model", BASE, *TOY_SIZES]
    out = tmp_path / "out"
    printed = run("train_hpt.py", *ONE_UPDATE, *inputs, *shared, "--out", out, ranks=2)
    for once in ("sampler (vLLM)  ", " 1/1 ", "next:", "HELD-OUT"):
        assert printed.count(once) == (once != "HELD-OUT")
    got = metrics(tmp_path / "out")[0]
    assert 0 < got["reward/mean"] < 1 and got["mismatch/logp_max"] < 1e-4
    for name in ("reward/mean", "hpt/sft_frac", "response_length/mean"):
        assert got[name] == one_rank[name]
    for name in ("optim/grad_norm", "policy/entropy"):
        assert got[name] == pytest.approx(one_rank[name], rel=1e-5)


def test_two_machines_have_the_gradient_of_one_process(one_rank, easy, tmp_path):
    """The command is the README's; neither Gloo nor vLLM is told anything about the network."""
    inputs = ["--data", easy, "--model", BASE, *TOY_SIZES, "--out", tmp_path / "out"]
    with two_machines() as names:
        ended = run_on_two_machines(names, ROOT / "train_hpt.py", *ONE_UPDATE, *inputs)
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2][-3000:] + ended[1][2][-3000:]
    got = metrics(tmp_path / "out")[0]
    assert got["reward/mean"] == one_rank["reward/mean"]
    assert got["optim/grad_norm"] == pytest.approx(one_rank["optim/grad_norm"], rel=1e-5)


# --------------------------------------------------------------------------------- the methods


def train(method, data, out, *more, ranks=None):
    flags = ["--method", method, "--model", BASE, "--data", data, *SMALL, *TOY_SIZES]
    run("train_hpt.py", *flags, "--lr", 1e-3, "--steps", 3, "--out", out, *more, ranks=ranks)
    return metrics(out)


def test_dft_trains_on_demonstrations_and_samples_nothing(easy, tmp_path):
    rows = train("dft", easy, tmp_path / "out")
    assert all(row["data/rollouts"] == 0 and row["data/demo_tokens"] > 0 for row in rows)
    assert rows[-1]["sft/nll"] < rows[0]["sft/nll"]


def test_luffy_has_one_demonstration_in_each_group(easy, tmp_path):
    rows = train("luffy", easy, tmp_path / "out")
    assert all(row["data/rollouts"] == 8 * 3 for row in rows)
    assert all(row["hpt/offline_ratio"] == pytest.approx(1 / 4) for row in rows)


def test_chord_trains_on_rollouts_and_demonstrations_as_its_schedule_says(easy, tmp_path):
    schedule = ["--chord-mu", 0.9, 0.1, "--chord-steps", 2, 1, "--steps", 2]
    rows = train("chord", easy, tmp_path / "out", *schedule)
    assert [row["chord/mu"] for row in rows] == pytest.approx([0.45, 0.9])
    for row in rows:
        assert row["data/rollouts"] == 8 * 4 and row["data/demo_tokens"] > 0
        assert row["hpt/offline_ratio"] == pytest.approx(1 / 5) and row["optim/grad_norm"] > 0
        assert "hpt/sft_frac" not in row


def test_smooth_gate_probe_importance_weights_and_a_temperature_of_0_7(easy, tmp_path):
    flags = ["--gate", "smooth", "--pi-old", "tis", "--probe-gradients", 2, "--temperature", 0.7]
    rows = train("hpt_mix", easy, tmp_path / "out", *flags)
    for row in rows:
        assert row["hpt/sft_frac"] == pytest.approx(1 - row["reward/mean"])  # beta = 1 - P
        # Sampler and trainer agree only if both divide the logits by the temperature.
        assert row["mismatch/logp_max"] < 1e-4
    assert [("probe/sft_norm" in row) for row in rows] == [False, True, False]


def critic_weights(folder):
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(folder / "final/critic")
    return dict(model.named_parameters())


def test_ppos_critic_starts_at_0_learns_and_is_restored(easy, tmp_path):
    rows = train("ppo", easy, tmp_path / "out", "--critic-lr", 1e-2, ranks=2)
    assert rows[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[2]["critic/explained_variance"]) > 1e-4
    critic = ["--critic", tmp_path / "out/final/critic", "--critic-lr", 1e-9, "--steps", 1]
    train("ppo", easy, tmp_path / "more", *critic)
    saved, restored = critic_weights(tmp_path / "out"), critic_weights(tmp_path / "more")
    assert saved["score.weight"].abs().max() > 0
    for name in saved:
        assert torch.allclose(saved[name], restored[name], atol=1e-7)


# ------------------------------------------------------------------------------- model families


def make_model(family, tied, template, folder):
    """A random two-layer model of a family, saved as a hub checkpoint would be."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        Qwen3Config,
    )

    torch.manual_seed(0)
    kinds = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "gemma2": Gemma2Config,
        "gemma3": Gemma3TextConfig,
    }
    extra = {} if family == "llama" else {"head_dim": 32}
    if family.startswith("gemma"):
        extra |= {"sliding_window": 32, "query_pre_attn_scalar": 32}
    tokenizer = make.tokenizer()
    config = kinds[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **extra,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if template == "plain":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def as_parquet(jsonl):
    """The same problems in the columns of the paper's training set."""
    import pyarrow
    import pyarrow.parquet

    table = []
    for row in read(jsonl):
        table.append(
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "target": [{"role": "assistant", "content": row["demonstration"]}],
                "reward_model": {"ground_truth": row["answer"]},
            }
        )
    path = jsonl.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


FAMILIES = [  # family, tied embeddings, template, form of the data, method, override
    ("llama", False, "plain", "jsonl", "sft", ["--rope-theta", 20000]),
    ("qwen3", True, "chat", "parquet", "grpo", ["--rope-theta", 20000]),
    ("gemma2", True, "plain", "jsonl", "gspo", ["--rope-theta", 20000]),
    ("gemma3", True, "chat", "parquet", "reinforce", ["--max-position-embeddings", 400]),
]


@pytest.mark.parametrize("family, tied, template, form, method, override", FAMILIES)
def test_a_family_trains_and_its_sampler_follows(
    easy, tmp_path, family, tied, template, form, method, override
):
    make_model(family, tied, template, tmp_path / "base")
    data = as_parquet(easy) if form == "parquet" else easy
    model = ["--model", tmp_path / "base", "--data", data, "--template", template]
    sizes = ["--max-prompt-tokens", 192, "--max-response-tokens", 64]
    more = ["--method", method, "--entropy-coef", 0.01, "--lr", 1e-3, "--steps", 2, *override]
    run("train_hpt.py", *model, *SMALL, *sizes, *more, "--out", tmp_path / "out")
    rows = metrics(tmp_path / "out")
    if method == "sft":
        assert rows[-1]["sft/nll"] < rows[0]["sft/nll"]
    else:
        assert all(row["mismatch/logp_max"] < 1e-4 for row in rows)
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out/final")
    assert before.keys() == after.keys()
    assert any((after[name] - before[name]).abs().max() > 1e-4 for name in before)


def test_a_model_without_the_usual_pieces_trains(easy, tmp_path):
    """No chat template, no pad token, two ends, tied embeddings, a vocabulary that is padded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    torch.manual_seed(0)
    tokenizer = make.tokenizer()
    tokenizer.chat_template = tokenizer.pad_token = None
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    padded, ends = 4 * len(tokenizer), [tokenizer.eos_token_id, 40]
    config = Qwen2Config(
        vocab_size=padded, tie_word_embeddings=True, eos_token_id=ends, pad_token_id=None, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").pad_token is None
    model = ["--model", tmp_path / "base", "--data", easy, "--template", "plain"]
    limits = ["--max-prompt-tokens", 192, "--max-response-tokens", 64]
    more = ["--method", "reinforce", "--lr", 1e-3, "--steps", 2]
    run("train_hpt.py", *model, *SMALL, *limits, *more, "--out", tmp_path / "out")
    rows = metrics(tmp_path / "out")
    # Most tokens of a random model are of the padding: sampler and trainer agree on them too.
    assert all(row["mismatch/logp_max"] < 1e-4 and row["optim/skipped"] == 0 for row in rows)
    saved = json.loads((tmp_path / "out/final/generation_config.json").read_text())
    assert saved["eos_token_id"] == ends
    assert weights(tmp_path / "out/final")["model.embed_tokens.weight"].shape == (padded, 64)


def command_lines():
    """The command lines of all processes, each a list of words."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process may end meanwhile
            lines.append(path.read_text(errors="replace").split("\0"))
    return lines


def test_no_process_of_a_run_is_left(toy_run):
    _, out, _ = toy_run
    assert not [line for line in command_lines() if str(out) in line]


def test_no_worker_of_the_verifier_outlives_its_program(toy_run):
    """A worker's last word is the number of the process that started it."""
    workers = [line for line in command_lines() if str(ROOT / "reward.py") in line]
    assert all(Path("/proc", line[-2]).exists() for line in workers)  # [-1] is behind the last \0
