"""Draw the metrics of one or more training runs into one file.

python -m tools.plot runs/A runs/B --out curves.png
"""

import argparse
from pathlib import Path

try:
    from common import curves, report
except ModuleNotFoundError as error:
    raise SystemExit("error: start it in the repository's folder: python -m tools.plot") from error


def main(argv: list[str] | None = None) -> None:
    """Draw one line per run, labelled by the name of its directory."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="output directories of train_hpt.py")
    about = "the picture to write, .png, .pdf or .svg (curves.png)"
    parser.add_argument("--out", default="curves.png", metavar="FILE", help=about)
    args = parser.parse_args(argv)
    names = [Path(run).name for run in args.runs]
    if len(set(names)) < len(names):
        names = args.runs  # directories that have the same name are labelled by their paths
    drawn = {name: [report.read_metrics(run)] for name, run in zip(names, args.runs, strict=True)}
    curves.plot(drawn, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
