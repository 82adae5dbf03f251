"""The paired bootstrap: its interval is that of a resampling written out by hand, and of the normal approximation."""

import tracemalloc

import numpy as np
import pytest

from lab.compare import METRICS, paired_bootstrap
from tasks import TASKS


def rng(seed=0):
    return np.random.default_rng(seed)


def accuracy(values, labels):
    return np.mean(values == labels)


def correlation(values, labels):
    return np.corrcoef(values, labels)[0, 1]


@pytest.mark.parametrize("name", ["para", "sts"])
def test_metrics_of_several_runs_are_those_of_the_tasks(name):
    """A random, a perfect, an opposite and a constant run; then constant labels."""
    metric, labels = TASKS[name].metric, rng(0).integers(0, 2, 200)
    runs = np.stack([rng(1).integers(0, 2, 200), labels, 1 - labels, np.full(200, 1)], axis=1)
    for gold in (labels, np.full(200, 1)):
        expected = [metric.function(run, gold) for run in runs.T]
        assert METRICS[metric.name](runs, gold) == pytest.approx(expected)


def resample_by_hand(parts, samples, seed):
    """The definition: for every resample draw each task's rows, and average the tasks' differences."""
    draw, differences = rng(seed), []
    for _ in range(samples):
        gains = []
        for first, second, labels, metric in parts:
            rows = draw.integers(0, len(labels), len(labels))
            gains.append(metric(first[rows], labels[rows]) - metric(second[rows], labels[rows]))
        differences.append(np.mean(gains))
    return np.percentile(differences, [2.5, 97.5]), np.mean(np.array(differences) <= 0)


def good_and_bad():
    """Predictions of 400 rows: .9 of them right against .5, the errors independent of each other."""
    labels = np.zeros(400)
    return (rng(0).random(400) < 0.1).astype(float), (rng(1).random(400) < 0.5).astype(float), labels


def test_tasks_and_runs_are_resampled_as_by_hand():
    """Two tasks of different size, two runs a side in one of them: interval and share agree within sampling error."""
    gold = rng(2).uniform(0, 5, 300)
    runs = np.stack([gold + rng(3 + i).normal(0, 2 + 0.1 * i, 300) for i in range(4)], axis=1)
    right = (rng(7).random((2, 500)) < 0.3).astype(float)

    def mean_correlation(values, labels):
        return np.mean([correlation(run, labels) for run in values.T])

    parts = [(runs[:, :2], runs[:, 2:], gold, mean_correlation), (*right, np.zeros(500), accuracy)]
    difference, interval, not_better = paired_bootstrap(parts, samples=4000)
    expected, expected_share = resample_by_hand(parts, 4000, seed=5)
    gains = [metric(first, labels) - metric(second, labels) for first, second, labels, metric in parts]
    assert difference == pytest.approx(np.mean(gains))
    width = expected[1] - expected[0]
    assert interval == pytest.approx(expected, abs=0.05 * width)
    assert not_better == pytest.approx(expected_share, abs=0.04)


def test_identical_predictions_differ_by_exactly_zero():
    values, labels = rng(0).integers(0, 2, 100), rng(1).integers(0, 2, 100)
    result = paired_bootstrap([(values, values.copy(), labels, accuracy)], samples=200)
    assert result == (0.0, (0.0, 0.0), 1.0)


def test_a_clearly_better_model_and_the_reverse():
    """.9 against .5 of 400 rows, each pair of errors independent: the standard error is about .03."""
    good, bad, labels = good_and_bad()
    difference, (low, high), not_better = paired_bootstrap([(good, bad, labels, accuracy)], samples=1000)
    assert difference == pytest.approx(accuracy(good, labels) - accuracy(bad, labels))
    assert 0.2 < low < difference < high < 0.6
    assert not_better == 0.0
    # the same rows are drawn for both sides: the interval is that of the paired differences
    error = ((good == labels).astype(float) - (bad == labels)).std() / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    reverse, _, not_better = paired_bootstrap([(bad, good, labels, accuracy)], samples=1000)
    assert (reverse, not_better) == (-difference, 1.0)


def test_it_is_seeded_and_accepts_any_metric():
    labels = rng(0).uniform(0, 5, 60)
    first, second = labels + rng(1).normal(size=60), labels + rng(2).normal(0, 3, 60)
    result = paired_bootstrap([(first, second, labels, correlation)], samples=100, seed=4)
    assert result == paired_bootstrap([(first, second, labels, correlation)], samples=100, seed=4)
    assert result[1] != paired_bootstrap([(first, second, labels, correlation)], samples=100, seed=5)[1]
    assert result[1][0] > 0


def test_several_tasks_are_resampled_independently():
    """The rows of each task are drawn on their own: the variances of the two halves add up."""
    part = (*good_and_bad(), accuracy)
    one, (low, high), _ = paired_bootstrap([part], samples=1000)
    both, (lower, higher), not_better = paired_bootstrap([part, part], samples=1000)
    assert both == pytest.approx(one) and not_better == 0.0
    assert higher - lower == pytest.approx((high - low) / np.sqrt(2), rel=0.1)
    good, bad, labels, metric = part
    mixed, _, _ = paired_bootstrap([part, (bad, good, labels, metric)], samples=10)
    assert mixed == pytest.approx(0)


def test_it_needs_no_memory_for_all_draws_at_once():
    """40,000 rows times 10,000 resamples would be 3.2 GB of row numbers."""
    labels, samples = np.zeros(40_000), 200
    tracemalloc.start()
    paired_bootstrap([(labels, labels, labels, accuracy)], samples=samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < samples * labels.nbytes / 2
