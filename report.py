"""What a run prints and draws at its end, and `--option evaluate` again: scores, exits, predictions, pictures.

    close_run      dev scores, early exit with cross-fitted thresholds, prediction files
    close_sweep    early exit at several thresholds: score against layers and time

A picture is a PNG of plain numbers: each `plot_` function writes one.
"""

import csv
import io
import textwrap
import time
from pathlib import Path

import numpy as np

from early_exit import FOLDS, UNREACHABLE, ExitInference, cross_fit, layer_scores, scores_at
from evaluation import AtExit, evaluate, mean_norm, predict, predict_exits, write_predictions
from files import write_whole
from parallel import progress_bars
from runs import memory_mib

# colours of the tasks, by their position in the run: well apart for colour-blind readers (Okabe and Ito)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ALL_TASKS, FULL_DEPTH, AUTO = "#333333", "#888888", "#b8860b"
# points nearer to each other than these shares of the axes share one label
NEAR_X, NEAR_Y = 0.09, 0.12


# --- files --------------------------------------------------------------------------------------------------------


def write_csv(path, rows):
    """Write dicts with the same keys as a CSV; real numbers with six significant digits."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    write_whole(path, table.getvalue())


def make_figure(width, height):
    """An empty figure; its size is in inches."""
    # imported here, because it would delay the first training step
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Write a figure as PNG."""
    write_whole(path, lambda out: figure.savefig(out, format="png", dpi=130))


# --- pictures -----------------------------------------------------------------------------------------------------


def clean(axes):
    """Draw a faint grid, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_points(axes, x, y, labels):
    """Write a label below and right of every point, where a rising curve leaves room; neighbours share one label."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    groups = []
    for i in np.argsort(x, kind="stable"):
        for group in groups:
            if abs(x[i] - x[group[0]]) < NEAR_X * (right - left) and abs(y[i] - y[group[0]]) < NEAR_Y * (high - low):
                group.append(i)
                break
        else:
            groups.append([i])
    for group in groups:
        names = [labels[i] for i in group]
        text = ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"
        axes.annotate(text, (x[group[0]], y[group[0]]), (3, -10), textcoords="offset points", fontsize=7.5)


def plot_sweep(path, rows, title):
    """Draw the rows of `sweep`, a panel row per task: score against mean layers, and against time."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    colors = {name: ALL_TASKS if name == "all" else COLORS[k % len(COLORS)] for k, name in enumerate(names)}
    figure = make_figure(9.5, 2.5 * len(names) + 0.6)
    x_labels = {"mean_layers": "mean number of layers", "milliseconds": "milliseconds per example"}
    for name, panels in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        full, *curve, auto = [
            row | {"milliseconds": 1000 / row["examples_per_second"]} for row in rows if row["task"] == name
        ]
        for axes, (key, x_label) in zip(panels, x_labels.items(), strict=True):
            line = axes.axhline(full["score"], color=FULL_DEPTH, linestyle="--", linewidth=1)
            axes.plot(full[key], full["score"], "x", color=FULL_DEPTH)
            x, y = [row[key] for row in curve], [row["score"] for row in curve]
            axes.plot(x, y, "-o", color=colors[name], markersize=4)
            [star] = axes.plot(auto[key], auto["score"], "*", color=AUTO, linestyle="", markersize=9)
            axes.margins(x=0.15, y=0.25)
            axes.autoscale_view()
            axes.set_xlim(left=0)
            label_points(axes, x, y, [row["setting"] for row in curve])
            axes.set_xlabel(x_label)
            clean(axes)
        panels[0].set_ylabel(f"{name}\n{full['metric']}" if name != "all" else "all tasks\nnorm")
    figure.suptitle(f"{title}\npoints: exit thresholds", fontsize=11)
    figure.legend([line, star], ["full depth", "auto"], loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    save(figure, path)


def plot_exits(path, shares, title):
    """Draw the share of rows that left at each exit. `shares` is {task: [L]}."""
    figure = make_figure(0.8 + 3.4 * len(shares), 3.2)
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for k, (axes, (name, share)) in enumerate(zip(panels, shares.items(), strict=True)):
        layers = np.arange(1, len(share) + 1)
        bars = axes.bar(layers, 100 * np.asarray(share), color=COLORS[k % len(COLORS)])
        axes.bar_label(bars, fmt="%.0f", fontsize=8 if len(share) <= 8 else 7, padding=1)
        axes.set_title(f"{name}: mean {float(layers @ share):.2f} of {len(share)} layers", fontsize=10)
        axes.set_xticks(layers)
        axes.set_xlabel("exit after layer")
        axes.margins(y=0.1)
        clean(axes)
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel("rows (%)")
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def plot_layer_scores(path, scores, metrics, title):
    """Draw the score of each exit if all rows left there. `scores` is {task: [L]}, `metrics` {task: metric name}."""
    figure = make_figure(6.4, 3.8)
    axes = figure.subplots()
    for k, (name, values) in enumerate(scores.items()):
        layers = np.arange(1, len(values) + 1)
        color = COLORS[k % len(COLORS)]
        axes.plot(layers, values, "-o", color=color, label=f"{name} ({metrics[name]})", markersize=4)
    axes.set_xticks(layers)
    axes.set_xlabel("exit after layer")
    axes.set_ylabel("score")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title(title, fontsize=11)
    clean(axes)
    save(figure, path)


def plot_confusion(path, confusion, label_names, title):
    """Draw a confusion matrix: counts, and the share of each gold class as the colour. Shapes: [classes, classes]."""
    confusion, classes = np.asarray(confusion), range(len(label_names))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = 2.6 + 0.9 * len(label_names)
    figure = make_figure(size + 0.6, size)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for gold in classes:
        for predicted in classes:
            color = "white" if shares[gold, predicted] > 0.5 else "black"
            text = f"{confusion[gold, predicted]}\n{shares[gold, predicted]:.0%}"
            axes.text(predicted, gold, text, ha="center", va="center", color=color, fontsize=9)
    names = [textwrap.fill(name, 10) for name in label_names]
    axes.set_xticks(classes, names, fontsize=8)
    axes.set_yticks(classes, names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the gold class", shrink=0.8)
    save(figure, path)


# --- tables -------------------------------------------------------------------------------------------------------


def score_table(tasks, metrics):
    """The lines of a table of dev scores; `metrics` is {task: {metric: number}}."""
    lines = [f"{'task':<18}{'metric':<10}{'dev':>7}{'majority':>10}{'positive':>10}{'macro F1':>10}{'layers':>8}"]
    for name, task in tasks.items():
        columns = [metrics[name].get(key) for key in ("majority", "positive_rate", "macro_f1")]
        cells = "".join(f"{'':>10}" if value is None else f"{value:>10.3f}" for value in columns)
        main, layers = metrics[name][task.metric.name], metrics[name]["mean_layers"]
        lines.append(f"{task.title:<18}{task.metric.name:<10}{main:>7.3f}{cells}{layers:>8.2f}")
    return lines


def exit_table(all_exits, record):
    """The lines of a table of early exit, from the `exits` record of summary.json."""
    depth = len(next(iter(record["shares"].values())))
    row = "{:<18}{:<12}{:>10}{:>12}{:>12}{:>8}{:>8}"
    lines = [
        f"early exit on dev, in {FOLDS} parts: the rows of a part leave by thresholds chosen on the other parts",
        row.format("task", "leaves by", "threshold", "full depth", "with exits", "layers", "saved"),
    ]

    def add(title, policy, threshold, full, left, layers):
        saved = f"{1 - layers / depth:.0%}"
        lines.append(row.format(title, policy, threshold, f"{full:.3f}", f"{left:.3f}", f"{layers:.2f}", saved))

    full, left, layers = (record["cross_fitted"][key] for key in ("full", "exit", "mean_layers"))
    for name, task_exits in all_exits.items():
        threshold = record["thresholds"][name]
        threshold = "never" if threshold == UNREACHABLE else f"{threshold:.4f}"
        add(task_exits.task.title, record["policies"][name], threshold, full[name], left[name], layers[name])
    norm = record["cross_fitted_norm"]
    add("norm, all tasks", "", "", norm["full"], norm["exit"], record["cross_fitted_layers"])
    return lines


# --- the end of a run ---------------------------------------------------------------------------------------------


def score_exits(tasks, all_exits, settings):
    """Choose the thresholds that a run keeps, and score early exit with cross-fitted ones: for summary.json.

    `all_exits` is {task: AllExits} of dev.
    """
    thresholds, held_out = settings.complete(all_exits), cross_fit(all_exits, settings)
    policies = settings.policies
    results = {name: scores_at(task_exits, policies[name], held_out[name]) for name, task_exits in all_exits.items()}
    kept = {name: scores_at(task_exits, policies[name], thresholds[name]) for name, task_exits in all_exits.items()}
    by_layer = {name: layer_scores(task_exits).tolist() for name, task_exits in all_exits.items()}
    full = {name: scores[-1] for name, scores in by_layer.items()}
    left = {name: result.score for name, result in results.items()}
    layers = {name: result.mean_layers for name, result in results.items()}
    return {
        "policies": policies,
        "thresholds": thresholds,
        "cross_fitted": {"full": full, "exit": left, "mean_layers": layers},
        "cross_fitted_norm": {"full": mean_norm(tasks, full), "exit": mean_norm(tasks, left)},
        "cross_fitted_layers": sum(layers.values()) / len(layers),
        "shares": {name: result.shares.tolist() for name, result in kept.items()},
        "layer_scores": by_layer,
    }


def close_exits(model, datasets, folder, settings, options):
    """Choose the exit thresholds and print and draw what they do. Returns (inference, record for summary.json)."""
    tasks = {name: data.task for name, data in datasets.items()}
    all_exits = {name: predict_exits(model, data, **options) for name, data in datasets.items()}
    record = score_exits(tasks, all_exits, settings)
    print("\n".join(exit_table(all_exits, record)))
    metrics = {name: task.metric.name for name, task in tasks.items()}
    plot_exits(
        folder / "exits.png", record["shares"], "Where the dev rows leave, with the thresholds that the run keeps"
    )
    plot_layer_scores(folder / "layer-scores.png", record["layer_scores"], metrics, "Dev score if all rows left there")
    return ExitInference(settings.policies, record["thresholds"]), record


def close_run(model, data, folder, options, settings=None, show_bar=False, known=None):
    """Score the model on dev, with exits too where there are settings; write predictions and pictures into `folder`.

    `data` is {task: {split: Dataset}}; `options` are arguments of `predict`. `known` is the result of `evaluate` for
    this model, if there is one. A run with exits evaluates again, in order to measure the time.
    Returns (scores as plain data, the `exits` record of summary.json or None).
    """
    folder = Path(folder)
    dev = {name: splits["dev"] for name, splits in data.items()}
    tasks = {name: dataset.task for name, dataset in dev.items()}
    started = time.perf_counter()
    scores, predictions = known if known and not settings else evaluate(model, dev, **options)
    seconds, infer, exit_record = time.perf_counter() - started, AtExit(), None
    for warning in scores.warnings:
        print(f"warning: {warning}")
    print("\n".join(score_table(tasks, scores.tasks)))
    print(f"raw {scores.raw:.4f}   norm {scores.norm:.4f}")
    for name, metrics in scores.tasks.items():
        if "confusion" in metrics:
            title = f"{tasks[name].title}, dev"
            plot_confusion(folder / f"confusion-{name}.png", metrics["confusion"], tasks[name].label_names, title)
    if settings:
        infer, exit_record = close_exits(model, dev, folder, settings, options)
        started = time.perf_counter()
        left, predictions = evaluate(model, dev, infer=infer, **options)
        exit_record |= {"dev": left.record(), "seconds": {"full": seconds, "exit": time.perf_counter() - started}}
        print(f"seconds for dev: {seconds:.1f} at full depth, {exit_record['seconds']['exit']:.1f} with exits")
    for name, splits in data.items():
        for split in ("dev", "test"):
            predicted = predictions[name] if split == "dev" else None
            # rows without a label or with an empty text are predicted, but not scored
            if predicted is None or len(predicted.rows) < len(splits[split]):
                predicted = predict(model, splits[split], infer=infer, show_bar=show_bar, **options)
            write_predictions(folder / "predictions", predicted, split)
    print(f"predictions: {folder / 'predictions'}")
    return scores.record(), exit_record


def copy_predictions(folder, outputs):
    """Copy prediction files of a run; `outputs` has entries such as "sst-dev=FILE", from the flag --sst_dev_out."""
    for key, _, path in (entry.partition("=") for entry in outputs or ()):
        source = Path(folder) / "predictions" / f"{key}-output.csv"
        # a function, since only the first process has the file
        write_whole(path, lambda out, source=source: out.write(source.read_bytes()))


def finish(parts, recorder):
    """Evaluate the best model, write its predictions, pictures and the summary."""
    folder, history = recorder.folder, recorder.history
    folder.load_best(parts.model)
    print(f"\nbest model: {history.best_phase} (last phase: norm {history.last_scores['norm']:.4f})")
    started = time.monotonic()
    bars = progress_bars()
    scores, exit_record = close_run(
        parts.model, parts.data, folder.path, parts.inference(), parts.exit_settings, bars, recorder.best_evaluation
    )
    counted = exit_record["dev"] if exit_record else scores
    folder.summary(
        {
            "best": {"phase": history.best_phase, **scores},
            "last": history.last_scores,
            "phase_norms": history.scores,
            "steps": history.total_steps,
            "train_seconds": round(history.train_seconds, 1),
            "eval_seconds": round(history.eval_seconds, 1),
            "finish_seconds": round(time.monotonic() - started, 1),
            "mean_layers": float(np.mean([metrics["mean_layers"] for metrics in counted["tasks"].values()])),
            "peak_mib": round(memory_mib(parts.precision.device)),
            "exits": exit_record,
        }
    )
    print(f"minutes: training {history.train_seconds / 60:.1f}, evaluation {history.eval_seconds / 60:.1f}")
    recorder.remove_last()


# --- the sweep ----------------------------------------------------------------------------------------------------


def sweep_rows(label, thresholds, all_exits, policies, seconds):
    """The rows of one setting of the thresholds: a dict per task, and one for all tasks.

    `thresholds` is {task: number, or [n]}; `seconds` is {task: time that the real run took}.
    """
    rows = []
    for name, task_exits in all_exits.items():
        result = scores_at(task_exits, policies[name], thresholds[name])
        threshold = float(np.mean(thresholds[name]))
        row = {"setting": label, "task": name, "policy": policies[name], "threshold": threshold}
        row |= {"metric": task_exits.task.metric.name, "score": result.score, "mean_layers": result.mean_layers}
        row |= {"examples_per_second": len(task_exits.rows) / seconds[name]}
        rows.append(row | {f"exit_{i}": float(share) for i, share in enumerate(result.shares, start=1)})
    total = {"setting": label, "task": "all", "policy": "", "threshold": "", "metric": "norm"}
    tasks = {name: task_exits.task for name, task_exits in all_exits.items()}
    total |= {"score": mean_norm(tasks, {row["task"]: row["score"] for row in rows})}
    count = sum(len(task_exits.rows) for task_exits in all_exits.values())
    total |= {"examples_per_second": count / sum(seconds.values())}
    # the other columns are averaged over the tasks
    total |= {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in total}
    return [*rows, total]


def sweep(model, datasets, settings, levels, options):
    """Score and time early exit at several thresholds: full depth, then each level for all tasks, then `auto`.

    `auto` is the choice of the settings: cross-fitted for the scores, chosen on all of dev for the time.
    Scores and layers come from one full pass, the time from a real run of the same rows. Returns a list of dicts.
    """
    all_exits = {name: predict_exits(model, data, **options) for name, data in datasets.items()}
    points = {"full depth": dict.fromkeys(datasets, UNREACHABLE)}
    points |= {f"{level:g}": dict.fromkeys(datasets, level) for level in levels}
    points["auto"] = settings.complete(all_exits)
    rows = []
    for label, thresholds in points.items():
        infer = AtExit() if label == "full depth" else ExitInference(settings.policies, thresholds)
        seconds = {}
        for name, data in datasets.items():
            started = time.perf_counter()
            predict(model, data, all_exits[name].rows, infer=infer, **options)
            seconds[name] = time.perf_counter() - started
        scored = cross_fit(all_exits, settings) if label == "auto" else thresholds
        rows += sweep_rows(label, scored, all_exits, settings.policies, seconds)
    return rows


def close_sweep(model, datasets, folder, settings, levels, options):
    """Sweep the exit threshold of all tasks over `levels`; write the CSV and the picture, and print the table."""
    rows = sweep(model, datasets, settings, levels, options)
    write_csv(folder / "sweep.csv", rows)
    plot_sweep(folder / "sweep.png", rows, "Early exit: dev score against layers and time")
    print(f"{'threshold':<12}{'norm':>8}{'layers':>8}{'ex/s':>8}")
    for row in rows:
        if row["task"] == "all":
            norm, layers, speed = row["score"], row["mean_layers"], row["examples_per_second"]
            print(f"{row['setting']:<12}{norm:>8.4f}{layers:>8.2f}{speed:>8.0f}")
    print(f"sweep: {folder / 'sweep.csv'}, {folder / 'sweep.png'}")
