"""Predicting a dataset, scoring the predictions, and writing the prediction files.

The dev score of a run is a mean over its tasks, in two versions. Never compare one with the other:

    norm = mean of the main metrics, each mapped from its range to 0..1     the course since 2024; BERTer's best row
    raw  = mean of the main metrics as they are                             the 2023 course; SMARTer BERT

The main metric is accuracy for classes and Pearson's r for a similarity (tasks.py), so r enters norm as (r + 1) / 2.
The best model of a run is the one with the highest norm at full depth.

A model that predicts the same class for every row may score as high as the majority class, which is easily missed
(BERTer 5.1). So every evaluation also reports the predicted classes, and warns where a model that may be kept has
collapsed.
"""

import csv
import io
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets import SkeletonRows, read_rows
from early_exit import AllExits, every_exit
from errors import explain_out_of_memory, smaller
from files import write_whole
from parallel import deal, gather_batches
from tasks import ACCURACY, PEARSON, SPEARMAN, TASKS

# a task has collapsed if it predicts one class for more than this share of the rows
COLLAPSED = 0.99
# predictions with a smaller standard deviation are one value plus rounding error, which could correlate by chance
CONSTANT = 1e-6
# a decision threshold stays this far from 0 and from 1
THRESHOLD_ROOM = 1e-6


@dataclass
class Predictions:
    """Predictions for rows of one dataset, in the order of `rows`.

    Shapes: rows, values, layers [n]; outputs [n,o]; probabilities [n,classes], or None for a regression.
    Units: values are class indices or label units; layers counts the executed ones.
    """

    data: object
    rows: np.ndarray
    values: np.ndarray
    outputs: np.ndarray
    probabilities: np.ndarray | None
    layers: np.ndarray


@dataclass
class Scores:
    """The scores of one evaluation. `tasks` is {task: {metric: number}}."""

    tasks: dict
    raw: float
    norm: float
    warnings: list = field(default_factory=list)

    def record(self):
        """The scores as log.jsonl and summary.json hold them."""
        return {"tasks": self.tasks, "raw": self.raw, "norm": self.norm}


# --- predicting ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtExit:
    """Inference in which every row leaves at exit i; None runs all layers. Shapes: outputs [b,o], layers [b]."""

    i: int | None = None
    batches_at_once = 1  # early_exit.ExitInference takes several batches at once

    def __call__(self, model, batch, batch_size):
        i = self.i or model.depth
        return model(batch, exits=(i,)).logits[i], torch.full((len(batch),), i)


@torch.no_grad()
def run_batches(model, data, rows, function, batch_size, autocast, show_bar):
    """Apply `function(model, batch)`, which returns a tuple of tensors [b,...], to batches of `rows`.

    Several processes share the batches. Each of them gets all results, in the order of `rows`.
    """
    was_training, device, results = model.training, next(model.parameters()).device, []
    model.eval()
    # longest rows first: batches have little padding, and if memory runs out, it does so at the first batch
    order = np.argsort(-data.lengths()[rows], kind="stable")  # [n]
    back = np.argsort(order)  # the inverse permutation: result back[i] belongs to row i
    starts = deal(range(0, len(rows), batch_size))
    # One autocast context for all batches: it caches the 16-bit copies of the trainable weights. It caches none of a
    # frozen weight, and none under inference_mode.
    with autocast():
        for start in tqdm(starts, f"predict {data.task.name}", disable=not show_bar, leave=False):
            batch = data.batch(rows[order[start : start + batch_size]]).to(device)
            results.append(function(model, batch))
    model.train(was_training)
    return tuple(torch.cat(parts).cpu()[back] for parts in zip(*gather_batches(results), strict=True))


def predict(model, data, rows=None, batch_size=32, infer=AtExit(), autocast=nullcontext, show_bar=False):
    """Predict rows of a dataset (by default all), with the model in evaluation mode.

    `infer(model, batch, batch_size)` returns (outputs, executed layers) of a batch, which has up to batch_size times
    `infer.batches_at_once` rows; `autocast()` makes the context of mixed precision.
    """
    rows, task = np.arange(len(data)) if rows is None else np.asarray(rows), data.task

    def infer_batch(model, batch):
        return infer(model, batch, batch_size)

    with explain_out_of_memory(smaller("--eval_batch_size", batch_size)):
        at_once = infer.batches_at_once * batch_size
        outputs, layers = run_batches(model, data, rows, infer_batch, at_once, autocast, show_bar)
    outputs = outputs.float()  # [n,o]
    values, probabilities = task.objective.decode(outputs, model.decision_threshold(task.name))
    probabilities = None if probabilities is None else probabilities.numpy()
    return Predictions(data, rows, values.numpy(), outputs.numpy(), probabilities, layers.numpy())


def predict_exits(model, data, rows=None, batch_size=32, autocast=nullcontext, show_bar=False):
    """Predict rows of a dataset (by default the usable ones) with every exit, in one full pass. Returns AllExits."""
    rows, task = data.usable if rows is None else np.asarray(rows), data.task
    with explain_out_of_memory(smaller("--eval_batch_size", batch_size)):
        outputs, confidence, lte = run_batches(model, data, rows, every_exit, batch_size, autocast, show_bar)
    # the outputs of all exits are decoded at once: [n,L,o] to [n * L,o]
    values, _ = task.objective.decode(outputs.flatten(0, 1), model.decision_threshold(task.name))
    values = values.view_as(lte).numpy()  # [n,L]
    return AllExits(task, rows, data.labels[rows], values, confidence.numpy(), lte.numpy())


# --- scoring ------------------------------------------------------------------------------------------------------
# scikit-learn is imported at the first evaluation: at start-up it would delay the first training step


def measure(metrics, values, labels):
    """{metric's name: number}; a metric that is listed twice is computed once."""
    return {metric.name: metric.function(values, labels) for metric in dict.fromkeys(metrics)}


def score_regression(task, values, labels):
    """The metrics of a regression, and a list of warnings. Shapes: values, labels [n].

    The metrics are pearson, spearman, the task's own one, mean_prediction and sd_prediction. If the standard deviation
    is at most CONSTANT, the correlations are 0, and there is one warning.
    """
    warnings = []
    if not values.std() > CONSTANT:
        warnings.append(f"{task.name}: every prediction is {values.mean():.3f}: correlations count as 0")
        # exactly constant, so that rounding error cannot correlate with the labels
        values = np.full_like(values, values.mean())
    metrics = measure((PEARSON, SPEARMAN, task.metric), values, labels)
    return metrics | {"mean_prediction": float(values.mean()), "sd_prediction": float(values.std())}, warnings


def score_classes(task, values, labels):
    """The metrics of a classification, and a list of warnings. Shapes: values, labels [n], class indices."""
    from sklearn.metrics import confusion_matrix, f1_score

    # [classes,classes]: a row per label, a column per prediction
    confusion = confusion_matrix(labels, values, labels=range(len(task.label_names)))
    shares = confusion.sum(0) / confusion.sum()  # [classes]: how often each class is predicted
    # macro F1 averages the classes that occur among the labels or the predictions
    metrics = measure((ACCURACY, task.metric), values, labels)
    metrics |= {"macro_f1": float(f1_score(labels, values, average="macro"))}
    metrics |= {"majority": float(confusion.sum(1).max() / confusion.sum())}
    metrics |= {"predicted_shares": shares.tolist(), "confusion": confusion.tolist()}
    if len(shares) == 2:
        metrics["positive_rate"] = float(shares[1])
    warnings = []
    if shares.max() > COLLAPSED:
        name = task.label_names[int(shares.argmax())]
        warnings.append(f"{task.name}: {shares.max():.1%} of the predictions are '{name}': the task has collapsed")
    return metrics, warnings


def score(predictions):
    """Score one task: its main metric under the metric's name, further metrics, and a list of warnings."""
    task, labels = predictions.data.task, predictions.data.labels[predictions.rows]
    score_kind = score_regression if task.is_regression else score_classes
    metrics, warnings = score_kind(task, predictions.values, labels)
    return metrics | {"mean_layers": float(predictions.layers.mean())}, warnings


def mean_norm(tasks, values):
    """The norm of {task: main metric}."""
    return float(np.mean([tasks[name].metric.normalise(value) for name, value in values.items()]))


def summarise(tasks, metrics, warnings):
    """Make Scores from the metrics of each task, {task: {metric: number}}."""
    main = {name: metrics[name][tasks[name].metric.name] for name in metrics}
    return Scores(metrics, float(np.mean(list(main.values()))), mean_norm(tasks, main), warnings)


def evaluate(model, datasets, **options):
    """Predict and score the usable rows of {task: Dataset}; the options are arguments of `predict`.

    Returns (Scores, {task: Predictions}).
    """
    metrics, warnings, predictions = {}, [], {}
    for name, data in datasets.items():
        predictions[name] = predict(model, data, data.usable, **options)
        metrics[name], new_warnings = score(predictions[name])
        warnings += new_warnings
    return summarise({name: data.task for name, data in datasets.items()}, metrics, warnings), predictions


def fit_decision_threshold(scores, labels):
    """The decision threshold with the best accuracy. Shapes: scores, labels [n].

    Candidates: the middle between two neighbouring scores that differ, the lowest score - .001, the highest + .001. Of
    equally good ones it is the lowest, clipped to [THRESHOLD_ROOM, 1 - THRESHOLD_ROOM].
    A cosine needs it: at cos > 0 a model predicts 1 for almost every pair. It is fitted on training rows.
    """
    order = np.argsort(scores, kind="stable")
    scores, labels = np.asarray(scores, np.float64)[order], np.asarray(labels)[order]
    # right[k] for k = 0..n: how many rows are right if the k lowest scores are predicted 0 and the others 1
    right = np.concatenate([[0], np.cumsum(labels == 0)]) + np.concatenate([np.cumsum(labels[::-1] == 1)[::-1], [0]])
    edges = np.concatenate([[scores[0] - 1e-3], (scores[1:] + scores[:-1]) / 2, [scores[-1] + 1e-3]])  # [n + 1]
    # no threshold separates two equal scores
    distinct = np.concatenate([[True], scores[1:] > scores[:-1], [True]])
    best = edges[np.where(distinct, right, -1).argmax()]
    return float(np.clip(best, THRESHOLD_ROOM, 1 - THRESHOLD_ROOM))


# --- prediction files ---------------------------------------------------------------------------------------------


def describe(predictions, i):
    """Prediction i as readable columns: value, label name, probability of it (both empty for a regression)."""
    task, value = predictions.data.task, predictions.values[i]
    if task.is_regression:
        return f"{value:.4f}", "", ""
    return f"{value:.0f}", task.label_names[int(value)], f"{predictions.probabilities[i, int(value)]:.4f}"


def prediction_text(task, ids, values):
    """Return predictions in the course's format: a header line, then a line `id , value ` per example."""
    lines = [f"{row_id} , {task.format(value)} " for row_id, value in zip(ids, values, strict=True)]
    return "\n".join([task.output[0], *lines]) + "\n"


def readable_table(predictions, **more):
    """A CSV of texts and predictions; `more` is {column: its values}."""
    data, table = predictions.data, io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["id", *data.task.columns, "prediction", "label", "probability", *more])
    for i, row in enumerate(predictions.rows):
        added = [values[i] for values in more.values()]
        writer.writerow([data.identifier(row), *data.text(row), *describe(predictions, i), *added])
    return table.getvalue()


def write_predictions(folder, predictions, split):
    """Write two files for one task and split: the course's format, and a readable CSV."""
    data, task = predictions.data, predictions.data.task
    ids = map(data.identifier, predictions.rows)
    write_whole(Path(folder) / f"{task.name}-{split}-output.csv", prediction_text(task, ids, predictions.values))
    # test rows have no label
    gold = ["" if np.isnan(label) else f"{label:g}" for label in data.labels[predictions.rows]]
    table = readable_table(predictions, gold=gold, layers=predictions.layers)
    write_whole(Path(folder) / f"{task.name}-{split}-readable.csv", table)


# --- the names of the CS224N skeleton -----------------------------------------------------------------------------

# {task: (method of the model, its output to predictions)}; Quora's output is a logit here (--para_loss bce), and a
# similarity may have any scale
SKELETON = {
    "para": ("predict_paraphrase", lambda logits: logits.sigmoid().round()),
    "sst": ("predict_sentiment", lambda logits: logits.argmax(-1)),
    "sts": ("predict_similarity", lambda logits: logits),
}


@torch.no_grad()
def eval_rows(name, loader, model, device):
    """Predict a loader of datasets.SkeletonRows: (score, or None without labels, predictions, ids, labels, texts)."""
    method, decode = SKELETON[name]
    values, ids, labels, texts = [], [], [], []
    model.eval()
    for batch in loader:
        names = [f"{key}{k}" for k in ("", "_1", "_2") for key in ("token_ids", "attention_mask")]
        inputs = [batch[name].to(device) for name in names if name in batch]
        values += decode(getattr(model, method)(*inputs)).flatten().tolist()
        labels += batch["labels"].tolist() if "labels" in batch else []
        ids += batch["sent_ids"]
        texts += batch["sents"]
    score = TASKS[name].metric.function(values, labels) if labels else None
    return score, values, ids, labels, texts


def model_eval_sst(dataloader, model, device):
    """Return SST's accuracy, macro F1, predictions, labels, texts and ids. Source: the course's evaluation.py."""
    score, values, ids, labels, texts = eval_rows("sst", dataloader, model, device)
    metrics, _ = score_classes(TASKS["sst"], np.array(values), np.array(labels))
    return score, metrics["macro_f1"], values, labels, texts, ids


def model_eval_multitask(sentiment_dataloader, paraphrase_dataloader, sts_dataloader, model, device):
    """Return score, predictions and ids of Quora, then of SST, then of STS. Source: the course's evaluation.py (2023).

    Differs: a constant similarity has correlation 0, not NaN.
    """
    loaders = {"para": paraphrase_dataloader, "sst": sentiment_dataloader, "sts": sts_dataloader}
    results = [eval_rows(name, loader, model, device)[:3] for name, loader in loaders.items()]
    return sum(results, ())  # one tuple of nine


def model_eval_test_multitask(*arguments):
    """Return predictions and ids of Quora, SST and STS, for rows without labels. Source: the course's evaluation.py."""
    _, para, para_ids, _, sst, sst_ids, _, sts, sts_ids = model_eval_multitask(*arguments)
    return para, para_ids, sst, sst_ids, sts, sts_ids


def test_model_multitask(args, model, device):
    """Predict the dev and test rows of three files each, print the dev scores, write the files `args.sst_dev_out`, ...

    Source: the course's evaluation.py.
    """
    for name, split in product(("sst", "para", "sts"), ("dev", "test")):
        rows = SkeletonRows(read_rows(name, getattr(args, f"{name}_{split}"), split), args, name == "sts")
        loader = torch.utils.data.DataLoader(rows, args.batch_size, collate_fn=rows.collate_fn)
        score, values, ids, *_ = eval_rows(name, loader, model, device)
        if split == "dev":
            print(f"dev {name} {TASKS[name].metric.name}: {score:.3f}")
        write_whole(getattr(args, f"{name}_{split}_out"), prediction_text(TASKS[name], ids, values))
