"""What a run says at its end, and `--option evaluate` says again: scores, exits, predictions, pictures.

Read first: evaluation.py, early_exit.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from early_exit import ExitInference, choose_thresholds, halves, layer_scores, scores_at
from evaluation import METRICS, evaluate, full_depth, normalise, predict, predict_exits, sweep, write_predictions
from plots import plot_confusion, plot_exits, plot_layer_scores, plot_sweep, write_csv


@dataclass(frozen=True)
class ExitSettings:
    """How a run leaves early: {task: policy}, {task: threshold, or None: choose it}, and the loss a choice may cost."""

    policies: dict
    thresholds: dict
    loss: float


def score_table(tasks, metrics):
    """Lines of a table of dev scores."""
    lines = [f"{'task':<18}{'metric':<10}{'dev':>7}{'majority':>10}{'positive':>10}{'macro F1':>10}{'layers':>8}"]
    for name, task in tasks.items():
        mine = metrics[name]
        cells = [mine.get(key) for key in ("majority", "positive_rate", "macro_f1")]
        told = "".join(f"{'':>10}" if cell is None else f"{cell:>10.3f}" for cell in cells)
        lines.append(f"{task.title:<18}{task.metric:<10}{mine[task.metric]:>7.3f}{told}{mine['mean_layers']:>8.2f}")
    return lines


def plain(scores):
    """Scores as plain data."""
    return {"tasks": scores.tasks, "raw": scores.raw, "norm": scores.norm}


def mean_norm(tasks, values):
    """norm of {task: main metric}."""
    return sum(normalise(tasks[name], value) for name, value in values.items()) / len(values)


def choose_exits(datasets, exits, settings):
    """Thresholds of all tasks, chosen on one half of dev where none is given, and what they do on the other half.

    Returns ({task: threshold}, {"full": {task: score}, "exit": {task: score}, "mean_layers": {task: layers}}).
    """
    parts = {name: [found.take(half) for half in halves(len(found.rows))] for name, found in exits.items()}
    metrics = {name: METRICS[data.task.metric] for name, data in datasets.items()}

    def scaled(name):
        return lambda values, labels: normalise(datasets[name].task, metrics[name](values, labels))

    unknown = {name: parts[name][0] for name, given in settings.thresholds.items() if given is None}
    chosen = choose_thresholds(unknown, settings.policies, {name: scaled(name) for name in unknown}, settings.loss)
    thresholds, other = settings.thresholds | chosen, {"full": {}, "exit": {}, "mean_layers": {}}
    for name, (_, reported_on) in parts.items():
        found = scores_at(reported_on, settings.policies[name], thresholds[name], metrics[name])
        other["full"][name] = float(layer_scores(reported_on, metrics[name])[-1])
        other["exit"][name], other["mean_layers"][name] = found.score, found.mean_layers
    return thresholds, other


def close_exits(model, datasets, folder, settings, how):
    """Choose thresholds, draw what the exits do, and return (inference, what to write into the summary)."""
    tasks = {name: data.task for name, data in datasets.items()}
    exits = {name: predict_exits(model, data, **how) for name, data in datasets.items()}
    thresholds, other = choose_exits(datasets, exits, settings)
    shares, by_layer = {}, {}
    for name, task in tasks.items():
        metric = METRICS[task.metric]
        shares[name] = scores_at(exits[name], settings.policies[name], thresholds[name], metric).shares
        by_layer[name] = layer_scores(exits[name], metric)
    plot_exits(folder / "exits.png", shares, "Where the dev examples leave")
    metrics = {name: task.metric for name, task in tasks.items()}
    plot_layer_scores(folder / "layer-scores.png", by_layer, metrics, "Dev score if every example left after a layer")
    full, left = (mean_norm(tasks, other[key]) for key in ("full", "exit"))
    layers = sum(other["mean_layers"].values()) / len(tasks)
    print(
        f"exits, chosen on one half of dev and reported on the other: norm {left:.4f} of {full:.4f} at full depth "
        f"({left / full:.1%}) with {layers:.2f} of {model.depth} layers ({1 - layers / model.depth:.0%} saved)"
    )
    for name in tasks:
        print(
            f"  {name:<7}{settings.policies[name]:<11}threshold {thresholds[name]:.4f}  full {other['full'][name]:.3f}"
            f"  exit {other['exit'][name]:.3f}  layers {other['mean_layers'][name]:.2f}"
        )
    record = {"policies": settings.policies, "thresholds": thresholds, "other_half": other}
    record |= {"other_half_norm": {"full": full, "exit": left}, "other_half_layers": layers}
    record |= {"shares": {name: share.tolist() for name, share in shares.items()}}
    record |= {"layer_scores": {name: scores.tolist() for name, scores in by_layer.items()}}
    return ExitInference(settings.policies, thresholds, how["batch_size"]), record


def close(model, data, folder, how, settings=None, progress=False, known=None):
    """Score the model on dev, with exits too where there are settings; write predictions and pictures into `folder`.

    `data` is {task: {split: Dataset}}; `how` goes to `predict`; `known` is what evaluate returned of this model, if it
    was asked before: with exits it is asked again, for the time. Returns (scores as plain data, exits or None).
    """
    folder = Path(folder)
    dev = {name: splits["dev"] for name, splits in data.items()}
    tasks = {name: dataset.task for name, dataset in dev.items()}
    started = time.perf_counter()
    scores, known = known if known and not settings else evaluate(model, dev, **how)
    seconds, infer, exits = time.perf_counter() - started, full_depth, None
    for warning in scores.warnings:
        print(f"warning: {warning}")
    print("\n".join(score_table(tasks, scores.tasks)))
    print(f"raw {scores.raw:.4f}   norm {scores.norm:.4f}")
    for name, metrics in scores.tasks.items():
        if "confusion" in metrics:
            title = f"{tasks[name].title}, dev"
            plot_confusion(folder / f"confusion-{name}.png", metrics["confusion"], tasks[name].label_names, title)
    if settings:
        infer, exits = close_exits(model, dev, folder, settings, how)
        started = time.perf_counter()
        left, known = evaluate(model, dev, infer=infer, **how)
        exits |= {"dev": plain(left), "seconds": {"full": seconds, "exit": time.perf_counter() - started}}
        print(f"all of dev with exits: raw {left.raw:.4f}   norm {left.norm:.4f}")
        print(f"seconds: full depth {exits['seconds']['full']:.1f}, with exits {exits['seconds']['exit']:.1f}")
    for name, splits in data.items():
        for split in ("dev", "test"):
            predictions = known[name] if split == "dev" else None
            if predictions is None or len(predictions.rows) < len(splits[split]):
                predictions = predict(model, splits[split], infer=infer, progress=progress, **how)
            write_predictions(folder / "predictions", predictions, split)
    print(f"predictions: {folder / 'predictions'}")
    return plain(scores), exits


def close_sweep(model, datasets, folder, settings, levels, how):
    """Sweep one threshold for all tasks over `levels`; write the CSV and the picture.

    `auto`, the thresholds chosen task by task on one half of dev, is a point too, so all points are measured on the
    other half.
    """
    exits = {name: predict_exits(model, data, **how) for name, data in datasets.items()}
    points = {f"{level:g}": dict.fromkeys(datasets, level) for level in levels}
    points["auto"], _ = choose_exits(datasets, exits, settings)
    reported = {name: found.take(halves(len(found.rows))[1]) for name, found in exits.items()}
    rows = sweep(model, datasets, reported, settings.policies, points, **how)
    write_csv(folder / "sweep.csv", rows)
    plot_sweep(folder / "sweep.png", rows, "Early exit: dev score against layers and time")
    print(f"{'threshold':<12}{'norm':>8}{'layers':>8}{'ex/s':>8}")
    for row in rows:
        if row["task"] == "all":
            print(
                f"{row['setting']:<12}{row['score']:>8.4f}{row['mean_layers']:>8.2f}{row['examples_per_second']:>8.0f}"
            )
    print(f"sweep: {folder / 'sweep.csv'}, {folder / 'sweep.png'}")
