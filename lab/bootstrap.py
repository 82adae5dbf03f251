"""Paired bootstrap: how certain is the difference between two groups of runs on the same dev rows?

Draw n rows with replacement, the same rows for both sides, and compute the difference again. The 2.5th and the
97.5th percentile of many such differences are a 95% interval. A dev score averages several tasks whose rows have
nothing to do with each other, so each task is resampled on its own. The difference of the averages is the average of
the tasks' differences.

The runs stay the same in every resample, so the interval does not cover other seeds.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 13.3 (percentile interval).
"""

import numpy as np

# scipy draws this many resamples at once, so that the memory for row numbers stays small
DRAWS_AT_ONCE = 20


def accuracies(values, labels):
    """Share of right predictions of each run. Shapes: [n,runs], [n] -> [runs]."""
    return (values == labels[:, None]).mean(0)


def correlations(values, labels):
    """Pearson correlation of each run; 0 where either side is constant. Shapes: [n,runs], [n] -> [runs]."""
    x, y = values - values.mean(0), labels - labels.mean()
    # compared before the means are subtracted: a constant less its mean need not be exactly 0
    varies = (np.ptp(values, axis=0) > 0) & (np.ptp(labels) > 0)
    return np.divide(y @ x, np.sqrt((x**2).sum(0) * (y**2).sum()), out=np.zeros(x.shape[1]), where=varies)


# The functions of tasks.py check their input for half a millisecond, and a bootstrap calls them 100,000 times.
METRICS = {"accuracy": accuracies, "pearson": correlations}


def paired_bootstrap(parts, samples=10_000, seed=0):
    """Compare two sides by resampling the rows that both predicted.

    `parts` is a list of (first, second, labels, metric), one per task. `metric(predictions, labels)` returns a number;
    each side's score is the mean of the tasks' metrics.
    Shapes: first, second: [n] for one run a side, or [n, runs]; labels [n].
    Returns (first - second, its 95% interval, share of resamples in which first is not better).
    """
    # imported here: scipy.stats takes a second
    from scipy.stats import bootstrap

    rng, measured, resampled = np.random.default_rng(seed), [], []
    for first, second, labels, metric in parts:

        def gain(rows, first=first, second=second, labels=labels, metric=metric):
            return metric(first[rows], labels[rows]) - metric(second[rows], labels[rows])

        # one sample of row numbers stands for both sides and the labels: that pairs them, whatever their shapes
        rows = np.arange(len(labels))
        draws = bootstrap(
            (rows,), gain, n_resamples=samples, batch=DRAWS_AT_ONCE, vectorized=False, method="percentile", rng=rng
        )
        measured.append(gain(rows))
        resampled.append(draws.bootstrap_distribution)
    differences = np.mean(resampled, axis=0)  # [samples]
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(np.mean(measured)), (float(low), float(high)), float(np.mean(differences <= 0))
