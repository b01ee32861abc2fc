"""What all tests share: GPUs are hidden from them, and the toy is trained once for all of them.

tests/test_gpu.py looks at GPUs, in processes that see them.
"""

import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def easy(tmp_path_factory):
    """Two files of sums of one and two digits, which the base often gets right: (train, held out).

    The one has 199 problems, the other 24.
    """
    import programs

    folder, files = tmp_path_factory.mktemp("easy"), []
    for name, part in (("train", slice(None)), ("held_out", slice(20, 44))):
        rows = programs.read(programs.ROOT / f"toy/{name}.jsonl")
        rows = [row for row in rows if row["level"] <= 2][part]
        files.append(programs.write_rows(folder / f"{name}.jsonl", rows))
    return files


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory, easy):
    """Six steps of HPT on the toy, started with torchrun, as a user would: a programs.Run."""
    import programs

    return programs.toy_run(tmp_path_factory.mktemp("toy"), *easy)
