"""The tables of results/ in Markdown: columns, notes and cells, made of the recorded rows and of nothing else."""

from statistics import mean, stdev

from files import write_whole
from lab.numbers import against_baseline, follow
from lab.record import recipes
from lab.rows import GROUPS, command_of, own_words
from tasks import TASKS


def markdown(head, lines):
    """A table from its column names and the cells of its lines."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(cells)} |" for cells in lines)]


def replace_between(path, name, content):
    """Put text between the markers `<!-- name -->` and `<!-- end name -->` of a file; without markers, append both."""
    old = path.read_text() if path.exists() else ""
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
    before, has_start, rest = old.partition(start)
    _, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        before, after = (f"{old.rstrip()}\n\n" if old else ""), ""
    write_whole(path, before + start + content + end + after)


# --- columns ------------------------------------------------------------------------------------------------------


def at(path):
    """The function that reads a number of a row, None if it is not there."""
    return lambda row: follow(row, path)


def oracle_layers(row):
    """The oracle's mean number of layers over the tasks."""
    oracle = follow(row, "measured/exits/oracle")
    return mean(one["layers"] for one in oracle.values()) if oracle else None


def stages(row):
    """The stages of Smart Alternating in the order of the epochs, as letters."""
    phases = [phase["phase"] for phase in row.get("phases", ())]
    return "".join(letter for phase in phases for letter in "AB" if f"stage {letter} (" in phase)


# {column: (format, function of a recorded row, what it is)}; cells of three decimals show the spread over the seeds
COLUMNS = {
    **{task: (".3f", at(f"last/{task}"), "") for task in TASKS},
    "norm": (".3f", at("last/norm"), ""),
    "raw": (".3f", at("last/raw"), ""),
    "best norm": (
        ".3f",
        at("best/norm"),
        "is the norm of the kept model: the highest of any phase, so it was chosen on the same dev data",
    ),
    "train sst": (
        ".3f",
        at("measured/train_scores/sst"),
        "is the accuracy of the kept model on at most 1,000 training rows",
    ),
    "Quora positive": (
        ".3f",
        at("positive_rate"),
        "is the share of pairs that the kept model calls paraphrases (labels: .378)",
    ),
    "norm with exits": (
        ".3f",
        at("exits/cross_fitted_norm/exit"),
        "is the norm of the kept model where rows leave early, with thresholds that their part of dev did not choose",
    ),
    "layers": (".2f", at("exits/cross_fitted_layers"), "is the mean number of layers that these rows use"),
    "oracle's layers": (
        ".2f",
        oracle_layers,
        "is that number if each row left at its first exit that no other exit beats (at exit 1 if none is right)",
    ),
    "stages": ("", stages, "are those of Smart Alternating, A for the last exit and B for all exits"),
    "compute": (
        ".2f",
        at("measured/compute"),
        "counts layer passes (forward 1, backward 2) without those of SMART, in epochs of training",
    ),
    "trained": (",.0f", at("measured/trained"), "is the number of parameters that train"),
    "train s": (".0f", at("train_seconds"), ""),
    "eval s": (".0f", at("eval_seconds"), ""),
    "MiB": (".0f", at("peak_mib"), "is the largest memory of the process"),
}
PAPER_COLUMNS = ("sst", "cfimdb", "para", "sts", "norm", "printed", "h:min")
DIFFERENCE = (
    "`difference` is the norm minus that of the baseline ({baseline}), ± half of a 95% interval, which covers other "
    "seeds and, where report had the dev labels, other dev rows. "
)


def cell(values, form):
    """The text of a cell: the mean of the seeds, for scores with their standard deviation."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    if isinstance(values[0], str):
        return values[0]
    spread = f" ± {stdev(values):{form}}" if form == ".3f" and len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def flags_cell(group, name):
    """The flags of a recipe, without the seed."""
    removed, words = GROUPS[group].removed.get(name), []
    if removed:
        return f"`{removed}` (flag removed)"
    words = own_words(group, name)
    if "--seed" in words:
        at = words.index("--seed")
        words = words[:at] + words[at + 2 :]
    return f"`{' '.join(words)}`" if words else ""


def comparable_differences(group, source):
    """The norm of each recipe minus its baseline's, {recipe: Number}."""
    numbers = {name: source.number(words) for name, words in against_baseline(group).items()}
    return {name: number for name, number in numbers.items() if number}


def table(group, source):
    """The column names and the cells of a group's table: a line for each recipe."""
    content, rows = GROUPS[group], source.load(group)
    ours, differences = recipes(rows), comparable_differences(group, source)
    columns = [key for key in content.columns if any(COLUMNS[key][1](row) not in (None, "") for row in rows.values())]
    papers = [key for key in PAPER_COLUMNS if any(key in one for one in content.paper.values())]
    head = ["run", "seeds", *columns, *["difference"] * bool(differences)]
    head += [*(f"paper: {key}" for key in papers), "flags"]
    lines = []
    for recipe, names in recipes({name: name for name in (*content.rows, *content.removed)}).items():
        runs = ours.get(recipe, [])
        cells = [cell([COLUMNS[key][1](row) for row in runs], COLUMNS[key][0]) for key in columns]
        cells += [f"{differences.get(recipe, '')}"] * bool(differences)
        cells += [cell([content.paper.get(recipe, {}).get(key)], ".3f") for key in papers]
        lines.append([recipe, f"{len(runs)}" if runs else "not run", *cells, flags_cell(group, names[0])])
    return head, lines


def caption(group, rows, head):
    """What the columns mean, the common flags, the budget, and where the rows were trained."""
    content = GROUPS[group]
    text = f"{content.note} ".lstrip() + "Dev scores after the last phase: mean ± standard deviation of the seeds. "
    text += "".join(f"`{key}` {COLUMNS[key][2]}. " for key in head if COLUMNS.get(key, ("", "", ""))[2])
    text += DIFFERENCE.format(baseline=content.baseline) if "difference" in head else ""
    text += "The machine was shared with other work, so the seconds are no benchmark. " if "train s" in head else ""
    text = text.rstrip() + "\n\n"
    others = sorted({command.split()[1] for command in content.rows.values() if command.startswith("-m ")})
    text += f"Every run{' except those of ' + ', '.join(others) if others else ''} uses these flags: "
    text += f"`{' '.join(command_of(group, None)[1:])}`. The last column adds flags or overrides them."
    if content.removed:
        text += ' "Flag removed": the row was measured with a flag that the program no longer has.'
    if content.scale != 1:
        text += f" All rows have {content.scale:g} of the planned length. The flags show the shortened lengths."
    if rows:
        first, commits = next(iter(rows.values())), ", ".join(sorted({row["commit"] for row in rows.values()}))
        text += f" Device {first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}, "
        text += f"torch {first['torch']}; commits {commits}."
    return text
