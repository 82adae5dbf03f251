"""What needs the dev labels, which are not in this repository: computed where the data are, kept in findings.json.

    intervals    half of the 95% interval of a difference of two recipes over other dev rows, by paired bootstrap
    errors       dev rows that leave early and are wrong, and pairs on which two encodings disagree, as shares and
                 means; what leaving early costs

A digest of the predictions stands beside each result: it counts as long as the rows have the same predictions.
No text and no label is recorded.
"""

from dataclasses import dataclass

import numpy as np

from datasets import find_data_dir, read_dataset
from errors import InputError
from lab.compare import compare
from lab.numbers import digest
from tasks import build_tasks

RESAMPLES = 2000


class Words:
    """A tokenizer for counting: one token for each word."""

    def encode(self, text):
        """One number for each word of a text."""
        return range(len(text.split()))


@dataclass(frozen=True)
class DevRows:
    """What the error analysis uses of a task's usable dev rows. `overlap` is NaN for single sentences.

    Shapes: labels, words, overlap [n].
    Units: words counts the words of a row; overlap is the share of two texts' different words that both have.
    """

    labels: np.ndarray
    words: np.ndarray
    overlap: np.ndarray

    def describe(self, chosen):
        """The share of some rows among all, and their means. Shapes: chosen [n], booleans."""
        result = {"share": chosen.mean()}
        if chosen.any():
            result |= {"words": self.words[chosen].mean(), "overlap": self.overlap[chosen].mean()}
        return {name: round(float(value), 4) for name, value in result.items() if not np.isnan(value)}


def word_overlap(first, *others):
    """The share of the different words that all texts have; NaN for one text."""
    sets = [set(text.lower().split()) for text in (first, *others)]
    return len(set.intersection(*sets)) / len(set.union(*sets)) if others else float("nan")


def read_dev_rows(data_dir):
    """The usable dev rows of a data folder: {task: DevRows}."""
    tasks, result = build_tasks(), {}
    folder, _ = find_data_dir(data_dir, [task.file("dev") for task in tasks.values()])
    for name, task in tasks.items():
        data = read_dataset(task, folder / task.file("dev"), Words())
        overlap = np.array([word_overlap(*data.text(row)) for row in data.usable])
        result[name] = DevRows(data.labels[data.usable], data.text_lengths()[data.usable], overlap)
    return result


def predicted(row, task, dev, kind="values"):
    """Recorded predictions of a task as numbers: a string has a digit for each dev row. Shapes: [n].

    Raises: InputError if the data have another number of dev rows.
    """
    values = np.array([float(value) for value in row["measured"]["predictions"][task.name][kind]])
    if len(values) != len(dev.labels):
        raise InputError(
            f"{row['name']} has {len(values)} predictions of {task.name}, but there are {len(dev.labels)} "
            "usable dev rows: give --data_dir with the data that the runs were trained on"
        )
    return values


def is_wrong(task, values, labels):
    """Whether predictions are wrong; of a regression, whether they are off by more than one. Shapes: [n]."""
    return np.abs(values - labels) > 1 if task.is_regression else values != labels


def leaving_errors(task, dev, row):
    """Rows that leave in the first half of the layers and are wrong, and rows that leave last and are right."""
    depth = len(row["measured"]["exits"]["layer_scores"][task.name])
    left, values, last = (predicted(row, task, dev, kind) for kind in ("left", "left_values", "values"))
    wrong = is_wrong(task, values, dev.labels)
    early, late = (left <= depth / 2) & wrong, (left == depth) & ~wrong
    result = {"all": dev.describe(left > 0), "early": dev.describe(left <= depth / 2)}
    result |= {
        "early wrong": dev.describe(early),
        "late right": dev.describe(late),
        "late": dev.describe(left == depth),
    }
    # of the rows that leave early and are wrong: how many the last exit would have predicted right
    saved = ~is_wrong(task, last, dev.labels)[early]
    return result | {"saved at the end": float(saved.mean()) if early.any() else 0.0}


def encoding_errors(task, dev, rows):
    """Rows on which two models disagree, and how often the first one is then nearer to the label."""
    first, second = (predicted(row, task, dev) for row in rows)
    differ = is_wrong(task, first, second)
    nearer = (np.abs(first - dev.labels) < np.abs(second - dev.labels))[differ]
    result = {"all": dev.describe(differ | ~differ), "differ": dev.describe(differ)}
    return result | {"first nearer": float(nearer.mean()) if differ.any() else 0.0}


# --- recording ----------------------------------------------------------------------------------------------------


def bootstrap(dev, score, sides, kinds=("values", "values")):
    """The difference of two sides' scores, and half of its 95% interval; None without a task that all runs predicted.

    A side is a list of rows; `kinds` says which of their predictions count (see `predicted`).
    """
    recorded = [row["measured"]["predictions"] for side in sides for row in side]
    tasks = [task for name, task in build_tasks().items() if all(name in one for one in recorded)]
    arrays = [
        # [n,runs]
        {task.name: np.stack([predicted(row, task, dev[task.name], kind) for row in side], axis=1) for task in tasks}
        for side, kind in zip(sides, kinds, strict=True)
    ]
    result = compare(*arrays, {name: rows.labels for name, rows in dev.items()}, score, RESAMPLES)
    if result is None:
        return None
    return {"difference": round(result["difference"], 5), "half": round((result["high"] - result["low"]) / 2, 5)}


def differences(source, described):
    """The differences of scores whose runs have recorded predictions: {name: (description, sides, digest)}."""
    result = {}
    for words in described:
        if len(words) == 5 and words[3] == "-" and words[1] in ("norm", *build_tasks()):
            sides = source.sides([words[0], words[2], words[4]])
            if of := digest(*sides):
                result[" | ".join(words)] = (words, sides, of)
    return result


def without_interval(source, described):
    """The names of the differences that may be computed, but whose interval over dev rows is not recorded."""
    recorded = source.recorded.get("intervals", {})
    every = differences(source, described).items()
    return [name for name, (_, _, of) in every if recorded.get(name, {}).get("digest") != of]


def record(source, described, errors_of, data_dir):
    """Compute what needs the dev labels. Returns the content of findings.json.

    `described` are descriptions of numbers (numbers.py); the differences of scores among them get an interval.
    `errors_of` is {name: [group, recipe] or [group, recipe, recipe]}: whose errors are described.
    """
    tasks, dev, errors = build_tasks(), read_dev_rows(data_dir), {}
    intervals, missing = dict(source.recorded.get("intervals", {})), without_interval(source, described)
    every = differences(source, described)
    for name in missing:
        words, sides, of = every[name]
        if result := bootstrap(dev, words[1], sides):
            intervals[name] = {"digest": of, "half": result["half"]}
    intervals = {name: intervals[name] for name in every if name in intervals}
    for name, of in errors_of.items():
        sides = source.sides(of)
        if not digest(*sides):
            continue
        rows = [side[0] for side in sides]
        by_task = {
            task.name: leaving_errors(task, dev[task.name], *rows)
            if len(rows) == 1
            else encoding_errors(task, dev[task.name], rows)
            for task in tasks.values()
            if all(task.name in row["measured"]["predictions"] for row in rows)
        }
        if len(rows) == 1:
            # the norm where rows leave early minus that of the last layer, the mean over the seeds
            known = source.errors().get(name, {}).get("cost")
            by_task["cost"] = known or bootstrap(dev, "norm", sides * 2, ("left_values", "values"))
        errors[name] = {"of": of, "digest": digest(*sides)} | by_task
    return {"intervals": intervals, "errors": errors}
