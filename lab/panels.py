"""What the pictures of the experiments show: for each group a function from its recorded rows to panels (pictures.py).

A function leaves out what was not run. Without anything to draw it returns no panels, and there is no picture.
"""

from statistics import mean, stdev

from lab.numbers import NORMAL_95, seed_noise
from lab.record import recipes
from lab.rows import BERTER_PAPER
from tasks import build_tasks

LAYERS, TIME = "mean number of layers", "milliseconds per example"
AXIS = {"sst": "SST accuracy", "para": "Quora accuracy", "sts": "STS Pearson r", "norm": "norm"}
NAMES = {name: task.title for name, task in build_tasks().items()} | {"norm": "all tasks"}


def spread(values, noise):
    """The mean of the seeds, and their standard deviation; None for no values.

    Few seeds estimate it badly, so it is at least the stated `noise`.
    """
    values = [value for value in values if value is not None]
    return (mean(values), max(noise, stdev(values) if len(values) > 1 else 0)) if values else None


def norm_of(group, runs):
    """The best norm of a recipe, over its seeds."""
    return spread([row["best"]["norm"] for row in runs], seed_noise(group, "norm", runs[0]))


def with_exits(group, runs):
    """The norm of a recipe where rows leave early, over its seeds."""
    norms = [row["exits"]["cross_fitted_norm"]["exit"] for row in runs if row["exits"]]
    return spread(norms, seed_noise(group, "norm", runs[0]))


def drop_empty(panels):
    """The panels that show something."""
    return [panel for panel in panels if panel.get("dots") or panel.get("curves")]


# --- one function for each group ----------------------------------------------------------------------------------


def berter_table2(rows):
    """Ours beside the paper's, for the paper's recipe; ours alone for the best recipe."""
    ours, block, group = recipes(rows), "best recipe: ", "berter-table2"
    paper = {
        name: [norm_of(group, runs), with_exits(group, runs), (BERTER_PAPER[name]["norm"], None)]
        for name, runs in ours.items()
        if name in BERTER_PAPER
    }
    best = {
        name.removeprefix(block): [norm_of(group, runs), with_exits(group, runs), None]
        for name, runs in ours.items()
        if name.startswith(block)
    }
    series = ["full depth", "with early exit", "BERTer (norm of its three scores)"]
    papers, our_own = (
        "BERTer's recipe: [CLS]; siamese [u; v] and squared error, where a name says nothing else",
        "best recipe: mean pooling, concat, our losses",
    )
    panels = [(papers, paper), (our_own, best)]
    return drop_empty([{"title": t, "dots": dots, "series": series, "x": "norm", "wide": True} for t, dots in panels])


def mean_curves(runs, task, policy):
    """A curve of thresholds, averaged over seeds at equal positions of the grid: (layers, scores)."""
    curves = [row["measured"]["exits"]["curves"][task][policy] for row in runs]
    points = list(zip(*(sorted((p["layers"], p["score"]) for p in curve) for curve in curves), strict=False))
    return [mean(x for x, _ in point) for point in points], [mean(y for _, y in point) for point in points]


def exit_thresholds(rows):
    """Score against layers for every training of the exits, one task a panel; all tasks; then all against time."""
    ours = {name: runs for name, runs in recipes(rows).items() if all(row["measured"] for row in runs)}
    panels = []
    for name, task in build_tasks().items():
        curves = {}
        for k, (recipe, runs) in enumerate(ours.items()):
            x, y = mean_curves(runs, name, "lte" if task.is_regression else "confidence")
            curves[recipe] = {"x": x, "y": y, "style": k}
        if "joint" in ours:
            oracle = ours["joint"][0]["measured"]["exits"]["oracle"][name]
            curves["oracle of joint"] = {"x": [oracle["layers"]], "y": [oracle["score"]], "style": 6, "points": True}
        certainty = "learning to exit" if task.is_regression else "confidence"
        panels.append({"title": f"{task.title}, by {certainty}", "x": LAYERS, "y": AXIS[name], "curves": curves})
    chosen, timed = {}, {}
    for k, (recipe, runs) in enumerate(ours.items()):
        points = list(zip(*(row["measured"]["exits"]["chosen"]["auto"] for row in runs), strict=True))
        x, y = ([mean(p[key] for p in point) for point in points] for key in ("layers", "norm"))
        # the right end: all layers
        x = [len(runs[0]["measured"]["exits"]["layer_scores"]["sst"]), *x]
        y = [mean(row["exits"]["cross_fitted_norm"]["full"] for row in runs), *y]
        chosen[recipe] = {"x": x, "y": y, "style": k}
        # one timed seed stands for the recipe: a mean of times needs equal machines
        sweeps = [row["sweep"] for row in runs if row["sweep"]]
        for name in AXIS if sweeps else ():
            points = {s: p if name == "norm" else p["tasks"][name] for s, p in sweeps[0].items() if s != "auto"}
            points = {s: (1000 / p["examples_per_second"], p["score"]) for s, p in points.items()}
            full = points.pop("full depth")
            x, y = zip(*sorted(points.values()), strict=True)
            timed.setdefault(name, {})[recipe] = {"x": x, "y": y, "style": k}
            if recipe == "joint":
                timed[name]["joint without early exit"] = {"x": full[:1], "y": full[1:], "style": 7, "points": True}
    panels.append({"title": "all tasks, thresholds chosen on other dev rows; all layers", "x": LAYERS, "y": "norm"})
    panels[-1]["curves"] = chosen
    for name, curves in timed.items():
        panels.append({"title": f"{NAMES[name]}, one threshold", "x": TIME, "y": AXIS[name], "curves": curves})
    return drop_empty(panels)


def dots_of(rows, values, series, titles):
    """Panels of dots: `values` is a list of functions, each for a panel, from a recipe's runs to its points."""
    ours = recipes(rows)
    panels = []
    for function, (title, x) in zip(values, titles, strict=True):
        dots = {name: points for name, runs in ours.items() if any(points := function(runs))}
        panels.append({"title": title, "dots": dots, "series": series, "x": x})
    return drop_empty(panels)


def slf_ablation(rows):
    """The norm at full depth and with exits."""
    group, series = "slf-ablation", ["full depth", "with early exit"]
    return dots_of(
        rows, [lambda runs: [norm_of(group, runs), with_exits(group, runs)]], series, [("best norm", "norm")]
    )


def embedding_order(rows):
    """The scores of both pair tasks."""
    functions = [
        lambda runs, task=task: [
            spread([row["best"].get(task) for row in runs], seed_noise("embedding-order", task, runs[0]))
        ]
        for task in ("para", "sts")
    ]
    return dots_of(rows, functions, ["_mean"], [("Quora", "accuracy"), ("STS", "Pearson r")])


def smart_when(rows):
    """The score with SMART minus the score without, over the training: a panel for each task."""
    ours, panels = recipes(rows), []
    for name in ("para", "sst", "sts", "norm"):
        curves = {}
        for recipe, runs in ours.items():
            base = ours.get("a tenth of the rows: no SMART" if recipe.startswith("a tenth") else "no SMART")
            if base and "no SMART" not in recipe:
                # seeds that both have
                pairs = [(a, b) for a in runs for b in base if a["seed"] == b["seed"]]
                gains = [[p[name] - q[name] for p, q in zip(a["phases"], b["phases"], strict=True)] for a, b in pairs]
                steps = [(k + 1) / len(gains[0]) for k in range(len(gains[0]))]
                label = recipe.replace("SMART on Quora, ", "Quora, ").replace("SMART on ", "")
                curves[label] = {"x": steps, "y": [mean(points) for points in zip(*gains, strict=True)]}
        panel = {"title": AXIS[name], "x": "share of the training", "y": "with SMART minus without"}
        if curves:
            noise = seed_noise("smart-when", name, ours["no SMART"][0])
            # half of the 95% interval of a difference of two runs
            panels.append(panel | {"curves": curves, "band": NORMAL_95 * noise * 2**0.5})
    return panels


def berter_figures(rows):
    """BERTer's figures 1 to 4."""
    base = rows.get("lr 1e-4, batch 16, dropout 0.3")

    def curve(word, default, key):
        # rows are named "batch 8", "lr 3e-5", ...; the base row stands for the default value
        points = {
            float(name.split()[1]): row for name, row in rows.items() if name.startswith(f"{word} ") and row != base
        }
        points |= {default: base} if base else {}
        x = sorted(points)
        y = [points[value]["last"][key] for value in x]
        errors = [seed_noise("berter-figures", key, points[value]) for value in x]
        # two values make no curve
        return {f"_{word}": {"x": x, "y": y, "errors": errors, "points": len(x) < 3}} if x else {}

    epochs = {}
    if "SST over epochs" in rows:
        y = [phase["sst"] for phase in rows["SST over epochs"]["phases"]]
        epochs = {"_SST": {"x": [0.25 * (k + 1) for k in range(len(y))], "y": y}}
    rate, batch, dropout = curve("lr", 1e-4, "sst"), curve("batch", 16, "norm"), curve("dropout", 0.3, "norm")
    return drop_empty(
        [
            {"title": "figure 1: SST alone, over epochs", "x": "epochs", "y": "SST accuracy", "curves": epochs},
            {"title": "figure 2: learning rate", "x": "learning rate", "y": "SST accuracy", "log": 10, "curves": rate},
            {"title": "figure 3: batch size", "x": "examples in a batch", "y": "norm", "log": 2, "curves": batch},
            {"title": "figure 4: dropout", "x": "dropout before the heads", "y": "norm", "curves": dropout},
        ]
    )


def loss_curve(row, column):
    """A column of a run's losses, smoothed over five log lines: {x, y}, x in training steps."""
    pairs = [
        (x, y) for x, y in zip(row["losses"]["step"], row["losses"].get(column, ()), strict=False) if y is not None
    ]
    steps, values = ([pair[side] for pair in pairs] for side in (0, 1))
    smooth = [mean(values[max(0, k - 4) : k + 1]) for k in range(len(values))]
    return {"x": steps, "y": smooth}


def smarter(rows):
    """SMARTer BERT's figures: learning curves with and without SMART, losses by split, gradient cosines."""

    def block(title):
        return {name.removeprefix(f"{title}: "): row for name, row in rows.items() if name.startswith(f"{title}: ")}

    curves, splits, surgery = block("learning curves"), block("splits"), block("surgery")
    dev = {
        name: {"x": list(range(1, len(row["phases"]) + 1)), "y": [phase["norm"] for phase in row["phases"]], "style": k}
        for k, (name, row) in enumerate(curves.items())
    }
    train = {
        task: {name: loss_curve(row, f"{task} loss") | {"style": k} for k, (name, row) in enumerate(curves.items())}
        for task in ("sst", "para", "sts")
    }
    by_split = {
        f"{name} split": loss_curve(row, "sst loss") | {"style": k + 2} for k, (name, row) in enumerate(splits.items())
    }
    pairs = {"sst-para": "SST and Quora", "sst-sts": "SST and STS", "para-sts": "Quora and STS"}
    cosines = {
        f"cosine, {title}": loss_curve(surgery["PCGrad"], f"cosine {pair}") | {"style": k + 5}
        for k, (pair, title) in enumerate(pairs.items())
        if "PCGrad" in surgery and f"cosine {pair}" in surgery["PCGrad"]["losses"]
    }
    return drop_empty(
        [
            *(
                {"title": f"figure 1: training, {NAMES[task]}", "x": "steps", "y": "loss", "curves": lines}
                for task, lines in train.items()
            ),
            {"title": "figure 1: dev score", "x": "passes over a tenth of the rows", "y": "norm", "curves": dev},
            {"title": "figure 3: training, SST, by data split", "x": "steps", "y": "loss", "curves": by_split},
            {
                "title": "cosine of two tasks' gradients (PCGrad)",
                "x": "steps",
                "y": "cosine",
                "curves": cosines,
                "band": 0,
            },
        ]
    )


def adaptations(rows):
    """Each task's score over the training, and the norm at its end with the number of trained parameters."""
    curves, dots = {"sst": {}, "para": {}, "sts": {}}, {}
    for k, (name, row) in enumerate(rows.items()):
        for task in row["metrics"]["last"]:
            y = [phase[task] for phase in row["phases"]]
            curves[task][name] = {"x": [(i + 1) / len(y) for i in range(len(y))], "y": y, "style": k}
        if len(row["metrics"]["last"]) == 3:  # a run of one task has another norm
            trained = row["measured"]["trained"] / 1e6 if row["measured"] else None
            point = spread([row["last"]["norm"]], seed_noise("adaptations", "norm", row))
            dots[f"{name} ({trained:.2f} M)" if trained else name] = [point]
    dots = dict(sorted(dots.items(), key=lambda item: -item[1][0][0]))
    return drop_empty(
        [
            *({"title": AXIS[t], "x": "share of the training", "curves": lines} for t, lines in curves.items()),
            {"title": "last score (millions of trained parameters)", "x": "norm", "dots": dots, "series": ["_norm"]},
        ]
    )


def score(rows):
    """The norm of each run, and of the ensemble."""
    dots = {name: [norm_of("score", [row])] for name, row in rows.items()}
    return drop_empty([{"title": "best norm", "x": "norm", "dots": dots, "series": ["_norm"]}])


# {group: function from its rows to panels}, and the titles of the pictures
PANELS = {
    "berter-table2": berter_table2,
    "exit-thresholds": exit_thresholds,
    "slf-ablation": slf_ablation,
    "embedding-order": embedding_order,
    "smart-when": smart_when,
    "berter-figures": berter_figures,
    "smarter": smarter,
    "adaptations": adaptations,
    "score": score,
}
BARS = "bars: noise of seeds, assumed for single ones"
TITLES = {
    "berter-table2": f"BERTer's Table 2: best dev score ({BARS})",
    "exit-thresholds": "Early exit: dev score against layers, and against time for one seed of joint",
    "slf-ablation": f"Training layer by layer, at equal compute ({BARS})",
    "embedding-order": f"Pair encodings: mean or [CLS] pooling ({BARS})",
    "smart-when": "What SMART adds to the dev score; the legend names its tasks (grey: 95% of the seeds' noise)",
    "berter-figures": f"BERTer's figures, 2 to 4 after a quarter of an epoch ({BARS})",
    "smarter": "SMARTer BERT's figures",
    "adaptations": f"Layer-level adaptations: dev score and trained parameters ({BARS})",
    "score": f"The best recipe: three seeds and their ensemble ({BARS})",
}
