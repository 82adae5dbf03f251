"""What the benchmark measures: the sizes of its parts, and the same examples for our code and for transformers."""

import csv
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from base_bert import BertConfig
from bert import BertModel
from datasets import Batch, read_dataset
from errors import InputError
from lab.curves import plot_curves
from lab.peer import MAX_LENGTH, PeerData, import_transformers
from samplers import generator, phase_rows, rows_per_epoch
from tasks import build_tasks
from tokenizer import BertTokenizer
from weights import WEIGHTS_FOLDER, find_weights

# the repository's folder
HERE = Path(__file__).parents[1]
SEED = 11711
LEARNING_RATE, HEAD_DROPOUT, TRAIN_BATCH = 5e-5, 0.3, 16
MINILM = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
# speed does not depend on the values of the weights, so a machine without downloads can measure with random ones
RANDOM_WEIGHTS = {"random-minilm": MINILM, "random-bert-base": {}}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Examples:
    """How many examples each part uses: texts to tokenise, and rows of the splits.

    `evaluated` rows are for the parts evaluate and exit, `remembered` ones for memory and distributed, `growth` is a
    tuple of epoch sizes, `pairs` the size of a Quora file.
    """

    sentences: int = 8000
    train: int = 640
    dev: int = 320
    evaluated: int = 960
    remembered: int = 320
    growth: tuple = (160, 320, 640)
    pairs: int = 400_000


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    `compiler` is torch's name of the --compile backend; `full_epoch` says whether the part run trains on all of the
    data or on the sample.
    Units: rounds are turns of every variant (epoch_rounds for the long ones); repeats are calls within a turn; steps
        are rows x tokens of a batch, lengths its tokens.
    """

    examples: Examples = Examples()
    rounds: int = 5
    epoch_rounds: int = 3
    repeats: int = 3
    steps: tuple = ((16, 32), (16, 64), (32, 64))
    lengths: tuple = (16, 32, 64, 96, 128)
    optimized: tuple = (("MiniLM", MINILM), ("bert-base", {}))
    matrices: tuple = (1024, 2048)
    compiler: str = "inductor"
    full_epoch: bool = True


GPU_SIZES = dict(
    examples=Examples(train=9600, dev=2400, evaluated=9600, growth=(2400, 4800, 9600)),
    repeats=10,
    steps=((16, 32), (16, 64), (128, 128)),
    matrices=(4096, 8192),
)
QUICK_SIZES = dict(
    examples=Examples(500, train=24, dev=24, evaluated=48, remembered=24, growth=(24, 48), pairs=5000),
    rounds=1,
    epoch_rounds=1,
    repeats=1,
    steps=((8, 16),),
    lengths=(8, 16),
    optimized=(("MiniLM", MINILM),),
    matrices=(512,),
    compiler="aot_eager",
    full_epoch=False,
)


@dataclass
class Setup:
    """What every part works with.

    `report` is the report's path without suffix, `run_dir` a trained run for the part exit or None, `peaks` is
    {precision: rate of matrix products}, measured before each part.
    """

    weights: Path
    data_dir: Path
    device: torch.device
    precisions: tuple
    sizes: Sizes
    report: Path
    run_dir: str | None = None
    peaks: dict = field(default_factory=dict)

    def precision(self, name):
        """Make the autocast context of a precision."""
        return nullcontext() if name == "fp32" else torch.autocast(self.device.type, PRECISIONS[name])

    def draw(self, part, panels, title):
        """Draw curves beside the report. Returns the Markdown line that shows them."""
        path = self.report.with_name(f"{self.report.name}-{part}.png")
        plot_curves(path, panels, title)
        return f"![{title}]({path.name})"


def launch(*arguments, **environment):
    """Run Python in the repository's folder, in a process of its own. Returns the seconds it takes."""
    started = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])[:200]} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - started


# --- the same examples for both sides ------------------------------------------------------------------------------


def prepare_weights(name, folder):
    """Find the folder of named weights; random weights are written to `folder`."""
    if name not in RANDOM_WEIGHTS:
        return find_weights(name)
    vocab = WEIGHTS_FOLDER / "all-MiniLM-L6-v2" / "vocab.txt"
    if not vocab.is_file():
        raise InputError(f"{vocab}: missing; --weights {name} needs this vocabulary: run ./setup.sh")
    model = BertModel(BertConfig(**RANDOM_WEIGHTS[name]), generator=torch.Generator().manual_seed(SEED))
    model.tokenizer_files = {"vocab.txt": vocab.read_bytes()}
    model.save_pretrained(folder)
    return Path(folder)


def read_split(setup, folder, split):
    """Read a split of a folder with our code: {task: Dataset}."""
    tokenizer, tasks = BertTokenizer.from_pretrained(setup.weights), build_tasks()
    return {name: read_dataset(task, folder / task.file(split), tokenizer, MAX_LENGTH) for name, task in tasks.items()}


def read_train_and_dev(setup, folder):
    """Read both splits that the training loop needs: {task: {split: Dataset}}."""
    train, dev = read_split(setup, folder, "train"), read_split(setup, folder, "dev")
    return {name: {"train": train[name], "dev": dev[name]} for name in train}


def read_peer(setup, folder, split, tokenize_once):
    """Read a split of a folder with the peer's code: {task: PeerData}."""
    tokenizer = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    return {
        name: PeerData(folder / task.file(split), task, tokenizer, tokenize_once)
        for name, task in build_tasks().items()
    }


def draw_rows(data, split, count):
    """Draw about `count` rows of {task: Dataset} by the seed, of each task in proportion to its rows.

    Training rows come from the first epoch of the equal split, dev rows from the whole file.
    Returns ({task: rows}, number of rows to draw from).
    """
    sizes = {name: len(dataset.usable) for name, dataset in data.items()}
    if split == "train":
        tasks = {name: dataset.task for name, dataset in data.items()}
        rows = phase_rows(rows_per_epoch(tasks, sizes, "equal"), sizes, 0, 1.0, SEED)
    else:
        rows = {name: generator(SEED, "dev", name).permutation(size) for name, size in sizes.items()}
    total = sum(map(len, rows.values()))
    fraction = min(1.0, count / total)
    # at least 8 of a task: a correlation needs two examples that differ
    kept = {name: chosen[: max(8, round(fraction * len(chosen)))] for name, chosen in rows.items()}
    return {name: data[name].usable[chosen] for name, chosen in kept.items()}, total


def write_course_file(path, dataset, rows):
    """Write rows of a dataset as one of the course's CSV files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["", "id", *dataset.task.columns, dataset.task.label_column])
        for i, row in enumerate(rows):
            writer.writerow([i, dataset.identifier(row), *dataset.text(row), f"{dataset.labels[row]:g}"])


def write_subset(setup, folder, **counts):
    """Write a data folder with about so many rows of each split (train=..., dev=...).

    Returns {split: lengths of the examples [n]} and {split: number of examples in a full epoch}.
    """
    lengths, totals = {}, {}
    for split, count in counts.items():
        data = read_split(setup, setup.data_dir, split)
        rows, totals[split] = draw_rows(data, split, count)
        for name, dataset in data.items():
            write_course_file(folder / dataset.task.file(split), dataset, rows[name])
        lengths[split] = np.concatenate([data[name].lengths()[chosen] for name, chosen in rows.items()])
    return lengths, totals


def real_batch(setup, b, s, tasks=("sst",)):
    """Make batches of real text, one per task, padded to s tokens as in a length bucket: the shortest row has 3/4 s.

    Shapes: each batch has one segment [b,s]; lengths [b].
    """
    lengths = np.linspace(s, 3 * s // 4, b).astype(int)
    tokenizer, table = BertTokenizer.from_pretrained(setup.weights), build_tasks()
    tokens = np.asarray(read_split(setup, setup.data_dir, "dev")["sst"].tokens[0].flat)
    ids = np.full((b, s), tokenizer.pad_id, np.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = np.resize(np.roll(tokens, -i * s), length)
        ids[i, 0], ids[i, length - 1] = tokenizer.cls_id, tokenizer.sep_id
    ids = torch.from_numpy(ids)
    mask = (torch.arange(s) < torch.from_numpy(lengths)[:, None]).long()
    segments, batches = ((ids, mask, torch.zeros_like(ids)),), []
    for name in tasks:
        low, high = table[name].label_range
        labels = torch.from_numpy(generator(SEED, "labels").integers(int(low), int(high) + 1, b)).float()
        batch = Batch(table[name], segments, labels, tuple(map(str, range(b))))
        batches.append(batch.to(setup.device))
    return batches, lengths


def layer_flop(config, lengths, passes):
    """Count the multiplications and additions of BERT's layers on real tokens.

    Each of a layer's 4 d^2 + 2 d f weights (f: intermediate size) costs one multiplication and one addition per
    token. The attention scores and the weighted values cost s d of each per token. A backward pass costs as much as
    two forward passes.
    Shapes: lengths [n]. Units: passes are 1 for inference, 3 for training.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    lengths = np.asarray(lengths, np.float64)
    weights = layers * (4 * d * d + 2 * d * config.intermediate_size)
    return passes * (2 * weights * lengths.sum() + 4 * layers * d * (lengths**2).sum())
