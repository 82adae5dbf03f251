#!/usr/bin/env python3
"""Run the experiments of README and make their tables from the runs' own logs. Read first: README.md.

    python experiments.py core              # runs what is not there yet, then writes results/core.*
    python experiments.py methods --list    # only shows the commands

A row is a name and the flags that it adds to its group's; one that starts with a script's name is that command
instead. A finished run is not run again; an interrupted one is resumed. Every number in results/ is read from
runs/experiments/GROUP/NAME, never typed.
"""

import argparse
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# first of ours: it says what to do where torch is not installed
import peer  # isort: skip
import numpy as np

from errors import InputError, run_script
from evaluation import METRICS, normalise, paired_bootstrap
from files import write_whole
from flags import EXIT_FLAGS, parse_flags
from runs import FREE_FLAGS
from tasks import build_tasks

HERE = Path(__file__).parent
PEER = peer.__name__
# flags that a run may differ in from its row: those of looking after it, and those of leaving early at inference
UNIMPORTANT = FREE_FLAGS | set(EXIT_FLAGS)
# what every group adds: the small weights, which every reader has
COMMON = "--weights minilm --precision bf16"
GROUPS = {
    "core": (
        "--epochs 3 --batch_size 16",
        {
            "mean pooling, seed 1": "--pooling mean --seed 1",
            "mean pooling, seed 2": "--pooling mean --seed 2",
            "mean pooling, seed 3": "--pooling mean --seed 3",
            "[CLS], seed 1": "--seed 1 --lr 1e-4 --step one_task",
            "[CLS], seed 2": "--seed 2",
            "[CLS], seed 3": "--seed 3",
            "mean pooling, heads' dropout 0.1": "--pooling mean --hidden_dropout_prob 0.1 --seed 1",
            "Bregman for SST and STS, seed 1": "--pooling mean --bregman 1 --bregman_tasks sst sts --seed 1",
            "Bregman for SST and STS, seed 2": "--pooling mean --bregman 1 --bregman_tasks sst sts --seed 2",
            "Bregman for SST and STS, seed 3": "--pooling mean --bregman 1 --bregman_tasks sst sts --seed 3",
            "mean pooling, Bregman": "--pooling mean --bregman 1 --seed 1",
            "transformers, seed 1": "peer.py --epochs 4 --lr 5e-5 --batch_size 16 --seed 1 --precision bf16",
            "transformers, seed 2": "peer.py --epochs 4 --lr 5e-5 --batch_size 16 --seed 2 --precision bf16",
            "transformers, seed 3": "peer.py --epochs 4 --lr 5e-5 --batch_size 16 --seed 3 --precision bf16",
            "pretrain (BERT frozen)": "--option pretrain --seed 1 --epochs 10",
            "SST alone, last linear layer": "--tasks sst --option pretrain --seed 1 --epochs 10",
            "SST alone, full model": "--tasks sst --seed 1",
            "CFIMDB alone, last linear layer": "--tasks cfimdb --option pretrain --seed 1 --epochs 10 --max_length 128",
            "CFIMDB alone, full model": "--tasks cfimdb --seed 1 --epochs 2 --max_length 128",
        },
    ),
    # mean pooling, with which the small weights were tuned: a tenth of an epoch then teaches every task something
    "methods": (
        "--epochs 1 --epoch_size 0.1 --batch_size 16 --seed 1 --pooling mean",
        {
            "baseline": "",
            "SMART on Quora": "--smart para",
            "SMART, Gaussian form": "--smart --smart_form gaussian",
            "Bregman": "--bregman 1",
            "SLF": "--slf --slf_epochs 0.02",
            "SLF, longer": "--slf --slf_epochs 0.25 --epoch_size 0.25",
            "SLF, longer, states kept": "--slf --slf_epochs 0.25 --epoch_size 0.25 --slf_cache",
            "Smart Alternating": "--smart_alternating --epochs 3 --epoch_size 0.05",
            "embed_concat": "--pairs embed_concat",
            "siamese": "--pairs siamese",
            "cosine losses": "--pairs siamese --para_loss cosine --sts_loss cosine",
            "PCGrad": "--gradients pcgrad",
            "GradVac": "--gradients gradvac",
            "adapter before": "--adapter before --lr 2e-3",
            "adapter after": "--adapter after --lr 2e-3",
            "adapter Houlsby": "--adapter houlsby --lr 2e-3",
            "adapter LHUC": "--adapter lhuc --lr 2e-3",
            "adapter PAL": "--adapter pal --lr 2e-3",
            "RMSprop": "--optimizer rmsprop --lr 1e-4",
            "SGD": "--optimizer sgd",
            "Full SMART": "--smart",
            "early exit, joint": "--early_exit",
            "LNSR": "--lnsr 1",
            "LNSR, weight 100": "--lnsr 100",
            "LNSR, weight 1000": "--lnsr 1000",
            "SMART, literal radius": "--smart --smart_radius 2e-5 --smart_step 2e-3 --smart_noise 2e-5",
            "all tasks a step": "--step all_tasks",
            "early exit, weighted": "--early_exit --exit_loss weighted",
            "early exit, alternating": "--early_exit --exit_loss alternating",
            "early exit, two stage": "--early_exit --exit_loss two_stage",
            "cls pooling": "--pooling cls",
        },
    ),
    # one default at a time against others, in runs as short as those of the methods
    "defaults": (
        "--epochs 1 --epoch_size 0.1 --batch_size 16 --seed 1 --pooling mean",
        {
            "AdamW, lr 1e-4": "--lr 1e-4",
            "AdamW, lr 5e-5": "--lr 5e-5",
            "AdamW, lr 2e-4": "--lr 2e-4",
            "AdamW, lr 4e-4": "--lr 4e-4",
            "SGD, lr 0.02": "--optimizer sgd --lr 0.02",
            "SGD, lr 0.1": "--optimizer sgd --lr 0.1",
            "SGD, lr 0.3": "--optimizer sgd --lr 0.3",
            "RMSprop, lr 5e-5": "--optimizer rmsprop --lr 5e-5",
            "RMSprop, lr 1e-4": "--optimizer rmsprop --lr 1e-4",
            "RMSprop, lr 2e-4": "--optimizer rmsprop --lr 2e-4",
            "Houlsby adapter, lr 1e-3": "--adapter houlsby --lr 1e-3",
            "Houlsby adapter, lr 4e-3": "--adapter houlsby --lr 4e-3",
            "no warm-up": "--warmup 0",
            "no clipping": "--clip 0",
            "constant learning rate": "--schedule constant",
            "cosine schedule": "--schedule cosine",
            "no weight decay": "--weight_decay 0",
        },
    ),
    # SMARTer BERT's claim about data splits: SST and STS cut to the paper's share of Quora, one to 16.6, and about
    # as many examples for every split
    "splits": (
        "--epochs 4 --batch_size 16 --pooling mean --train_rows sst=854 sts=604",
        {
            "equal, seed 1": "--split equal --epoch_size 3.375 --seed 1",
            "proportional, seed 1": "--split proportional --epoch_size 4.5 --seed 1",
            "full, seed 1": "--split full --epoch_size 0.5 --seed 1",
            "full, one task after another, seed 1": "--split full --sampler sequential --epoch_size 0.5 --seed 1",
            "full, square root, seed 1": "--split full --sampler sqrt --epoch_size 0.5 --seed 1",
            "full, annealed, seed 1": "--split full --sampler annealed --epoch_size 0.5 --seed 1",
            "equal, seed 2": "--split equal --epoch_size 3.375 --seed 2",
            "proportional, seed 2": "--split proportional --epoch_size 4.5 --seed 2",
            "full, seed 2": "--split full --epoch_size 0.5 --seed 2",
            "full, one task after another, seed 2": "--split full --sampler sequential --epoch_size 0.5 --seed 2",
            "full, square root, seed 2": "--split full --sampler sqrt --epoch_size 0.5 --seed 2",
            "full, annealed, seed 2": "--split full --sampler annealed --epoch_size 0.5 --seed 2",
        },
    ),
    "exits": (
        "--batch_size 16 --seed 1",
        {
            "SLF + early exit": "--slf --early_exit --epochs 2 --slf_epochs 0.1",
            "early exit, siamese, mean pooling": "--early_exit --pairs siamese --pooling mean --epochs 1",
            "early exit, mean pooling": "--early_exit --pooling mean --epochs 3",
        },
    ),
}


def command_of(group, name):
    """The script of one row and its flags, later ones overriding earlier ones."""
    shared, rows = GROUPS[group]
    if rows[name].startswith(f"{PEER}.py"):
        return shlex.split(rows[name])
    return ["multitask_classifier.py", *shlex.split(f"{COMMON} {shared} {rows[name]}")]


def slug(name):
    """A directory name for a row."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def run_row(group, name, data_dir, runs):
    """Train one row unless its summary is there. Returns its run directory, or None where it failed."""
    folder = runs / group / slug(name)
    if (folder / "summary.json").exists():
        return folder
    command = [sys.executable, *command_of(group, name), "--run_dir", str(folder)]
    if data_dir:
        command += ["--data_dir", data_dir]
    if (folder / "config.json").exists():
        if command[1].startswith(PEER):
            shutil.rmtree(folder)
        else:
            command += ["--resume"]
    print(f"== {group}: {name}\n{' '.join(command[1:])}", flush=True)
    status = subprocess.run(command, cwd=HERE).returncode
    if status == 130:
        raise InputError("interrupted: the same command goes on from here")
    return folder if status == 0 else None


def same_flags(group, name, config):
    """Whether a finished run was trained with the flags that its row has now."""
    script, *given = command_of(group, name)
    if script == f"{PEER}.py":
        flags = vars(peer.make_parser().parse_args([*given, "--run_dir", ""]))
    else:
        flags = parse_flags(given)[0]
        # where a row leaves it to the weights, the run has filled it in
        flags["max_length"] = flags["max_length"] or config["flags"]["max_length"]
    return all(flags[key] == value for key, value in config["flags"].items() if key in flags.keys() - UNIMPORTANT)


def read_row(group, name, folder):
    """One row of the table, from the run's files alone; None where there is no such run."""
    if not (folder / "summary.json").exists():
        return None
    config, summary = (json.loads((folder / file).read_text()) for file in ("config.json", "summary.json"))
    if not same_flags(group, name, config):
        return None
    row = {"name": name, "command": " ".join(command_of(group, name)), "commit": config["commit"]}
    row |= {key: config[key] for key in ("device", "threads", "torch", "data")}
    row |= {"weights": config["weights"]["sha256"], "seed": config["flags"]["seed"]}
    for key in ("best", "last"):
        row[key] = {"raw": summary[key]["raw"], "norm": summary[key]["norm"]}
        for task, metrics in summary[key]["tasks"].items():
            row[key][task] = metrics.get("pearson", metrics.get("accuracy"))
    keep = ("phase_norms", "steps", "train_seconds", "eval_seconds", "positive_rate", "peak_mib", "exits")
    return row | {key: summary.get(key) for key in keep} | {"sweep": read_sweep(folder)}


def read_sweep(folder):
    """What a sweep of a run's exits (`--option evaluate --exit_threshold .5,...`) found for all tasks together.

    Returns {setting: {score, mean_layers, examples_per_second}}, or None where there was none.
    """
    path = folder / "evaluate" / "sweep.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "all"]
    keep = ("score", "mean_layers", "examples_per_second")
    return {row["setting"]: {key: float(row[key]) for key in keep} for row in rows}


def read_predictions(folder, task):
    """A run's dev predictions of one task, in the course's format: {id: value}."""
    lines = (folder / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
    return {key.strip(): float(value) for key, value in (line.split(",") for line in lines)}


def read_labels(folder, task):
    """The dev labels of one task, from the readable predictions: {id: label}."""
    with open(folder / "predictions" / f"{task.name}-dev-readable.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: float(row["gold"]) for row in csv.DictReader(file) if row["gold"]}


def compare_runs(ours, others):
    """The mean norm of some runs against that of others, by paired bootstrap over the dev rows, at their best epochs.

    The runs stay the same in every resample, so that the interval says nothing about other seeds.
    """
    parts = []
    for task in build_tasks().values():
        labels = read_labels(ours[0], task)
        found = [read_predictions(folder, task) for folder in (*ours, *others)]
        values = np.array([[predicted[key] for predicted in found] for key in labels])  # [rows, runs]

        def metric(predicted, gold, task=task):
            return np.mean([normalise(task, METRICS[task.metric](run, gold)) for run in predicted.T])

        first, second = np.split(values, [len(ours)], axis=1)
        parts.append((first, second, np.array(list(labels.values())), metric))
    difference, (low, high), not_better = paired_bootstrap(parts)
    return {"difference": difference, "low": low, "high": high, "not_better": not_better}


def compare_seeds(rows, runs):
    """Compare with transformers: every row that is one of a recipe's seeds, and all seeds of a recipe together.

    Each time the other side is the mean of all seeds that transformers was run with.
    """
    recipes = {}
    for row in rows:
        recipe, seed, _ = row["name"].partition(", seed ")
        if seed:
            recipes.setdefault(recipe, []).append(row)
    others = [runs / slug(row["name"]) for row in recipes.pop("transformers", ())]
    for mine in recipes.values() if others else ():
        folders = [runs / slug(row["name"]) for row in mine]
        for row, folder in zip(mine, folders, strict=True):
            row["against_peer"] = compare_runs([folder], others)
        if len(mine) > 1:
            mine[-1]["together_against_peer"] = compare_runs(folders, others) | {"runs": len(mine)}


def comparison_table(rows):
    """The comparisons with transformers as a table in Markdown; nothing where there are none."""
    lines = []
    for row in rows:
        together = row.get("together_against_peer", {})
        name = row["name"].partition(", seed ")[0] + f", mean of {together.get('runs')} seeds"
        for told, found in ((row["name"], row.get("against_peer")), (name, together)):
            if found:
                lines.append(
                    f"| {told} | {found['difference']:+.4f} | {found['low']:+.4f} to {found['high']:+.4f} | "
                    f"{found['not_better']:.1%} |"
                )
    peers = sum(row["name"].startswith("transformers, seed ") for row in rows)
    head = ["", f"norm minus the mean of transformers' ({peers} seed{'s' * (peers > 1)}), best epochs", "95%"]
    return (
        [
            "",
            f"| {' | '.join([*head, 'not better in'])} |",
            "|---|---|---|---|",
            *lines,
            "",
            "Paired bootstrap: 10,000 resamples of the dev rows, the same rows for both.",
        ]
        if lines
        else []
    )


def table(group, rows):
    """The group's table in Markdown."""
    tasks = [task for task in ("sst", "cfimdb", "para", "sts") if any(task in row["last"] for row in rows)]
    head = ["row", *tasks, "norm", "raw", "best norm", "Quora positive", "train s", "eval s", "MiB", "flags added"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        numbers = [row["last"].get(task) for task in tasks] + [row["last"]["norm"], row["last"]["raw"]]
        numbers += [row["best"]["norm"], row["positive_rate"]]
        cells = ["" if x is None else f"{x:.3f}" for x in numbers]
        cells += [f"{row['train_seconds']:.0f}", f"{row['eval_seconds']:.0f}", f"{row['peak_mib'] or ''}"]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | `{GROUPS[group][1][row['name']] or ' '}` |")
    peers = f", but for {PEER}.py's" if any(row["command"].startswith(PEER) for row in rows) else ""
    first, commits = rows[0], sorted({row["commit"] for row in rows})
    notes = [
        f"Scores of the last phase; `best norm` is chosen on the same dev data. All rows start from `{COMMON} "
        f"{GROUPS[group][0]}`, which flags added override{peers}. Device {first['device']}, {first['threads']} "
        f"threads, torch {first['torch']}; commits {', '.join(commits)}. Seconds are those of a shared machine: no "
        "benchmark. MiB: the process's peak."
    ]
    for row in rows:
        if found := row.get("sweep"):
            full, left = found["full depth"], found["auto"]
            notes.append(
                f"{row['name']}, thresholds chosen on one half of dev and measured on the other: norm "
                f"{left['score']:.4f} of {full['score']:.4f} at full depth ({left['score'] / full['score']:.1%}) with "
                f"{left['mean_layers']:.2f} layers instead of {full['mean_layers']:.2f} "
                f"({left['mean_layers'] / full['mean_layers']:.0%}), "
                f"{left['examples_per_second'] / full['examples_per_second']:.2f} times as many examples a second; "
                f"at a threshold of .999 {found['0.999']['mean_layers']:.2f} layers."
            )
    return "\n".join([*lines, "", *notes, *comparison_table(rows)]) + "\n"


def update_readme(group, content):
    """Put a table between its markers in README.md."""
    path = HERE / "README.md"
    before, start, rest = path.read_text().partition(f"<!-- {group} -->\n")
    _, end, after = rest.partition(f"<!-- end {group} -->")
    if start and end:
        write_whole(path, before + start + content + end + after)


def benchmark_goals(path):
    """The goals of benchmark.py's report and what was measured, as a list in Markdown."""
    records = json.loads(path.read_text())
    first = next(iter(records.values()))
    lines = [f"- {part}: {goal.removeprefix('goal: ')}" for part, told in records.items() for goal in told["goals"]]
    minutes = sum(told["seconds"] for told in records.values()) / 60
    about = f"Device {first['device']}, {first['threads']} threads, torch {first['torch']}, transformers "
    about += f"{first['transformers']}; commits {', '.join(sorted({told['commit'] for told in records.values()}))}; "
    return "\n".join([*lines, "", f"{about}{minutes:.0f} minutes. Median (lowest - highest) of the rounds."]) + "\n"


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "a group of runs; benchmark only copies what benchmark.py found into README"
    parser.add_argument("group", choices=(*GROUPS, "benchmark"), help=told)
    parser.add_argument("--data_dir", help="folder of the course's data; default as in multitask_classifier.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where the runs are")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    parser.add_argument("--collect", action="store_true", help="make the tables from finished runs, run nothing")
    return parser


def main(argv=None):
    """Run a group and write its tables."""
    args = make_parser().parse_args(argv)
    if args.group == "benchmark":
        update_readme("benchmark", benchmark_goals(HERE / "results" / "benchmark-cpu.json"))
        return
    rows = []
    for name in GROUPS[args.group][1]:
        if args.only and name not in args.only:
            continue
        if args.list:
            print(f"{name}: {' '.join(command_of(args.group, name))}")
            continue
        folder = args.runs / args.group / slug(name)
        if not args.collect:
            folder = run_row(args.group, name, args.data_dir, args.runs)
        row = folder and read_row(args.group, name, folder)
        if row:
            rows.append(row)
        else:
            trained = folder and (folder / "summary.json").exists()
            why = f" ({folder} was trained with other flags: remove it to run the row again)" if trained else ""
            print(f"no result: {name}{why}")
    compare_seeds(rows, args.runs / args.group)
    if rows and not args.only:
        write_whole(HERE / "results" / f"{args.group}.json", json.dumps(rows, indent=1))
        write_whole(HERE / "results" / f"{args.group}.md", table(args.group, rows))
        update_readme(args.group, table(args.group, rows))
    if rows:
        print(table(args.group, rows))


if __name__ == "__main__":
    run_script(main)
