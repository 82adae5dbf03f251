#!/usr/bin/env python3
"""How fast this code is, beside transformers and torch.optim in the same process. Read first: multitask_classifier.py.

    python benchmark.py                                  every part, on the CPU
    python benchmark.py step optimizer --use_gpu         two parts, on the GPU

Every number is a ratio as much as a time: the variants take turns (A B, B A, A B, ...), each round gives one ratio
of a peer's cost to ours, and the table shows the median of the rounds with the lowest and the highest. Above 1 we
are ahead. The peers are written out below, so that a reader can judge whether they are fair:

    plain   AutoModel as it comes, the fast tokenizer called in the collate function, random batches padded to their
            longest text, torch.optim.AdamW as it comes
    best    AutoModel with sdpa attention, every text tokenised once beforehand, transformers' length-grouped
            batches, torch.optim.AdamW(fused=True), evaluation sorted by length

Both have the same examples, heads, losses, schedule, clipping, precision and number of threads as ours. Whoever
pads less works on fewer numbers, so the share of the machine's matrix peak counts multiplications and additions on
real tokens only. The peak is measured too: the best of several square matrix products.
"""

import argparse
import csv
import json
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

try:
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed here: run ./setup.sh --dev once, then use .venv/bin/python")

import multitask_classifier
from base_bert import WEIGHTS_FOLDER, BertConfig, find_weights
from bert import BertModel
from datasets import Batch, find_data_dir, read_dataset
from errors import InputError, run_script
from evaluation import accuracy, evaluate, pearson
from files import write_whole
from flags import parse_flags, positive_int
from optimizer import AdamW, clip_gradients, parameter_groups
from runs import RunFolder, command_line, describe_environment
from samplers import epoch_rows, generator
from tasks import build_tasks
from tokenizer import BertTokenizer

SEED = 11711
LEARNING_RATE, WEIGHT_DECAY, CLIP, WARMUP, HEAD_DROPOUT = 5e-5, 0.01, 1.0, 0.1, 0.3
TRAIN_BATCH, EVAL_BATCH, MAX_LENGTH = 16, 32, 512
MINILM = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
# speed does not depend on what the weights are: for machines without downloaded ones
RANDOM_WEIGHTS = {"random-minilm": MINILM, "random-bert-base": {}}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    Units: rounds are turns of every variant; repeats are calls within a turn; the others count examples or texts.
    """

    rounds: int = 5
    epoch_rounds: int = 3
    repeats: int = 10
    sentences: int = 8000
    train: int = 1600
    dev: int = 800
    evaluated: int = 2400
    remembered: int = 640
    steps: tuple = ((16, 32), (16, 64), (32, 64))
    optimized: tuple = (("MiniLM", MINILM), ("bert-base", {}))
    matrices: tuple = (1024, 2048)


GPU_SIZES = dict(train=9600, dev=2400, steps=((16, 32), (16, 64), (128, 128)), matrices=(4096, 8192))
QUICK_SIZES = dict(
    rounds=2,
    epoch_rounds=1,
    repeats=2,
    sentences=500,
    train=96,
    dev=48,
    evaluated=96,
    remembered=48,
    steps=((8, 16),),
    optimized=(("MiniLM", MINILM),),
    matrices=(512,),
)


@dataclass
class Setup:
    """What every part works with: weights and data folders, device, precisions, sizes."""

    weights: Path
    data_dir: Path
    device: torch.device
    precisions: tuple
    sizes: Sizes
    peaks: dict = field(default_factory=dict)

    def precision(self, name):
        """The autocast context of a precision."""
        return multitask_classifier.make_precision(name, self.device)()


# --- arithmetic ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The costs of one variant, with a baseline's to compare them with.

    `rounds` holds {phase: cost} per round; `amount`, where set, is what was got for the cost; `flop` is
    {label: (operations, phases they are compared with)}.
    Units: costs are seconds or MiB; `unit` is what the table shows (ms, s, MiB, or something per second).
    """

    setting: str
    variant: str
    unit: str
    rounds: list
    baseline: list
    amount: float = 0.0
    flop: dict = field(default_factory=dict)
    peak: float = 0.0
    note: str = ""

    def values(self):
        """The rounds' results in the table's unit."""
        scale = {"ms": 1e3}.get(self.unit, 1.0)
        totals = [sum(phases.values()) for phases in self.rounds]
        return [self.amount / total if self.amount else scale * total for total in totals]

    def ratios(self):
        """Cost over the baseline's cost in the same round: above 1 the baseline is ahead."""
        pairs = zip(self.rounds, self.baseline, strict=True)
        return [sum(mine.values()) / sum(base.values()) for mine, base in pairs]

    def shares(self):
        """{label: share of the matrix peak that was reached}, of the median round."""
        shares = {}
        for label, (operations, names) in self.flop.items():
            seconds = statistics.median(sum(phases[name] for name in names) for phases in self.rounds)
            shares[label] = operations / seconds / self.peak
        return shares

    def phases(self):
        """{phase: median cost}."""
        return {name: statistics.median(phases[name] for phases in self.rounds) for name in self.rounds[0]}

    def record(self):
        """The row as plain data."""
        return asdict(self) | {
            "values": self.values(),
            "ratios": self.ratios(),
            "peak_shares": self.shares(),
            "phases": self.phases(),
        }


def compare(setting, unit, measured, **details):
    """Rows of the variants of one setting; the first is the baseline of all. `measured`: {variant: rounds}."""
    baseline = next(iter(measured.values()))
    return [Row(setting, variant, unit, rounds, baseline, **details) for variant, rounds in measured.items()]


def layer_flop(config, lengths, passes):
    """Multiplications and additions of BERT's layers on real tokens.

    Each of a layer's 4 d^2 + 2 d f weights (f: intermediate size) takes one of both per token; scores and
    weighted values take s d of both each per token. A backward pass costs two forward passes.
    Shapes: lengths [n]. Units: passes are 1 for inference, 3 for training.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    lengths = np.asarray(lengths, np.float64)
    weights = layers * (4 * d * d + 2 * d * config.intermediate_size)
    return passes * (2 * weights * lengths.sum() + 4 * layers * d * (lengths**2).sum())


def three_digits(value):
    """A number with about three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_spread(values, suffix=""):
    """Median (lowest - highest)."""
    middle, low, high = map(three_digits, (statistics.median(values), min(values), max(values)))
    return f"{middle}{suffix} ({low} - {high})"


def table(rows):
    """Lines of a Markdown table of rows, its columns aligned."""
    cells = [["setting", "variant", "median (low - high)", "cost / ours (low - high)", "of matrix peak", "of which"]]
    for row in rows:
        ratio = "1" if row.rounds is row.baseline else with_spread(row.ratios())
        shares = ", ".join(f"{label} {share:.0%}" for label, share in row.shares().items())
        phases = row.phases() if len(row.rounds[0]) > 1 else {}
        scale = {"ms": 1e3}.get(row.unit, 1.0)
        parts = ", ".join(f"{name} {three_digits(scale * cost)}" for name, cost in phases.items())
        detail = "; ".join(filter(None, [parts, row.note]))
        cells.append([row.setting, row.variant, with_spread(row.values(), f" {row.unit}"), ratio, shares, detail])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


# --- clocks -------------------------------------------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Seconds between marks. On CUDA the marks are events, so that measuring does not make the host wait."""

    def __init__(self, device):
        self.device, self.marks = device, []
        synchronize(device)
        self.mark("")

    def mark(self, phase):
        """End a phase here."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            synchronize(self.device)
            now = time.perf_counter()
        self.marks.append((phase, now))

    def phases(self, repeats=1):
        """{phase: seconds}, divided by the number of repeats."""
        synchronize(self.device)
        seconds = {}
        for (_, before), (phase, now) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(now) / 1e3 if self.device.type == "cuda" else now - before
            seconds[phase] = seconds.get(phase, 0.0) + passed / repeats
        return seconds


def alternate(variants, rounds, label):
    """Call every variant once per round, forwards and backwards in turn. Returns {variant: its results}."""
    results, names = {name: [] for name in variants}, list(variants)
    for k in tqdm(range(rounds), label, disable=None, leave=False):
        for name in names if k % 2 == 0 else names[::-1]:
            results[name].append(variants[name]())
    return results


def measure_matrix_peak(device, dtype, sizes, repeats=8):
    """Best rate of a square matrix product. Units: floating-point operations per second."""
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        a @ b
        for _ in range(repeats):
            watch = Stopwatch(device)
            a @ b
            watch.mark("product")
            best = max(best, 2 * n**3 / watch.phases()["product"])
    return best


# --- the peers: transformers, written plainly ---------------------------------------------------------------------


def import_transformers():
    """transformers, quiet.

    Raises: InputError where it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("benchmark.py: the peer, transformers, is not installed: run ./setup.sh --dev") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class PeerModel(nn.Module):
    """AutoModel with a linear head per task on its pooler output."""

    def __init__(self, weights, tasks, **options):
        super().__init__()
        self.bert = import_transformers().AutoModel.from_pretrained(weights, **options)
        self.dropout = nn.Dropout(HEAD_DROPOUT)
        d = self.bert.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(d, task.outputs) for name, task in tasks.items()})

    def forward(self, task_name, **inputs):
        """Logits of a task. Shapes: inputs [b,s] -> [b, outputs]."""
        return self.heads[task_name](self.dropout(self.bert(**inputs).pooler_output))


def peer_loss(task_name, logits, labels):
    """The mean loss of a task."""
    logits = logits.float()
    if task_name == "sst":
        return F.cross_entropy(logits, labels.long())
    if task_name == "para":
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)
    return F.mse_loss(logits.squeeze(-1), labels)


def peer_optimizer(model, **options):
    """torch.optim.AdamW without decay on biases and LayerNorm."""
    groups = parameter_groups(model.named_parameters(), WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, **options)


class PeerData:
    """One CSV file as lists; with `tokenize_once`, its texts are tokenised here and not batch by batch."""

    def __init__(self, path, task, tokenizer, tokenize_once):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        self.columns = [[row[name] for row in rows] for name in task.columns]
        self.labels = [float(row[task.label_column]) for row in rows]
        self.tokenizer, self.encoded = tokenizer, None
        if tokenize_once:
            self.encoded = tokenizer(*self.columns, truncation=True, max_length=MAX_LENGTH)

    def lengths(self):
        """Tokens of each example, where they are known."""
        return [len(ids) for ids in self.encoded["input_ids"]]

    def collate(self, rows):
        """Inputs and labels of a batch, padded to its longest example."""
        if self.encoded is None:
            texts = [[column[i] for i in rows] for column in self.columns]
            how = dict(truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            inputs = self.tokenizer(*texts, **how)
        else:
            examples = {key: [values[i] for i in rows] for key, values in self.encoded.items()}
            inputs = self.tokenizer.pad(examples, return_tensors="pt")
        return dict(inputs), torch.tensor([self.labels[i] for i in rows])


def cut(order, size):
    """Consecutive batches of a list."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def peer_batches(data, best):
    """An epoch's batches of one file: random ones, or length-grouped as transformers' Trainer makes them."""
    if not best:
        return cut(torch.randperm(len(data.labels)).tolist(), TRAIN_BATCH)
    from transformers.trainer_pt_utils import get_length_grouped_indices

    return cut(get_length_grouped_indices(data.lengths(), TRAIN_BATCH), TRAIN_BATCH)


def peer_train(model, data, precision, device, best):
    """Train one epoch over {task: PeerData}, the tasks' batches in random order."""
    transformers = import_transformers()
    optimizer = peer_optimizer(model, **({"fused": True} if best else {}))
    steps = [(name, rows) for name, part in data.items() for rows in peer_batches(part, best)]
    random.Random(SEED).shuffle(steps)
    warmup = round(WARMUP * len(steps))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, len(steps))
    model.train()
    for name, rows in steps:
        inputs, labels = data[name].collate(rows)
        inputs, labels = {k: v.to(device) for k, v in inputs.items()}, labels.to(device)
        with precision():
            logits = model(name, **inputs)
        loss = peer_loss(name, logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def peer_evaluate(model, data, precision, device, best):
    """The norm of {task: PeerData}, in the order of the file or sorted by length."""
    model.eval()
    scores = []
    for name, part in data.items():
        order = list(range(len(part.labels)))
        if best:
            order = np.argsort(-np.array(part.lengths()), kind="stable").tolist()
        outputs = []
        for rows in cut(order, EVAL_BATCH):
            inputs, _ = part.collate(rows)
            with precision():
                outputs.append(model(name, **{k: v.to(device) for k, v in inputs.items()}).float())
        outputs, labels = torch.cat(outputs).cpu(), np.array([part.labels[i] for i in order])
        if name == "sts":
            scores.append((pearson(outputs.squeeze(-1).clamp(0, 5).numpy(), labels) + 1) / 2)
        else:
            predicted = outputs.argmax(-1) if name == "sst" else (outputs.squeeze(-1) > 0).long()
            scores.append(accuracy(predicted.numpy(), labels))
    return float(np.mean(scores))


# --- the same examples for everybody ------------------------------------------------------------------------------


def prepare_weights(name, folder):
    """The folder of the named weights; random ones are drawn into `folder`."""
    if name not in RANDOM_WEIGHTS:
        return find_weights(name)
    vocab = WEIGHTS_FOLDER / "all-MiniLM-L6-v2" / "vocab.txt"
    if not vocab.is_file():
        raise InputError(f"{vocab}: missing, and --weights {name} needs a vocabulary: run ./setup.sh")
    model = BertModel(BertConfig(**RANDOM_WEIGHTS[name]), generator=torch.Generator().manual_seed(SEED))
    model.tokenizer_files = {"vocab.txt": vocab.read_bytes()}
    model.save_pretrained(folder)
    return Path(folder)


def read_splits(setup, folder, splits):
    """{task: {split: Dataset}} of a folder, read by our code."""
    tokenizer = BertTokenizer.from_pretrained(setup.weights)
    tasks = build_tasks()
    return {
        name: {split: read_dataset(task, folder / task.file(split), tokenizer, MAX_LENGTH) for split in splits}
        for name, task in tasks.items()
    }


def write_course_file(path, dataset, rows):
    """Write rows of a dataset as the course's CSV."""
    task = dataset.task
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["", "id", *task.columns, task.label_column])
        for i, row in enumerate(rows):
            writer.writerow([i, dataset.identifier(row), *dataset.text(row), f"{dataset.labels[row]:g}"])


def write_subset(setup, folder, train, dev):
    """Write a seeded subset: `train` rows of the equal split's first epoch and `dev` rows, the tasks in proportion.

    Returns {split: {task: lengths of the examples}}.
    """
    data = read_splits(setup, setup.data_dir, ("train", "dev"))
    lengths = {}
    for split, count in (("train", train), ("dev", dev)):
        sizes = {name: len(splits[split].usable) for name, splits in data.items()}
        if split == "train":
            rows = epoch_rows(sizes, "equal", 0, 1.0, SEED)
        else:
            rows = {name: generator(SEED, "dev", name).permutation(size) for name, size in sizes.items()}
        share = min(1.0, count / sum(map(len, rows.values())))
        lengths[split] = {}
        for name, chosen in rows.items():
            dataset = data[name][split]
            # a correlation needs at least two examples that differ
            chosen = dataset.usable[chosen[: max(8, round(share * len(chosen)))]]
            write_course_file(folder / dataset.task.file(split), dataset, chosen)
            lengths[split][name] = dataset.lengths()[chosen]
    return lengths


def real_batch(setup, b, s, tokens):
    """A batch of real text, padded to s tokens as length buckets pad: the shortest row has three quarters of that.

    Shapes: tokens is a flat array of word ids; the batch's segment is [b,s].
    """
    lengths = np.linspace(s, 3 * s // 4, b).astype(int)
    tokenizer = BertTokenizer.from_pretrained(setup.weights)
    ids = np.full((b, s), tokenizer.pad_id, np.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = np.resize(tokens[i * s :], length)
        ids[i, 0], ids[i, length - 1] = tokenizer.cls_id, tokenizer.sep_id
    ids = torch.from_numpy(ids)
    mask = (torch.arange(s) < torch.from_numpy(lengths)[:, None]).long()
    labels = torch.from_numpy(generator(SEED, "labels").integers(0, 5, b)).float()
    segments = ((ids, mask, torch.zeros_like(ids)),)
    return Batch(build_tasks(("sst",))["sst"], "single", segments, labels, tuple(map(str, range(b)))), lengths


# --- tokenize -----------------------------------------------------------------------------------------------------


def timed(call, device):
    """A variant that times one call."""

    def variant():
        watch = Stopwatch(device)
        call()
        watch.mark("call")
        return watch.phases()

    return variant


def set_tokenizer_threads(parallel):
    """Let transformers' tokenizer use one core or all."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if parallel else "false"


def benchmark_tokenize(setup, folder):
    """Sentences per second: single sentences without special tokens, and padded batches."""
    data = read_splits(setup, setup.data_dir, ("train",))
    texts = [text for splits in data.values() for row in splits["train"].usable for text in splits["train"].text(row)]
    texts = random.Random(SEED).sample(texts, min(len(texts), setup.sizes.sentences))
    ours = BertTokenizer.from_pretrained(setup.weights)
    fast = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    batches, cpu = cut(texts, TRAIN_BATCH), torch.device("cpu")

    def encode_cold():
        cold = BertTokenizer(ours.vocab, ours.do_lower_case)
        return [cold.encode(text) for text in texts]

    def fast_batches():
        how = dict(padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return [fast(batch, **how) for batch in batches]

    def fast_at_once(parallel):
        set_tokenizer_threads(parallel)
        fast(texts, add_special_tokens=False)
        set_tokenizer_threads(False)

    if [ours.encode(text) for text in texts] != fast(texts, add_special_tokens=False)["input_ids"]:
        raise RuntimeError("the tokenizers disagree: run tests/test_tokenizer.py")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    set_tokenizer_threads(False)
    groups = {
        "texts to ids": {
            "ours": lambda: [ours.encode(text) for text in texts],
            "ours, empty cache": encode_cold,
            "transformers, one by one": lambda: [fast.encode(text, add_special_tokens=False) for text in texts],
            "transformers, one call": lambda: fast_at_once(False),
            "transformers, one call, all cores": lambda: fast_at_once(True),
        },
        f"padded batches of {TRAIN_BATCH}": {
            "ours": lambda: [ours(batch) for batch in batches],
            "transformers": fast_batches,
        },
    }
    rows = []
    for setting, calls in groups.items():
        for call in calls.values():
            call()
        measured = alternate({n: timed(c, cpu) for n, c in calls.items()}, setup.sizes.rounds, f"tokenize {setting}")
        rows += compare(setting, "sentences/s", measured, amount=len(texts))
    os.environ.pop("TOKENIZERS_PARALLELISM")
    if before is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = before
    return rows, {}


# --- optimizer ----------------------------------------------------------------------------------------------------


def benchmark_optimizer(setup, folder):
    """AdamW.step on the parameters of whole models; all variants update the same ones with the same gradients."""
    rows = []
    for name, sizes in setup.sizes.optimized:
        with torch.device("meta"):
            model = BertModel(BertConfig(**sizes))
        model.to_empty(device=setup.device)
        draw = torch.Generator(setup.device).manual_seed(SEED)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02, generator=draw)
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3, generator=draw)
        groups = parameter_groups(model.named_parameters(), WEIGHT_DECAY)
        copies = ([dict(group) for group in groups] for _ in iter(int, 1))
        optimizers = {
            "ours": AdamW(next(copies), lr=LEARNING_RATE),
            "torch, fused": torch.optim.AdamW(next(copies), lr=LEARNING_RATE, fused=True),
            "torch, foreach": torch.optim.AdamW(next(copies), lr=LEARNING_RATE, foreach=True),
            "torch, one by one": torch.optim.AdamW(next(copies), lr=LEARNING_RATE, foreach=False),
        }
        variants = {key: repeated_step(optimizer, setup) for key, optimizer in optimizers.items()}
        for variant in variants.values():
            variant()
        count = sum(parameter.numel() for parameter in model.parameters())
        measured = alternate(variants, setup.sizes.rounds, f"optimizer {name}")
        rows += compare(f"{name}, {count / 1e6:.1f} M parameters", "ms", measured)
    return rows, {}


def repeated_step(optimizer, setup):
    """A variant that takes optimiser steps."""

    def variant():
        watch = Stopwatch(setup.device)
        for _ in range(setup.sizes.repeats):
            optimizer.step()
            watch.mark("step")
        return watch.phases(setup.sizes.repeats)

    return variant


# --- step ---------------------------------------------------------------------------------------------------------


def our_model(setup, tasks, attention="plain"):
    """Our multitask model on the device."""
    bert = BertModel.from_pretrained(setup.weights, attention=attention)
    init = torch.Generator().manual_seed(SEED)
    model = multitask_classifier.MultitaskBERT(bert, tasks, HEAD_DROPOUT, init=init)
    return model.to(setup.device)


def our_step(setup, model, batch, precision):
    """A variant that takes our training step on one batch, phase by phase."""
    optimizer = AdamW(parameter_groups(model.named_parameters(), WEIGHT_DECAY), lr=LEARNING_RATE)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward():
        with setup.precision(precision):
            logits = model(batch).logits[model.depth]
        return batch.task.loss(logits, batch.labels).mean()

    return step_variant(setup, model, forward, lambda: clip_gradients(parameters, CLIP), optimizer)


def peer_step(setup, model, batch, precision, fused):
    """A variant that takes transformers' training step on one batch, phase by phase."""
    optimizer = peer_optimizer(model, **({"fused": True} if fused else {}))
    ids, mask, types = batch.segments[0]

    def forward():
        with setup.precision(precision):
            logits = model("sst", input_ids=ids, attention_mask=mask, token_type_ids=types)
        return peer_loss("sst", logits, batch.labels)

    def clip():
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    return step_variant(setup, model, forward, clip, optimizer)


def step_variant(setup, model, forward, clip, optimizer):
    """A variant that takes training steps: forward with loss, backward, clip, optimizer."""

    def variant():
        model.train()
        watch = Stopwatch(setup.device)
        for _ in range(setup.sizes.repeats):
            loss = forward()
            watch.mark("forward")
            loss.backward()
            watch.mark("backward")
            clip()
            watch.mark("clip")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch.mark("optimizer")
        return watch.phases(setup.sizes.repeats)

    return variant


@torch.inference_mode()
def check_same_work(ours, peer, batch):
    """Give the peer our heads and make sure that both compute the same logits."""
    peer.heads.load_state_dict(ours.heads.state_dict())
    ids, mask, types = batch.segments[0]
    expected = peer.eval()("sst", input_ids=ids, attention_mask=mask, token_type_ids=types)
    difference = (ours.eval()(batch).logits[ours.depth] - expected).abs().max().item()
    if not difference < 1e-2:
        raise RuntimeError(f"the logits of ours and of transformers differ by {difference}: not the same work")


def benchmark_step(setup, folder):
    """A training step on the very same padded batch."""
    tasks = build_tasks(("sst",))
    train = read_splits(setup, setup.data_dir, ("train",))["sst"]["train"]
    tokens = np.asarray(train.tokens[0].flat)
    rows = []
    for precision in setup.precisions:
        for b, s in setup.sizes.steps:
            batch, lengths = real_batch(setup, b, s, tokens)
            batch = batch.to(setup.device)
            ours, with_sdpa = our_model(setup, tasks), our_model(setup, tasks, "sdpa")
            plain = PeerModel(setup.weights, tasks).to(setup.device)
            best = PeerModel(setup.weights, tasks, attn_implementation="sdpa").to(setup.device)
            for ours_too, peer in ((ours, plain), (with_sdpa, best)):
                check_same_work(ours_too, peer, batch)
            variants = {
                "ours": our_step(setup, ours, batch, precision),
                "ours --attention sdpa": our_step(setup, with_sdpa, batch, precision),
                "transformers plain": peer_step(setup, plain, batch, precision, fused=False),
                "transformers best": peer_step(setup, best, batch, precision, fused=True),
            }
            if setup.device.type == "cuda":
                compiled = PeerModel(setup.weights, tasks, attn_implementation="sdpa").to(setup.device)
                compiled = torch.compile(compiled)
                variants["transformers best, compiled"] = peer_step(setup, compiled, batch, precision, fused=True)
            for variant in variants.values():
                variant()
            measured = alternate(variants, setup.sizes.rounds, f"step {precision} {b} x {s}")
            flop = layer_flop(ours.bert.config, lengths, passes=3)
            phases = ("forward", "backward", "clip", "optimizer")
            how = {"step": (flop, phases), "without optimizer": (flop, phases[:3])}
            setting = f"{precision}, {b} x {s}, {lengths.mean() / s:.0%} real"
            rows += compare(setting, "ms", measured, flop=how, peak=setup.peaks[precision])
    return rows, {}


# --- epoch --------------------------------------------------------------------------------------------------------


def epoch_flags(setup, precision, attention="plain"):
    """The flags of our run, as the command line gives them."""
    given = f"--option finetune --epochs 1 --split full --precision {precision} --attention {attention}"
    given += f" --batch_size {TRAIN_BATCH} --eval_batch_size {EVAL_BATCH} --lr {LEARNING_RATE} --clip {CLIP}"
    given += f" --weight_decay {WEIGHT_DECAY} --warmup {WARMUP} --hidden_dropout_prob {HEAD_DROPOUT} --seed {SEED}"
    return parse_flags(given.split())[0]


def our_parts(setup, folder, flags, model):
    """What our training loop needs, with the data read from `folder`."""
    return multitask_classifier.build(flags, model, read_splits(setup, folder, ("train", "dev")), setup.device)


def our_epoch(setup, folder, precision, attention="plain"):
    """Read, train, evaluate, save: ours. Returns ({phase: seconds}, dev norm)."""
    torch.manual_seed(SEED)
    flags = epoch_flags(setup, precision, attention)
    model = our_model(setup, multitask_classifier.task_table(flags), attention)
    with tempfile.TemporaryDirectory() as run, redirect_stdout(None):
        watch = Stopwatch(setup.device)
        parts = our_parts(setup, folder, flags, model)
        watch.mark("read")
        started = time.perf_counter()
        progress, _ = multitask_classifier.train(parts, RunFolder(run))
        synchronize(setup.device)
        whole = time.perf_counter() - started
    phases = {**watch.phases(), "train": progress.train_seconds, "evaluate": progress.eval_seconds}
    phases["save"] = max(0.0, whole - progress.train_seconds - progress.eval_seconds)
    return phases, progress.last_scores["norm"]


def peer_epoch(setup, folder, precision, best):
    """Read, train, evaluate, save: transformers, plain or with its best settings. As our_epoch."""
    torch.manual_seed(SEED)
    tasks = build_tasks()
    options = {"attn_implementation": "sdpa"} if best else {}
    model = PeerModel(setup.weights, tasks, **options).to(setup.device)
    tokenizer = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    with tempfile.TemporaryDirectory() as run:
        watch = Stopwatch(setup.device)
        train, dev = (
            {name: PeerData(folder / task.file(split), task, tokenizer, best) for name, task in tasks.items()}
            for split in ("train", "dev")
        )
        watch.mark("read")
        peer_train(model, train, lambda: setup.precision(precision), setup.device, best)
        watch.mark("train")
        norm = peer_evaluate(model, dev, lambda: setup.precision(precision), setup.device, best)
        watch.mark("evaluate")
        torch.save(model.state_dict(), Path(run) / "best.pt")
        watch.mark("save")
    return watch.phases(), norm


EPOCHS = {
    "ours": (our_epoch, {}),
    "ours --attention sdpa": (our_epoch, {"attention": "sdpa"}),
    "transformers plain": (peer_epoch, {"best": False}),
    "transformers best": (peer_epoch, {"best": True}),
}


class Profile:
    """Seconds spent in wrapped functions; a wrapped function inside another counts to the outer one."""

    def __init__(self, device):
        self.device, self.seconds, self.inside = device, {}, False

    def wrap(self, owner, attribute, phase):
        """Replace a function by one that adds its time to a phase. Returns a function that puts it back."""
        original = getattr(owner, attribute)

        def measured(*args, **kw):
            if self.inside:
                return original(*args, **kw)
            self.inside = True
            synchronize(self.device)
            started = time.perf_counter()
            try:
                return original(*args, **kw)
            finally:
                synchronize(self.device)
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
                self.inside = False

        setattr(owner, attribute, measured)
        return lambda: setattr(owner, attribute, original)


def profile_epoch(setup, folder, precision):
    """Where the time of our epoch goes: {phase: seconds}; what no phase covers is called rest."""
    torch.manual_seed(SEED)
    profile, flags = Profile(setup.device), epoch_flags(setup, precision)
    model = our_model(setup, multitask_classifier.task_table(flags))
    undo = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as run, redirect_stdout(None):
        parts, run_folder = our_parts(setup, folder, flags, model), RunFolder(run)
        profile.seconds["tokenise"] = time.perf_counter() - started
        make_optimizer = parts.make_optimizer

        def profiled_optimizer(parameters):
            optimizer = make_optimizer(parameters)
            profile.wrap(optimizer, "step", "optimizer")
            return optimizer

        parts.make_optimizer = profiled_optimizer
        for splits in parts.data.values():
            profile.wrap(splits["train"], "batch", "collate")
        profile.wrap(parts.model, "forward", "forward")
        profile.wrap(parts.gradients, "add", "backward")
        profile.wrap(run_folder, "save_best", "save")
        profile.wrap(run_folder, "save_last", "save")
        try:
            undo.append(profile.wrap(multitask_classifier, "clip_gradients", "clip"))
            undo.append(profile.wrap(multitask_classifier, "evaluate_dev", "evaluate"))
            multitask_classifier.train(parts, run_folder)
        finally:
            for put_back in undo:
                put_back()
    whole = time.perf_counter() - started
    order = ("tokenise", "collate", "forward", "backward", "clip", "optimizer", "evaluate", "save")
    seconds = {phase: profile.seconds[phase] for phase in order}
    return seconds | {"rest": whole - sum(seconds.values())}


def benchmark_epoch(setup, folder):
    """A training epoch end to end, from the CSV files to the best checkpoint."""
    sizes = setup.sizes
    lengths = write_subset(setup, folder / "epoch", sizes.train, sizes.dev)
    write_subset(setup, folder / "warm", 48, 24)
    rows, profiles = [], {}
    for precision in setup.precisions:
        norms = {}

        def variant(name, call, where, precision=precision, norms=norms, **kw):
            def run():
                phases, norm = call(setup, where, precision, **kw)
                norms[name] = norm
                return phases

            return run

        for name, (call, kw) in EPOCHS.items():
            variant(name, call, folder / "warm", **kw)()
        variants = {name: variant(name, call, folder / "epoch", **kw) for name, (call, kw) in EPOCHS.items()}
        measured = alternate(variants, sizes.epoch_rounds, f"epoch {precision}")
        train = np.concatenate(list(lengths["train"].values()))
        dev = sum(map(len, lengths["dev"].values()))
        flop = layer_flop(BertConfig.from_json(setup.weights / "config.json"), train, passes=3)
        how = {"train": (flop, ("train",))}
        setting = f"{precision}, {len(train)} train + {dev} dev examples, batch {TRAIN_BATCH}"
        new = compare(setting, "s", measured, flop=how, peak=setup.peaks[precision])
        rows += [replace(row, note=f"norm {norms[row.variant]:.3f}") for row in new]
        profiles[precision] = profile_epoch(setup, folder / "epoch", precision)
    return rows, profiles


# --- evaluate -----------------------------------------------------------------------------------------------------


def our_evaluation(setup, folder, model, precision):
    """A variant that reads the dev files and scores them."""

    def variant():
        watch = Stopwatch(setup.device)
        data = {name: splits["dev"] for name, splits in read_splits(setup, folder, ("dev",)).items()}
        watch.mark("read")
        evaluate(model, data, batch_size=EVAL_BATCH, precision=lambda: setup.precision(precision))
        watch.mark("predict")
        return watch.phases()

    return variant


def peer_evaluation(setup, folder, model, precision, best):
    """A variant that reads the dev files and scores them, transformers."""
    tasks = build_tasks()
    tokenizer = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)

    def variant():
        watch = Stopwatch(setup.device)
        files = {name: (folder / task.file("dev"), task) for name, task in tasks.items()}
        data = {name: PeerData(path, task, tokenizer, best) for name, (path, task) in files.items()}
        watch.mark("read")
        peer_evaluate(model, data, lambda: setup.precision(precision), setup.device, best)
        watch.mark("predict")
        return watch.phases()

    return variant


def benchmark_evaluate(setup, folder):
    """Evaluation at full depth, from the CSV files to the scores."""
    tasks = build_tasks()
    lengths = write_subset(setup, folder / "evaluate", 24, setup.sizes.evaluated)
    write_subset(setup, folder / "warm", 24, 48)
    dev = np.concatenate(list(lengths["dev"].values()))
    models = {
        "ours": our_model(setup, tasks),
        "ours --attention sdpa": our_model(setup, tasks, "sdpa"),
        "transformers plain": PeerModel(setup.weights, tasks).to(setup.device),
        "transformers best": PeerModel(setup.weights, tasks, attn_implementation="sdpa").to(setup.device),
    }
    flop = layer_flop(models["ours"].bert.config, dev, passes=1)
    rows = []
    for precision in setup.precisions:

        def variant(name, where, precision=precision):
            if name.startswith("ours"):
                return our_evaluation(setup, where, models[name], precision)
            return peer_evaluation(setup, where, models[name], precision, name == "transformers best")

        for name in models:
            variant(name, folder / "warm")()
        variants = {name: variant(name, folder / "evaluate") for name in models}
        measured = alternate(variants, setup.sizes.epoch_rounds, f"evaluate {precision}")
        how = {"predict": (flop, ("predict",))}
        setting = f"{precision}, {len(dev)} examples, batch {EVAL_BATCH}"
        rows += compare(setting, "s", measured, flop=how, peak=setup.peaks[precision])
    return rows, {}


# --- memory -------------------------------------------------------------------------------------------------------


def peak_mib(device):
    """Most memory that this process has held: of the GPU where there is one. Units: MiB.

    Differs: not getrusage's ru_maxrss, in which Linux counts the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def remember_epoch(call, setup, folder, precision, threads, kw):
    """Run an epoch in a process of its own. Returns {phase: MiB}."""
    torch.set_num_threads(threads)
    before = peak_mib(setup.device)
    call(setup, folder, precision, **kw)
    return {"start": before, "epoch": peak_mib(setup.device) - before}


def benchmark_memory(setup, folder):
    """Peak memory of a short epoch, each variant in a fresh process."""
    write_subset(setup, folder / "memory", setup.sizes.remembered, setup.sizes.remembered // 4)
    rows = []
    for precision in setup.precisions:

        def variant(call, kw, precision=precision):
            def run():
                arguments = (call, setup, folder / "memory", precision, torch.get_num_threads(), kw)
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    return pool.submit(remember_epoch, *arguments).result()

            return run

        measured = alternate({name: variant(*c) for name, c in EPOCHS.items()}, 1, f"memory {precision}")
        rows += compare(f"{precision}, peak, {setup.sizes.remembered} examples, batch {TRAIN_BATCH}", "MiB", measured)
    return rows, {}


# --- the report ---------------------------------------------------------------------------------------------------

PARTS = {
    "tokenize": benchmark_tokenize,
    "step": benchmark_step,
    "epoch": benchmark_epoch,
    "evaluate": benchmark_evaluate,
    "optimizer": benchmark_optimizer,
    "memory": benchmark_memory,
}


def profile_lines(profiles):
    """Where the time of our epoch goes, as shares."""
    lines = []
    for precision, seconds in profiles.items():
        whole = sum(seconds.values())
        shares = ", ".join(f"{phase} {cost / whole:.1%}" for phase, cost in seconds.items())
        lines.append(f"Where the time of our epoch goes ({precision}, {whole:.1f} s): {shares}.")
    return lines


def report_lines(title, told):
    """A part's section of the report; `told` is what its record in the JSON file holds."""
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in told["matrix_peak"].items())
    about = f"commit {told['commit'] or 'unknown'}, {told['device']}, {told['threads']} threads, torch {told['torch']}"
    about += f", transformers {told['transformers']}, {told['started'][:10]}, {told['seconds'] / 60:.1f} min"
    lines = [f"## {title}", "", PARTS[title].__doc__.split("\n")[0], ""]
    lines += [f"`{told['command']}` ({about}; matrix peak in GFLOP/s: {peaks})", "", *told["table"], ""]
    return lines + [line for paragraph in profile_lines(told["profile"]) for line in (paragraph, "")]


def write_report(path, records):
    """Write PATH.json and PATH.md; parts that were not run now stay as they are."""
    old = path.with_suffix(".json")
    if old.is_file():
        records = json.loads(old.read_text()) | records
    records = {name: records[name] for name in PARTS if name in records}
    write_whole(old, json.dumps(records, indent=1) + "\n")
    lines = ["# Ours beside transformers", ""]
    lines += ["Cost / ours: above 1, ours is ahead. What the variants are is said at the top of benchmark.py.", ""]
    for name, told in records.items():
        lines += report_lines(name, told)
    write_whole(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def report_path(folder, device, quick):
    """Where the report goes, without its suffix: the device is in the name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path(folder) / f"benchmark-{name.replace(' ', '-')}{'-quick' if quick else ''}"


def choose_sizes(args, device):
    """Sizes for the device and the flags."""
    sizes = Sizes(**(GPU_SIZES if device.type != "cpu" else {}))
    if args.quick:
        sizes = replace(sizes, **QUICK_SIZES)
    return replace(sizes, rounds=args.rounds, epoch_rounds=args.rounds) if args.rounds else sizes


def run_part(name, setup):
    """Measure one part and print its table. Returns its record."""
    started = time.monotonic()
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        rows, profiles = PARTS[name](setup, Path(folder))
    record = {
        "command": command_line(),
        **describe_environment(setup.device),
        "transformers": import_transformers().__version__,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "weights": setup.weights.name,
        "data": setup.data_dir.name,
        "sizes": asdict(setup.sizes),
        "matrix_peak": setup.peaks,
        "table": table(rows),
        "rows": [row.record() for row in rows],
        "profile": profiles,
    }
    print("\n".join(report_lines(name, record)), flush=True)
    return record


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Time this code beside transformers and torch.optim.",
        epilog="Needs a quiet machine. Parts that are not named keep their numbers in the report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--use_gpu", action="store_true", help="measure on CUDA or Apple's MPS")
    parser.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample")
    parser.add_argument("--weights", default="minilm", help=f"a name, a folder, or {', '.join(RANDOM_WEIGHTS)}")
    parser.add_argument(
        "--precision", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS), help="autocast precisions"
    )
    parser.add_argument("--rounds", type=positive_int, help="turns of every variant")
    parser.add_argument("--quick", action="store_true", help="a few hundred examples: does it work, not how fast")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"), help="folder of the report")
    return parser


def main(argv=None):
    """Run the parts and write the report."""
    args = make_parser().parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"{name}: no such part; choose from {', '.join(PARTS)}")
    import_transformers()
    device = multitask_classifier.choose_device(args.use_gpu)
    tasks = build_tasks()
    folder, _ = find_data_dir(args.data_dir, tasks, ("train", "dev"))
    sizes = choose_sizes(args, device)
    with tempfile.TemporaryDirectory() as drawn:
        weights = prepare_weights(args.weights, drawn)
        setup = Setup(weights, Path(folder), device, tuple(args.precision), sizes)
        path = report_path(args.results, device, args.quick)
        for part in args.parts or PARTS:
            setup.peaks = {
                name: measure_matrix_peak(device, PRECISIONS[name], sizes.matrices) for name in setup.precisions
            }
            write_report(path, {part: run_part(part, setup)})
    print(f"report: {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_script(main)
