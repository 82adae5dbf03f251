"""Two kinds of pictures for the tables of results/: curves, and dots with error bars. Both are readable in grey.

A panel is a dict of plain data; a figure is panels side by side, with one legend below. Curves differ in colour, line
style and marker at once. No label is written beside a point, so that no two labels overlap.
"""

import csv
import math

from matplotlib.figure import Figure

from files import write_whole
from lab.panels import AXIS, LAYERS, NAMES, TIME

# colours of different lightness (Okabe and Ito), line styles and markers
STYLES = (
    ("#000000", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#e69f00", "-.", "^"),
    ("#009e73", ":", "D"),
    ("#cc79a7", (0, (5, 1)), "v"),
    ("#56b4e9", (0, (3, 1, 1, 1)), "P"),
    ("#7f7f7f", (0, (1, 1)), "X"),
    ("#d55e00", (0, (7, 2)), "<"),
    ("#882255", (0, (4, 1, 1, 1, 1, 1)), ">"),
)
INCHES, DPI = 9.2, 110
BAND = "#dddddd"
SWEEP = "Early exit, on half of dev: score against layers and time"


def clean(axes, panel):
    """Titles with units, a faint grid, and no frame above and to the right."""
    axes.set_title(panel["title"], fontsize=10)
    axes.set_xlabel(panel["x"], fontsize=9)
    axes.set_ylabel(panel.get("y", ""), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(axes, panel):
    """Draw the curves of a panel: {label: {x, y, errors, style, points}}.

    `points` draws no line. A curve of more than 20 points has about eight markers, at places of its own. `band` of the
    panel is the half height of a grey band around 0, and draws a line at 0.
    """
    if "band" in panel:
        axes.axhspan(-panel["band"], panel["band"], color=BAND, zorder=0)
        axes.axhline(0, color="#7f7f7f", linewidth=0.8, zorder=1)
    for k, (label, curve) in enumerate(panel["curves"].items()):
        color, line, marker = STYLES[curve.get("style", k)]  # one more curve needs one more style
        options = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.4}
        every = len(curve["x"]) // 8 if len(curve["x"]) > 20 else 1
        options["markevery"] = (k * every // len(panel["curves"]), every)
        if curve.get("points"):
            options |= {"linestyle": "", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axes.errorbar(curve["x"], curve["y"], curve.get("errors"), label=label, capsize=2, **options)
    if panel.get("log"):
        axes.set_xscale("log", base=panel["log"])
        ticks = sorted({x for curve in panel["curves"].values() for x in curve["x"]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    clean(axes, panel)


def draw_dots(axes, panel):
    """Draw a line for each label: {label: [(value, error or None), ...]}, one value for each series of the panel."""
    labels = list(panel["dots"])
    for s, series in enumerate(panel["series"]):
        points = [(k, *panel["dots"][label][s]) for k, label in enumerate(labels) if panel["dots"][label][s]]
        color, _, marker = STYLES[s]
        if points:
            rows, values, errors = zip(*points, strict=True)
            # a little lower for each series, so that bars do not cover each other
            rows = [row + 0.2 * (s - (len(panel["series"]) - 1) / 2) for row in rows]
            bars = [error or math.nan for error in errors]
            options = {"color": color, "linestyle": "", "marker": marker, "markersize": 6, "capsize": 3}
            if s:  # a hollow marker does not hide the one below
                options["markerfacecolor"] = "none"
            axes.errorbar(values, rows, xerr=bars, label=series, **options)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.locator_params(axis="x", nbins=6)  # more tick labels would touch each other
    clean(axes, panel)


def draw(path, panels, title):
    """Draw panels into one PNG, two side by side; panels that are `wide` one below the other.

    A label that starts with an underscore is not in the legend.
    """
    columns = 1 if any(panel.get("wide") for panel in panels) else 2
    columns = min(columns, len(panels))
    lines = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    # a line of dots needs .34 inches; curves need 2.9
    heights = [max(0.9 + 0.34 * len(one["dots"]) if "dots" in one else 2.9 for one in line) for line in lines]
    figure = Figure(figsize=(INCHES, sum(heights) + 0.7), layout="constrained", dpi=DPI)
    grid = list(figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights}).flat)
    handles = {}
    for axes, panel in zip(grid, panels, strict=False):
        (draw_dots if "dots" in panel else draw_curves)(axes, panel)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    if handles:
        columns = max(1, min(4, 110 // max(map(len, handles))))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    write_whole(path, lambda out: figure.savefig(out, format="png"))


def draw_sweep(path, results):
    """Draw the sweep of results/exits.md from its CSV: sweep.png for each task and all, sweep-norm.png for all."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    panels = []
    for name in dict.fromkeys(row["task"] for row in rows):
        mine, key = [row for row in rows if row["task"] == name], "norm" if name == "all" else name
        for x, read in (
            (LAYERS, lambda row: float(row["mean_layers"])),
            (TIME, lambda row: 1000 / float(row["examples_per_second"])),
        ):
            curves = {}
            for label, chosen in (
                ("one threshold for all rows, .5 to .999", lambda s: s not in ("full depth", "auto")),
                ("full depth", lambda s: s == "full depth"),
                ("chosen thresholds", lambda s: s == "auto"),
            ):
                points = sorted((read(row), float(row["score"])) for row in mine if chosen(row["setting"]))
                curves[label] = {"x": [p[0] for p in points], "y": [p[1] for p in points], "points": len(points) == 1}
            panels.append({"title": NAMES[key], "x": x, "y": AXIS[key], "curves": curves})
    draw(results / "sweep.png", panels, SWEEP)
    draw(results / "sweep-norm.png", panels[-2:], SWEEP)
