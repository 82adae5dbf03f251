"""What the benchmark measures: the same examples, the two programs, and the training step of each.

Both sides read the same CSV files, each with its own code. Ours trains with multitask_classifier.train_step,
transformers with peer.peer_train: the very functions of the two programs. Whatever in lab/ calls the inner functions
of our program stands here.
"""

import csv
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# first: it prints what to do if torch is not installed
import multitask_classifier  # isort: skip # noqa: F401
import numpy as np
import torch

from base_bert import BertConfig
from bert import BertModel
from building import build, build_table, make_autocast
from datasets import read_dataset
from early_exit import UNREACHABLE, ExitInference, choose_policies
from evaluation import AtExit, evaluate
from flags import parse_flags
from lab.peer import (
    CLIP,
    EVAL_BATCH,
    MAX_LENGTH,
    WARMUP,
    WEIGHT_DECAY,
    PeerData,
    PeerModel,
    import_transformers,
    linear_schedule,
    peer_optimizer,
    peer_predict,
    peer_scores,
    peer_train,
)
from multitask_classifier import TaskLoss, make_model, phase_steps, set_trainable, train_step
from runs import RunFolder
from samplers import make_rng, phase_rows, rows_per_epoch
from tasks import build_tasks
from tokenizer import BertTokenizer

# the repository's folder
HERE = Path(__file__).parents[1]
SEED, BATCH, LEARNING_RATE, HEAD_DROPOUT = 11711, 16, 5e-5, 0.3
# {program: its module and the flags that it needs for the same work}
PROGRAMS = {"ours": ("multitask_classifier", "--pooling", "cls"), "transformers": ("lab.peer",)}
# ways to train: our flags, or whether torch.compile translates the peer's model
TRAININGS = {
    "ours": "",
    "ours, sdpa": "--attention sdpa",
    "ours, compiled": "--compile",
    "transformers": False,
    "transformers, compiled": True,
}
# a program that runs a module and ends after the first step of any optimiser
FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
name = sys.argv.pop(1)
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
sys.exit("no training step was taken")
"""


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    Units: `run`, `growth` and `evaluated` are shares of an epoch, or of the dev rows; `lengths` are tokens; `repeats`
        are steps in a turn, `profiled` steps; `gpu_steps` is ((rows, tokens), wanted ratio) of a batch.
    """

    rounds: int = 3
    run: float = 1 / 3
    growth: tuple = (1 / 48, 1 / 12, 1 / 3)
    evaluated: float = 1.0
    lengths: tuple = (16, 32, 64, 128)
    repeats: int = 10
    profiled: int = 20
    gpu_steps: tuple = (((128, 128), 1.3), ((16, 32), 2.0))


QUICK = Sizes(1, 0.02, (0.01, 0.02), 0.02, (8, 16), 1, 2)


@dataclass(frozen=True)
class Setup:
    """What every part works with."""

    weights: Path
    data_dir: Path
    device: torch.device
    precisions: tuple
    sizes: Sizes


# --- the same examples for both sides ------------------------------------------------------------------------------


def read_ours(setup, folder, splits=("train", "dev"), names=("sst", "para", "sts")):
    """Read files of a folder with our code: {task: {split: Dataset}}."""
    tokenizer = BertTokenizer.from_pretrained(setup.weights)
    return {
        name: {split: read_dataset(task, folder / task.file(split), tokenizer, MAX_LENGTH) for split in splits}
        for name, task in build_tasks(names).items()
    }


def read_peer(setup, folder, split, names=("sst", "para", "sts")):
    """Read a split of a folder with the peer's code: {task: PeerData}."""
    tokenizer = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    return {
        name: PeerData(folder / task.file(split), task, tokenizer, True) for name, task in build_tasks(names).items()
    }


def write_course_file(path, task, rows):
    """Write rows, each (id, texts, label), as one of the course's CSV files."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["", "id", *task.columns, task.label_column])
        for i, (identifier, texts, label) in enumerate(rows):
            writer.writerow([i, identifier, *texts, f"{label:g}"])


def course_rows(dataset, chosen):
    """The usable rows of a Dataset at the chosen positions, as write_course_file takes them."""
    return [(dataset.identifier(i), dataset.text(i), dataset.labels[i]) for i in dataset.usable[chosen]]


def write_share(setup, folder, share):
    """Write a data folder with a share of an epoch (equal split) and of the dev rows. Returns (training, dev examples).

    The test files have 8 rows of a task: our program predicts them at the end of a run, and the peer does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = read_ours(setup, setup.data_dir)
    tasks = {name: splits["train"].task for name, splits in data.items()}
    sizes = {name: len(splits["train"].usable) for name, splits in data.items()}
    train, dev = phase_rows(rows_per_epoch(tasks, sizes, "equal"), sizes, 0, share, SEED), {}
    for name, splits in data.items():
        size = len(splits["dev"].usable)
        # at least 8 of a task: a correlation needs examples that differ
        dev[name] = make_rng(SEED, "dev", name).permutation(size)[: max(8, round(share * size))]
        rows = {"train": ("train", train[name]), "dev": ("dev", dev[name]), "test": ("dev", dev[name][:8])}
        for split, (source, chosen) in rows.items():
            write_course_file(folder / tasks[name].file(split), tasks[name], course_rows(splits[source], chosen))
    return sum(map(len, train.values())), sum(map(len, dev.values()))


def write_sentences(setup, folder, b, s):
    """Write SST's training file with b sentences of s tokens, every second one a quarter shorter, of random words.

    Each word is one token. The padding is needed: without any, transformers would leave out its mask.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab, rng = BertTokenizer.from_pretrained(setup.weights).vocab, make_rng(SEED, "words")
    words, task = [word for word in vocab if word.isascii() and word.islower() and word.isalpha()], build_tasks()["sst"]
    # two of the tokens are [CLS] and [SEP]
    sizes = [s - 2 - i % 2 * (s // 4) for i in range(b)]
    rows = [(f"id{i}", [" ".join(rng.choice(words, size))], rng.integers(5)) for i, size in enumerate(sizes)]
    write_course_file(folder / task.file("train"), task, rows)


def write_random_weights(folder, vocab, **sizes):
    """Write a BERT with random weights, bert-base if no sizes are given: speed does not depend on their values."""
    folder.mkdir(parents=True, exist_ok=True)
    words = vocab.read_bytes()
    config = BertConfig(vocab_size=len(words.splitlines()), **sizes)
    model = BertModel(config, generator=torch.Generator().manual_seed(SEED))
    model.tokenizer_files = {"vocab.txt": words}
    model.save_pretrained(folder)
    return folder


# --- the two programs ---------------------------------------------------------------------------------------------


def launch(*arguments):
    """Run Python in the repository's folder, in a process of its own. Returns the seconds it takes."""
    started = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env=os.environ.copy(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])[:200]} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - started


def program_words(setup, program, data, precision):
    """A program's module and flags, and its run directory: the same job for both."""
    run = data / "run"
    words = [*PROGRAMS[program], "--weights", setup.weights, "--data_dir", data, "--epochs", 1, "--batch_size", BATCH]
    words += ["--seed", 1, "--lr", LEARNING_RATE, "--hidden_dropout_prob", HEAD_DROPOUT, "--precision", precision]
    return [*words, "--run_dir", run], run


def run_program(setup, program, data, precision, peaks):
    """Run a program from start to finish. Returns {phase: seconds}; appends its peak memory in MiB to `peaks`."""
    words, run = program_words(setup, program, data, precision)
    seconds = launch("-m", *words)
    summary = RunFolder(run).read_summary()
    shutil.rmtree(run)
    peaks.append({"": summary["peak_mib"]})
    phases = {"train": summary["train_seconds"], "evaluate": summary["eval_seconds"]}
    return phases | {"start and end": max(0.0, seconds - sum(phases.values()))}


def run_to_first_step(setup, program, data, precision):
    """Run a program until it has taken its first training step. Returns {"": seconds}."""
    words, run = program_words(setup, program, data, precision)
    seconds = launch("-c", FIRST_STEP, *words)
    shutil.rmtree(run)
    return {"": seconds}


# --- steps and evaluations within this process --------------------------------------------------------------------


def our_parts(setup, precision, data, more=""):
    """The parts of our training loop with a new model, for {task: {split: Dataset}}."""
    words = f"--epochs 1 --precision {precision} --batch_size {BATCH} --eval_batch_size {EVAL_BATCH} --pooling cls"
    words += f" --lr {LEARNING_RATE} --clip {CLIP} --weight_decay {WEIGHT_DECAY} --warmup {WARMUP} --seed {SEED}"
    words += f" --hidden_dropout_prob {HEAD_DROPOUT} --tasks {' '.join(data)} {more}"
    flags = parse_flags(words.split())[0]
    bert = BertModel.from_pretrained(setup.weights, attention=flags["attention"])
    model = make_model(flags, build_table(flags), bert).to(setup.device)
    return build(flags, model, data, setup.device, {"loss": TaskLoss()})


def our_training(parts):
    """Make a function that trains on the (task, rows) of steps with our program's train_step."""
    phase = next(parts.plan())
    optimizer = parts.make_optimizer(set_trainable(parts.model, phase, parts.trainable))

    def train(steps):
        for name, rows in steps:
            train_step(parts, optimizer, parts.terms, [(name, [rows], phase.exit_weights[0])], 1.0)

    return train


def peer_model(setup, names):
    """The peer's model on the device, with its fastest attention."""
    return PeerModel(setup.weights, build_tasks(names), HEAD_DROPOUT, attn_implementation="sdpa").to(setup.device)


def peer_training(setup, precision, data, compiled=False):
    """Make a function that trains on the (task, rows) of steps with the peer's peer_train, for {task: PeerData}."""
    model = peer_model(setup, tuple(data))
    optimizer = peer_optimizer(model, LEARNING_RATE, fused=True)
    # as many steps as never happen here: the learning rate rises slowly, the work is that of every step
    schedule, autocast = linear_schedule(optimizer, 10**6), make_autocast(precision, setup.device)
    model = torch.compile(model) if compiled else model

    def train(steps):
        peer_train(model, data, steps, optimizer, schedule, autocast)

    return train


def our_steps(parts):
    """The (task, rows) of the steps of our first epoch."""
    steps = phase_steps(parts, next(parts.plan()), 0.0)
    return [(name, rows) for [(name, [rows], _)] in steps]


def step_trainings(setup, folder, precision, b, s, names=tuple(PROGRAMS)):
    """Make functions that take one training step on b sentences of s tokens: {name: function}, names of TRAININGS."""
    write_sentences(setup, folder, b, s)
    ours = read_ours(setup, folder, ("train",), ("sst",))
    theirs = read_peer(setup, folder, "train", ("sst",))
    functions = {}
    for name in names:
        if name.startswith("ours"):
            train = our_training(our_parts(setup, precision, ours, TRAININGS[name]))
        else:
            train = peer_training(setup, precision, theirs, TRAININGS[name])
        functions[name] = partial(train, [("sst", np.arange(b))])
    return functions


# for untrained exits: the share of rows that stay after each exit
STAYING = {
    "ours, 10% leave at each exit": 0.9,
    "ours, 30% leave at each exit": 0.7,
    "ours, 50% leave at each exit": 0.5,
}
NEVER = "ours, exits that no row leaves at"


class RandomExits(ExitInference):
    """Early exit at random, for untrained exits: the certainties are computed, then replaced by random numbers."""

    def certainty(self, model, state, logits, task):
        """Random numbers from 0 to 1. Shapes: state [b,w], logits [b,o] -> [b]."""
        return torch.rand_like(super().certainty(model, state, logits, task))


def exit_inferences(tasks):
    """How the examples leave, for every variant of an evaluation: {variant: inference}."""
    policies = choose_policies(tasks, "auto")
    inferences = {"ours": AtExit(), NEVER: RandomExits(policies, dict.fromkeys(tasks, UNREACHABLE))}
    return inferences | {x: RandomExits(policies, dict.fromkeys(tasks, share)) for x, share in STAYING.items()}


def evaluation_variants(setup, folder, precision):
    """Make evaluations of the dev files: {variant: function}, and {variant: mean layers}, filled when they run."""
    data, layers = read_ours(setup, folder), {}
    parts = our_parts(setup, precision, data, "--early_exit")

    def evaluate_ours(label, infer):
        torch.manual_seed(SEED)
        _, predictions = evaluate(parts.model, parts.dev(), infer=infer, **parts.inference())
        layers[label] = float(np.mean(np.concatenate([task.layers for task in predictions.values()])))

    model, autocast = peer_model(setup, tuple(data)), make_autocast(precision, setup.device)
    theirs = read_peer(setup, folder, "dev")

    def evaluate_theirs():
        peer_scores(
            theirs, {name: peer_predict(model, part, EVAL_BATCH, autocast, True) for name, part in theirs.items()}
        )

    calls = {label: partial(evaluate_ours, label, infer) for label, infer in exit_inferences(parts.model.tasks).items()}
    return {"ours": calls["ours"], "transformers": evaluate_theirs} | calls, layers
