"""Train the rows of the tables in results/, record what they measured, and write the tables.

    python -m lab.experiments core              # trains what has not been trained, then writes results/core.md
    python -m lab.experiments methods --list    # prints the commands and about how long they take, trains nothing
    python -m lab.experiments core --collect    # writes results/core.md again, trains nothing
    python -m lab.experiments berter-table2 exit-thresholds --jobs 2 --hours 1.5 --data_dir ../shared/data
    python -m lab.experiments berter-table2 --fraction 0.02 --epochs 1      # all its rows in minutes, as a check

A group (rows.py) is a table; a row of it is one run in runs/experiments/GROUP/NAME. A finished run is not trained
again, an interrupted one continues. When a row ends, its numbers are read from its run's files and recorded in
results/rows/GROUP/NAME.json, never typed. If the run's folder is gone, the recorded numbers stay, as long as the row's
command is the recorded one.
"""

import argparse
import csv
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

# first: it prints what to do if the packages are not installed
from lab import peer  # isort: skip # noqa: F401
import numpy as np

from building import build_table
from datasets import find_data_dir
from errors import InputError, run_script
from files import write_whole
from flags import parse_flags, recorded_flags
from lab.bootstrap import METRICS, paired_bootstrap
from lab.rows import COMMON, ENSEMBLE, GROUPS, command_of, slug, split_name
from lab.tables import comparison_table, replace_between, score_table
from methods import below_one, per_task, positive, positive_int
from runs import FORMAT, FREE_FLAGS
from samplers import rows_per_epoch
from tasks import TASKS, build_tasks

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
SCRATCH = HERE / "runs" / "scratch"
# a run may differ from its row in these flags: where the run is stored, and how it exits early at inference
UNIMPORTANT = FREE_FLAGS | {"exit_policy", "exit_threshold"}
# for estimates, measured on one core with the small weights: seconds to train on one example, and to score the dev
# set; the training rows of the data
EXAMPLE_SECONDS, DEV_SECONDS, START_SECONDS = 0.011, 18, 60
TRAIN_ROWS = {"sst": 8544, "para": 14169, "sts": 6040, "cfimdb": 1707}
# what a method multiplies the time of a training step with
STEP_FACTORS = {"smart": 2.3, "bregman": 1.4, "lnsr": 1.6}


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


def estimate(words):
    """About how many minutes a row takes on one core."""
    flags, is_other = flags_of(words)
    if is_other:
        return flags.get("epochs", 0.2) * 9.6  # the peer, measured; the ensemble only predicts
    table = build_table(flags)
    sizes = {name: TRAIN_ROWS[name] for name in table}
    sizes |= per_task(flags["train_rows"], "--train_rows", list(table), positive_int)
    examples = sum(rows_per_epoch(table, sizes, flags["split"]).values())
    phases = flags["epochs"] * (2 if flags["exit_loss"] == "two_stage" else 1)
    passes = phases * flags["epoch_size"]
    for name, factor in STEP_FACTORS.items():
        if flags[name] is not None:
            # no task named: all tasks
            passes *= 1 + (factor - 1) * (len(flags[name]) / len(table) if flags[name] else 1)
    # stage 1 stops its forward pass at layer i and its backward pass below it
    passes += flags["slf"] * flags["slf_epochs"] * 6 * 0.35
    phases += 3 * flags["slf"]
    return (START_SECONDS + examples * passes * EXAMPLE_SECONDS + phases * DEV_SECONDS) / 60


# --- training -----------------------------------------------------------------------------------------------------


def start(words, log, threads):
    """Run a program to its end; with a log file, on one core and with its output in there. Returns its status."""
    if not log:
        return subprocess.run([sys.executable, *words], cwd=HERE).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as out:
        return subprocess.run(
            [sys.executable, *words], cwd=HERE, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode


def run_row(group, name, place, log=None):
    """Train one row, unless its run is finished, and measure the saved model. Returns whether it trained."""
    folder = place.run(group, name)
    words = [*place.command(group, name), "--run_dir", str(folder.resolve())]
    data = ["--data_dir", str(Path(place.data_dir).resolve())] if place.data_dir else []
    is_other, trained = words[0] == "-m", False
    if not (folder / "summary.json").exists():
        words += data
        if (folder / "config.json").exists():
            # other programs cannot resume: their interrupted runs start again
            if is_other:
                shutil.rmtree(folder)
            else:
                words += ["--resume"]
        print(f"== {group}: {name}\n{' '.join(words)}", flush=True)
        if start(words, log, 1) == 130:
            raise InputError("interrupted: the same command continues from here")
        trained = True
    if not is_other and (folder / "best.safetensors").exists() and not (folder / "measured.json").exists():
        start(["-m", "lab.measure", str(folder.resolve()), *data], log, 1)
    return trained


def finish_row(group, name, place):
    """Record the numbers of a trained row, so that they stay when its folder goes."""
    row = read_row(group, name, place)
    if row:
        write_row(place.record(group, name), row)
        print(
            f"== {group}: {name}: norm {row['best']['norm']:.4f}, {row['train_seconds'] / 60:.1f} minutes", flush=True
        )
    else:
        print(f"== {group}: {name}: no result", flush=True)


def run_rows(rows, place, jobs, hours):
    """Train rows, `jobs` side by side; none starts after `hours`. `rows` are pairs (group, name)."""
    deadline, stop = time.monotonic() + 3600 * hours, threading.Event()

    def work(group, name):
        if stop.is_set() or time.monotonic() > deadline:
            return
        log = place.runs / group / f"{slug(name)}.txt" if jobs > 1 else None
        try:
            run_row(group, name, place, log)
        except InputError:
            stop.set()
            raise
        finish_row(group, name, place)

    # an ensemble needs the models of other rows, so it waits for them
    ensembles = [row for row in rows if ENSEMBLE in command_of(*row)]
    for some in ([row for row in rows if row not in ensembles], ensembles):
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in [pool.submit(work, group, name) for group, name in some]:
                    future.result()
            except BaseException:
                # rows in training save themselves at the signal that they received too; no further row starts
                stop.set()
                raise


# --- reading runs -------------------------------------------------------------------------------------------------


def trained_flags(config):
    """The flags that a run was trained with, in today's spelling, a newer flag with its default.

    In format 1 --bregman and --lnsr took the weight, with 0 for off, and --bregman_tasks the tasks.
    """
    flags, recorded = recorded_flags(config, "."), config["flags"]
    if config.get("format") == FORMAT:
        return flags
    for term in ("bregman", "lnsr"):
        if recorded.get(term):
            flags |= {term: recorded.get(f"{term}_tasks") or [], f"{term}_weight": recorded[term]}
    return flags


def same_flags(words, config):
    """Whether a run was trained with the flags of a row's command."""
    wanted, is_other = flags_of(words)
    trained = config["flags"] if is_other else trained_flags(config)
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
    return row | read_log(folder) | {"measured": json.loads(measured.read_text()) if measured.exists() else None}


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
    """The recorded rows of a group, in the order of its table: {name: row}. Rows that were not run are left out."""
    content, place = GROUPS[group], Place(results=results)
    paths = {name: place.record(group, name) for name in (*content.rows, *content.removed)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def read_sweep(folder):
    """Read the sweep of a run's exits (`--option evaluate --exit_threshold .5,...`), averaged over the tasks.

    Returns {setting: {score, mean_layers, examples_per_second, and for each task its examples per second}}, or None if
    the run has no sweep.
    """
    path = folder / "evaluate" / "sweep.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    settings = {row["setting"]: {} for row in rows}
    for row in rows:
        if row["task"] == "all":
            keys = ("score", "mean_layers", "examples_per_second")
            settings[row["setting"]] |= {key: float(row[key]) for key in keys}
        else:
            settings[row["setting"]][row["task"]] = float(row["examples_per_second"])
    return settings


def read_predictions(folder, task):
    """A run's dev predictions of one task, from the file in the course's format: {id: value}."""
    lines = (folder / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
    return {key.strip(): float(value) for key, value in (line.split(",") for line in lines)}


def read_labels(folder, task):
    """The dev labels of one task, from the readable predictions: {id: label}."""
    with open(folder / "predictions" / f"{task.name}-dev-readable.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: float(row["gold"]) for row in csv.DictReader(file) if row["gold"]}


# --- comparing runs with the peer ---------------------------------------------------------------------------------


def compare_runs(ours, others):
    """Compare the mean norm of some runs with that of others, by paired bootstrap over the dev rows.

    Each run counts with the predictions of its best epoch.
    """
    parts = []
    for task in build_tasks().values():
        labels = read_labels(ours[0], task)
        predictions = [read_predictions(folder, task) for folder in (*ours, *others)]
        values = np.array([[of_run[key] for of_run in predictions] for key in labels])  # [rows, runs]

        def mean_norm(values, gold, task=task):
            return task.metric.normalise(METRICS[task.metric.name](values, gold)).mean()

        first, second = np.split(values, [len(ours)], axis=1)
        parts.append((first, second, np.array(list(labels.values())), mean_norm))
    difference, (low, high), not_better = paired_bootstrap(parts)
    return {"difference": difference, "low": low, "high": high, "not_better": not_better}


def compare_seeds(rows, runs):
    """Compare recipes that were run with several seeds with the mean of all seeds of transformers.

    Every seed is compared on its own, then the mean of a recipe's seeds. A recipe without its runs' predictions keeps
    the comparison that is recorded.
    """
    recipes = {}
    for row in rows:
        recipe, seed, _ = row["name"].partition(", seed ")
        if seed:
            recipes.setdefault(recipe, []).append(row)
    others = [runs / slug(row["name"]) for row in recipes.pop("transformers", ())]
    for mine in recipes.values() if others else ():
        folders = [runs / slug(row["name"]) for row in mine]
        if not all((folder / "predictions").is_dir() for folder in (*folders, *others)):
            continue
        for row, folder in zip(mine, folders, strict=True):
            row["against_peer"] = compare_runs([folder], others)
        if len(mine) > 1:
            mine[-1]["mean_against_peer"] = compare_runs(folders, others) | {"runs": len(mine)}


# --- the program --------------------------------------------------------------------------------------------------


def collect(group, names, place):
    """Read the rows of some names from their runs, or else from the record, and print which names have no numbers."""
    recorded, rows = load_rows(group, place.results), []
    for name in names:
        folder, old = place.run(group, name), recorded.get(name)
        row = read_row(group, name, place) if name in GROUPS[group].rows else None
        if not row and (folder / "summary.json").exists():
            print(f"{name}: {folder} was trained with other flags: remove it to train the row again")
        removed = name in GROUPS[group].removed
        if not row and old and (removed or old["command"] == " ".join(place.command(group, name))):
            row = old
        if row:
            # a comparison needs predictions, which may be gone
            kept = {key: old[key] for key in ("against_peer", "mean_against_peer") if old and key in old}
            rows.append(row | kept)
        else:
            print(f"no result: {name}")
    compare_seeds(rows, place.runs / group)
    return rows


def tables(group, rows):
    """The Markdown of a group's tables: {file name: text}."""
    result = {f"{group}.md": score_table(COMMON, GROUPS[group], rows)}
    comparison = comparison_table(rows)
    return result | ({"comparison.md": comparison} if comparison else {})


def write_tables(group, names, place, to_files=True):
    """Collect the rows of some names and print their tables; with `to_files`, record the rows and write the tables."""
    rows = collect(group, names, place)
    texts = tables(group, rows) if rows else {}
    print("\n".join(texts.values()))
    if to_files:
        for row in rows:
            write_row(place.record(group, row["name"]), row)
        for name, text in texts.items():
            replace_between(place.results / name, "table", text)


def cut_data(data_dir, target, fraction):
    """Copy a data folder with a part of the rows of every file, evenly spread, at least 20 of them."""
    names = [task.file(split) for task in TASKS.values() for split in ("train", "dev", "test")]
    source, _ = find_data_dir(data_dir or None, names)
    for name in names:
        with open(source / name, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        count = min(len(rows), max(20, round(fraction * len(rows))))
        target.mkdir(parents=True, exist_ok=True)
        with open(target / name, "w", newline="", encoding="utf-8") as file:
            chosen = [rows[k * len(rows) // count] for k in range(count)]
            csv.writer(file, delimiter="\t").writerows([header, *chosen])


def check_place(args):
    """The place of a check run: cut data, and runs and results in a scratch folder, which starts empty."""
    shutil.rmtree(args.scratch, ignore_errors=True)
    cut_data(args.data_dir, args.scratch / "data", args.fraction)
    more = [f"--epochs {args.epochs}"] if args.epochs else []
    more += [f"--weights {shlex.quote(args.weights)}"] if args.weights else []
    return Place(
        args.scratch / "runs", args.scratch / "results", str(args.scratch / "data"), tuple(shlex.split(" ".join(more)))
    )


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=GROUPS, metavar="GROUP", help=f"tables: {', '.join(GROUPS)}")
    parser.add_argument(
        "--data_dir", default="", help="folder of the course's data; default: multitask_classifier.py's"
    )
    parser.add_argument("--runs", type=Path, default=Place.runs, help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows; prints their table")
    parser.add_argument("--jobs", type=positive_int, default=1, help="rows to train side by side, each on one core")
    parser.add_argument("--hours", type=positive, default=1000, help="no row starts after so many hours")
    parser.add_argument("--list", action="store_true", help="print the commands and their minutes, train nothing")
    parser.add_argument("--collect", action="store_true", help="make the tables from what is there, train nothing")
    check = parser.add_argument_group("check run", "goes quickly through all rows and leaves results/ alone")
    check.add_argument("--fraction", type=below_one, help="share of the rows of every data file")
    check.add_argument("--epochs", type=positive_int, help="epochs of every row")
    check.add_argument("--weights", help="weights of every row")
    check.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of the check run; its content is replaced")
    return parser


def choose_rows(args):
    """The rows to train, pairs (group, name): the groups in the order given, further seeds of all groups last."""
    rows = [(group, name) for group in args.groups for name in GROUPS[group].rows]
    known = {name for group in args.groups for name in (*GROUPS[group].rows, *GROUPS[group].removed)}
    unknown = set(args.only or ()) - known
    if unknown:
        raise InputError(f"--only {sorted(unknown)[0]!r}: no such row: --list prints the rows")
    # sorting is stable: rows with the same seed stay in order
    return sorted((row for row in rows if not args.only or row[1] in args.only), key=lambda row: split_name(row[1])[2])


def list_rows(rows, place):
    """Print the command of every row and about how long it takes."""
    total = 0.0
    for group, name in rows:
        command, done = place.command(group, name), place.record(group, name).exists()
        minutes = estimate(command)
        total += 0 if done else minutes
        print(f"{group}: {name} ({'recorded' if done else f'{minutes:.0f} min'}): python {' '.join(command)}")
    print(f"{total:.0f} minutes of one core for the rows that have no record")


def main(argv=None):
    """Train the runs of some groups and write their tables."""
    args = make_parser().parse_args(argv)
    if (args.epochs or args.weights) and not args.fraction:
        raise InputError("--epochs and --weights belong to a check run: add --fraction")
    place = (
        check_place(args) if args.fraction else replace(Place(results=RESULTS), runs=args.runs, data_dir=args.data_dir)
    )
    rows = choose_rows(args)
    if args.list:
        return list_rows(rows, place)
    if not args.collect:
        run_rows(rows, place, args.jobs, args.hours)
    for group in args.groups:
        names = [*GROUPS[group].rows, *GROUPS[group].removed]
        write_tables(group, [name for name in names if not args.only or name in args.only], place, not args.only)
    return None


if __name__ == "__main__":
    run_script(main)
