"""Draw the metrics of one or more training runs into one PNG file.

python -m tools.plot runs/A runs/B --out curves.png
"""

import argparse
from pathlib import Path

from common import curves, report


def main(argv=None):
    """Draw one line per run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="output directories of train_hpt.py")
    parser.add_argument(
        "--out", default="curves.png", metavar="FILE", help="the picture to write (%(default)s)"
    )
    args = parser.parse_args(argv)
    out = Path(args.out)
    if not out.suffix:  # matplotlib would add one
        parser.error(f"--out {out}: name a file that ends in .png, .pdf or .svg")
    curves.plot({label: [report.read_metrics(run)] for label, run in labels(args.runs)}, out)
    print(out)


def labels(runs):
    """Return (label, run) pairs: a run is labelled by its name, or by its path if two share it."""
    names = [Path(run).name for run in runs]
    pairs = []
    for name, run in zip(names, runs, strict=True):
        pairs.append((name if names.count(name) == 1 else run, run))
    return pairs


if __name__ == "__main__":
    main()
