"""A real language model of 135 M parameters: two steps of HPT, an evaluation, its checkpoint.

The model comes from a Python package (toy/smollm2.py), which .ci/run installs. Without the package
these tests are skipped, and .ci/run fails.
"""

import itertools
import json

import pytest
import torch
from test_run import metrics, read, run, write_rows

from toy import smollm2, word_problems

missing = smollm2.missing_packages()
pytestmark = pytest.mark.skipif(
    bool(missing),
    reason=f"not installed: {', '.join(missing)}; toy/smollm2.py says how to install them",
)
RECIPE = f"@{word_problems.FOLDER.parent}/recipes/smollm2-135m-word-problems.args"
END = "<|im_end|>"  # with which the chat template of this model ends a message


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    smollm2.main([str(folder)])
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Two steps of HPT, in which the model sees the same four easy problems; (files, output)."""
    folder = tmp_path_factory.mktemp("word problems")
    train = read(word_problems.FOLDER / "word_problems_train.jsonl")
    four = write_rows(folder / "four.jsonl", [row for row in train if row["level"] == "1"][:4])
    flags = [RECIPE, "--model", base, "--data", four, "--eval-data", four, "--steps", 2]
    flags += ["--prompts-per-step", 4, "--minibatches-per-step", 1, "--samples-per-prompt", 2]
    flags += ["--warmup-steps", 0, "--eval-every", 0, "--gamma", 0.99]
    return folder / "run", run("train_hpt.py", *flags, "--out", folder / "run", ranks=1)
