"""Train the rows of the tables in results/, record what they measured, and write the tables.

    python -m lab.experiments core              # trains what has not been trained, then writes results/core.md
    python -m lab.experiments methods --list    # prints the commands and about how long they take, trains nothing
    python -m lab.experiments core --collect    # writes results/core.md again, trains nothing
    python -m lab.experiments berter-table2 exit-thresholds --jobs 2 --hours 1.5 --data_dir ../shared/data
    python -m lab.experiments berter-table2 --fraction 0.02 --epochs 1      # all its rows in minutes, as a check
    python -m lab.experiments report            # writes all pages and pictures again from the recorded rows
    python -m lab.experiments report --data_dir ../shared/data      # first computes what needs the dev labels

A group (rows.py) is a table; a row of it is one run in runs/experiments/GROUP/NAME. An interrupted run continues. When
a row ends, its numbers are read from its run's files and recorded in results/rows/GROUP/NAME.json, never typed. A row
that is recorded with today's command is not trained again: remove its file, and its run's folder, to do so.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# first: it prints what to do if the packages are not installed
from lab import peer  # isort: skip # noqa: F401
from building import build_table
from datasets import find_data_dir
from errors import InputError, run_script
from files import write_whole
from lab import findings, labels, pages
from lab.compare import compare_seeds
from lab.numbers import read_source
from lab.pictures import draw_sweep
from lab.record import HERE, RESULTS, Place, flags_of, load_rows, read_row, write_row
from lab.rows import ENSEMBLE, GROUPS, command_of, slug, split_name
from methods import below_one, per_task, positive, positive_int
from samplers import rows_per_epoch
from tasks import TASKS

COURSE_FILES = [task.file(split) for task in TASKS.values() for split in ("train", "dev", "test")]
REPORT, SCRATCH = "report", HERE / "runs" / "scratch"
# thresholds whose time is measured
TIMED = "0.5,0.6,0.7,0.8,0.9,0.95,0.99,0.999"
# for estimates, measured with the small weights on one core (bf16: a CPU that has it; fp32: one that has not): seconds
# to train on one example, and to score the dev set; the training rows of the data
EXAMPLE_SECONDS, DEV_SECONDS, START_SECONDS = {"bf16": 0.011, "fp32": 0.05}, {"bf16": 18, "fp32": 90}, 60
TRAIN_ROWS = {"sst": 8544, "para": 14169, "sts": 6040, "cfimdb": 1707}
# what a method multiplies the time of a training step with
STEP_FACTORS = {"smart": 2.3, "bregman": 1.4, "lnsr": 1.6}


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
    training = examples * passes * EXAMPLE_SECONDS[flags["precision"]]
    return (START_SECONDS + training + phases * DEV_SECONDS[flags["precision"]]) / 60


# --- training -----------------------------------------------------------------------------------------------------


def start(words, log):
    """Run a program to its end; with a log file, on one core and with its output in there. Returns its status."""
    if not log:
        return subprocess.run([sys.executable, *words], cwd=HERE).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
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
        if start(words, log) == 130:
            raise InputError("interrupted: the same command continues from here")
        trained = True
    if not is_other and (folder / "best.safetensors").exists() and not (folder / "measured.json").exists():
        start(["-m", "lab.measure", str(folder.resolve()), *data], log)
    return trained


def time_exits(rows, place):
    """Measure how long the dev rows take at several exit thresholds, one saved model after the other, nothing beside.

    Training times under --jobs are no timings: two rows share the machine's caches and memory.
    """
    for group, name in rows:
        folder = place.run(group, name)
        if "--early_exit" in place.command(group, name) and (folder / "summary.json").exists():
            words = ["multitask_classifier.py", "--option", "evaluate", "--run_dir", str(folder.resolve())]
            words += ["--exit_threshold", TIMED]
            words += ["--data_dir", str(Path(place.data_dir).resolve())] if place.data_dir else []
            if not (folder / "evaluate" / "sweep.csv").exists():
                start(words, None)


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


# --- the program --------------------------------------------------------------------------------------------------


def collect(group, names, place):
    """Read the rows of some names from their runs, or else from the record, and print which names have no numbers."""
    recorded, rows, missing = load_rows(group, place.results), [], []
    for name in names:
        folder, old = place.run(group, name), recorded.get(name)
        row = read_row(group, name, place) if name in GROUPS[group].rows else None
        if not row and (folder / "summary.json").exists():
            print(f"{name}: {folder} was trained with other flags: remove it to train the row again")
        if row or old:
            # a comparison needs predictions, which may be gone
            kept = {key: old[key] for key in ("against_peer", "mean_against_peer") if old and key in old}
            rows.append((row or old) | kept)
        else:
            missing.append(name)
    if missing:
        print(f"no result: {'; '.join(missing)}")
    compare_seeds(rows, place.runs / group)
    return rows


def record_rows(group, place):
    """Collect the rows of a group, record them, and write their page."""
    for row in collect(group, [*GROUPS[group].rows, *GROUPS[group].removed], place):
        write_row(place.record(group, row["name"]), row)
    pages.write_page(group, read_source(place.results), place.results)


def report(results, data_dir=""):
    """Write all pages and pictures of results/, and README's table, from the recorded rows: no weights, no run is read.

    With a folder of the data, what needs the dev labels is computed and recorded first.
    """
    described, errors_of = findings.described_numbers()
    described = [*described, *pages.described_numbers()]
    if data_dir:
        content = labels.record(read_source(results), described, errors_of, data_dir)
        write_whole(results / "findings.json", json.dumps(content, indent=1) + "\n")
    source = read_source(results)
    if missing := labels.without_interval(source, described):
        print(
            f"{len(missing)} intervals cover other seeds only: run report with --data_dir, then they cover dev rows too"
        )
    for group in GROUPS:
        pages.write_page(group, source, results)
    draw_sweep(results / "sweep.csv", results)
    findings.write_findings(source, results)
    if (readme := results.parent / "README.md").exists():
        pages.write_readme(source, readme)


def cut_data(data_dir, target, fraction):
    """Copy a data folder with a part of the rows of every file, evenly spread, at least 20 of them."""
    source, _ = find_data_dir(data_dir or None, COURSE_FILES)
    for name in COURSE_FILES:
        with open(source / name, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        count = min(len(rows), max(20, round(fraction * len(rows))))
        target.mkdir(parents=True, exist_ok=True)
        with open(target / name, "w", newline="", encoding="utf-8") as file:
            chosen = [rows[k * len(rows) // count] for k in range(count)]
            csv.writer(file, delimiter="\t").writerows([header, *chosen])


def check_place(args):
    """The place of a check run: cut data, and runs and results in a scratch folder, which starts empty.

    Raises: InputError for a folder with other content.
    """
    mark = args.scratch / "check-run"
    if args.scratch.is_dir() and any(args.scratch.iterdir()) and not mark.exists():
        raise InputError(f"--scratch {args.scratch}: has files that no check run wrote: name a new or an empty folder")
    shutil.rmtree(args.scratch, ignore_errors=True)
    write_whole(mark, "A check run replaces what is in this folder.\n")
    cut_data(args.data_dir, args.scratch / "data", args.fraction)
    more = ["--epochs", str(args.epochs)] if args.epochs else []
    more += ["--weights", args.weights] if args.weights else []
    return Place(args.scratch / "runs", args.scratch / "results", str(args.scratch / "data"), tuple(more))


def make_parser():
    """Make the command line."""
    names = f"{', '.join(GROUPS)}; {REPORT} writes all tables and pictures again, from the recorded rows alone"
    parser = argparse.ArgumentParser(
        prog="python -m lab.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=(*GROUPS, REPORT), metavar="GROUP", help=names)
    parser.add_argument(
        "--data_dir", default="", help="folder of the course's data; default: multitask_classifier.py's"
    )
    parser.add_argument("--runs", type=Path, default=Place.runs, help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--jobs", type=positive_int, default=1, help="rows to train side by side, each on one core")
    parser.add_argument("--hours", type=positive, default=1000, help="no row starts after so many hours")
    parser.add_argument("--time", action="store_true", help="time the exits of the trained rows, and train nothing")
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


def list_rows(rows, missing, place):
    """Print the command of every row, and about how long it takes if it is not recorded."""
    total = 0.0
    for group, name in rows:
        command, done = place.command(group, name), (group, name) not in missing
        minutes = estimate(command)
        total += 0 if done else minutes
        print(f"{group}: {name} ({'recorded' if done else f'{minutes:.0f} min'}): python {' '.join(command)}")
    print(f"{total:.0f} minutes of one core for the rows that have no record")


def main(argv=None):
    """Train the runs of some groups, record them and write their tables."""
    args = make_parser().parse_args(argv)
    if (args.epochs or args.weights) and not args.fraction:
        raise InputError("--epochs and --weights belong to a check run: add --fraction")
    if args.fraction and (REPORT in args.groups or args.list or args.time or args.collect):
        raise InputError(f"--fraction: a check run trains: leave out {REPORT}, --list, --time and --collect")
    if REPORT in args.groups:
        return report(RESULTS, args.data_dir)
    place = check_place(args) if args.fraction else Place(args.runs, RESULTS, args.data_dir)
    rows = choose_rows(args)
    recorded = {group: load_rows(group, place.results) for group in args.groups}
    missing = [(group, name) for group, name in rows if name not in recorded[group]]
    if args.list:
        return list_rows(rows, missing, place)
    if args.time:
        time_exits(rows, place)
    elif not args.collect:
        if missing:
            # a table of the course's data must not get a row of the sample
            find_data_dir(place.data_dir or None, COURSE_FILES, may_be_sample=False)
        print(f"{len(rows) - len(missing)} rows are recorded already, {len(missing)} are to be trained", flush=True)
        run_rows(missing, place, args.jobs, args.hours)
    for group in args.groups:
        record_rows(group, place)
    return None


if __name__ == "__main__":
    run_script(main)
