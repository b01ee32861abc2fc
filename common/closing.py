"""What a run prints and draws at its end, all of it read from the run's directory.

So a resumed run reports on all of its steps.
"""

import os
from pathlib import Path

from common import curves, report
from common.report import by_level, markdown_table, mean_pass_at_k, say

SHOWN = 3  # held-out questions


def closing_report(out: Path, args) -> None:
    """Print on rank 0 what the run has reached and where its files are; draw its pictures."""
    if os.environ.get("RANK", "0") != "0":  # the process group, and rank() with it, has ended
        return
    try:
        if (out / "held_out.jsonl").exists():
            say(before_and_after(report.read_results(out / "held_out.jsonl"), args.temperature))
        measured = report.read_metrics(out)
        curves.plot({out.name: [measured]}, out / "curves.png")
        if (out / "gate.jsonl").exists():
            gate = report.read_jsonl(out / "gate.jsonl", ("step", "levels"))
            curves.plot_gate(gate, measured["hpt/offline_ratio"], out / "gate.png")
    except (Exception, SystemExit) as error:  # the model is saved: the run has ended well
        say(f"warning: the closing table or a picture is left out: {error}")
    say(f"\nwritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def before_and_after(rows: list[dict], temperature: float) -> str:
    """Return the table and the sentence on held-out accuracy; rows have the "step" of each."""
    before = [row for row in rows if row["step"] == 0]
    after = [row for row in rows if row["step"] == rows[-1]["step"]]
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        return "\nThe held-out problems have changed since step 0, so there is no table."
    table = "\n".join(markdown_table(accuracy_rows(before, after)))
    title = f"held-out accuracy at temperature {temperature:g}, ± one standard error:"
    return f"\n{title}\n{table}\n\n{accuracy_sentence(before, after)}\n{answers(before, after)}"


def accuracy_rows(before: list[dict], after: list[dict]) -> list[list]:
    """Return the head and the rows of the held-out accuracies before and after, level by level."""
    rows, at_the_end = [["level", "problems", "before, %", "after, %"]], by_level(after)
    for level, results in by_level(before).items():
        scores = [mean_pass_at_k(part, 1).percent() for part in (results, at_the_end[level])]
        rows.append([level, len(results), *scores])
    return rows


def accuracy_sentence(before: list[dict], after: list[dict]) -> str:
    """Return what became of the held-out accuracy; a change within two errors is not called one.

    Both evaluations are of the same problems, so the change has the error of the differences.
    """
    numbers = report.compare_results(after, before)
    change = numbers["difference"]
    verb = "rose" if change.mean > 0 else "fell"
    if not abs(change.mean) > 2 * change.error:  # this is so, too, if the error is nan
        verb = "did not clearly change: it went"
    first, last = numbers["b"].percent(), numbers["a"].percent()
    return f"Held-out accuracy {verb} from {first} % to {last} %."


def answers(before: list[dict], after: list[dict]) -> str:
    """Return a few held-out questions, from the first to the last, with responses to each.

    Each response has one line. A long one is cut in the middle, since its answer is at the end.
    """
    places = [i * (len(before) - 1) // (SHOWN - 1) for i in range(SHOWN)]
    lines = ["\nheld-out questions, and the first response to each before and after:"]
    for i in sorted(set(places)):
        lines.append(f"  {one_line(before[i]['prompt'])}")
        lines.append(f"    before: {one_line(before[i]['responses'][0])}")
        lines.append(f"    after:  {one_line(after[i]['responses'][0])}")
    return "\n".join(lines)


def one_line(text, width: int = 88) -> str:
    """Return a text on one line of at most `width` characters, without control characters."""
    text = " ".join(str(text).split())
    text = "".join(c if c.isprintable() else " " for c in text)
    if len(text) <= width:
        return text
    half = (width - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
