"""The pages of results/: NAME.md, .csv and .png of each group, made of the recorded rows and of nothing else.

A page of an experiment opens with its question. A table follows, with a line for each recipe, then what the columns
mean, the picture, and the answer: typed sentences (answers.toml) with the measured numbers. The older groups have a
typed page; their table is written between its markers. A row without a record is marked "not run".
"""

import csv
import io
import re
import tomllib
from pathlib import Path
from statistics import mean

from errors import InputError
from files import write_whole
from lab.numbers import against_baseline, all_descriptions, fill, read_numbers
from lab.panels import PANELS, TITLES
from lab.pictures import draw
from lab.record import recipes
from lab.rows import GROUPS, own_words
from lab.sections import SECTIONS, comparison_table, exits_csv
from lab.tables import COLUMNS, caption, comparable_differences, markdown, replace_between, table

ANSWERS = tomllib.loads(Path(__file__).with_name("answers.toml").read_text())

# --- the answer ---------------------------------------------------------------------------------------------------

WORDS = {
    "higher": "Norm clearly higher than the baseline's",
    "lower": "Norm clearly lower than the baseline's",
    "not clearly different": "Norm not clearly different from the baseline's",
}
WHY_MISSING = "The machine's time ran out; `--list` prints about how long each run takes."


def baseline_sentences(group, source):
    """Which recipes have a clearly higher or lower norm than their baseline, and which have neither."""
    names = {word: [] for word in WORDS}
    for name, number in comparable_differences(group, source).items():
        names[number.direction].append(f"{name} ({number})")
    return [f"{WORDS[word]}: {', '.join(some)}." for word, some in names.items() if some]


def answer(group, source):
    """The lines of the answer: the comparison with the baseline, then the typed sentences with recorded numbers."""
    content, rows, typed = GROUPS[group], source.load(group), ANSWERS[group]
    texts = baseline_sentences(group, source) + fill(typed["text"], read_numbers(typed, source))[0]
    missing = [name for name in content.rows if name not in rows]
    if not texts:
        which = "no row of this table was run" if not rows else "the rows that are compared were not run"
        return [f"Not answered: {which}. {WHY_MISSING}"]
    if missing:
        texts.append(
            f"{len(missing)} of {len(content.rows)} runs (further seeds count) are missing; nothing is said about "
            f"them. {WHY_MISSING}"
        )
    return [f"- {text}" for text in texts]


def described_numbers():
    """The descriptions of all numbers on the pages, for labels.py."""
    return [*all_descriptions(ANSWERS.values()), *(d for group in GROUPS for d in against_baseline(group).values())]


# --- the files ----------------------------------------------------------------------------------------------------


def numbers_csv(group, rows):
    """The CSV of a page: a line for each run, unrounded scores to six digits."""
    columns, out = GROUPS[group].columns, io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "seed", *columns, "flags"])
    for name, row in rows.items():
        values = [COLUMNS[key][1](row) for key in columns]
        cells = ["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values]
        flags = GROUPS[group].removed.get(name) or " ".join(own_words(group, name))
        writer.writerow([name, row["seed"], *cells, flags])
    return out.getvalue()


def table_part(group, source):
    """The lines of a page from its table to its picture."""
    rows, (head, lines) = source.load(group), table(group, source)
    parts = [*markdown(head, lines), "", caption(group, rows, head)]
    parts += ["", f"[{group}.csv]({group}.csv) has the numbers of every run.", ""]
    if group in PANELS and PANELS[group](rows):
        parts += [f"![{TITLES[group]}]({group}.png)", ""]
    parts += SECTIONS[group](rows) if group in SECTIONS else []
    return parts


def page(group, source):
    """The Markdown of an experiment's page."""
    parts = [f"# {GROUPS[group].question}", "", *table_part(group, source), "## Answer", "", *answer(group, source), ""]
    parts += [
        f"`.venv/bin/python -m lab.experiments {group}` trains the runs that are missing, "
        "`.venv/bin/python -m lab.experiments report` writes this page. [README.md](README.md) explains `norm`."
    ]
    return "\n".join(parts) + "\n"


def write_page(group, source, results):
    """Write the page of a group, its CSV, and its picture where there is something to draw."""
    rows = source.load(group)
    write_whole(results / f"{group}.csv", numbers_csv(group, rows))
    if GROUPS[group].question:
        write_whole(results / f"{group}.md", page(group, source))
    elif rows:
        replace_between(results / f"{group}.md", "table", "\n".join(table_part(group, source)).rstrip() + "\n")
    if text := comparison_table(rows):
        replace_between(results / "comparison.md", "table", text)
    if group == "exit-thresholds":
        write_whole(results / f"{group}-sweep.csv", exits_csv(rows))
    if panels := PANELS[group](rows) if group in PANELS else []:
        draw(results / f"{group}.png", panels, TITLES[group])


# --- README's table -----------------------------------------------------------------------------------------------

# {the first cell of a line of README's table of scores: the group and the recipe of its numbers}
README_ROWS = {
    "BERT frozen, heads trained for 10 epochs": ("core", "pretrain (BERT frozen)"),
    "fine-tuned, sentence vector from [CLS]": ("core", "[CLS]"),
    "fine-tuned, mean over all tokens (the default)": ("core", "mean pooling"),
    "the same with a Bregman term (smart.py) for SST and STS": ("core", "Bregman for SST and STS"),
    "the same tasks with transformers, 4 epochs, [CLS]": ("core", "transformers"),
    "Sequential Layer Focus (SLF), early exit, [CLS], 2 epochs": ("exits", "SLF + early exit"),
    "early exit, mean over all tokens": ("exits", "early exit, mean pooling"),
}


def readme_cells(runs):
    """The numbers of a line: seeds, scores after the last epoch, minutes from the fastest to the slowest run, GiB."""
    scores = [f"{mean(row['last'][key] for row in runs):.3f}".lstrip("0") for key in ("sst", "para", "sts", "norm")]
    ends = [of(row["train_seconds"] for row in runs) / 60 for of in (min, max)]
    minutes = dict.fromkeys(f"{end:.{0 if end > 1 else 1}f}" for end in ends)  # equal ones count once
    memory = mean(row["peak_mib"] for row in runs if row["peak_mib"]) / 1024
    return [f"{len(runs)}", *scores, "–".join(minutes), f"{memory:.1f}"]


def write_readme(source, path):
    """Write the numbers of README's table again, in the lines that begin with the labels of README_ROWS."""
    text = path.read_text()
    for label, (group, recipe) in README_ROWS.items():
        cells = readme_cells(recipes(source.load(group))[recipe])
        text, count = re.subn(rf"(?m)^\| {re.escape(label)} \|.*$", f"| {' | '.join([label, *cells])} |", text)
        if count != 1:
            raise InputError(f"{path}: {count} lines begin with | {label} |, not one: see README_ROWS in pages.py")
    write_whole(path, text)
