"""The tables of results/ in Markdown, made of the rows that experiments.py records."""

from files import write_whole
from tasks import TASKS


def markdown(head, lines):
    """A table from its column names and the cells of its lines."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(cells)} |" for cells in lines)]


def commit_list(rows):
    """The commits that the runs were trained at."""
    return ", ".join(sorted({row["commit"] for row in rows}))


def score_table(common, group, rows):
    """A group's table: scores, cost and flags of every row, and below it what the columns mean.

    `common` are the flags of all groups, `group` an experiments.Group.
    """
    tasks = [task for task in TASKS if any(task in row["last"] for row in rows)]
    head = ["run", *tasks, "norm", "raw", "best norm", "Quora positive", "train s", "eval s", "MiB", "flags"]
    lines = []
    for row in rows:
        numbers = [row["last"].get(task) for task in tasks] + [row["last"]["norm"], row["last"]["raw"]]
        numbers += [row["best"]["norm"], row["positive_rate"]]
        cells = ["" if x is None else f"{x:.3f}" for x in numbers]
        cells += [f"{row['train_seconds']:.0f}", f"{row['eval_seconds']:.0f}", f"{row['peak_mib'] or ''}"]
        name = row["name"]
        flags = f"`{group.removed[name]}` (flag removed)" if name in group.removed else f"`{group.rows[name]}`"
        lines.append([name, *cells, flags if flags != "``" else ""])
    first, peers = rows[0], any(row["command"].startswith("-m lab.peer ") for row in rows)
    notes = (
        "Dev scores after the last epoch. `best norm` is the highest norm of any epoch, so it was chosen on the same "
        "dev data. `Quora positive` is the share of pairs that the best model calls paraphrases. MiB is the largest "
        "memory of the process. The machine was shared with other work, so the seconds are no benchmark.\n\n"
        f"Every run{' except those of lab.peer' if peers else ''} uses these flags: `{common} {group.flags}`. The last "
        "column adds flags or overrides them."
    )
    if any(row["name"] in group.removed for row in rows):
        notes += ' "Flag removed": the row was measured with a flag that the program no longer has.'
    notes += (
        f" Device {first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}, torch {first['torch']}; "
        f"commits {commit_list(rows)}."
    )
    sweeps = [sweep_note(row) for row in rows if row.get("sweep")]
    return "\n".join([*markdown(head, lines), "", notes, *(line for note in sweeps for line in ("", note))]) + "\n"


def sweep_note(row):
    """Describe what the chosen thresholds of a run's exits gain and cost."""
    full, chosen = row["sweep"]["full depth"], row["sweep"]["auto"]
    return (
        f"{row['name']}: thresholds that were chosen without the dev rows that they are scored on give norm "
        f"{chosen['score']:.4f} against {full['score']:.4f} at full depth ({chosen['score'] / full['score']:.1%}). "
        f"They use {chosen['mean_layers']:.2f} layers instead of {full['mean_layers']:.2f} "
        f"({chosen['mean_layers'] / full['mean_layers']:.0%}) and predict "
        f"{chosen['examples_per_second'] / full['examples_per_second']:.2f} times as many examples a second. With a "
        f"threshold of .999 the mean is {row['sweep']['0.999']['mean_layers']:.2f} layers."
    )


def comparison_table(rows):
    """The comparisons with transformers, or an empty text if there are none."""
    lines = []
    for row in rows:
        mean = row.get("mean_against_peer", {})
        recipe = row["name"].partition(", seed ")[0]
        for name, result in (
            (row["name"], row.get("against_peer")),
            (f"{recipe}, mean of {mean.get('runs')} seeds", mean),
        ):
            if result:
                interval = f"{result['low']:+.4f} to {result['high']:+.4f}"
                lines.append([name, f"{result['difference']:+.4f}", interval, f"{result['not_better']:.1%}"])
    if not lines:
        return ""
    peers = sum(row["name"].startswith("transformers, seed ") for row in rows)
    head = ["run", "difference", "95% interval", "not better in"]
    note = (
        f"`difference` is the run's norm minus the mean norm of transformers' {peers} seed{'s' * (peers > 1)}, all at "
        "their best epochs. The interval and the last column come from a paired bootstrap: 10,000 times, dev rows are "
        "drawn with replacement, the same rows for both sides, and the difference is computed again. The last column "
        "is the share of these differences that are not above 0. The runs stay the same, so the interval does not "
        "cover other seeds."
    )
    return "\n".join([*markdown(head, lines), "", note]) + "\n"


def replace_between(path, name, content):
    """Put text between the markers `<!-- name -->` and `<!-- end name -->` of a file; without markers, append both."""
    old = path.read_text() if path.exists() else ""
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
    before, has_start, rest = old.partition(start)
    _, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        before, after = (f"{old.rstrip()}\n\n" if old else ""), ""
    write_whole(path, before + start + content + end + after)
