"""The benchmark runs, on the smallest settings, and prints what it says it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench

ROOT = Path(__file__).parents[1]
TINY = ["--rounds", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2"]


def table(*words):
    """{side: the numbers of its line} of what the benchmark prints, and the whole text."""
    command = [sys.executable, "-m", "tools.bench", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line.strip("| ").split("|") for line in done.stdout.splitlines() if line[:1] == "|"]
    numbers = {
        side.strip(): [float(x.replace(",", "")) for x in line[:4]] for side, *line in lines[2:]
    }
    return numbers, done.stdout


def test_update_measures_both_sides():
    sides, printed = table(
        "update", *TINY, "--lengths", "lognormal:30:64", "--tokens-per-microbatch", "128"
    )
    assert list(sides) == ["ours", "plain"]
    assert sides["plain"][0] * sides["plain"][3] == pytest.approx(sides["ours"][0], rel=0.02)
    tokens = sum(bench.draw_lengths(("lognormal", 30, 64), 4)) + 4 * 64
    assert f"update of toy: 4 sequences, {tokens} tokens" in printed


@pytest.mark.slow
def test_rollouts_are_those_of_vllm():
    sides, printed = table("rollout", *TINY)
    assert list(sides) == ["ours", "LLM.generate"] and "both sample the same tokens" in printed


@pytest.mark.slow
def test_trl_takes_steps_on_the_same_prompts_if_it_is_installed():
    pytest.importorskip("trl")
    sides, _ = table("step", *TINY)
    assert list(sides) == ["ours", "TRL"] and sides["TRL"][0] > 0


def test_lengths_have_a_heavy_tail_and_stay_in_their_bounds():
    drawn = sorted(bench.draw_lengths(("lognormal", 120, 512), 4000))
    assert drawn[0] >= bench.SHORTEST and drawn[-1] <= 512
    assert sum(drawn) / len(drawn) > 1.3 * drawn[2000]  # the mean lies far above the median
    assert bench.draw_lengths(("fixed", 7, 7), 3) == [7, 7, 7]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["update", "--lengths", "lognormal:90:50"], "invalid lengths value"),
        (["update", "@toy/toy.args"], "leave out --model, --data and @FILE"),
        (["update", "--model=m"], "leave out --model, --data and @FILE"),
    ],
)
def test_wrong_flags_get_a_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert sentence in capsys.readouterr().err


def test_step_without_trl_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="step compares with TRL"):
        bench.main(["step"])


def test_sides_take_turns_in_alternating_order():
    calls = []
    results = bench.take_turns(2, {name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "ab" + "ab" + "ba" and results == {"a": [None] * 2, "b": [None] * 2}


def test_the_shape_of_the_toy_is_the_toys():
    config = json.loads((ROOT / "toy/base/config.json").read_text())
    assert tuple(config[key] for key in bench.CONFIG) == bench.SHAPES["toy"]
