"""What single pages have beside their table: comparisons, early exit at many thresholds, a confusion matrix."""

import csv
import io
from statistics import mean

from lab.rows import GROUPS, recipe_of
from lab.tables import markdown
from tasks import build_tasks

# --- comparisons by paired bootstrap ------------------------------------------------------------------------------

COMPARISON = ("difference", "95% interval", "not better in")


def comparison_cells(name, result):
    """The cells of a comparison by paired bootstrap."""
    interval = f"{result['low']:+.4f} to {result['high']:+.4f}"
    return [name, f"{result['difference']:+.4f}", interval, f"{result['not_better']:.1%}"]


def comparison_table(rows):
    """The comparisons with transformers, or an empty text if there are none."""
    lines = []
    for row in rows.values():
        mean_of = row.get("mean_against_peer", {})
        for name, result in (
            (row["name"], row.get("against_peer")),
            (f"{recipe_of(row['name'])}, mean of {mean_of.get('runs')} seeds", mean_of),
        ):
            lines += [comparison_cells(name, result)] if result else []
    if not lines:
        return ""
    peers = sum(name.startswith("transformers, seed ") for name in rows)
    note = (
        f"`difference` is the run's norm minus the mean norm of transformers' {peers} seed{'s' * (peers > 1)}, all at "
        "their best epochs. The interval and the last column come from a paired bootstrap: 10,000 times, dev rows are "
        "drawn with replacement, the same rows for both sides, and the difference is computed again. The last column "
        "is the share of these differences that are not above 0. The runs stay the same, so the interval does not "
        "cover other seeds."
    )
    return "\n".join([*markdown(["run", *COMPARISON], lines), "", note]) + "\n"


# --- early exit at many thresholds --------------------------------------------------------------------------------


def sweep_notes(rows):
    """What the chosen thresholds of a run's exits gain and cost, a paragraph for each run that was timed."""
    parts = []
    for row in rows.values():
        if row.get("sweep"):
            full, chosen = row["sweep"]["full depth"], row["sweep"]["auto"]
            score, layers, speed = (chosen[k] / full[k] for k in ("score", "mean_layers", "examples_per_second"))
            text = (
                f"{row['name']}: thresholds that were chosen without the dev rows that they are scored on give norm "
                f"{chosen['score']:.4f} against {full['score']:.4f} at full depth ({score:.1%}). They use "
                f"{chosen['mean_layers']:.2f} layers instead of {full['mean_layers']:.2f} ({layers:.0%}) and predict "
                f"{speed:.2f} times as many examples a second. With a threshold of .999 the mean is "
                f"{row['sweep']['0.999']['mean_layers']:.2f} layers."
            )
            parts += [text, ""]
    return parts


def exit_points(rows):
    """Every measured setting of the exits: (run, task, kind of certainty, setting, score, layers)."""
    for name, row in rows.items():
        exits = (row.get("measured") or {}).get("exits") or {}
        for task, kinds in exits.get("curves", {}).items():
            for kind, curve in kinds.items():
                yield from ((name, task, kind, f"{p['threshold']:g}", p["score"], p["layers"]) for p in curve)
        for kind, points in exits.get("chosen", {}).items():
            for point in points:
                setting = f"chosen, may lose {point['allowed']:.2%}"
                yield from ((name, t, kind, setting, p["score"], p["layers"]) for t, p in point["tasks"].items())
                yield name, "all", kind, setting, point["norm"], point["layers"]
        yield from ((name, t, "oracle", "oracle", p["score"], p["layers"]) for t, p in exits.get("oracle", {}).items())


def exits_csv(rows):
    """The CSV of all settings of the exits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "task", "certainty", "setting", "score", "layers"])
    writer.writerows((*words, f"{score:.6g}", f"{layers:.6g}") for *words, score, layers in exit_points(rows))
    return out.getvalue()


def time_table(rows):
    """The time of the dev rows at several thresholds, as the mean over the runs that were timed."""
    sweeps, lines = [row["sweep"] for row in rows.values() if row.get("sweep")], []
    tasks = list(sweeps[0]["full depth"]["tasks"]) if sweeps else []
    for setting in sweeps[0] if sweeps else ():
        points = [sweep[setting] for sweep in sweeps]
        times = [1000 / point["examples_per_second"] for point in points]
        full = [1000 / sweep["full depth"]["examples_per_second"] for sweep in sweeps]
        cells = [setting]
        for task in tasks:
            ours = [point["tasks"][task] for point in points]
            cells += [
                f"{mean(p['score'] for p in ours):.3f}",
                f"{mean(1000 / p['examples_per_second'] for p in ours):.2f}",
            ]
        norm, layers = (mean(point[key] for point in points) for key in ("score", "mean_layers"))
        share = mean(time / one for time, one in zip(times, full, strict=True))
        lines.append([*cells, f"{norm:.3f}", f"{layers:.2f}", f"{mean(times):.2f}", f"{share:.2f}"])
    head = ["threshold for all tasks", *(f"{task}: {what}" for task in tasks for what in ("score", "ms"))]
    head += ["norm", "layers", "ms per example", "share of full depth's"]
    title = "### Time, measured alone on the machine (auto: chosen thresholds; mean over the timed runs)"
    missing = "Not run: it needs the saved models on an idle machine."
    return [title, "", *(markdown(head, lines) if lines else [missing]), ""]


def exits_section(rows):
    """Tables of the settings of the baseline's exits: fixed thresholds, chosen ones and the oracle; then their time."""
    baseline, points = GROUPS["exit-thresholds"].baseline, {}
    for name, task, kind, setting, score, layers in exit_points(rows):
        if recipe_of(name) == baseline:
            points.setdefault((kind, setting), {}).setdefault(task, []).append((score, layers))
    parts = []
    for title, kind in (
        ("one threshold for the confidence", "confidence"),
        ("thresholds chosen on other dev rows (learning to exit for STS, confidence otherwise)", "auto"),
        ("thresholds chosen on other dev rows (learning to exit for all tasks)", "lte"),
        ("oracle, the first exit that no other exit beats", "oracle"),
    ):
        chosen = {s: one for (k, s), one in points.items() if k == kind and (kind != "lte" or s.startswith("chosen"))}
        tasks = [task for task in ("sst", "para", "sts", "all") if any(task in one for one in chosen.values())]
        head = ["threshold", *(f"{'norm' if t == 'all' else t}: {what}" for t in tasks for what in ("score", "layers"))]
        lines = []
        for setting, one in chosen.items():
            means = [mean(p[side] for p in one[task]) for task in tasks for side in (0, 1)]
            lines.append([setting.replace("1.01", "never"), *(f"{value:.3f}" for value in means)])
        parts += [f"### {baseline}: {title}", "", *markdown(head, lines), ""] if lines else []
    return [*parts, *time_table(rows), *confusion_table(rows)] if rows else []


# --- confusion and ensemble ---------------------------------------------------------------------------------------


def confusion_table(rows):
    """The confusion matrix of the last row that has one. Source: SMARTer BERT, figure 2."""
    with_classes = [row for row in rows.values() if "confusion" in row["metrics"]["best"].get("sst", {})]
    if not with_classes:
        return []
    names, row = build_tasks()["sst"].label_names, with_classes[-1]
    counts = row["metrics"]["best"]["sst"]["confusion"]
    lines = [[gold, *map(str, line)] for gold, line in zip(names, counts, strict=True)]
    title = f"### SST rows of dev by label and prediction: {row['name']}"
    return [title, "", *markdown(["label", *(f"predicted {name}" for name in names)], lines), ""]


def score_section(rows):
    """The confusion matrix, and the ensemble's comparisons."""
    parts = confusion_table(rows)
    for row in rows.values():
        against = (row.get("measured") or {}).get("against") or {}
        lines = [comparison_cells(name, result) for name, result in against.items()]
        title = f"### {row['name']}: its norm minus that of its members, by paired bootstrap over the dev rows"
        parts += [title, "", *markdown(["compared with", *COMPARISON], lines), ""] if lines else []
    return parts


# {group: function from its rows to the lines between its table and its answer}
SECTIONS = {"exits": sweep_notes, "exit-thresholds": exits_section, "score": score_section}
