"""One evaluation loop over the tasks, the metrics, and the prediction files. Read first: datasets.py, early_exit.py.

The dev score of a run, two ways (never compare across them):
    norm = mean over the tasks of (accuracy, accuracy, (r + 1) / 2)     the course since 2024; BERTer's best row
    raw  = mean over the tasks of (accuracy, accuracy, r)               the 2023 course; SMARTer BERT
Model selection uses norm at full depth. A model that predicts one class for everything scores like the majority
class and is easily missed (BERTer 5.1), so every evaluation also reports what is predicted and warns of a collapse.
"""

import csv
import io
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from early_exit import FULL_DEPTH, AllExits, ExitInference, every_exit, scores_at
from errors import smaller, spare_memory
from files import write_whole
from parallel import deal, gather_batches

# one class predicted for more than this share of the rows is called a collapse
COLLAPSED = 0.99
# values of a smaller standard deviation are one value and rounding, which could correlate by chance
CONSTANT = 1e-6
# a threshold leaves at least this much of [0, 1] on either side
THRESHOLD_ROOM = 1e-6


@dataclass
class Predictions:
    """What the model says of the given rows of one dataset, in the rows' order.

    Shapes: rows, values, exits [n]; outputs [n, outputs]; probabilities [n, classes] or None for a regression.
    Units: values are class indices or label units; exits count executed layers.
    """

    data: object
    rows: np.ndarray
    values: np.ndarray
    outputs: np.ndarray
    probabilities: np.ndarray | None
    exits: np.ndarray


@dataclass
class Scores:
    """Dev scores of one evaluation: `tasks` is {task: {metric: number}}."""

    tasks: dict
    raw: float
    norm: float
    warnings: list = field(default_factory=list)


def at_exit(i):
    """Make the inference that leaves at exit i. Shapes: outputs [b,o], executed layers [b]."""
    return lambda model, batch: (model(batch, exits=(i,)).logits[i], torch.full((len(batch),), i))


def full_depth(model, batch):
    """Run every layer: the default inference."""
    return at_exit(model.depth)(model, batch)


@torch.no_grad()
def run_batches(model, data, rows, function, batch_size, precision, progress):
    """Apply `function(model, batch)`, which gives a tuple of tensors [b,...], to rows of a dataset.

    The longest rows come first, so that padding is small; the tensors return in the rows' order. Several processes
    share the batches, and each gets all results.
    """
    order = np.argsort(-data.lengths()[rows], kind="stable")
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    results = []
    starts = deal(range(0, len(rows), batch_size))
    # one context for all batches, and not inference mode, in which autocast forgets: so the weights are cast once
    with precision():
        for start in tqdm(starts, f"predict {data.task.name}", disable=not progress, leave=False):
            batch = data.batch(rows[order[start : start + batch_size]]).to(device)
            results.append(function(model, batch))
    model.train(was_training)
    back = torch.empty(len(rows), dtype=torch.long)
    back[torch.from_numpy(order)] = torch.arange(len(rows))
    return tuple(torch.cat(parts).cpu()[back] for parts in zip(*gather_batches(results), strict=True))


def predict(model, data, rows=None, batch_size=32, infer=full_depth, precision=nullcontext, progress=False):
    """Predict rows of a dataset (all of them by default).

    `infer(model, batch) -> (outputs, exits)` is full depth or an early-exit policy, which may want more rows at
    once; `precision()` makes the autocast context. The model is put into evaluation mode and back.
    """
    rows = np.arange(len(data)) if rows is None else np.asarray(rows)
    rows_at_once = getattr(infer, "rows_at_once", batch_size)
    with spare_memory(smaller("--eval_batch_size", batch_size)):
        outputs, exits = run_batches(model, data, rows, infer, rows_at_once, precision, progress)
    outputs = outputs.float()
    values, probabilities = data.task.decode(outputs, model.threshold(data.task.name))
    probabilities = None if probabilities is None else probabilities.numpy()
    return Predictions(data, rows, values.numpy(), outputs.numpy(), probabilities, exits.numpy())


def predict_exits(model, data, rows=None, batch_size=32, precision=nullcontext, progress=False):
    """What every exit says of rows of a dataset (the usable ones by default), from one full pass."""
    rows = data.usable if rows is None else np.asarray(rows)
    with spare_memory(smaller("--eval_batch_size", batch_size)):
        outputs, confidence, lte = run_batches(model, data, rows, every_exit, batch_size, precision, progress)
    values, _ = data.task.decode(outputs.flatten(0, 1), model.threshold(data.task.name))
    return AllExits(rows, data.labels[rows], values.view_as(lte).numpy(), confidence.numpy(), lte.numpy())


# --- metrics ------------------------------------------------------------------------------------------------------


def accuracy(values, labels):
    """Share of equal entries."""
    return float(np.mean(values == labels))


def pearson(values, labels):
    """Pearson correlation; 0 where either side is constant (where it is not defined)."""
    x, y = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    # x - x.mean() of a constant need not be exactly zero; a nan is caught here too
    if not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(values, labels):
    """Pearson correlation of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(values), rankdata(labels))


def confusion_matrix(values, labels, classes):
    """Counts with a row per gold class and a column per predicted class. Shapes: [classes, classes]."""
    pairs = np.asarray(labels, int) * classes + np.asarray(values, int)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion):
    """Mean of the classes' F1; a class that neither occurs nor is predicted is left out."""
    hits, total = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * hits[total > 0] / total[total > 0]))


METRICS = {"accuracy": accuracy, "pearson": pearson}


def normalise(task, value):
    """A task's main metric on a scale from 0 to 1, as norm takes it."""
    return (value + 1) / 2 if task.is_regression else value


def score(predictions):
    """The metrics of one task and, as second value, a list of warnings."""
    task, labels = predictions.data.task, predictions.data.labels[predictions.rows]
    values, warnings = predictions.values, []
    layers = float(predictions.exits.mean())
    if task.is_regression:
        if not values.std() > CONSTANT:
            warnings.append(f"{task.name}: every prediction is {values.mean():.3f}, so r counts as 0")
            values = np.full_like(values, values.mean())
        metrics = {"pearson": pearson(values, labels), "spearman": spearman(values, labels)}
        metrics |= {"mean_prediction": float(values.mean()), "sd_prediction": float(values.std())}
    else:
        classes = len(task.label_names)
        confusion = confusion_matrix(values, labels, classes)
        shares = confusion.sum(0) / confusion.sum()
        metrics = {"accuracy": accuracy(values, labels), "macro_f1": macro_f1(confusion)}
        metrics |= {"majority": float(confusion.sum(1).max() / confusion.sum())}
        metrics |= {"predicted_shares": shares.tolist(), "confusion": confusion.tolist()}
        if classes == 2:
            metrics["positive_rate"] = float(shares[1])
        if shares.max() > COLLAPSED:
            name = task.label_names[int(shares.argmax())]
            warnings.append(f"{task.name}: {shares.max():.1%} of the predictions are '{name}': the task has collapsed")
    return metrics | {"mean_layers": layers}, warnings


def summarise(tasks, metrics, warnings):
    """Scores from the metrics of each task."""
    main = {name: metrics[name][tasks[name].metric] for name in metrics}
    norm = {name: normalise(tasks[name], value) for name, value in main.items()}
    return Scores(metrics, float(np.mean(list(main.values()))), float(np.mean(list(norm.values()))), warnings)


def evaluate(model, datasets, **how):
    """Score {task name: Dataset} on their usable rows; `how` goes to `predict`.

    Returns (Scores, {task: Predictions}).
    """
    metrics, warnings, predictions = {}, [], {}
    for name, data in datasets.items():
        predictions[name] = predict(model, data, data.usable, **how)
        metrics[name], told = score(predictions[name])
        warnings += told
    return summarise({name: data.task for name, data in datasets.items()}, metrics, warnings), predictions


def time_predictions(model, data, rows, **how):
    """Seconds that predicting rows of a dataset takes, from texts' tokens to predictions."""
    started = time.perf_counter()
    predict(model, data, rows, **how)
    return time.perf_counter() - started


def sweep(model, datasets, exits, policies, settings, batch_size=32, precision=nullcontext):
    """Scores, layers and speed of early exit at several settings of the thresholds.

    Scores and layers come from `exits` ({task: AllExits}: one full pass), speed from a real run of the same rows
    per setting. `settings` is {label: {task: threshold}}; a row for full depth comes first. Returns one dict per
    setting and task, and one per setting for all tasks together (norm, mean of the tasks' mean layers).
    """
    how, rows = dict(batch_size=batch_size, precision=precision), []
    everything = {"full depth": dict.fromkeys(datasets, FULL_DEPTH)} | settings
    for label, thresholds in everything.items():
        infer = full_depth if label == "full depth" else ExitInference(policies, thresholds, batch_size)
        mine, seconds, examples = [], 0.0, 0
        for name, data in datasets.items():
            found = scores_at(exits[name], policies[name], thresholds[name], METRICS[data.task.metric])
            taken = time_predictions(model, data, exits[name].rows, infer=infer, **how)
            shares = {f"exit_{i}": float(share) for i, share in enumerate(found.shares, start=1)}
            row = {"setting": label, "task": name, "policy": policies[name], "threshold": thresholds[name]}
            row |= {"metric": data.task.metric, "score": found.score, "mean_layers": found.mean_layers}
            mine.append(row | {"examples_per_second": len(exits[name].rows) / taken} | shares)
            seconds, examples = seconds + taken, examples + len(exits[name].rows)
        total = {"setting": label, "task": "all", "policy": "", "threshold": "", "metric": "norm"}
        total["score"] = float(np.mean([normalise(datasets[row["task"]].task, row["score"]) for row in mine]))
        for key in ("mean_layers", *(key for key in mine[0] if key.startswith("exit_"))):
            total[key] = float(np.mean([row[key] for row in mine]))
        rows += [*mine, total | {"examples_per_second": examples / seconds}]
    return rows


def fit_threshold(scores, labels):
    """The decision threshold on scores in [0, 1] with the best accuracy, in the middle of its gap.

    Fitted on training data: a cosine decoded at cos > 0 would say "paraphrase" always.
    """
    order = np.argsort(scores, kind="stable")
    scores, labels = np.asarray(scores, np.float64)[order], np.asarray(labels)[order]
    right = np.concatenate([[0], np.cumsum(labels == 0)]) + np.concatenate([np.cumsum(labels[::-1] == 1)[::-1], [0]])
    edges = np.concatenate([[scores[0] - 1e-3], (scores[1:] + scores[:-1]) / 2, [scores[-1] + 1e-3]])
    # a threshold between two equal scores cannot tell them apart
    distinct = np.concatenate([[True], scores[1:] > scores[:-1], [True]])
    best = edges[np.where(distinct, right, -1).argmax()]
    return float(np.clip(best, THRESHOLD_ROOM, 1 - THRESHOLD_ROOM))


def paired_bootstrap(parts, samples=10_000, seed=0):
    """Compare two models by resampling the rows, the same ones for both.

    `parts` is a list of (first, second, labels, metric), one per task: the models' predictions of the same rows. What
    is compared is the mean of the tasks' metrics.
    Returns (difference first - second, its 95% interval, share of resamples in which first is not better).
    """
    rng = np.random.default_rng(seed)

    def difference(draws):
        gains = [
            metric(first[draw], labels[draw]) - metric(second[draw], labels[draw])
            for (first, second, labels, metric), draw in zip(parts, draws, strict=True)
        ]
        return float(np.mean(gains))

    differences = np.empty(samples)
    for i in range(samples):
        differences[i] = difference([rng.integers(0, len(part[2]), len(part[2])) for part in parts])
    low, high = np.percentile(differences, [2.5, 97.5])
    return difference([slice(None)] * len(parts)), (low, high), float(np.mean(differences <= 0))


# --- prediction files ---------------------------------------------------------------------------------------------


def format_value(task, value):
    """A prediction as the course's files write it: 3, 1.0 or 4.1270."""
    return f"{value:.4f}" if task.is_regression else f"{value:.1f}" if task.name == "para" else f"{value:.0f}"


def describe(predictions, i):
    """Prediction i as readable columns: value, label name, probability of it (empty for a regression)."""
    task, value = predictions.data.task, predictions.values[i]
    if task.is_regression:
        return f"{value:.4f}", "", ""
    return f"{value:.0f}", task.label_names[int(value)], f"{predictions.probabilities[i, int(value)]:.4f}"


def write_predictions(folder, predictions, split):
    """Write the course's file and the readable CSV of one task and split.

    The course's format: a header line, then `id , value ` per example.
    """
    data, task = predictions.data, predictions.data.task
    lines = [task.header] + [
        f"{data.identifier(row)} , {format_value(task, value)} "
        for row, value in zip(predictions.rows, predictions.values, strict=True)
    ]
    write_whole(Path(folder) / f"{task.name}-{split}-output.csv", "\n".join(lines) + "\n")
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["id", *task.columns, "prediction", "label", "probability", "gold", "layers"])
    for i, row in enumerate(predictions.rows):
        gold = "" if np.isnan(data.labels[row]) else f"{data.labels[row]:g}"
        described = describe(predictions, i)
        writer.writerow([data.identifier(row), *data.text(row), *described, gold, predictions.exits[i]])
    write_whole(Path(folder) / f"{task.name}-{split}-readable.csv", table.getvalue())
