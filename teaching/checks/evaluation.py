"""Checks of part evaluation: fitting a threshold, and the metrics of a regression."""

from dataclasses import replace

import numpy as np

from evaluation import fit_decision_threshold, score_regression
from tasks import TASKS, Metric


def threshold(draw):
    """Fit thresholds for scores whose classes overlap."""
    n = 4 + 10 * draw.size
    results = []
    for _ in range(1 + 5 * draw.size):
        labels = np.array([0, 1, *(draw.number(0, 1) for _ in range(n - 2))])
        scores = np.array([draw.uniform(0.3, 0.5) + 0.15 * label for label in labels]).round(3)
        results.append(fit_decision_threshold(scores, labels))
    draw.show(scores=scores, labels=labels)
    return {"fit_decision_threshold": results}


def ties(draw):
    """Fit thresholds where scores are equal, where there is one class, and at the ends of the range."""
    cases = [([0.5, 0.5, 0.5, 0.7], [0, 1, 0, 1]), ([0.2, 0.4], [1, 1]), ([0.2, 0.4], [0, 0]), ([0.0, 0.0], [1, 1])]
    cases += [([1.0, 1.0], [0, 0]), ([0.4, 0.2, 0.2], [1, 0, 1])]
    for _ in range(10 * draw.size):
        n = draw.number(2, 6)
        cases.append(([draw.number(1, 4) / 5 for _ in range(n)], [draw.number(0, 1) for _ in range(n)]))
    draw.show(scores=str(cases[0][0]), labels=str(cases[0][1]))
    return {
        "fit_decision_threshold": [
            fit_decision_threshold(np.array(scores), np.array(labels)) for scores, labels in cases
        ]
    }


# a metric of the task's own that is no correlation
ERROR = Metric("mean_error", lambda values, labels: float(np.abs(values - labels).mean()))


def metrics(values, labels, task=TASKS["sts"]):
    """Return the metrics and the number of warnings of a regression."""
    before = values.copy()
    numbers, warnings = score_regression(task, values, labels)
    results = {**{name: float(value) for name, value in numbers.items()}, "warnings": len(warnings)}
    return results | {"values are as before": str(np.array_equal(values, before))}


def regression(draw):
    """Score predictions that follow the labels with noise."""
    n = 4 + 10 * draw.size
    labels = np.array([draw.uniform(0, 5) for _ in range(n)]).round(1)
    values = (0.5 * labels + np.array([draw.uniform(0, 2) for _ in range(n)])).round(2)
    draw.show(values=values, labels=labels)
    return metrics(values, labels, replace(TASKS["sts"], metric=ERROR))


def constant(draw):
    """Score predictions that are constant, constant but for rounding error, and almost constant."""
    n = 4 + 10 * draw.size
    labels = np.array([draw.uniform(0, 5) for _ in range(n)]).round(1)
    start, results = draw.uniform(1, 4), {}
    draw.show(labels=labels, values=f"{start:.4f} + error * (label - mean label)")
    unit = 1e-6 / labels.std()  # sd(values) = CONSTANT
    for error in (0.0, 0.01 * unit, 0.7 * unit, 1.4 * unit, 1e-4):
        values = start + error * (labels - labels.mean())
        # the mean and the standard deviation may be those before or after the rounding error is removed
        chosen = {
            name: value
            for name, value in metrics(values, labels, replace(TASKS["sts"], metric=ERROR)).items()
            if name != "sd_prediction"
        }
        results |= {f"{name} with error {error:g}": value for name, value in chosen.items()}
    return results
