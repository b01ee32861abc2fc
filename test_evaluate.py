"""pass@k and standard errors against brute force."""
import itertools
import math
import statistics

import pytest

from evaluate import by_level, mean_and_error, pass_at_k, summary


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    assert 1 - (1 - 2 / 4) ** 2 != pytest.approx(pass_at_k(4, 2, 2))  # negative control: the biased plug-in estimate


def test_mean_and_standard_error_over_problems():
    values = [0.0, 0.25, 1.0, 0.5]
    mean, error = mean_and_error(values)
    assert mean == statistics.fmean(values) and error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_error([0.5])[0] == 0.5 and math.isnan(mean_and_error([0.5])[1])


def test_summary_and_levels():
    results = [{"level": 2, "correct": 4}, {"level": 10, "correct": 0}, {"level": 2, "correct": 2}]
    assert list(by_level(results)) == [2, 10, "all"] and len(by_level(results)["all"]) == 3
    scores = summary(results, 4)
    assert list(scores) == ["avg@4", "pass@1", "pass@2", "pass@4"]
    assert scores["avg@4"][0] == pytest.approx(0.5) == scores["pass@1"][0] and scores["pass@4"][0] == pytest.approx(2 / 3)
    assert list(summary(results, 6)) == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6"]
