"""The benchmark runs, on the smallest settings, and prints what it says it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench

ROOT = Path(__file__).parents[1]
TINY = ["--rounds", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2"]
RUNS = [  # in one process, which imports everything once
    ["load", "--rounds", "1"],
    ["step", *TINY],
    ["rollout", *TINY, "--lengths", "lognormal:20:32", "--generate-batch", "4"],
]


def run(lines, missing=()):
    """What the benchmarks of some command lines print; `missing` packages cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({list(missing)!r}))\n"
        f"from tools import bench\nfor line in {lines!r}: bench.main(line)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed():
    """What the benchmarks that need vLLM print."""
    return run(RUNS)


def figure(printed, name):
    """The first number after a name."""
    return float(re.search(rf"{re.escape(name)}\s+(-?[\d,.]+)", printed)[1].replace(",", ""))


def test_update_needs_neither_vllm_nor_math_verify():
    line = ["update", "--rounds", "1", "--sequences", "4", "--prompt-tokens", "8"]
    line += ["--lengths", "lognormal:30:64", "--tokens-per-microbatch", "128"]
    printed = run([line], missing=["vllm", "math_verify", "latex2sympy2_extended"])
    assert figure(printed, "forward and backward, ours / plain:") > 0
    assert figure(printed, "memory of the pass, at its peak") > 0
    # The toy's 0.8 M parameters and Adam's two moments, in float32.
    assert figure(printed, "memory held between passes") > 3 * 4 * 0.0008
    planned = printed[printed.index("what --plan estimates") :]
    assert figure(planned, "memory held between passes") == pytest.approx(3 * 4 * 0.0008, abs=5e-4)
    assert figure(planned, "memory of the pass, at its peak") > 4 * 0.0008
    assert "plain" not in run([[*line, "--alone"]])


def test_rollouts_are_those_of_vllm_and_have_the_lengths_asked_for(printed):
    assert "token for token the same" in printed
    drawn = bench.draw_lengths(("lognormal", 20, 32), 4, seed=0)
    assert f"4 responses, mean {sum(drawn) / 4:.1f} tokens, longest {max(drawn)}" in printed
    assert figure(printed, "ours / transformers' generate, batches of 4:") > 0


def test_the_parts_of_a_step_add_up(printed):
    whole = re.search(r"sum of the parts +([\d.]+) s; the whole ([\d.]+) s", printed)
    assert float(whole[1]) == pytest.approx(float(whole[2]), abs=2e-3)
    parts = ("rollout", "reward", "gate and micro-batches", "old-policy pass", "update", "weights")
    named = sum(figure(printed, f"\n  {name}") for name in parts)
    assert named == pytest.approx(float(whole[2]), rel=0.02, abs=5e-3)


def test_load_measures_start_and_weights(printed):
    assert figure(printed, "build the engine") > figure(printed, "give the sampler new weights") > 0


def test_lengths_have_a_heavy_tail_and_stay_in_their_bounds():
    drawn = sorted(bench.draw_lengths(("lognormal", 120, 512), 4000, seed=0))
    assert drawn[0] >= bench.MIN_LENGTH and drawn[-1] <= 512
    assert sum(drawn) / len(drawn) > 1.3 * drawn[2000]  # the mean lies far above the median
    assert drawn == sorted(bench.draw_lengths(("lognormal", 120, 512), 4000, seed=0))
    assert bench.draw_lengths(("fixed", 7, 7), 3, seed=0) == [7, 7, 7]


@pytest.mark.parametrize("text", ["fixed", "fixed:0", "normal:3", "lognormal:9", "lognormal:9:5"])
def test_wrong_lengths_get_a_sentence(text, capsys):
    with pytest.raises(SystemExit):
        bench.main(["update", "--lengths", text])
    assert f"must be fixed:N or lognormal:MEAN:MAX with 16 < MEAN < MAX, not {text}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("word", ["--model=m", "--data", "--plan", "@toy/toy.args"])
def test_update_refuses_what_it_makes_itself(word):
    with pytest.raises(SystemExit, match=f"random sequences: leave out {word.split('=')[0]}$"):
        bench.main(["update", word, "80"])


def test_sides_take_turns_in_alternating_order():
    calls = []
    results = bench.take_turns(2, {name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "ab" + "ab" + "ba" and results == {"a": [None] * 2, "b": [None] * 2}


def test_a_peer_that_is_not_installed_gets_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="TRL is not installed here"):
        bench.main(["step", "--peer", "trl"])


@pytest.mark.parametrize("line", [["rollout"], ["step", "--peer", "trl"]])
def test_what_compares_single_processes_refuses_torchrun(line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="leave out torchrun"):
        bench.main(line)


def test_the_shape_of_the_toy_is_the_toys():
    config = json.loads((ROOT / "toy/base/config.json").read_text())
    assert tuple(config[key] for key in bench.CONFIG_KEYS) == bench.SHAPES["toy"]


def test_trl_takes_steps_on_the_same_prompts_if_it_is_installed():
    pytest.importorskip("trl")
    printed = run([["step", *TINY, "--peer", "trl"]])
    assert figure(printed, "a step, ours / TRL, ratio of the medians:") > 0
