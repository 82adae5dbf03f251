"""Reading the files of a finished run into one row of numbers, and recording the row in results/rows/.

A run's folder is not kept, so a row holds all that any table, picture or comparison needs: scores, confusion matrices,
learning curves, losses, predictions without texts and labels, early exit at every threshold, time and memory.

    from lab.record import load_rows
    load_rows("berter-table2")["Baseline"]["best"]["norm"]
"""

import csv
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from files import write_whole
from flags import parse_flags, recorded_flags
from lab.rows import GROUPS, command_of, recipe_of, slug
from runs import FREE_FLAGS
from tasks import TASKS

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
# a run may differ from its row in these flags: where the run is stored, and how it exits early at inference
UNIMPORTANT = FREE_FLAGS | {"exit_policy", "exit_threshold"}


@dataclass(frozen=True)
class Place:
    """Where rows are trained and recorded, and on which data; `more` are flags that a check run adds to every row."""

    runs: Path = HERE / "runs" / "experiments"
    results: Path = RESULTS
    data_dir: str = ""
    more: tuple = ()

    def run(self, group, name):
        """The folder of a row's run."""
        return self.runs / group / slug(name)

    def record(self, group, name):
        """The file in which a row's numbers are recorded."""
        return self.results / "rows" / group / f"{slug(name)}.json"

    def command(self, group, name):
        """The words of a row's command after `python`."""
        words = command_of(group, name)
        return words + list(self.more) * (words[0] != "-m")


def flags_of(words):
    """Parse a row's command with its own program. Returns ({flag: value}, whether it is another program of lab/)."""
    script, *words = words
    if script == "-m":
        program = importlib.import_module(words[0])
        return vars(program.make_parser().parse_args([*words[1:], "--run_dir", ""])), True
    return parse_flags(words)[0], False


# --- reading runs -------------------------------------------------------------------------------------------------


def same_flags(words, config):
    """Whether a run was trained with the flags of a row's command."""
    wanted, is_other = flags_of(words)
    trained = config["flags"] if is_other else recorded_flags(config, ".")
    if not is_other:
        # a row may leave this to the weights; the run records the resulting number
        wanted["max_length"] = wanted["max_length"] or trained["max_length"]
    return all(trained[key] == value for key, value in wanted.items() if key not in UNIMPORTANT)


def main_metrics(tasks):
    """{task: its main metric} from {task: {metric: number}} of a summary."""
    return {task: metrics[TASKS[task].metric.name] for task, metrics in tasks.items()}


def read_row(group, name, place):
    """Read the numbers of one row from its run's files; None if there is no finished run with the row's flags."""
    folder, words = place.run(group, name), place.command(group, name)
    if not (folder / "summary.json").exists():
        return None
    config, summary = (json.loads((folder / file).read_text()) for file in ("config.json", "summary.json"))
    if not same_flags(words, config):
        return None
    row = {"name": name, "command": " ".join(words)}
    row |= {key: config[key] for key in ("commit", "device", "threads", "torch", "data")}
    row |= {"weights": config["weights"]["sha256"], "seed": config["flags"]["seed"], "started": config.get("started")}
    for key in ("best", "last"):
        row[key] = {"raw": summary[key]["raw"], "norm": summary[key]["norm"]} | main_metrics(summary[key]["tasks"])
    row["positive_rate"] = summary["best"]["tasks"].get("para", {}).get("positive_rate")
    keys = ("phase_norms", "steps", "train_seconds", "eval_seconds", "finish_seconds", "peak_mib", "mean_layers")
    row |= {key: summary.get(key) for key in (*keys, "exits")} | {"sweep": read_sweep(folder)}
    row |= {"best_phase": summary["best"].get("phase"), "metrics": {k: summary[k]["tasks"] for k in ("best", "last")}}
    measured = folder / "measured.json"
    row |= read_log(folder) | {"measured": json.loads(measured.read_text()) if measured.exists() else None}
    phase = GROUPS[group].scored_after.get(recipe_of(name))
    return row | scores_after(phase, row) if phase else row


def scores_after(phase, row):
    """The entries of a row whose scores are those after an earlier phase; what its last model gave is left out."""
    [scores] = [entry for entry in row["phases"] if entry["phase"] == phase]
    main = {key: scores[key] for key in row["last"]}
    kept = {"positive_rate": scores["positive_rate"], "measured": {"compute": row["measured"]["compute"]}}
    return dict.fromkeys(("metrics", "exits", "mean_layers")) | {"best": main, "last": main, "best_phase": phase} | kept


def read_log(folder):
    """The learning curves of a run: its dev scores after each phase, and its losses (a number per 50 steps).

    `losses` has a column for each task and term, and one for each pair of tasks whose gradients were compared.
    """
    path, phases, steps = folder / "log.jsonl", [], []
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry["kind"] == "phase":
            seconds = {key: entry[key] for key in ("train_seconds", "eval_seconds")}
            phase = {"phase": entry["phase"], "norm": entry["norm"], "raw": entry["raw"]}
            rate = entry["dev"].get("para", {}).get("positive_rate")
            phases.append(phase | main_metrics(entry["dev"]) | {"positive_rate": rate} | seconds)
        else:
            terms = {f"{task} {term}": x for task, values in entry["terms"].items() for term, x in values.items()}
            cosines = {f"cosine {pair}": x for pair, x in entry.get("cosines", {}).items()}
            steps.append({"step": entry["step"]} | terms | cosines)
    columns = dict.fromkeys(key for step in steps for key in step)
    losses = {key: [step[key] if key == "step" else rounded(step.get(key)) for step in steps] for key in columns}
    return {"phases": phases, "losses": losses}


def rounded(value):
    """A number with four significant digits; None stays None."""
    return None if value is None else float(f"{value:.4g}")


def write_row(path, row):
    """Record a row: JSON with a line for each key."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in row.items())
    write_whole(path, f"{{\n{lines}\n}}\n")


def load_rows(group, results=RESULTS):
    """The recorded rows of a group, in the order of its table: {name: row}.

    A row that was not run is left out, and one that was recorded with another command than today's. A check run adds
    flags at the end of a command.
    """
    content, place, rows = GROUPS[group], Place(results=results), {}
    for name in (*content.rows, *content.removed):
        path, today = place.record(group, name), command_of(group, name) if name in content.rows else []
        row = json.loads(path.read_text()) if path.exists() else None
        if row and row["command"].split()[: len(today)] == today:
            rows[name] = row
    return rows


def recipes(rows):
    """Rows that differ in the seed alone: {recipe: [row, ...]} from {name: row}."""
    result = {}
    for name, row in rows.items():
        result.setdefault(recipe_of(name), []).append(row)
    return result


def read_sweep(folder):
    """Read the sweep of a run's exits (`--option evaluate --exit_threshold .5,...`).

    Returns {setting: {score, mean_layers, examples_per_second: of all tasks, tasks: {task: the same three}}}, or None
    if the run has no sweep.
    """
    path = folder / "evaluate" / "sweep.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    settings = {row["setting"]: {"tasks": {}} for row in rows}
    for row in rows:
        numbers = {key: float(row[key]) for key in ("score", "mean_layers", "examples_per_second")}
        one = settings[row["setting"]]
        one |= numbers if row["task"] == "all" else {"tasks": one["tasks"] | {row["task"]: numbers}}
    return settings
