"""The training runs behind the tables of results/: their flags, how they are started, and how their files are read.

    python -m lab.experiments core              # trains what has not been trained, then writes results/core.*
    python -m lab.experiments methods --list    # prints the commands, trains nothing
    python -m lab.experiments core --collect    # writes results/core.* again, trains nothing

A group is a table; a row of it is one run in runs/experiments/GROUP/NAME. A finished run is not trained again, an
interrupted one continues. The numbers of a row are read from its run's files and recorded in results/GROUP.json, never
typed. If the run's folder is gone, the recorded numbers stay, as long as the row's command is the recorded one.
"""

import argparse
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# first: it prints what to do if the packages are not installed
from lab import peer  # isort: skip
import numpy as np

from errors import InputError, run_script
from files import write_whole
from flags import parse_flags, recorded_flags
from lab.bootstrap import METRICS, paired_bootstrap
from lab.tables import comparison_table, replace_between, score_table
from runs import FORMAT, FREE_FLAGS
from tasks import TASKS, build_tasks

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
PEER = "lab.peer"
# a run may differ from its row in these flags: where the run is stored, and how it exits early at inference
UNIMPORTANT = FREE_FLAGS | {"exit_policy", "exit_threshold"}
# the flags of every run: the small weights, which every reader can download
COMMON = "--weights minilm --precision bf16"


@dataclass(frozen=True)
class Group:
    """The runs of one table.

    `flags` are the flags of all its runs; `rows` is {name: flags of that run, which win}, or the peer's whole command;
    `removed` is {name: flags} of runs that today's program cannot repeat: their recorded numbers stay in the table.
    """

    flags: str
    rows: dict
    removed: dict = field(default_factory=dict)


PEER_FLAGS = "-m lab.peer --epochs 4 --lr 5e-5 --batch_size 16 --precision bf16"
CORE = Group(
    "--epochs 3 --batch_size 16",
    {
        "mean pooling, seed 1": "--pooling mean --seed 1",
        "mean pooling, seed 2": "--pooling mean --seed 2",
        "mean pooling, seed 3": "--pooling mean --seed 3",
        "[CLS], seed 1": "--pooling cls --seed 1 --lr 1e-4 --step one_task",
        "[CLS], seed 2": "--pooling cls --seed 2",
        "[CLS], seed 3": "--pooling cls --seed 3",
        "mean pooling, heads' dropout 0.1": "--pooling mean --hidden_dropout_prob 0.1 --seed 1",
        "Bregman for SST and STS, seed 1": "--pooling mean --bregman sst sts --seed 1",
        "Bregman for SST and STS, seed 2": "--pooling mean --bregman sst sts --seed 2",
        "Bregman for SST and STS, seed 3": "--pooling mean --bregman sst sts --seed 3",
        "mean pooling, Bregman": "--pooling mean --bregman --bregman_weight 1 --seed 1",
        "transformers, seed 1": f"{PEER_FLAGS} --seed 1",
        "transformers, seed 2": f"{PEER_FLAGS} --seed 2",
        "transformers, seed 3": f"{PEER_FLAGS} --seed 3",
        "pretrain (BERT frozen)": "--pooling cls --option pretrain --seed 1 --epochs 10",
        "SST alone, last linear layer": "--pooling cls --tasks sst --option pretrain --seed 1 --epochs 10",
        "SST alone, full model": "--pooling cls --tasks sst --seed 1",
        "CFIMDB alone, last linear layer": "--pooling cls --tasks cfimdb --option pretrain --seed 1 --epochs 10 "
        "--max_length 128",
        "CFIMDB alone, full model": "--pooling cls --tasks cfimdb --seed 1 --epochs 2 --max_length 128",
    },
)
# short runs with mean pooling: with it the small weights learn something of every task in a tenth of an epoch
SHORT = "--epochs 1 --epoch_size 0.1 --batch_size 16 --seed 1 --pooling mean"
METHODS = Group(
    SHORT,
    {
        "baseline": "",
        "SMART on Quora": "--smart para",
        "SMART, Gaussian form": "--smart --smart_form gaussian",
        "Bregman": "--bregman --bregman_weight 1",
        "SLF": "--slf --slf_epochs 0.02",
        "SLF, longer": "--slf --slf_epochs 0.25 --epoch_size 0.25",
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
        "LNSR": "--lnsr --lnsr_weight 1",
        "LNSR, weight 100": "--lnsr --lnsr_weight 100",
        "LNSR, weight 1000": "--lnsr --lnsr_weight 1000",
        "SMART, literal radius": "--smart --smart_radius 2e-5",
        "all tasks a step": "--step all_tasks",
        "early exit, weighted": "--early_exit --exit_loss weighted",
        "early exit, alternating": "--early_exit --exit_loss alternating",
        "early exit, two stage": "--early_exit --exit_loss two_stage",
        "cls pooling": "--pooling cls",
    },
    removed={"SLF, longer, states cached": "--slf --slf_epochs 0.25 --epoch_size 0.25 --slf_cache"},
)
# one default at a time against other values, in runs as short as those of the methods
DEFAULTS = Group(
    SHORT,
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
)
# SST and STS cut to SMARTer BERT's share of Quora (one to 16.6); every split trains on about as many examples
SPLITS = Group(
    "--epochs 4 --batch_size 16 --pooling mean --train_rows sst=854 sts=604",
    {
        f"{name}, seed {seed}": f"{flags} --seed {seed}"
        for seed in (1, 2)
        for name, flags in {
            "equal": "--split equal --epoch_size 3.375",
            "proportional": "--split proportional --epoch_size 4.5",
            "full": "--split full --epoch_size 0.5",
            "full, one task after another": "--split full --sampler sequential --epoch_size 0.5",
            "full, square root": "--split full --sampler sqrt --epoch_size 0.5",
            "full, annealed": "--split full --sampler annealed --epoch_size 0.5",
        }.items()
    },
)
EXITS = Group(
    "--batch_size 16 --seed 1",
    {
        "SLF + early exit": "--pooling cls --slf --early_exit --epochs 2 --slf_epochs 0.1",
        "early exit, siamese, mean pooling": "--early_exit --pairs siamese --pooling mean --epochs 1",
        "early exit, mean pooling": "--early_exit --pooling mean --epochs 3",
    },
)
GROUPS = {"core": CORE, "methods": METHODS, "defaults": DEFAULTS, "splits": SPLITS, "exits": EXITS}


def command_of(group, name):
    """The words of one row's command after `python`."""
    row = GROUPS[group].rows[name]
    if row.startswith(f"-m {PEER} "):
        return shlex.split(row)
    return ["multitask_classifier.py", *shlex.split(f"{COMMON} {GROUPS[group].flags} {row}")]


def flags_of(group, name):
    """Parse the flags of one row with its own program. Returns ({flag: value}, whether the program is the peer)."""
    script, *words = command_of(group, name)
    if script == "-m":
        return vars(peer.make_parser().parse_args([*words[1:], "--run_dir", ""])), True
    return parse_flags(words)[0], False


def slug(name):
    """The directory name of a row."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


# --- training -----------------------------------------------------------------------------------------------------


def run_row(group, name, data_dir, runs):
    """Train one row, unless its run is finished."""
    folder = runs / group / slug(name)
    if (folder / "summary.json").exists():
        return
    words = [*command_of(group, name), "--run_dir", str(folder.resolve())]
    if data_dir:
        words += ["--data_dir", str(Path(data_dir).resolve())]
    if (folder / "config.json").exists():
        # the peer cannot resume: its interrupted run starts again
        if words[0] == "-m":
            shutil.rmtree(folder)
        else:
            words += ["--resume"]
    print(f"== {group}: {name}\n{' '.join(words)}", flush=True)
    if subprocess.run([sys.executable, *words], cwd=HERE).returncode == 130:
        raise InputError("interrupted: the same command continues from here")


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


def same_flags(group, name, config):
    """Whether a run was trained with the flags that its row has now."""
    wanted, is_peer = flags_of(group, name)
    trained = config["flags"] if is_peer else trained_flags(config)
    if not is_peer:
        # a row may leave this to the weights; the run records the resulting number
        wanted["max_length"] = wanted["max_length"] or trained["max_length"]
    return all(trained[key] == value for key, value in wanted.items() if key not in UNIMPORTANT)


def main_metrics(tasks):
    """{task: its main metric} from {task: {metric: number}} of a summary."""
    return {task: metrics[TASKS[task].metric.name] for task, metrics in tasks.items()}


def read_row(group, name, folder):
    """Read the numbers of one row from its run's files; None if there is no finished run with the row's flags."""
    if not (folder / "summary.json").exists():
        return None
    config, summary = (json.loads((folder / file).read_text()) for file in ("config.json", "summary.json"))
    if not same_flags(group, name, config):
        return None
    row = {"name": name, "command": " ".join(command_of(group, name))}
    row |= {key: config[key] for key in ("commit", "device", "threads", "torch", "data")}
    row |= {"weights": config["weights"]["sha256"], "seed": config["flags"]["seed"]}
    for key in ("best", "last"):
        row[key] = {"raw": summary[key]["raw"], "norm": summary[key]["norm"]} | main_metrics(summary[key]["tasks"])
    row["positive_rate"] = summary["best"]["tasks"].get("para", {}).get("positive_rate")
    keys = ("phase_norms", "steps", "train_seconds", "eval_seconds", "peak_mib", "exits")
    return row | {key: summary.get(key) for key in keys} | {"sweep": read_sweep(folder)}


def read_sweep(folder):
    """Read the sweep of a run's exits (`--option evaluate --exit_threshold .5,...`), averaged over the tasks.

    Returns {setting: {score, mean_layers, examples_per_second}}, or None if the run has no sweep.
    """
    path = folder / "evaluate" / "sweep.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "all"]
    keys = ("score", "mean_layers", "examples_per_second")
    return {row["setting"]: {key: float(row[key]) for key in keys} for row in rows}


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


def read_recorded(group):
    """The recorded rows of a group: {name: row}."""
    path = RESULTS / f"{group}.json"
    return {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def collect(group, names, runs):
    """Read the rows of some names from their runs, or else from the record, and print which names have no numbers."""
    recorded, rows = read_recorded(group), []
    for name in names:
        folder, old = runs / group / slug(name), recorded.get(name)
        row = read_row(group, name, folder) if name in GROUPS[group].rows else None
        if not row and (folder / "summary.json").exists():
            print(f"{name}: {folder} was trained with other flags: remove it to train the row again")
        if not row and old and (name in GROUPS[group].removed or old["command"] == " ".join(command_of(group, name))):
            row = old
        if row:
            # a comparison needs predictions, which may be gone
            kept = {key: old[key] for key in ("against_peer", "mean_against_peer") if old and key in old}
            rows.append(kept | row)
        else:
            print(f"no result: {name}")
    compare_seeds(rows, runs / group)
    return rows


def tables(group, rows):
    """The Markdown of a group's tables: {file name: text}."""
    result = {f"{group}.md": score_table(COMMON, GROUPS[group], rows)}
    comparison = comparison_table(rows)
    return result | ({"comparison.md": comparison} if comparison else {})


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", choices=GROUPS, help="a group of runs, which is a table")
    parser.add_argument("--data_dir", help="folder of the course's data; default as in multitask_classifier.py")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "experiments", help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows; prints their table, writes nothing")
    parser.add_argument("--list", action="store_true", help="print the commands, train nothing")
    parser.add_argument("--collect", action="store_true", help="make the tables from what is there, train nothing")
    return parser


def main(argv=None):
    """Train a group's runs and write its tables."""
    args = make_parser().parse_args(argv)
    group = GROUPS[args.group]
    names = [name for name in (*group.rows, *group.removed) if not args.only or name in args.only]
    for name in group.rows:
        if name in names and args.list:
            print(f"{name}: python {' '.join(command_of(args.group, name))}")
        elif name in names and not args.collect:
            run_row(args.group, name, args.data_dir, args.runs)
    rows = [] if args.list else collect(args.group, names, args.runs)
    if not rows:
        return
    texts = tables(args.group, rows)
    print("\n".join(texts.values()))
    if not args.only:
        write_whole(RESULTS / f"{args.group}.json", json.dumps(rows, indent=1))
        for name, text in texts.items():
            replace_between(RESULTS / name, "table", text)


if __name__ == "__main__":
    run_script(main)
