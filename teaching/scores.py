"""Expected scores: runs that take minutes, each with several seeds, and their mean and standard deviation.

    python -m teaching expected --list                      prints the commands
    python -m teaching expected --data_dir DIR              trains what is missing; a stopped command continues
    python -m teaching expected --only "sample, frozen" --seeds 1

RUNS is the list; all seeds of the sample's runs take about an hour on one core. results/expected.json records one
row for each run and seed, and the handout's tables are made from it. A row with another command than its run has now
does not count.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import InputError
from files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "expected.json"
RUNS_FOLDER = ROOT / "runs" / "expected"


@dataclass(frozen=True)
class Run:
    """A training run of the course: its flags, the pages that show it, and its number of seeds."""

    flags: str
    parts: tuple = ()
    seeds: int = 10
    data_dir: str | None = "data/sample"  # None: the course's data

    @property
    def command(self):
        """The command without its seed, as the handout prints it."""
        folder = f"--data_dir {self.data_dir} " if self.data_dir else ""
        return f"multitask_classifier.py --weights minilm {folder}{self.flags}"


BERT_PARTS = ("attention", "layer", "embeddings")
RUNS = {
    "sample, frozen": Run("--option pretrain --epochs 10", ("tokenizer", *BERT_PARTS, "losses", "classifier")),
    "sample, fine-tuned": Run("--epochs 3", ("optimizer", "losses", "classifier", "smart", "gradients", "adapters")),
    "sample, SGD": Run("--epochs 3 --optimizer sgd", ("optimizer",), seeds=1),
    "sample, cosine losses": Run(
        "--epochs 3 --pairs siamese --para_loss cosine --sts_loss cosine", ("losses", "evaluation"), seeds=1
    ),
    "sample, early exit": Run("--epochs 3 --early_exit", ("early_exit", "slf"), seeds=1),
    "sample, SLF and early exit": Run(
        "--epochs 3 --early_exit --slf --slf_epochs 2.5 --lr 2.5e-4", ("early_exit", "slf"), seeds=1
    ),
    "sample, SMART on Quora": Run("--epochs 3 --smart para", ("smart",), seeds=1),
    "sample, Bregman": Run("--epochs 3 --bregman", ("smart",), seeds=1),
    "sample, all tasks a step": Run("--epochs 3 --step all_tasks", ("gradients",), seeds=1),
    "sample, PCGrad": Run("--epochs 3 --gradients pcgrad", ("gradients",), seeds=1),
    "sample, LoRA": Run("--epochs 3 --adapter lora --lr 2e-3", ("adapters",), seeds=1),
    "SST alone, frozen": Run("--tasks sst --option pretrain --epochs 10", BERT_PARTS, data_dir=None),
    "SST alone, fine-tuned": Run("--tasks sst --epochs 3", ("classifier",), seeds=3, data_dir=None),
    "CFIMDB alone, frozen": Run(
        "--tasks cfimdb --option pretrain --epochs 10 --max_length 128", BERT_PARTS, data_dir=None
    ),
    "CFIMDB alone, fine-tuned": Run(
        "--tasks cfimdb --epochs 2 --max_length 128", ("classifier",), seeds=3, data_dir=None
    ),
}
COLUMNS = {"sst": "SST", "cfimdb": "CFIMDB", "para": "Quora", "sts": "STS r", "norm": "norm"}


# --- running ----------------------------------------------------------------------------------------------------------


def read_record():
    """Return the recorded rows that belong to today's commands: {(run, seed): row}."""
    rows = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    return {
        (row["run"], row["seed"]): row
        for row in rows
        if row["run"] in RUNS and row["command"] == RUNS[row["run"]].command
    }


def read_run(name, seed, folder):
    """Return the row of a finished run, from its files."""
    from tasks import TASKS  # a student's mistake in tasks.py is no reason not to grade bert.py

    config, summary = (json.loads((folder / file).read_text()) for file in ("config.json", "summary.json"))
    best = summary["best"]
    scores = {task: metrics[TASKS[task].metric.name] for task, metrics in best["tasks"].items()}
    return {
        "run": name,
        "seed": seed,
        "command": RUNS[name].command,
        "scores": scores | {"norm": best["norm"]},
        "minutes": (summary["train_seconds"] + summary["eval_seconds"]) / 60,
        **{key: config[key] for key in ("commit", "device", "threads", "torch")},
    }


def train_seed(name, seed, data_dir):
    """Train a run with one seed, on one thread. Returns its row.

    Raises: InputError where the run fails.
    """
    folder = RUNS_FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{seed}"
    words = [*RUNS[name].command.split(), "--seed", str(seed), "--run_dir", str(folder), "--overwrite"]
    if RUNS[name].data_dir is None:
        # named, so that the program does not fall back to the sample where the course's data are missing
        words += ["--data_dir", str(data_dir or ROOT / "data")]
    print(" ".join(words), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, *words], cwd=ROOT, env=environment).returncode:
        raise InputError(f"{name}, seed {seed}: the run failed or was stopped; the same command continues here")
    return read_run(name, seed, folder)


def run_expected(only=(), seeds=None, data_dir=None, show=False):
    """Train the runs and seeds that have no row yet; record each row as soon as it is there."""
    rows = read_record()
    for name, run in RUNS.items():
        if only and name not in only:
            continue
        for seed in range(1, min(run.seeds, seeds or run.seeds) + 1):
            if show:
                print(f"{name}: {run.command} --seed {seed}")
            elif (name, seed) not in rows:
                rows[name, seed] = train_seed(name, seed, data_dir)
                ordered = sorted(rows.values(), key=lambda row: (list(RUNS).index(row["run"]), row["seed"]))
                write_whole(RECORD, json.dumps(ordered, indent=1) + "\n")


# --- the table --------------------------------------------------------------------------------------------------------


def mean_and_deviation(numbers, form=".3f"):
    """Return "mean (standard deviation)" as text, one number without a deviation, and nothing for no numbers."""
    if not numbers:
        return ""
    mean = format(statistics.mean(numbers), form).replace("0.", ".", 1)
    if len(numbers) == 1:
        return mean
    return f"{mean} ({format(statistics.stdev(numbers), form).replace('0.', '.', 1)})"


def table_row(name, rows):
    """Return the line of one run; `rows` are those of its seeds."""
    if not rows:
        return f"| {name} | 0 | not run yet |" + " |" * len(COLUMNS)
    scores = [mean_and_deviation([row["scores"][key] for row in rows if key in row["scores"]]) for key in COLUMNS]
    minutes = statistics.mean(row["minutes"] for row in rows)
    return f"| {name} | {len(rows)} | {' | '.join(scores)} | {minutes:.1f} |"


def score_table(part=None):
    """Return the table of the runs that a part's page shows, or of all runs, with their commands. "" without runs."""
    chosen = {name: run for name, run in RUNS.items() if part is None or part in run.parts}
    if not chosen:
        return ""
    recorded, lines = read_record(), [f"| run | seeds | {' | '.join(COLUMNS.values())} | minutes |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for name in chosen:
        lines.append(table_row(name, [row for (run, _), row in recorded.items() if run == name]))
    lines += [
        "",
        "Dev scores of the best epoch, as the program prints them at the end: the mean over the seeds, the standard "
        "deviation in brackets. A score with one seed varies about as much as that of `sample, fine-tuned`. Minutes on "
        "one CPU thread of a shared machine. Scores on the sample data only show that a program works.",
        "",
        "```sh",
        *(f".venv/bin/python {run.command} --seed 1    # {name}" for name, run in chosen.items()),
        "```",
    ]
    return "\n".join(lines)
