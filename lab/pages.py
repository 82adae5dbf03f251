"""The pages of the experiments: results/NAME.md, .csv and .png, made of the recorded rows and of nothing else.

A page opens with its question. A table follows, with a line for each recipe (the mean of its seeds), then the budget,
the picture and the answer. A row without a record is marked "not run".
"""

import csv
import io
from statistics import mean, stdev

from files import write_whole
from lab.compare import recipes_of
from lab.panels import PANELS, TITLES
from lab.pictures import draw
from lab.rows import GROUPS, command_of, own_words, split_name
from lab.tables import commit_list, markdown
from tasks import build_tasks

# one dev run's standard deviation, from seeds of long runs
NOISE = 0.0055


def task_score(name):
    """The function that reads a task's score after the last phase from a row."""
    return lambda row: row["last"].get(name)


def exits_of(row):
    """A run's record of early exit with thresholds that were cross-fitted on dev, or nothing."""
    exits = row.get("exits") or {}
    return {"norm": exits["cross_fitted_norm"]["exit"], "layers": exits["cross_fitted_layers"]} if exits else {}


def measured(key):
    """The function that reads one measured number of a row."""
    return lambda row: (row.get("measured") or {}).get(key)


def oracle(key):
    """The function that reads the oracle's mean score or layers over the tasks."""

    def read(row):
        exits = (row.get("measured") or {}).get("exits") or {}
        return mean(one[key] for one in exits["oracle"].values()) if exits else None

    return read


def stages(row):
    """The stages of Smart Alternating in the order of the epochs, as letters."""
    return "".join(letter for phase in row["phases"] for letter in "AB" if f"stage {letter} (" in phase["phase"])


def paper_number(key):
    """The function that reads a number of the paper's table; it needs no run."""
    return lambda paper: paper.get(key)


# {column: (format, function of a recorded row)}
COLUMNS = {
    "sst": (".3f", task_score("sst")),
    "para": (".3f", task_score("para")),
    "sts": (".3f", task_score("sts")),
    "norm": (".3f", lambda row: row["last"]["norm"]),
    "best norm": (".3f", lambda row: row["best"]["norm"]),
    "Quora positive": (".2f", lambda row: row["positive_rate"]),
    "norm with exits": (".3f", lambda row: exits_of(row).get("norm")),
    "layers": (".2f", lambda row: exits_of(row).get("layers")),
    "oracle's layers": (".2f", oracle("layers")),
    "stages": ("", stages),
    "train sst": (".3f", lambda row: ((row.get("measured") or {}).get("train_scores") or {}).get("sst")),
    "compute": (".2f", measured("compute")),
    "trained": (",.0f", measured("trained")),
    "train min": (".1f", lambda row: row["train_seconds"] / 60),
    "eval min": (".1f", lambda row: row["eval_seconds"] / 60),
    "MiB": (".0f", lambda row: row["peak_mib"]),
}
PAPER_COLUMNS = {
    f"paper: {key}": (".3f", paper_number(key)) for key in ("sst", "para", "sts", "norm", "printed", "h:min")
}
NOTES = {
    "best norm": "`best norm` is the highest norm of any phase, so it was chosen on the same dev data",
    "Quora positive": "`Quora positive` is the share of pairs that the model calls paraphrases (in dev .378 are)",
    "norm with exits": "`norm with exits` is the norm where rows leave early, by thresholds that their part of dev did "
    "not choose",
    "layers": "`layers` is the mean number of layers that these rows use",
    "oracle's layers": "`oracle's layers` is the mean if each row left at its first exit that no other exit beats",
    "stages": "`stages` are those of Smart Alternating, A for the last exit and B for all exits",
    "train sst": "`train sst` is the accuracy of the kept model on 1,000 training rows",
    "compute": "`compute` counts layer passes (forward 1, backward 2), in epochs of plain training",
    "trained": "`trained` is the number of parameters that train",
    "difference": "`difference` is the norm of the kept model minus the baseline's, with a 95% interval by paired "
    "bootstrap over the dev rows, which does not cover other seeds",
}


# --- the table ----------------------------------------------------------------------------------------------------


def cell(values, form):
    """The text of a cell: the mean of the seeds, with their standard deviation where there are several."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    if isinstance(values[0], str):
        return values[0]
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 and stdev(values) else ""
    return f"{mean(values):{form}}{spread}"


def difference_cell(runs):
    """The text of the comparison with the baseline."""
    result = runs[0].get("against_baseline")
    return f"{result['difference']:+.3f} ({result['low']:+.3f} to {result['high']:+.3f})" if result else ""


def table_lines(group, rows):
    """The column names and the cells of a page's table."""
    content, recipes = GROUPS[group], recipes_of(list(rows.values()))
    paper_columns = [key for key in PAPER_COLUMNS if any(key[7:] in one for one in content.paper.values())]
    columns = [key for key in content.columns if any(COLUMNS[key][1](row) not in (None, "") for row in rows.values())]
    compared = any("against_baseline" in row for row in rows.values())
    head = ["run", "seeds", *columns, *(["difference"] if compared else []), *paper_columns, "flags"]
    lines = []
    for name in (name for name in content.rows if split_name(name)[2] == 1):
        recipe = name.partition(", seed ")[0]
        runs = recipes.get(recipe, [])
        cells = [cell([COLUMNS[key][1](row) for row in runs], COLUMNS[key][0]) for key in columns]
        cells += [difference_cell(runs)] if compared and runs else [""] * compared
        paper = content.paper.get(recipe, {})
        cells += [cell([PAPER_COLUMNS[key][1](paper)], PAPER_COLUMNS[key][0]) for key in paper_columns]
        flags = " ".join(own_words(group, name))
        lines.append([recipe, f"{len(runs)}" if runs else "not run", *cells, f"`{flags}`" if flags else ""])
    return head, lines


def caption(group, rows, head):
    """What the columns mean, the common flags, the budget, and where the rows were trained."""
    content, notes = GROUPS[group], [NOTES[key] for key in head if key in NOTES]
    text = f"{content.note} ".lstrip() + "Dev scores after the last phase. " + "".join(f"{note}. " for note in notes)
    common = " ".join(command_of(group, None)[1:])
    text += f"Every run uses these flags: `{common}`. The last column adds flags or overrides them."
    if content.scale != 1:
        text += (
            f" Budget: all rows have {content.scale:g} of the planned length, so that the table fits into the time "
            "that there was. The flags show the shortened lengths."
        )
    if rows:
        first = next(iter(rows.values()))
        text += f" Device {first['device']}, torch {first['torch']}; commits {commit_list(rows.values())}."
    return text


# --- early exit at many thresholds --------------------------------------------------------------------------------


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
    sweeps = [row["sweep"] for row in rows.values() if row.get("sweep")]
    if not sweeps:
        return ["### Time", "", "Not run.", ""]
    lines = []
    for setting in sweeps[0]:
        norm, layers = (mean(sweep[setting][key] for sweep in sweeps) for key in ("score", "mean_layers"))
        milliseconds = mean(1000 / sweep[setting]["examples_per_second"] for sweep in sweeps)
        full = mean(1000 / sweep["full depth"]["examples_per_second"] for sweep in sweeps)
        lines.append([setting, f"{norm:.3f}", f"{layers:.2f}", f"{milliseconds:.2f}", f"{milliseconds / full:.2f}"])
    head = ["threshold for all tasks", "norm", "layers", "ms per example", "share of full depth's"]
    return ["### Time, measured alone on the machine (auto: chosen thresholds)", "", *markdown(head, lines), ""]


def exits_section(rows):
    """Tables of the settings: fixed thresholds, chosen ones and the oracle, as the mean over all runs of the page."""
    points = {}
    for _, task, kind, setting, score, layers in exit_points(rows):
        points.setdefault((kind, setting), {}).setdefault(task, []).append((score, layers))
    parts = []
    for title, kind in (
        ("One threshold for the confidence", "confidence"),
        ("Chosen thresholds (learning to exit for STS, confidence otherwise)", "auto"),
        ("Chosen thresholds (learning to exit for all tasks)", "lte"),
        ("Oracle: the first exit that no other exit beats", "oracle"),
    ):
        chosen = {s: one for (k, s), one in points.items() if k == kind and (kind != "lte" or s.startswith("chosen"))}
        tasks = [task for task in ("sst", "para", "sts", "all") if any(task in one for one in chosen.values())]
        head = ["threshold", *(f"{'norm' if t == 'all' else t}: {what}" for t in tasks for what in ("score", "layers"))]
        lines = []
        for setting, one in chosen.items():
            means = [mean(p[side] for p in one[task]) for task in tasks for side in (0, 1)]
            lines.append([setting.replace("1.01", "never"), *(f"{value:.3f}" for value in means)])
        parts += [f"### {title}", "", *markdown(head, lines), ""] if lines else []
    note = (
        "Means over the runs of this page that have the exits measured. Scores of chosen thresholds are cross-fitted."
    )
    return [*parts, note, ""] if parts else []


# --- confusion and ensemble ---------------------------------------------------------------------------------------


def score_section(rows):
    """The confusion matrix of the last row with one, and the ensemble's comparisons."""
    parts, with_classes = [], [row for row in rows.values() if "confusion" in row["metrics"]["best"].get("sst", {})]
    if with_classes:
        names = build_tasks()["sst"].label_names
        counts = with_classes[-1]["metrics"]["best"]["sst"]["confusion"]
        lines = [[gold, *map(str, line)] for gold, line in zip(names, counts, strict=True)]
        title = f"### SST rows of dev by label and prediction: {with_classes[-1]['name']}"
        parts += [title, "", *markdown(["label", *(f"predicted {name}" for name in names)], lines), ""]
    for row in rows.values():
        against = (row.get("measured") or {}).get("against") or {}
        lines = [
            [name, f"{one['difference']:+.4f}", f"{one['low']:+.4f} to {one['high']:+.4f}", f"{one['not_better']:.1%}"]
            for name, one in against.items()
        ]
        if lines:
            head = ["compared with", "difference of the norm", "95% interval", "not better in"]
            parts += [f"### {row['name']}, by paired bootstrap over the dev rows", "", *markdown(head, lines), ""]
    return parts


# what a page has between its table and its answer
SECTIONS = {"exit-thresholds": exits_section, "score": score_section}


# --- the answer ---------------------------------------------------------------------------------------------------


def answer(group, rows):
    """What the table says: typed sentences where their rows were run, then the differences from the baseline."""
    content = GROUPS[group]
    if not rows:
        return "Not answered: no row of this table was run."
    missing = [name for name in content.rows if name not in rows]
    text = f"{len(missing)} of {len(content.rows)} rows were not run. " if missing else ""
    if all(name in rows for name in content.answer_needs):
        text += content.answer.format(rows=rows)
    compared = [row for row in rows.values() if "against_baseline" in row]
    for word, sign in (("Above", 1), ("Below", -1)):
        # the whole interval lies on one side of 0
        sure = [row for row in compared if min(sign * row["against_baseline"][end] for end in ("low", "high")) > 0]
        names = [
            f"{row['name'].partition(', seed ')[0]} ({row['against_baseline']['difference']:+.3f})" for row in sure
        ]
        text += (
            f"{word} the baseline by more than chance on these rows: {', '.join(names) or 'none'}. " if compared else ""
        )
    return text + f"Another seed changes a norm by about {NOISE} (one standard deviation) after long runs."


# --- the files ----------------------------------------------------------------------------------------------------


def page(group, rows):
    """The Markdown of a page."""
    head, lines = table_lines(group, rows)
    picture = [f"![{TITLES[group]}]({group}.png)", ""] if group in PANELS and PANELS[group](rows) else []
    parts = [f"# {GROUPS[group].question}", "", *markdown(head, lines), "", caption(group, rows, head), "", *picture]
    parts += SECTIONS[group](rows) if group in SECTIONS else []
    parts += ["## Answer", "", answer(group, rows), ""]
    parts += [
        f"The numbers of every run are in [{group}.csv]({group}.csv). `python -m lab.experiments {group}` trains "
    ]
    parts[-1] += (
        "the runs, `python -m lab.experiments report` writes this page. [README.md](README.md) explains `norm`."
    )
    return "\n".join(parts) + "\n"


def numbers_csv(group, rows):
    """The CSV of a page: a line for each run, unrounded scores to six digits."""
    columns = GROUPS[group].columns
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "seed", *columns, "difference", "low", "high", "flags"])
    for name, row in rows.items():
        values = [COLUMNS[key][1](row) for key in columns]
        values += [row.get("against_baseline", {}).get(key) for key in ("difference", "low", "high")]
        cells = ["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values]
        writer.writerow([name, row["seed"], *cells, " ".join(own_words(group, name))])
    return out.getvalue()


def write_page(group, rows, results):
    """Write the page of an experiment, its CSV, and its picture where there is something to draw."""
    write_whole(results / f"{group}.md", page(group, rows))
    write_whole(results / f"{group}.csv", numbers_csv(group, rows))
    if group == "exit-thresholds":
        write_whole(results / f"{group}-sweep.csv", exits_csv(rows))
    if panels := PANELS[group](rows) if group in PANELS else []:
        draw(results / f"{group}.png", panels, TITLES[group])
