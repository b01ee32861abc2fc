"""The real program with real vLLM, on the toy and on tiny models of other families made on the spot."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toy
from train_hpt import METHODS

HERE = Path(__file__).parent
SMALL = ["--prompts-per-step", "8", "--eval-samples", "1"]


def run(*command, ranks=None, fails=False):
    """A program of this folder as a user would type it, under torchrun where `ranks` says so; its standard output."""
    launcher = [sys.executable] + ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] * bool(ranks)
    done = subprocess.run([*launcher, *map(str, command)], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stderr if fails else done.stdout


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def level_rows(folder, count=40):
    """A jsonl of toy sums of every level."""
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy.problems()[1][::5][:count]))
    return path


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, run("train_hpt.py", "--steps", 3, "--save-every", 2, *SMALL, "--out", out, ranks=1)


def test_what_a_run_prints_and_writes(toy_run):
    out, printed = toy_run
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["mismatch/logp_max"] < 1e-4  # sampler against trainer, before and after new weights
        assert row["optim/skipped"] == 0 and row["optim/grad_norm"] > 0 and 0 <= row["hpt/sft_frac"] <= 1
    assert "held-out accuracy" in printed and "offline ratio" in printed and "the first problem, as the model sees it" in printed
    assert len(printed.split("held-out accuracy")[1].split("\n\n")[0].splitlines()) == 2 + 6 + 1  # one line a level, and all
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["steps"] == 3 and config["versions"]["vllm"] and config["ranks"] == 1
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9 and {"prompt", "response", "reward", "P", "trained_on"} <= samples[0].keys()
    assert all((s["trained_on"] == "demonstration") == (s["P"] == 0) for s in samples)
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "step_000002/model.safetensors").exists() and not (out / "step_000001").exists()


def test_checkpoint_is_a_plain_model_that_training_moved(toy_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out, _ = toy_run
    old, new = (dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters()) for path in (toy.BASE, out / "final"))
    assert old.keys() == new.keys()
    assert all(0 < (new[k] - old[k]).abs().max() < 0.01 for k in old)
    assert AutoTokenizer.from_pretrained(out / "final").encode("1+2") == toy.tokenizer().encode("1+2")


def test_same_command_same_numbers(toy_run, tmp_path):
    run("train_hpt.py", "--steps", 3, "--save-every", 2, *SMALL, "--out", tmp_path / "again", ranks=1)
    first, again = metrics(toy_run[0]), metrics(tmp_path / "again")
    assert without_times(again) == without_times(first)
    run("train_hpt.py", "--steps", 1, *SMALL, "--seed", 1, "--out", tmp_path / "other")  # negative control
    assert without_times(metrics(tmp_path / "other"))[1] != without_times(first)[1]


def test_two_ranks_are_one(toy_run, tmp_path):
    """The same rollouts, and the first update's gradient to 1e-5: one engine a rank, then one engine for both."""
    want = metrics(toy_run[0])[1]
    for name, flags in {"data parallel": [], "tensor parallel": ["--tensor-parallel", 2]}.items():
        out = tmp_path / name.replace(" ", "-")
        run("train_hpt.py", "--steps", 1, "--minibatches-per-step", 1, *SMALL, *flags, "--out", out, ranks=2)
        got = metrics(out)[1]
        assert got["mismatch/logp_max"] < 1e-4
        if name == "data parallel":
            alone = tmp_path / "alone"
            run("train_hpt.py", "--steps", 1, "--minibatches-per-step", 1, *SMALL, "--out", alone, ranks=1)
            want = metrics(alone)[1]
        for key in ("reward/mean", "hpt/sft_frac", "response_length/mean"):
            assert got[key] == want[key], (name, key)
        for key in ("optim/grad_norm", "policy/entropy", "sft/nll"):
            assert got[key] == pytest.approx(want[key], rel=1e-5), (name, key)
    assert want["optim/grad_norm"] != pytest.approx(metrics(toy_run[0])[1]["optim/grad_norm"], rel=1e-3)  # negative control


ELSEWHERE = {"hpt", "sft", "reinforce"}  # run above and by the families below, where the others' advantages are 0 for want of success
FLAGS = {"ppo": ["--critic-lr", 1e-2],
         "hpt_mix": ["--gate", "smooth", "--pi-ref", "tis", "--probe-gradients", 2], "hpt_off": ["--pi-ref", "rollout", "--gamma", 0.25]}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ELSEWHERE])
def test_other_methods(tmp_path, method):
    """Three steps of every method; what it uses is what its row says it uses."""
    out, ranks = tmp_path / "out", 2 if method == "ppo" else None
    flags = ["--method", method, "--model", toy.BASE, "--data", level_rows(tmp_path), "--prompts-per-step", 8, "--samples-per-prompt", 4,
             "--max-prompt-tokens", 16, "--max-response-tokens", 112, "--lr", 1e-3]
    run("train_hpt.py", *flags, *FLAGS.get(method, []), "--steps", 3, "--out", out, ranks=ranks)
    rows, (rl, demo, meet) = metrics(out), METHODS[method]
    assert len(rows) == 3
    for row in rows:
        assert row["data/rollouts"] == 8 * (0 if not rl else 3 if meet == "group" else 4)
        assert (row["data/demo_tokens"] > 0) == bool(demo) and row["optim/grad_norm"] > 0 and row["optim/skipped"] == 0
        if rl and meet != "gate":
            assert row["mismatch/logp_max"] < 1e-4
        if meet == "group":
            assert row["hpt/offline_ratio"] == pytest.approx(1 / 4)
    if method == "hpt_mix":
        assert all(row["hpt/sft_frac"] == pytest.approx(1 - row["reward/mean"]) for row in rows)  # beta = 1 - P
        assert [("probe/sft_norm" in row) for row in rows] == [False, True, False]
    if method == "ppo":
        from transformers import AutoModelForTokenClassification
        run("train_hpt.py", *flags, "--critic", out / "final/critic", "--critic-lr", 1e-9, "--steps", 1, "--out", tmp_path / "more")
        saved, restored = (dict(AutoModelForTokenClassification.from_pretrained(folder / "final/critic").named_parameters())
                           for folder in (out, tmp_path / "more"))
        assert all(torch.allclose(saved[name], restored[name], atol=1e-7) for name in saved)
        assert saved["score.weight"].abs().max() > 0  # it began at 0, which the first step's values show
        assert rows[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-5) and abs(rows[2]["critic/explained_variance"]) > 1e-4


def test_comparison(tmp_path):
    """The comparison's own command, cut short: it trains, starts one run from another's end, reports, and goes on where it was."""
    flags = ["--only", "SFT", "SFT -> GRPO", "--seeds", 1, "--steps", 1, "--samples", 2, "--out", tmp_path]
    command = [sys.executable, "compare.py", *map(str, flags)]
    printed = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    table = (tmp_path / "comparison.md").read_text()
    assert table in printed + "\n" and all(f"| {label} | 1 |" in table for label in ("SFT", "SFT -> GRPO")) and "| base |" in table
    assert (tmp_path / "comparison.png").exists() and (tmp_path / "pass.png").exists()
    config = json.loads((tmp_path / "sft-then-grpo-seed0/config.json").read_text())
    assert config["flags"]["model"] == str(tmp_path / "sft-seed0/final")
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert again.count("(was there)") == 2 and table in again + "\n"


FAMILIES = [  # family, tied embeddings, template, data, method
    ("llama", False, "plain", "jsonl", "sft"), ("llama", True, "chat", "jsonl", "reinforce"), ("qwen3", True, "chat", "parquet", "grpo"),
    ("qwen3", False, "chat", "jsonl", "cispo"), ("gemma2", True, "plain", "parquet", "gspo"), ("gemma3", True, "chat", "jsonl", "dr_grpo"),
]


def make_model(family, tied, template, folder):
    """A random two-layer model of a family, saved as a hub checkpoint would be, with the toy's byte tokenizer."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen3Config
    torch.manual_seed(0)
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[family]
    extra = {} if family == "llama" else {"head_dim": 32}
    extra |= {"sliding_window": 32, "query_pre_attn_scalar": 32} if "gemma" in family else {}
    tokenizer = toy.tokenizer()
    config = kind(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **extra)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template if template == "chat" else None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family, tied, template, form, method", FAMILIES)
def test_other_families(tmp_path, family, tied, template, form, method):
    """Three steps from jsonl or parquet; training moves the weights, the sampler follows, and the result loads."""
    from transformers import AutoModelForCausalLM
    make_model(family, tied, template, tmp_path / "base")
    source = level_rows(tmp_path)
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        table = [{"prompt": [{"role": "user", "content": r["prompt"]}], "target": [{"role": "assistant", "content": r["demonstration"]}],
                  "reward_model": {"ground_truth": r["answer"]}} for r in rows]
        source = tmp_path / "sums.parquet"
        pq.write_table(pa.Table.from_pylist(table), source)
    run("train_hpt.py", "--model", tmp_path / "base", "--data", source, "--template", template, "--method", method, "--steps", 3,
        "--prompts-per-step", 4, "--samples-per-prompt", 4, "--max-prompt-tokens", 192, "--max-response-tokens", 96,
        "--tokens-per-microbatch", 600, "--lr", 1e-3, "--entropy-coef", 0.01, "--rope-theta" if family != "gemma3" else "--max-position-embeddings",
        20000 if family != "gemma3" else 400, "--out", tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3]
    if method == "sft":
        assert rows[-1]["sft/nll"] < rows[0]["sft/nll"]
    else:
        assert all(row["mismatch/logp_max"] < 1e-4 for row in rows)
    old, new = (dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("base", "out/final"))
    assert old.keys() == new.keys() and any((new[k] - old[k]).abs().max() > 1e-4 for k in old)
    printed = run("evaluate.py", "--model", tmp_path / "out/final", "--data", source, "--template", template, "--samples", 4,
                  "--max-response-tokens", 64, "--out", tmp_path / "eval")
    assert "avg@n" in printed and "pass@4" in printed and "±" in printed


def test_evaluate_agrees_with_training(toy_run, tmp_path):
    out, printed = toy_run
    toy.defaults()
    flags = ["--model", out / "final", "--data", HERE / ".toy_data/held_out.jsonl", "--samples", 1, "--temperature", 1, "--top-p", 1,
             "--max-response-tokens", 112]
    for ranks in (1, 2):
        run("evaluate.py", *flags, "--out", tmp_path / str(ranks), ranks=ranks)
    one, two = ((tmp_path / ranks / "table.md").read_text() for ranks in "12")
    assert one == two  # the problems are split over engines, the numbers are the same
    assert json.loads((tmp_path / "1/results.json").read_text())["results"]["held_out"]["avg@1"][0] == metrics(out)[3]["eval/avg@1"]


def test_an_output_directory_is_never_overwritten(toy_run):
    out, _ = toy_run
    before = (out / "metrics.jsonl").read_text()
    assert "exists already" in run("train_hpt.py", "--out", out, ranks=1, fails=True)
    assert (out / "metrics.jsonl").read_text() == before


def test_no_process_is_left(toy_run):
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists() and path.parent.name != str(os.getpid())]
    assert not [c for c in commands if str(HERE / "reward.py").encode() in c]
