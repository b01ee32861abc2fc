"""A long run takes no more of the machine than a short one."""


def test_later_steps_hold_no_more_files_or_processes(toy_run):
    """Step 3 comes after the first evaluation and checkpoint, step 6 after two more of each."""
    rows = {row["step"]: row for row in toy_run.watched}
    for name in ("files", "processes"):
        assert rows[6][name] <= rows[3][name], name
    assert rows[3]["files"] > 10 and rows[3]["processes"] > 0  # something is counted
