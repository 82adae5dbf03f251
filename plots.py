"""Tables and pictures of an evaluation: the sweep of exit thresholds, exits used, exits' scores, confusion matrix.

Read first: evaluation.py. Every function writes one file, from plain numbers.
"""

import csv
import io
import textwrap

import numpy as np
from matplotlib.figure import Figure

from files import write_whole

COLORS = {"sst": "#0072b2", "cfimdb": "#cc79a7", "para": "#d55e00", "sts": "#009e73", "all": "#333333"}
# points nearer than these shares of the axes share one label
NEAR_X, NEAR_Y = 0.09, 0.12


def write_csv(path, rows):
    """Write dicts with the same keys as a CSV; real numbers with six significant digits."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    write_whole(path, table.getvalue())


def save(figure, path):
    """Write a figure as PNG."""
    write_whole(path, lambda out: figure.savefig(out, format="png", dpi=130))


def clean(axes):
    """Leave a faint grid and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_points(axes, x, y, labels):
    """Write a label below and right of every point, where a rising curve leaves room; neighbours share one."""
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


def is_number(text):
    """Whether a setting is one threshold, a point of the curve, and not a choice of its own such as auto."""
    return text.replace(".", "", 1).isdigit()


def others(rows):
    """The rows of settings that are no single threshold."""
    return [row for row in rows if not is_number(row["setting"])]


def milliseconds(row):
    """Time per example."""
    return 1000 / row["examples_per_second"]


def plot_sweep(path, rows, title):
    """Draw evaluation.sweep's rows: score against mean layers and against time, the full model as a line."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(9.5, 2.5 * len(names) + 0.6), layout="constrained")
    for name, (by_layers, by_time) in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        full, *mine = [row for row in rows if row["task"] == name]
        curve = [row for row in mine if is_number(row["setting"])]
        for axes, x_of in ((by_layers, lambda row: row["mean_layers"]), (by_time, milliseconds)):
            line = axes.axhline(full["score"], color="#888888", linestyle="--", linewidth=1)
            axes.plot(x_of(full), full["score"], "x", color="#888888")
            x, y = [x_of(row) for row in curve], [row["score"] for row in curve]
            axes.plot(x, y, "-o", color=COLORS[name], markersize=4)
            stars = [
                axes.plot(x_of(row), row["score"], marker, color="#b8860b", linestyle="", markersize=9)[0]
                for row, marker in zip(others(mine), "*PDvs", strict=False)
            ]
            axes.margins(x=0.15, y=0.25)
            axes.autoscale_view()
            axes.set_xlim(left=0)
            label_points(axes, x, y, [row["setting"] for row in curve])
            clean(axes)
        by_layers.set_ylabel(f"{name}\n{full['metric']}" if name != "all" else "all tasks\nnorm")
        by_layers.set_xlabel("mean number of layers")
        by_time.set_xlabel("milliseconds per example")
    figure.suptitle(f"{title}\npoints: exit thresholds", fontsize=11)
    meanings = ["full depth", *(row["setting"] for row in others(mine))]
    figure.legend([line, *stars], meanings, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    save(figure, path)


def plot_exits(path, shares, title):
    """Draw the share of rows that left at each exit. `shares` is {task: [L]}."""
    figure = Figure(figsize=(0.8 + 3.4 * len(shares), 3.2), layout="constrained")
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        layers = np.arange(1, len(share) + 1)
        bars = axes.bar(layers, 100 * np.asarray(share), color=COLORS[name])
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
    """Draw each exit's score if every row left there. `scores` is {task: [L]}, `metrics` {task: metric name}."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, values in scores.items():
        layers = np.arange(1, len(values) + 1)
        axes.plot(layers, values, "-o", color=COLORS[name], label=f"{name} ({metrics[name]})", markersize=4)
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
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
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


def plot_curves(path, panels, title):
    """Draw measured curves, panels side by side. `panels` is a list of (x label, y label, {name: (x, y)})."""
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, (x_label, y_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, (x, y)), style in zip(curves.items(), ("-o", "--", ":"), strict=False):
            axes.plot(x, y, style, label=name, markersize=4)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
        clean(axes)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
