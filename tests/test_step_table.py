"""The lines that a run prints: columns that stay in their place, and the time that is left."""

import math

import pytest

from common import flags, step_table, terminal
from common.step_table import COLUMNS, StepTable, cell

HPT = {
    "reward/mean": 0.07421875,
    "hpt/sft_frac": 0.65625,
    "hpt/offline_ratio": 0.193,
    "sft/nll": 0.0664,
    "response_length/mean": 49.41,
    "policy/entropy": 0.195,
    "mismatch/kl": 8.03e-14,
    "optim/grad_norm": 0.0143,
    "perf/rollout_tokens_per_sec": 4210.4,
    "perf/train_tokens_per_sec": 9000.0,
    "time/step": 3.25,
}
WITHOUT_GATE = {name: HPT[name] for name in HPT if name not in ("hpt/sft_frac", "sft/nll")}
GRPO = WITHOUT_GATE | {"hpt/offline_ratio": 0.0}
SFT = {
    name: HPT[name] for name in ("hpt/offline_ratio", "sft/nll", "optim/grad_norm", "time/step")
} | {"perf/train_tokens_per_sec": 123456.0}
LARGE = {  # long responses, a slow step, a model that knows nothing
    "reward/mean": 1.0,
    "hpt/sft_frac": 1.0,
    "hpt/offline_ratio": 0.0,
    "sft/nll": 11.93,
    "response_length/mean": 8192.0,
    "policy/entropy": 11.93,
    "mismatch/kl": 0.0,
    "optim/grad_norm": 123456.7,
    "perf/rollout_tokens_per_sec": 1.23e7,
    "time/step": 12345.6,
}
SMALL = dict.fromkeys(HPT, 1.2345e-09)
STEPS = [HPT, GRPO, SFT, LARGE, SMALL, {}]


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the table reads; a test moves them."""
    now = [0.0]
    monkeypatch.setattr(step_table.time, "perf_counter", lambda: now[0])
    return now


def table(last_step=36, evaluated=(), width=120):
    return StepTable(last_step, evaluated, width)


def line_of(metrics, step=1, **more):
    return table(**more).lines_of({"step": step} | metrics)[-1]


def ends(line):
    """Where the words of a line end."""
    return [
        i for i in range(1, len(line) + 1) if line[i - 1] != " " and line[i : i + 1] in ("", " ")
    ]


@pytest.mark.parametrize("last_step", [1, 36, 500, 10_000])
@pytest.mark.parametrize("metrics", STEPS)
def test_every_line_has_the_columns_of_the_header(metrics, last_step):
    header, line = table(last_step).lines_of({"step": 1} | metrics)
    assert ends(header) == ends(line)
    assert len(ends(line)) == len(COLUMNS) + 2  # the step, and the time left


def test_a_line_by_hand(clock):
    header, line = table().lines_of({"step": 7} | HPT)
    assert header == (
        " step  reward  gated  offline    nll  length  entropy  "
        "mismatch    grad   tok/s    sec   left"
    )
    assert line == (
        " 7/36   0.074  0.656    0.193  0.066    49.4    0.195  "
        " 8.0e-14  0.0143    4210    3.2     0s"
    )


def test_a_metric_that_a_method_does_not_have_is_a_dash():
    line = line_of(SFT)
    assert " ".join(line.split()[:-1]) == "1/36 - - 0.193 0.066 - - - 0.0143 123456 3.2"
    assert line_of({}, step=0).split() == ["0/36", *["-"] * 11]


def test_a_usual_line_fits_120_columns_with_the_accuracy_behind_it():
    for metrics in STEPS:
        line = line_of(metrics | {"eval/pass@1": 0.98765}, last_step=500)
        assert len(line) <= 120 and line.endswith("  HELD-OUT ACCURACY 0.988")


@pytest.mark.parametrize("width", [60, 80, 90])
def test_a_narrow_terminal_has_fewer_columns(width):
    header, line = table(36, width=width).lines_of({"step": 1} | HPT)
    assert len(header) == len(line) <= width and ends(header) == ends(line)
    assert header.split()[:2] == ["step", "reward"] and header.split()[-2:] == ["sec", "left"]


@pytest.mark.parametrize(
    "value, width, form, text",
    [
        (None, 5, ".3f", "    -"),
        (math.nan, 5, ".3f", "  nan"),
        (math.inf, 6, ".3g", "   inf"),
        (0.12345, 5, ".3f", "0.123"),
        (12.345, 5, ".3f", " 12.3"),
        (1.2345e-5, 6, ".3g", " 1e-05"),
        (0.0031234, 6, ".3g", "0.0031"),
        (123456.7, 6, ".3g", "123457"),
        (1e9, 6, ".0f", " 1e+09"),
        (-0.5, 6, ".3f", "-0.500"),
    ],
)
def test_a_number_has_as_many_digits_as_there_is_room_for(value, width, form, text):
    assert cell(value, width, form) == text


def test_the_header_comes_again_every_20_lines():
    lines_of = table(100).lines_of
    printed = [len(lines_of({"step": step} | HPT)) for step in range(41)]
    assert printed == [2] + [1] * 19 + [2] + [1] * 19 + [2]


def test_what_is_not_there_at_every_step_stands_at_the_end(monkeypatch):
    def behind(**metrics):
        renamed = {name.replace("_", "/", 1): value for name, value in metrics.items()}
        return line_of(HPT | renamed)[len(line_of(HPT)) :]

    assert behind(optim_skipped=0, critic_skipped=0) == ""
    assert behind(optim_skipped=1, critic_skipped=2) == "  3 skipped"
    assert behind(perf_train_tokens_per_sec=0) == "  nothing to train on"
    monkeypatch.setattr(terminal, "bold", lambda text: f"*{text}*")
    assert behind(**{"eval/pass@1": 0.98765}) == "  *HELD-OUT ACCURACY 0.988*"


# ------------------------------------------------------------------------------- the time left


def left(table, clock, step, seconds, evaluation=0.0, own=None):
    """What a step says of the time left; it took `seconds`, and as many for an evaluation."""
    clock[0] += seconds + evaluation
    metrics = {"step": step} | ({"time/step": own or seconds} if step else {})
    metrics |= {"eval/pass@1": 0.5} if evaluation else {}
    return table.lines_of(metrics)[-1].replace("  HELD-OUT ACCURACY 0.500", "").split()[-1]


def test_the_time_left_counts_the_evaluations_that_come(clock):
    lines = table(10, {5, 10})
    assert left(lines, clock, 0, 0, evaluation=7) == "-"  # no step is done
    assert left(lines, clock, 1, 10) == "1m44s"  # 9 * 10 + 2 * 7
    assert left(lines, clock, 2, 20) == "2m14s"  # 8 * 15 + 2 * 7
    for step in (3, 4):
        left(lines, clock, step, 15)
    assert left(lines, clock, 5, 15, evaluation=9) == "1m23s"  # 5 * 15 + 8
    for step in range(6, 10):
        left(lines, clock, step, 15)
    assert left(lines, clock, 10, 15, evaluation=8) == "0s"


def test_the_time_left_counts_what_comes_between_two_steps(clock):
    """As a checkpoint, which no metric of a step holds."""
    lines = table(4)
    left(lines, clock, 1, 10)
    assert left(lines, clock, 2, 30, own=10) == "40s"  # 2 * (10 + 30) / 2


def test_a_run_that_goes_on_estimates_from_its_own_steps(clock):
    assert left(table(100), clock, 98, 3) == "6s"


def test_the_time_left_follows_the_last_steps(clock):
    lines = table(100)
    for step in range(1, 31):
        text = left(lines, clock, step, 1 if step <= 10 else 2)
    assert text == "2m20s"  # 70 steps of 2 s; of 5/3 s if all steps counted


def test_docs_name_the_metric_of_every_column():
    text = (flags.REPOSITORY / "docs/metrics.md").read_text().split("## What a run prints")[1]
    text = text.split("\n## ")[0]
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| column"):
            title, about = (part.strip() for part in line.strip("|").split("|"))
            rows[title] = about
    assert list(rows) == [*(column.title for column in COLUMNS), "left"]
    for column in COLUMNS:
        assert all(f"`{name}`" in rows[column.title] for name in column.metrics)
