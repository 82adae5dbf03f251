"""Paired bootstrap: how certain is the difference between two groups of runs on the same dev rows?

Draw n rows with replacement, the same rows for both sides, and compute the difference again. The 2.5th and the
97.5th percentile of many such differences are a 95% interval. A dev score averages several tasks whose rows have
nothing to do with each other, so each task is resampled on its own. The difference of the averages is the average of
the tasks' differences. The runs stay the same in every resample, so the interval does not cover other seeds.

The labels are not in this repository. So a comparison is computed where data or runs are, and its result is recorded:
here that of the core runs with transformers, in ensemble.py that of an ensemble with its members, in labels.py the
differences that the pages print.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 13.3 (percentile interval).
"""

import csv

import numpy as np

from lab.record import recipes
from lab.rows import slug
from tasks import build_tasks

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


def compare(ours, others, labels, score="norm", samples=10_000):
    """Compare the mean score of some runs with that of other runs, on the tasks that both have; None without any.

    `score` is "norm" or the name of a task.
    Shapes: ours, others: {task: [n,runs]}, labels: {task: [n]}.
    """
    parts = []
    for name, task in build_tasks().items():
        if score in ("norm", name) and all(name in side for side in (ours, others)):

            def metric(values, gold, task=task):
                scores = METRICS[task.metric.name](values, gold)
                return (task.metric.normalise(scores) if score == "norm" else scores).mean()

            parts.append((ours[name], others[name], labels[name], metric))
    if not parts:
        return None
    difference, (low, high), not_better = paired_bootstrap(parts, samples)
    return {"difference": difference, "low": low, "high": high, "not_better": not_better}


# --- with transformers --------------------------------------------------------------------------------------------


def read_predictions(folder, task):
    """A run's dev predictions of one task, from the file in the course's format: {id: value}."""
    lines = (folder / "predictions" / f"{task}-dev-output.csv").read_text().splitlines()[1:]
    return {key.strip(): float(value) for key, value in (line.split(",") for line in lines)}


def read_labels(folder, task):
    """The dev labels of one task, from the readable predictions: {id: label}."""
    with open(folder / "predictions" / f"{task}-dev-readable.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: float(row["gold"]) for row in csv.DictReader(file) if row["gold"]}


def compare_folders(ours, others):
    """Compare the norm of some runs with that of others, each with the predictions of its best epoch."""
    labels = {name: read_labels(ours[0], name) for name in build_tasks()}
    sides = []
    for side in (ours, others):
        predictions = {name: [read_predictions(folder, name) for folder in side] for name in labels}
        sides.append({n: np.array([[run[key] for run in predictions[n]] for key in labels[n]]) for n in labels})
    return compare(*sides, {name: np.array(list(gold.values())) for name, gold in labels.items()})


def compare_seeds(rows, runs):
    """Compare recipes that were run with several seeds with the mean of all seeds of transformers.

    Every seed is compared on its own, then the mean of a recipe's seeds. A recipe without its runs' predictions keeps
    the comparison that is recorded.
    """
    by_recipe = recipes({row["name"]: row for row in rows if ", seed " in row["name"]})
    others = [runs / slug(row["name"]) for row in by_recipe.pop("transformers", ())]
    for mine in by_recipe.values() if others else ():
        folders = [runs / slug(row["name"]) for row in mine]
        if not all((folder / "predictions").is_dir() for folder in (*folders, *others)):
            continue
        for row, folder in zip(mine, folders, strict=True):
            row["against_peer"] = compare_folders([folder], others)
        if len(mine) > 1:
            mine[-1]["mean_against_peer"] = compare_folders(folders, others) | {"runs": len(mine)}
