"""From flags to the parts of a run: device, data, and everything that fills the slots of the training loop.

The loop (multitask_classifier.py) sees only `Parts`. Terms, plans, adapters and rates come from the methods' records
(flags.METHODS). This module receives the model and never imports it.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import parallel
from base_bert import BertConfig
from datasets import SPLITS, describe_datasets, find_data_dir, read_dataset
from errors import InputError, explain_out_of_memory, smaller, warn
from evaluation import run_batches
from flags import METHODS, PRECISIONS, SAMPLE_DEFAULTS
from methods import per_task, positive, positive_int
from optimizer import OPTIMIZERS, SCHEDULES, parameter_groups
from runs import check_same_files, command_line, describe_environment, hash_weights, sha256
from samplers import make_rng
from slf import start_plan
from tasks import TASKS, build_tasks, widen
from tokenizer import BertTokenizer
from weights import find_weights, pooling_of

# A BERT of at most SMALL hidden units takes the first of two default learning rates (optimizer.py), a larger one the
# second. The first were measured with the small default weights (results/defaults.md), the second are the papers'.
SMALL = 512
# --max_length: MIN_LENGTH has room for the special tokens of any pair encoding and one word. MAX_LENGTH is the default,
# where the weights allow it.
MIN_LENGTH, MAX_LENGTH = 5, 512
# What a method's record may need. "exits": an exit after every layer is built. "embeddings": a loss term looks at the
# embeddings, so that the features of a frozen BERT cannot be cached. "all_tasks": a step has a batch of each task.
NEEDS = ("exits", "embeddings", "all_tasks")
# what --compile uses, and how many variants of a layer it may translate
COMPILER, TRANSLATIONS = "inductor", 128
# glibc's names for the sizes from which it gives freed memory back, and the largest sizes that it takes (before 2.35)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST, LARGEST_BEFORE = -1, -3, 2**31 - 1, 2**25


@dataclass(frozen=True)
class Precision:
    """Where and how precisely the model computes: the device, the autocast context, and fp16's loss scaler."""

    device: torch.device
    autocast: Callable  # () -> context
    scaler: torch.amp.GradScaler


@dataclass(frozen=True)
class Settings:
    """Plain numbers and choices of the loop, as the flags give them."""

    batch_size: int
    accumulate: int
    eval_batch_size: int
    data_split: str
    sampler: str
    all_tasks: bool  # whether every step has a batch of each task
    task_weights: dict
    clip: float
    seed: int
    schedule: Callable  # finished share of the training -> factor of the learning rate


@dataclass(frozen=True)
class Parts:
    """Everything that the loop needs."""

    model: nn.Module
    data: dict  # {task: {split: Dataset}}
    rows: dict  # {task: the rows of its training file to train on}
    plan: Callable  # () -> generator of phases
    terms: dict  # {name: loss term}
    gradients: object
    make_optimizer: Callable  # {name: parameter} -> optimizer
    trainable: frozenset  # names of the parameters that this run may train at all
    precision: Precision
    settings: Settings
    exit_settings: object  # how to leave early at inference, or None

    def dev(self):
        """{task: dev Dataset}."""
        return {name: splits["dev"] for name, splits in self.data.items()}

    def inference(self):
        """Keyword arguments of evaluation.predict."""
        return {"batch_size": self.settings.eval_batch_size, "autocast": self.precision.autocast}


# --- the machine --------------------------------------------------------------------------------------------------


def choose_device(use_gpu):
    """The device to train on; prints a warning where a GPU is wanted and there is none."""
    if use_gpu:
        if torch.cuda.is_available():
            # float32 products on tensor cores (TF32: 10 bits of mantissa, where bf16 has 7)
            torch.set_float32_matmul_precision("high")
            return torch.device("cuda")
        if torch.backends.mps.is_available() and not parallel.several():
            return torch.device("mps")
        warn("--use_gpu, but torch sees no GPU (CUDA or MPS): working on the CPU")
    return torch.device("cpu")


def keep_freed_memory():
    """Let the C library keep large freed blocks for the next step, where it is glibc (Linux).

    Otherwise glibc returns them to the system, and the system zeroes new ones in every step. With kept memory the
    gradient of the word embeddings, 47 MB, takes 10 to 36 ms of a step, otherwise 76 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, LARGEST)
        mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE)


def compile_layers(bert, device, backend):
    """Let torch.compile translate the layers, at the first step and for all batch sizes and lengths above 1.

    Raises: InputError where the translated code for a CPU cannot be compiled.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if backend == "inductor" and device.type == "cpu" and not shutil.which(compiler):
        raise InputError(f"--compile: needs a C++ compiler, and there is no {compiler}: install it, or set CXX")
    # a translation per task, adapter and frozen part; the layers share them
    torch._dynamo.config.recompile_limit = TRANSLATIONS
    for layer in bert.bert_layers:
        layer.compile(dynamic=True, backend=backend)


def computes_bf16(device):
    """Whether a device is as fast in bf16 as in float32: an x86 CPU without AVX-512 is about 30 times slower."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2"


def make_autocast(name, device):
    """The autocast context of a precision, as a function that makes it.

    Raises: InputError where the device lacks it. Warns where it is slow.
    """
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: a CPU has no fast half precision: use bf16 or fp32, or --use_gpu")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("--precision bf16: this GPU has no bf16: use fp16 or fp32")
    if name == "bf16" and not computes_bf16(device):
        warn("--precision bf16: this CPU has no instructions for it and takes about 30 times as long as with fp32")
    if name == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=PRECISIONS[name])


# --- what a run reads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a training run reads: flags (with their defaults filled in), weights, tasks and data."""

    flags: dict
    weights: Path
    tasks: dict
    data: dict  # {task: {split: Dataset}}
    hashes: dict  # the hashes of weights and data, as config.json holds them

    def record(self, device):
        """What config.json holds of these inputs, and of the machine."""
        return {"flags": self.flags, "command": command_line(), **describe_environment(device), **self.hashes}


def read_inputs(flags, typed, config):
    """Read and check weights and data. `config` is that of the run to resume, or None.

    Raises: InputError where they do not fit together, or are not those of the run to resume.
    """
    recorded = config and "weights" not in typed
    weights = Path(config["weights"]["folder"]) if recorded else find_weights(flags["weights"])
    print(f"weights: {weights}")
    tasks, sizes = build_table(flags), BertConfig.from_json(weights / "config.json")
    flags = fill_weight_defaults(flags, weights, sizes)
    check_fits(flags, tasks, sizes, weights)
    data, files, is_sample = read_data(flags, tasks, BertTokenizer.from_pretrained(weights))
    if is_sample and not config:
        flags = fill_sample_defaults(flags, typed, sizes)
    data_hashes = {name: sha256(path) for name, path in files.items()}
    parallel.check_same("flags", {name: flags[name] for name in flags.keys() - {"data_dir", "weights"}})
    parallel.check_same("data files", data_hashes)
    weight_hashes = hash_weights(weights)
    if config:
        check_same_files(config["data"], data_hashes, files)
        before = config["weights"]["sha256"]
        check_same_files(before, weight_hashes, {name: weights / name for name in before | weight_hashes})
    print("\n".join(describe_datasets(data)))
    hashes = {"weights": {"folder": str(weights.resolve()), "sha256": weight_hashes}, "data": data_hashes}
    return Inputs(flags, weights, tasks, data, hashes)


def fill_weight_defaults(flags, weights, sizes):
    """Choose --pooling and --max_length by the weights, where the user did not."""
    filled = dict(flags)
    if flags["pooling"] == "auto":
        filled["pooling"], reason = pooling_of(weights)
        print(f"pooling: {filled['pooling']} ({reason})")
    filled["max_length"] = flags["max_length"] or min(MAX_LENGTH, sizes.max_position_embeddings)
    return filled


def fill_sample_defaults(flags, typed, sizes):
    """Choose what suits --slf on the few sentences of data/sample, where the user did not; print what differs."""
    suits = flags["slf"] and flags["optimizer"] == "adamw" and flags["adapter"] == ["none"]
    if not suits or sizes.hidden_size > SMALL:
        return flags
    changed = {name: value for name, value in SAMPLE_DEFAULTS.items() if name not in typed}
    if changed:
        settings = " ".join(f"--{name} {value:g}" for name, value in changed.items())
        print(f"sample data: {settings}, instead of the defaults for the course's data (--help)")
    return flags | changed


def check_fits(flags, tasks, config, weights):
    """Fail where the weights do not go with the tasks' encodings or with --max_length.

    Raises: InputError.
    """
    packed = [task.name for task in tasks.values() if task.encoding != "siamese" and task.is_pair]
    if packed and config.type_vocab_size < 2:
        raise InputError(
            f"--pairs: {weights} has one kind of segment (type_vocab_size 1), {packed[0]} packs two: "
            f"use --pairs {' '.join(f'{name}=siamese' for name in packed)}"
        )
    if config.num_hidden_layers == 1 and "exits" in needs_of_methods(flags):
        raise InputError(f"{weights} has one layer, so there is no exit before the last: use weights with more layers")
    if not MIN_LENGTH <= flags["max_length"] <= config.max_position_embeddings:
        raise InputError(
            f"--max_length {flags['max_length']}: give a length from {MIN_LENGTH} to "
            f"{config.max_position_embeddings}, the positions of {weights}"
        )


def read_data(flags, tasks, tokenizer, splits=SPLITS):
    """All datasets of a run: {task: {split: Dataset}}, {"task split": path}, and whether they are the sample."""
    paths = {(name, split): flags[f"{name}_{split}"] for name in tasks for split in splits}
    wanted = {key: tasks[key[0]].file(key[1]) for key, path in paths.items() if not path}
    folder, is_sample = None, False
    if wanted:
        folder, is_sample = find_data_dir(flags["data_dir"], wanted.values(), may_be_sample=len(wanted) == len(paths))
        if is_sample:
            print(f"data: no course data in data/, so the sample in {folder.parent.name}/sample (./setup.sh --data)")
    data, files = {name: {} for name in tasks}, {}
    for (name, split), path in paths.items():
        path = Path(path) if path else folder / wanted[name, split]
        data[name][split] = read_dataset(tasks[name], path, tokenizer, flags["max_length"], labelled=split != "test")
        files[f"{name} {split}"] = path
    return data, files, is_sample


def choose_rows(data, counts, seed):
    """The rows to train on: {task: rows}, all usable ones or `counts[task]` of them, drawn by the seed."""
    rows = {name: splits["train"].usable for name, splits in data.items() if "train" in splits}
    for name, count in counts.items():
        chosen = make_rng(seed, "train_rows", name).permutation(rows[name])[:count]
        print(f"--train_rows: {len(chosen):,} of {len(rows[name]):,} {name} rows")
        rows[name] = np.sort(chosen)
    return rows


def cache_features(model, dataset, batch_size, precision):
    """A dataset with the states that the heads of a frozen BERT see, computed once. Shapes: [n,w]."""

    def states(model, batch):
        return (widen(model(batch).states[model.depth]),)

    rows, bar = np.arange(len(dataset)), parallel.progress_bars()
    with explain_out_of_memory(smaller("--eval_batch_size", batch_size)):
        [features] = run_batches(model, dataset, rows, states, batch_size, precision.autocast, bar)
    return dataset.with_features(features)


# --- the slots ----------------------------------------------------------------------------------------------------


def known(method, slot, names, choices):
    """The names that a method's record returns for a slot.

    Raises: InputError for a name that is not there.
    """
    for name in names:
        if name not in choices:
            raise InputError(f"method {method.title!r}: {slot} names {name!r}, which is not there: correct its record")
    return names


def first(built):
    """The first of the built objects that is not None; None if there is none."""
    return next((thing for thing in built if thing is not None), None)


def needs_of_methods(flags):
    """What the methods that are on need, together: some of NEEDS."""
    return set().union(*(known(method, "needs", method.needs(flags), NEEDS) for method in METHODS))


def build_table(flags):
    """The run's tasks: {name: Task}."""
    in_pairs = [name for name, row in TASKS.items() if row.is_pair and name in flags["tasks"]]
    pairs = per_task(flags["pairs"], "--pairs", in_pairs, str)
    losses = {name: flags.get(f"{name}_loss") for name in flags["tasks"]}
    return build_tasks(flags["tasks"], pairs, flags["siamese_features"], losses)


def build_adapters(flags, config, task_names, generator):
    """The module for BERT's adapter slot, or None."""
    return first(method.adapters(flags, config, task_names, generator) for method in METHODS)


def build_trainable(flags, model):
    """What the run may train at all: the kind of training (for the default learning rate) and the parameters' names."""
    everything = {name for name, _ in model.named_parameters()}
    if flags["option"] == "pretrain":
        # every exit's pooler counts as BERT's own, as the last one is
        poolers = [module.pooler_dense for module in model.exits if module.pooler_dense is not None]
        frozen = {id(parameter) for module in (model.bert, *poolers) for parameter in module.parameters()}
        return "pretrain", frozenset(name for name, p in model.named_parameters() if id(p) not in frozen)
    restricted = [
        known(method, "trains", names, everything)
        for method in METHODS
        if (names := method.trains(flags, model)) is not None
    ]
    # a few new parameters beside a frozen BERT take larger steps than BERT's own parameters
    kind = "adapter" if restricted and model.adapters is not None else "finetune"
    return kind, frozenset(everything.intersection(*restricted))


def build_terms(flags, model, terms):
    """The loss terms: those in `terms`, then those of the methods that are on."""

    # on a CUDA GPU, because there a CPU takes longer to draw noise than the GPU takes for the step
    device = "cuda" if next(model.parameters()).is_cuda else "cpu"

    def noise(purpose):
        # a generator for each purpose, so that a method does not change the random numbers of the rest
        return torch.Generator(device).manual_seed(int(make_rng(flags["seed"], purpose).integers(2**62)))

    for method in METHODS:
        more = method.terms(flags, model, noise)
        if clash := terms.keys() & more.keys():
            raise InputError(f"loss term {min(clash)}: two methods use this name: rename one")
        terms = terms | more
    return terms


def build_plan(flags, depth):
    """The training plan, as a function that starts it anew."""
    plan = start_plan(flags, depth, "exits" in needs_of_methods(flags))
    for method in METHODS:
        plan = method.plan(flags, depth, plan)
    # try the plan, with scores of 0: some phase must keep its model
    phases = plan()
    phase = next(phases)
    try:
        while not phase.keep:
            phase = phases.send(0.0)
    except StopIteration:
        raise InputError(f"the plan ends with {phase.label!r} and no phase keeps its model: set keep=True") from None
    return plan


def build_optimizer(flags, kind, model):
    """The function that makes an optimiser for {name: parameter}."""
    for_small, for_large = OPTIMIZERS[flags["optimizer"]].learning_rates[kind]
    learning_rate = flags["lr"] or (for_small if model.bert.config.hidden_size <= SMALL else for_large)
    rates = {}
    for method in METHODS:
        rates |= known(method, "rates", method.rates(flags, model), dict(model.named_parameters()))

    def make(parameters):
        groups = parameter_groups(parameters.items(), flags["weight_decay"], rates)
        optimizer = OPTIMIZERS[flags["optimizer"]](groups, lr=learning_rate)
        for group in optimizer.param_groups:
            group["initial_lr"] = learning_rate * group["rate"]
        return optimizer

    return make


def build(flags, model, data, device, terms):
    """Fill the loop's slots as the flags say. `terms` is {name: loss term} of those that every run has."""
    exit_settings = first(method.exit_settings(flags, model.tasks) for method in METHODS)
    for name, splits in data.items():
        if exit_settings and len(splits["dev"].usable) < 2:
            raise InputError(f"--early_exit: give two dev rows of {name}: some choose its threshold, others are scored")
    if flags["compile"]:
        compile_layers(model.bert, device, COMPILER)
    scaler = torch.amp.GradScaler(device.type, enabled=flags["precision"] == "fp16")
    precision = Precision(device, make_autocast(flags["precision"], device), scaler)
    kind, trainable = build_trainable(flags, model)
    if kind == "pretrain" and not needs_of_methods(flags) & {"exits", "embeddings"}:
        size = flags["eval_batch_size"]
        data = {
            name: {split: cache_features(model, dataset, size, precision) for split, dataset in splits.items()}
            for name, splits in data.items()
        }
    weights = per_task(flags["task_weights"], "--task_weights", list(data), positive)
    order = torch.Generator().manual_seed(flags["seed"])
    return Parts(
        model=model,
        data=data,
        rows=choose_rows(data, per_task(flags["train_rows"], "--train_rows", list(data), positive_int), flags["seed"]),
        plan=build_plan(flags, model.depth),
        terms=build_terms(flags, model, terms),
        gradients=first(method.gradients(flags, list(model.parameters()), order) for method in METHODS),
        make_optimizer=build_optimizer(flags, kind, model),
        trainable=trainable,
        precision=precision,
        settings=Settings(
            batch_size=flags["batch_size"],
            accumulate=flags["accumulate"],
            eval_batch_size=flags["eval_batch_size"],
            data_split=flags["split"],
            sampler=flags["sampler"],
            all_tasks=flags["step"] == "all_tasks" or "all_tasks" in needs_of_methods(flags),
            task_weights=dict.fromkeys(data, 1.0) | weights,
            clip=flags["clip"],
            seed=flags["seed"],
            schedule=lambda progress: SCHEDULES[flags["schedule"]](progress, flags["warmup"]),
        ),
        exit_settings=exit_settings,
    )


def parameter_table(model, trainable):
    """Lines with the number of parameters and of trainable ones, for each part of the model."""
    parts = {"embeddings": model.bert, "layers": model.bert.bert_layers, "pooler": model.bert.pooler_dense}
    parts |= {name: module for name, module in model.named_children() if name not in ("bert", "dropout")}
    # a parameter belongs to the last part that contains it, so "embeddings" keeps what is in no other part of BERT
    part_of = {id(p): part for part, module in parts.items() for p in module.parameters()}
    counts = {}
    for name, parameter in model.named_parameters():
        total, trained = counts.get(part_of[id(parameter)], (0, 0))
        size = parameter.numel()
        counts[part_of[id(parameter)]] = (total + size, trained + size * (name in trainable))
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return [f"{part:<12}{total:>12,} parameters {trained:>12,} trainable" for part, (total, trained) in counts.items()]
