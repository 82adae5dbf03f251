#!/usr/bin/env python3
"""Fine-tune one BERT on sentiment, paraphrase and similarity at once: the model, the flags and the one training loop.

Read first: bert.py, tasks.py, datasets.py. Then read here in this order: `MultitaskBERT` (a BERT with one head per
task), `train` (the loop: it knows no task and no extension), `build` (the only place that reads flags and decides
which parts fill the loop's slots).

    python multitask_classifier.py --option finetune --use_gpu

An extension plugs into a slot: a loss term `term(model, batch, outputs, exit_weights) -> [b]`, a training plan
(slf.py), a way to combine gradients (gradients.py), an adapter (adapters.py), an inference policy (early_exit.py).
One that is off is not built, so that the baseline stays bit-identical.
"""

import argparse
import json
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

try:
    import numpy as np
    import torch
    from torch import nn
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed here: run ./setup.sh once, then use .venv/bin/python")

import slf
from base_bert import BertConfig, find_weights
from bert import BertModel, Dropout
from datasets import SPLITS, Batch, bucketed_batches, find_data_dir, read_dataset, report
from early_exit import Exit
from errors import InputError, run_script
from evaluation import evaluate, fit_threshold, predict, score, summarise, write_predictions
from gradients import Sum
from optimizer import SCHEDULES, SGD, AdamW, RMSprop, clip_gradients, parameter_groups
from runs import (
    FREE_FLAGS,
    RunFolder,
    check_same_data,
    check_same_run,
    command_line,
    describe_environment,
    hash_weights,
    name_run,
    sha256,
)
from samplers import DATA_SPLITS, SAMPLERS, all_tasks_order, epoch_rows, generator, task_order
from tasks import ENCODINGS, PARA_LOSSES, STS_LOSSES, build_tasks
from tokenizer import BertTokenizer

TASK_NAMES = ("sst", "cfimdb", "para", "sts")


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Outputs:
    """What one forward pass gives.

    Shapes: embeds: one [b,s,d] per encoder pass; states and logits: {exit layer: [b,w]} and {exit layer: [b,o]}.
    `rng` is the dropout generator's state after embedding: replaying it repeats the layers' dropout masks.
    """

    embeds: tuple
    states: dict
    logits: dict
    rng: torch.Tensor


class MultitaskBERT(nn.Module):
    """A BERT with one head per task and, where `exits` is set, an exit after every layer.

    Source: BERTer 3.1 (heads), 3.3 (exits), 3.4 (pair encodings); SMARTer BERT 4.1.
    """

    def __init__(self, bert, tasks, hidden_dropout_prob=0.3, pooling="cls", exits=False, init=None):
        super().__init__()
        self.bert, self.tasks, self.pooling = bert, tasks, pooling
        self.depth = bert.config.num_hidden_layers
        self.dropout = Dropout(hidden_dropout_prob)
        self.heads = self.make_heads(init)
        with_pooler = pooling == "cls"
        self.exits = nn.ModuleList(
            Exit(bert, lambda: self.make_heads(init), with_pooler) for _ in range(self.depth - 1) if exits
        )
        self.register_buffer("thresholds", torch.full((len(tasks),), 0.5))

    def make_heads(self, init):
        """A head per task, drawn from the generator `init`."""
        d, heads = self.bert.config.hidden_size, nn.ModuleDict()
        for name, task in self.tasks.items():
            width = d * len(task.siamese_features) if task.encoding == "siamese" else d
            heads[name] = task.make_head(width)
            for parameter in heads[name].parameters():
                std = self.bert.config.initializer_range if parameter.dim() > 1 else 0.0
                nn.init.normal_(parameter, 0.0, std, generator=init)
        return heads

    def threshold(self, name):
        """Decision threshold of a task."""
        return float(self.thresholds[list(self.tasks).index(name)])

    def set_threshold(self, name, value):
        """Set the decision threshold of a task."""
        self.thresholds[list(self.tasks).index(name)] = value

    def embed(self, batch):
        """The embeddings that enter layer 1, one tensor per encoder pass. Shapes: tuple of [b,s,d]."""
        embeds = tuple(self.bert.embed(ids, types) for ids, _, types in batch.segments)
        return (torch.cat(embeds, dim=1),) if batch.encoding == "embed_concat" else embeds

    def masks(self, batch):
        """The attention mask of every encoder pass. Shapes: tuple of [b,s]."""
        masks = tuple(mask for _, mask, _ in batch.segments)
        return (torch.cat(masks, dim=1),) if batch.encoding == "embed_concat" else masks

    def state(self, i, hidden, masks, task):
        """The vector that the heads of exit i see. Shapes: hidden: one [b,s,d] per pass -> [b,w]."""
        if self.pooling == "mean":
            vectors = [mean_pool(h, mask) for h, mask in zip(hidden, masks, strict=True)]
        else:
            pool = self.bert.pool if i == self.depth else self.exits[i - 1].pool
            vectors = [pool(h) for h in hidden]
        return vectors[0] if len(vectors) == 1 else pair_features(*vectors, task.siamese_features)

    def head(self, i, state, task):
        """Output of exit i's head for a task. Shapes: [b,w] -> [b,o]."""
        heads = self.heads if i == self.depth else self.exits[i - 1].heads
        return heads[task.name](self.dropout(state))

    def forward(self, batch, embeds=None, start=None, exits=None):
        """Run the layers up to the last of `exits` (by default the full depth) and each exit's head.

        `embeds` replaces the embedding lookup; `start=(i, hidden)` enters after layer i with known hidden states.
        """
        exits, task = exits or (self.depth,), batch.task
        if batch.features is not None:
            states = {self.depth: batch.features}
            return Outputs((), states, {self.depth: self.head(self.depth, batch.features, task)}, None)
        embeds = self.embed(batch) if embeds is None else embeds
        first, hidden = start or (0, embeds)
        rng, masks, states, logits = dropout_state(embeds[0].device), self.masks(batch), {}, {}
        extended = [self.bert.extend_mask(mask, embeds[0].dtype) for mask in masks]
        for i in range(first + 1, max(exits) + 1):
            layer = self.bert.bert_layers[i - 1]
            hidden = [layer(h, mask, task.name) for h, mask in zip(hidden, extended, strict=True)]
            if i in exits:
                states[i] = self.state(i, hidden, masks, task)
                logits[i] = self.head(i, states[i], task)
        return Outputs(embeds, states, logits, rng)

    def answer(self, name, *segments):
        """Logits of a task for raw (input_ids, attention_mask) segments, as the course's methods give them."""
        ids = segments[0][0]
        whole = [(i, m, torch.full_like(i, k)) for k, (i, m) in enumerate(segments)]
        task = self.tasks[name]
        if task.encoding == "concat":
            whole = [pack_pairs(*whole)]
        elif task.encoding == "siamese":
            whole = [(i, m, torch.zeros_like(i)) for i, m, _ in whole]
        batch = Batch(task, task.encoding, tuple(whole), None, tuple(range(len(ids))))
        return self(batch).logits[self.depth]

    def predict_sentiment(self, input_ids, attention_mask):
        """Five logits for SST. Shapes: [b,s], [b,s] -> [b,5]. Source: the course's interface."""
        return self.answer("sst", (input_ids, attention_mask))

    def predict_paraphrase(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """One logit for Quora. Shapes: four [b,s] -> [b]. Source: the course's interface."""
        return self.answer("para", (input_ids_1, attention_mask_1), (input_ids_2, attention_mask_2)).squeeze(-1)

    def predict_similarity(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """One value for STS. Shapes: four [b,s] -> [b]. Source: the course's interface."""
        return self.answer("sts", (input_ids_1, attention_mask_1), (input_ids_2, attention_mask_2)).squeeze(-1)


def dropout_state(device):
    """State of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def mean_pool(h, mask):
    """Mean of the hidden states of the real tokens. Shapes: [b,s,d], [b,s] -> [b,d]."""
    weights = mask.unsqueeze(-1).to(h.dtype)
    return (h * weights).sum(1) / weights.sum(1)


def pair_features(u, v, kind):
    """Features of two sentence vectors: [u; v] or [u; v; |u - v|]. Source: BERTer 3.4; Sentence-BERT."""
    return torch.cat([u, v] if kind == "uv" else [u, v, (u - v).abs()], dim=-1)


def pack_pairs(first, second):
    """Join padded [CLS] A [SEP] and [CLS] B [SEP] into [CLS] A [SEP] B [SEP], without padding in between."""
    rows = []
    for (ids_a, mask_a, _), (ids_b, mask_b, _) in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True):
        a, b = ids_a[mask_a.bool()], ids_b[mask_b.bool()][1:]
        rows.append((torch.cat([a, b]), torch.cat([torch.zeros_like(a), torch.ones_like(b)])))
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    types = nn.utils.rnn.pad_sequence([types for _, types in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in rows], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    return ids, mask, types


# --- the loop -----------------------------------------------------------------------------------------------------


class TaskLoss:
    """The loss term every run has: the task's loss at each exit, weighted. Source: BERTer 3.3, sum of L_i."""

    def __call__(self, model, batch, outputs, exit_weights):
        return sum(w * batch.task.loss(outputs.logits[i], batch.labels) for i, w in exit_weights.items())


@dataclass
class Parts:
    """Everything the loop needs; made by `build`, which alone reads flags."""

    model: MultitaskBERT
    data: dict  # {task: {split: Dataset}}
    plan: Callable  # () -> generator of phases
    terms: dict  # {name: loss term}
    gradients: object
    make_optimizer: Callable  # parameters by name -> optimizer
    may_train: Callable  # parameter name -> whether this run may train it
    schedule: Callable  # progress -> multiplier of the learning rate
    device: torch.device
    precision: Callable  # () -> autocast context
    scaler: torch.amp.GradScaler
    task_weights: dict
    batch_size: int
    accumulate: int
    eval_batch_size: int
    all_tasks: bool
    split: str
    sampler: str
    clip: float
    seed: int
    log_every: int
    save_every: float
    keep_last: bool

    def dev(self):
        """{task: dev Dataset}."""
        return {name: splits["dev"] for name, splits in self.data.items()}


class Interrupted(Exception):
    """SIGINT or SIGTERM, at a place where the state can be saved."""


class SignalGuard:
    """Turns SIGINT and SIGTERM into a request that the loop honours between two steps.

    While `immediate` is set (evaluation changes nothing) the signal interrupts at once; a second one always does.
    """

    def __enter__(self):
        self.received, self.immediate = None, False
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        again, self.received = self.received is not None, number
        if self.immediate or again:
            raise Interrupted


@dataclass
class Progress:
    """Where a run is: what is saved in last.pt beside the tensors."""

    scores: list = field(default_factory=list)  # norm after each finished phase
    step: int = 0  # finished steps of the current phase
    epochs: float = 0.0  # epochs before the current phase
    total_steps: int = 0
    best: float = -1.0
    best_phase: str = ""
    last_scores: dict = field(default_factory=dict)
    trained: list = field(default_factory=list)  # names of the parameters the optimiser holds
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


def phase_steps(parts, phase, position):
    """The steps of a phase: each a list of (task, rows); a pure function of seed and position."""
    usable = {name: splits["train"].usable for name, splits in parts.data.items()}
    sizes = {name: len(rows) for name, rows in usable.items()}
    rows = epoch_rows(sizes, parts.split, position, phase.fraction, parts.seed)
    batches = {}
    for name, chosen in rows.items():
        chosen = usable[name][chosen]
        rng = generator(parts.seed, "batches", name, position)
        lengths = parts.data[name]["train"].lengths()[chosen]
        batches[name] = [chosen[b] for b in bucketed_batches(lengths, parts.batch_size * parts.accumulate, rng)]
    counts = {name: len(batch) for name, batch in batches.items()}
    k, n = phase.stretch
    if parts.all_tasks:
        order = all_tasks_order(counts)
    else:
        rng = generator(parts.seed, "order", position)
        order = [[pair] for pair in task_order(parts.sampler, counts, k / max(1, n - 1), rng)]
    return [[(name, batches[name][b]) for name, b in step] for step in order]


def set_trainable(model, phase, may_train):
    """Let only this phase's parameters have gradients. Returns {name: parameter}."""
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(may_train(name) and name.startswith(phase.trainable))
        if parameter.requires_grad:
            trainable[name] = parameter
    return trainable


def train_step(parts, optimizer, step, exit_weights, multiplier):
    """One optimiser step over the (task, rows) of `step`.

    Each loss is divided by the number of examples its task has in the whole step, so that k accumulated batches
    equal one batch k times as large, and a short last batch counts by its examples.
    Returns a list of (task, ids, {term: sum over the examples}) without waiting for the device.
    """
    done = []
    for name, rows in step:
        data = parts.data[name]["train"]
        for start in range(0, len(rows), parts.batch_size):
            batch = data.batch(rows[start : start + parts.batch_size]).to(parts.device)
            with parts.precision():
                outputs = parts.model(batch, exits=tuple(exit_weights))
            values = {key: term(parts.model, batch, outputs, exit_weights) for key, term in parts.terms.items()}
            loss = parts.task_weights[name] * sum(values.values()).sum() / len(rows)
            parts.gradients.add(name, parts.scaler.scale(loss))
            done.append((name, batch.ids, {key: value.detach().sum() for key, value in values.items()}))
    parts.gradients.combine()
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    parts.scaler.unscale_(optimizer)
    if parts.clip:
        clip_gradients([p for group in optimizer.param_groups for p in group["params"]], parts.clip)
    parts.scaler.step(optimizer)
    parts.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return done


def check_finite(folder, done, first_step):
    """Stop the run at the first loss that is not a number, saving the batch's ids.

    `done` holds the results of several steps; their values are fetched from the device here, together.
    Returns [(task, examples, {term: mean})].
    """
    rows = []
    for offset, results in enumerate(done):
        for name, ids, values in results:
            values = {key: float(value) / len(ids) for key, value in values.items()}
            if not all(map(np.isfinite, values.values())):
                record = {"step": first_step + offset, "task": name, "terms": {k: str(v) for k, v in values.items()}}
                path = folder.path / "nan-batch.json"
                path.write_text(json.dumps(record | {"ids": ids}, indent=1))
                raise InputError(
                    f"{path}: the loss of {name} is {values} at step {first_step + offset}: lower --lr, or look at "
                    "the examples whose ids are saved there"
                )
            rows.append((name, len(ids), values))
    return rows


def mean_terms(rows):
    """Mean of each task's terms over logged batches: {task: {term: mean}}."""
    means = {}
    for name in dict.fromkeys(name for name, _, _ in rows):
        mine = [(count, values) for task, count, values in rows if task == name]
        total = sum(count for count, _ in mine)
        means[name] = {key: sum(c * v[key] for c, v in mine) / total for key in mine[0][1]}
    return means


def peak_memory(device):
    """Peak memory of the process (or of the GPU) in MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def snapshot(parts, optimizer, progress):
    """Everything a resumed run needs, loadable with weights_only=True."""
    return {
        "model": parts.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "terms": {key: term.state_dict() for key, term in parts.terms.items() if hasattr(term, "state_dict")},
        "gradients": parts.gradients.state_dict() if hasattr(parts.gradients, "state_dict") else {},
        "scaler": parts.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(parts.device) if parts.device.type == "cuda" else None,
    }


def restore(parts, state):
    """Put the saved tensors back (the optimiser's follow once it is built)."""
    parts.model.load_state_dict(state["model"])
    for key, saved in state["terms"].items():
        parts.terms[key].load_state_dict(saved)
    if state["gradients"]:
        parts.gradients.load_state_dict(state["gradients"])
    parts.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], parts.device)


def evaluate_dev(parts):
    """Full-depth dev scores; decision thresholds that are fitted are fitted on training rows first."""
    how = dict(batch_size=parts.eval_batch_size, precision=parts.precision)
    for name, splits in parts.data.items():
        task = splits["train"].task
        if task.fit_threshold:
            parts.model.set_threshold(name, 0.5)
            seen = predict(parts.model, splits["train"], splits["train"].usable[:2000], **how)
            labels = splits["train"].labels[seen.rows]
            parts.model.set_threshold(name, fit_threshold(seen.probabilities[:, 1], labels))
    return evaluate(parts.model, parts.dev(), **how)[0]


def main_metrics(metrics, tasks):
    """{task: its main metric}."""
    return {name: values[tasks[name].metric] for name, values in metrics.items()}


def log_steps(parts, folder, phase, progress, optimizer, pending, seconds):
    """Write a log line for the pending steps. Returns what the progress bar says."""
    rows = check_finite(folder, pending, progress.total_steps - len(pending) + 1)
    terms, count = mean_terms(rows), sum(count for _, count, _ in rows)
    folder.log(
        kind="step",
        phase=phase.label,
        step=progress.total_steps,
        terms=terms,
        lr=optimizer.param_groups[0]["lr"],
        seconds=round(seconds, 3),
        examples_per_second=round(count / seconds, 1),
        peak_mib=peak_memory(parts.device),
    )
    losses = " ".join(f"{name} {sum(values.values()):.3f}" for name, values in terms.items())
    return f"{losses} {count / seconds:.0f} ex/s"


def train_phase(parts, folder, phase, progress, optimizer, signals):
    """Take the (remaining) steps of a phase.

    Raises: Interrupted after saving, on SIGINT or SIGTERM; InputError where a loss is not a number.
    """
    steps = phase_steps(parts, phase, progress.epochs)
    k, n = phase.stretch
    quiet = not sys.stderr.isatty()
    pending, started = [], time.monotonic()
    logged_at = saved_at = told_at = started
    parts.model.train()
    bar = tqdm(steps[progress.step :], phase.label, len(steps), initial=progress.step, disable=quiet)
    for step in bar:
        share = (k + (progress.step + 0.5) / len(steps)) / n
        exit_weights = phase.exit_weights[progress.step % len(phase.exit_weights)]
        pending.append(train_step(parts, optimizer, step, exit_weights, parts.schedule(share)))
        for term in parts.terms.values():
            if hasattr(term, "after_step"):
                term.after_step(parts.model, share)
        progress.step += 1
        progress.total_steps += 1
        now, stop = time.monotonic(), signals.received
        save = stop or now - saved_at > 60 * parts.save_every
        if save or len(pending) == parts.log_every or progress.step == len(steps):
            line = log_steps(parts, folder, phase, progress, optimizer, pending, now - logged_at)
            bar.set_postfix_str(line)
            if quiet and now - told_at > 60:
                print(f"{phase.label} step {progress.step}/{len(steps)} {line}", flush=True)
                told_at = now
            pending, logged_at = [], now
        if save:
            progress.train_seconds += now - started
            started = saved_at = time.monotonic()
            folder.save_last(snapshot(parts, optimizer, progress))
            if stop:
                raise Interrupted
    progress.train_seconds += time.monotonic() - started


def evaluate_phase(parts, folder, phase, progress, optimizer, signals):
    """Evaluate after a phase, keep the model where it is the best, and save what resuming needs."""
    started = time.monotonic()
    signals.immediate = True
    try:
        scores = evaluate_dev(parts)
    except Interrupted:
        folder.save_last(snapshot(parts, optimizer, progress))
        raise
    finally:
        signals.immediate = False
    progress.eval_seconds += time.monotonic() - started
    if phase.keep and scores.norm > progress.best:
        progress.best, progress.best_phase = scores.norm, phase.label
        folder.save_best(parts.model)
    progress.last_scores = {"tasks": scores.tasks, "raw": scores.raw, "norm": scores.norm}
    progress.scores.append(scores.norm)
    progress.epochs += phase.fraction
    progress.step = 0
    folder.log(
        kind="phase",
        phase=phase.label,
        dev=scores.tasks,
        raw=scores.raw,
        norm=scores.norm,
        train_seconds=round(progress.train_seconds, 2),
        eval_seconds=round(progress.eval_seconds, 2),
    )
    told = "  ".join(f"{name} {value:.3f}" for name, value in main_metrics(scores.tasks, parts.model.tasks).items())
    best = "  best so far" if progress.best_phase == phase.label else ""
    print(f"{phase.label}: dev {told}  raw {scores.raw:.4f}  norm {scores.norm:.4f}{best}", flush=True)
    for warning in scores.warnings:
        print(f"warning: {warning}", flush=True)
    folder.save_last(snapshot(parts, optimizer, progress))


def send(plan, score):
    """The plan's next phase, or None at its end."""
    try:
        return plan.send(score)
    except StopIteration:
        return None


def train(parts, folder, state=None):
    """The one training loop: phases from the plan, steps within each. Returns the Progress at the end.

    `state` is what a stopped run saved: the plan is sent the recorded scores and goes on where it was.
    """
    progress = Progress()
    if state:
        restore(parts, state)
        progress = Progress(**state["progress"])
    plan = parts.plan()
    phase = next(plan)
    for norm in progress.scores:
        phase = send(plan, norm)
    optimizer = None
    with SignalGuard() as signals:
        while phase is not None:
            parameters = set_trainable(parts.model, phase, parts.may_train)
            same = list(parameters) == progress.trained
            if optimizer is None or not same:
                optimizer = parts.make_optimizer(parameters)
                if state and same:
                    optimizer.load_state_dict(state["optimizer"])
            progress.trained, state = list(parameters), None
            train_phase(parts, folder, phase, progress, optimizer, signals)
            evaluate_phase(parts, folder, phase, progress, optimizer, signals)
            phase = send(plan, progress.scores[-1])
    return progress


# --- flags and parts ----------------------------------------------------------------------------------------------

OPTIMIZERS = {"adamw": AdamW, "rmsprop": RMSprop, "sgd": SGD}
# learning rates that train, by optimiser and by what is trained (README, "Defaults by measurement")
LEARNING_RATES = {
    "adamw": {"finetune": 5e-5, "pretrain": 1e-3},
    "rmsprop": {"finetune": 2e-5, "pretrain": 1e-3},
    "sgd": {"finetune": 1e-2, "pretrain": 1e-1},
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def positive_int(text):
    """An argparse type: a whole number above 0."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def at_least_zero(text):
    """An argparse type: a number that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive(text):
    """An argparse type: a number above 0."""
    value = at_least_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text):
    """An argparse type: a number from 0 to below 1."""
    value = at_least_zero(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def per_task(entries, flag, names, convert, everything=False):
    """Read `value` or `task=value ...` entries into {task: value}."""
    chosen = {}
    for entry in entries or ():
        name, equals, value = entry.rpartition("=")
        try:
            value = convert(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{flag} {entry}: {error}") from None
        for task in [name] if equals else names:
            if task not in names:
                raise InputError(f"{flag} {entry}: no such task here; tasks are {', '.join(names)}")
            chosen[task] = value
    return chosen


def encoding(text):
    """A pair encoding, for per_task."""
    if text not in ENCODINGS:
        raise ValueError(f"{text!r} is not one of {', '.join(ENCODINGS)}")
    return text


def make_parser():
    """All flags, in groups. Every extension is off by default."""
    parser = argparse.ArgumentParser(
        description="Fine-tune one hand-written BERT on sentiment (SST), paraphrase (Quora) and similarity (STS).",
        epilog="A run directory holds everything a run leaves behind; predict.py answers from it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    course = parser.add_argument_group("what to do")
    course.add_argument(
        "--option",
        choices=("pretrain", "finetune", "evaluate"),
        default="finetune",
        help="pretrain: BERT frozen, heads trained; finetune: everything; evaluate: score a saved run (--run_dir)",
    )
    course.add_argument("--use_gpu", action="store_true", help="train on CUDA or Apple's MPS where there is one")
    course.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=["sst", "para", "sts"], help="what to learn")
    course.add_argument("--epochs", type=positive_int, default=3, help="passes over each task's share of the data")
    course.add_argument("--batch_size", type=positive_int, default=16, help="examples per batch")
    course.add_argument("--lr", type=positive, help="peak learning rate; default by optimiser and --option")
    course.add_argument("--hidden_dropout_prob", type=share, default=0.3, help="dropout before the heads")
    course.add_argument("--seed", type=int, default=11711, help="seed of everything random")

    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample if that is bare")
    for name in TASK_NAMES:
        for split in SPLITS:
            data.add_argument(f"--{name}_{split}", metavar="CSV", help=f"the {name} {split} file, if not in --data_dir")
    data.add_argument("--split", choices=DATA_SPLITS, default="equal", help="how much of each task an epoch takes")
    data.add_argument("--sampler", choices=SAMPLERS, default="random", help="which task comes next")
    data.add_argument("--max_length", type=positive_int, default=512, help="tokens per text or packed pair")
    data.add_argument("--pairs", nargs="+", metavar="ENC", default=["concat"],
                      help=f"how a pair enters BERT: {', '.join(ENCODINGS)}; also per task, para=siamese")
    data.add_argument("--siamese_features", choices=("uv", "uvd"), default="uvd", help="[u; v] or [u; v; |u - v|]")

    model = parser.add_argument_group("model")
    model.add_argument("--weights", default="auto",
                       help="auto (bert-base-uncased if it is there, else the small default), a name, or a folder")
    model.add_argument("--pooling", choices=("cls", "mean"), default="cls", help="sentence vector: BERT's pooler or a mean")
    model.add_argument("--attention", choices=("plain", "sdpa"), default="plain", help="written out, or torch's kernel")
    model.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="autocast precision")
    model.add_argument("--para_loss", choices=tuple(PARA_LOSSES), default="bce", help="loss of the paraphrase task")
    model.add_argument("--sts_loss", choices=tuple(STS_LOSSES), default="mse", help="loss of the similarity task")
    model.add_argument("--cosine_margin", type=share, default=0.0, help="margin of the cosine embedding loss")

    plan = parser.add_argument_group("optimisation")
    plan.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="update rule")
    plan.add_argument("--weight_decay", type=at_least_zero, default=0.01, help="decoupled weight decay")
    plan.add_argument("--schedule", choices=tuple(SCHEDULES), default="linear", help="course of the learning rate")
    plan.add_argument("--warmup", type=share, default=0.1, help="share of the training that warms up")
    plan.add_argument("--clip", type=at_least_zero, default=1.0, help="largest global gradient norm; 0: no clipping")
    plan.add_argument("--accumulate", type=positive_int, default=1, help="batches per optimiser step")
    plan.add_argument("--task_weights", nargs="+", metavar="TASK=W", help="weights of the tasks' losses (1 each)")
    plan.add_argument("--step", choices=("one_task", "all_tasks"), default="one_task", help="tasks in one optimiser step")

    output = parser.add_argument_group("output")
    output.add_argument("--run_dir", help="where the run goes; default runs/ and a name made of the flags")
    output.add_argument("--resume", action="store_true", help="continue the run in --run_dir")
    output.add_argument("--overwrite", action="store_true", help="replace the run in --run_dir")
    output.add_argument("--keep_last", action="store_true", help="keep last.pt when the run is complete")
    output.add_argument("--log_every", type=positive_int, default=50, help="steps per line of log.jsonl")
    output.add_argument("--save_every", type=positive, default=10.0, help="minutes between saved states within a phase")
    output.add_argument("--eval_batch_size", type=positive_int, default=32, help="examples per batch of an evaluation")
    return parser


def parse_flags(argv=None):
    """Read the command line. Returns ({flag: value}, names of the flags that were given, {flag: default})."""
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    defaults = vars(parser.parse_args([]))
    bare = make_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return flags, set(vars(bare.parse_args(argv))), defaults


def choose_device(use_gpu):
    """The device to train on; a warning where a GPU is wanted and there is none."""
    if use_gpu:
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        print("warning: --use_gpu, but torch sees no GPU (CUDA or MPS): training on the CPU", file=sys.stderr)
    return torch.device("cpu")


def make_precision(name, device):
    """The autocast context of a precision.

    Raises: InputError where the device lacks it.
    """
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: a CPU has no fast half precision: use bf16 or fp32, or --use_gpu")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("--precision bf16: this GPU has no bf16: use fp16 or fp32")
    if name == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=PRECISIONS[name])


def read_data(args, tasks, tokenizer):
    """All datasets of a run: {task: {split: Dataset}}, and {file: path}."""
    given = {(name, split): args[f"{name}_{split}"] for name in tasks for split in SPLITS}
    folder = None
    if not all(given.values()):
        folder, is_sample = find_data_dir(args["data_dir"], tasks)
        if is_sample:
            print(f"data: no course data in data/, so the sample in {folder.parent.name}/sample (./setup.sh --data)")
    data, files = {name: {} for name in tasks}, {}
    for (name, split), path in given.items():
        path = Path(path) if path else folder / tasks[name].file(split)
        data[name][split] = read_dataset(tasks[name], path, tokenizer, args["max_length"], labelled=split != "test")
        files[path.name] = path
    return data, files


@torch.no_grad()
def cache_features(model, dataset, batch_size, precision):
    """Compute once what the heads of a frozen BERT see: fills dataset.features. Shapes: [n,w]."""
    model.eval()
    device, states = next(model.parameters()).device, []
    order = np.argsort(dataset.lengths(), kind="stable")
    for start in tqdm(range(0, len(order), batch_size), f"features {dataset.path.name}", disable=None, leave=False):
        batch = dataset.batch(order[start : start + batch_size]).to(device)
        with precision():
            states.append(model(batch).states[model.depth].float().cpu())
    features = torch.empty(len(order), states[0].shape[1])
    features[torch.from_numpy(order)] = torch.cat(states)
    dataset.features = features


def parameter_table(model, may_train):
    """Lines with the number of parameters and of trainable ones, by part of the model."""
    counts = {}
    for name, parameter in model.named_parameters():
        part = "embeddings" if "embed" in name else "layers" if ".bert_layers." in name else name.split(".")[0]
        part = "pooler" if name.startswith("bert.pooler") else part
        total, trained = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), trained + parameter.numel() * may_train(name))
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return [f"{part:<12}{total:>12,} parameters {trained:>12,} trained" for part, (total, trained) in counts.items()]


def task_table(flags):
    """The run's tasks."""
    pair_tasks = [name for name in flags["tasks"] if name in ("para", "sts")]
    return build_tasks(
        flags["tasks"],
        per_task(flags["pairs"], "--pairs", pair_tasks, encoding),
        flags["siamese_features"],
        flags["para_loss"],
        flags["sts_loss"],
        flags["cosine_margin"],
    )


def build_model(flags, tasks, bert):
    """The model of a run around a BERT, new heads drawn from the seed."""
    init = torch.Generator().manual_seed(flags["seed"])
    return MultitaskBERT(bert, tasks, flags["hidden_dropout_prob"], flags["pooling"], False, init)


def build(flags, model, data, device):
    """Fill the loop's slots: the only place that decides by flags."""
    precision = make_precision(flags["precision"], device)
    frozen = flags["option"] == "pretrain"

    def may_train(name):
        return not (frozen and name.startswith("bert."))

    if frozen:
        for splits in data.values():
            for dataset in splits.values():
                cache_features(model, dataset, flags["eval_batch_size"], precision)
    learning_rate = flags["lr"] or LEARNING_RATES[flags["optimizer"]][flags["option"]]

    def make_optimizer(parameters):
        groups = parameter_groups(parameters.items(), flags["weight_decay"])
        optimizer = OPTIMIZERS[flags["optimizer"]](groups, lr=learning_rate)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def schedule(progress):
        return SCHEDULES[flags["schedule"]](progress, flags["warmup"])

    return Parts(
        model=model,
        data=data,
        plan=lambda: slf.plain(flags["epochs"], ({model.depth: 1.0},)),
        terms={"loss": TaskLoss()},
        gradients=Sum(list(model.parameters())),
        make_optimizer=make_optimizer,
        may_train=may_train,
        schedule=schedule,
        device=device,
        precision=precision,
        scaler=torch.amp.GradScaler(device.type, enabled=flags["precision"] == "fp16"),
        task_weights=dict.fromkeys(data, 1.0) | per_task(flags["task_weights"], "--task_weights", list(data), positive),
        batch_size=flags["batch_size"],
        accumulate=flags["accumulate"],
        eval_batch_size=flags["eval_batch_size"],
        all_tasks=flags["step"] == "all_tasks",
        split=flags["split"],
        sampler=flags["sampler"],
        clip=flags["clip"],
        seed=flags["seed"],
        log_every=flags["log_every"],
        save_every=flags["save_every"],
        keep_last=flags["keep_last"],
    )


# --- a run from start to end --------------------------------------------------------------------------------------


def score_table(scores, tasks):
    """Lines of a table of dev scores."""
    lines = [f"{'task':<18}{'metric':<10}{'dev':>7}{'majority':>10}{'positive':>10}{'macro F1':>10}"]
    for name, task in tasks.items():
        metrics = scores["tasks"][name]
        cells = [metrics.get(key) for key in ("majority", "positive_rate", "macro_f1")]
        told = "".join(f"{'':>10}" if cell is None else f"{cell:>10.3f}" for cell in cells)
        lines.append(f"{task.title:<18}{task.metric:<10}{metrics[task.metric]:>7.3f}{told}")
    lines.append(f"raw {scores['raw']:.4f}   norm {scores['norm']:.4f}")
    return lines


def write_all_predictions(parts, folder, splits=("dev", "test")):
    """Predict every row of the given splits and write the prediction files."""
    for name, datasets in parts.data.items():
        for split in splits:
            how = dict(batch_size=parts.eval_batch_size, precision=parts.precision, progress=sys.stderr.isatty())
            write_predictions(folder, predict(parts.model, datasets[split], **how), split)


def finish(parts, folder, progress):
    """Write predictions and the summary of the best model; print the closing table."""
    folder.load_best(parts.model)
    started = time.monotonic()
    scores = evaluate_saved(parts)
    write_all_predictions(parts, folder.path / "predictions")
    summary = {
        "best": {"phase": progress.best_phase, **scores},
        "last": progress.last_scores,
        "phase_norms": progress.scores,
        "steps": progress.total_steps,
        "train_seconds": round(progress.train_seconds, 1),
        "eval_seconds": round(progress.eval_seconds, 1),
        "finish_seconds": round(time.monotonic() - started, 1),
        "mean_layers": float(np.mean([metrics["mean_layers"] for metrics in scores["tasks"].values()])),
        "positive_rate": scores["tasks"].get("para", {}).get("positive_rate"),
        "peak_mib": peak_memory(parts.device),
    }
    folder.summary(summary)
    print(f"\nbest model: {progress.best_phase} (last phase: norm {progress.last_scores['norm']:.4f})")
    print("\n".join(score_table(scores, parts.model.tasks)))
    print(f"minutes: training {progress.train_seconds / 60:.1f}, evaluation {progress.eval_seconds / 60:.1f}")
    print(f"predictions: {folder.path / 'predictions'}")
    if not parts.keep_last:
        folder.remove_last()


def evaluate_saved(parts):
    """Dev scores of the model as it is, as plain data."""
    how = dict(batch_size=parts.eval_batch_size, precision=parts.precision)
    scores, _ = evaluate(parts.model, parts.dev(), **how)
    for warning in scores.warnings:
        print(f"warning: {warning}")
    return {"tasks": scores.tasks, "raw": scores.raw, "norm": scores.norm}


def load_run(path, device, given=None):
    """A saved run's (model, tokenizer, flags, config); flags in `given` override what the run was trained with."""
    folder = RunFolder(path)
    config = folder.config()
    flags = config["flags"] | (given or {})
    tokenizer = BertTokenizer.from_pretrained(folder.path)
    bert = BertModel(BertConfig(**config["bert"]), attention=flags["attention"])
    model = build_model(flags, task_table(flags), bert)
    folder.load_best(model)
    return model.to(device).eval(), tokenizer, flags, config


def evaluate_run(flags, given):
    """--option evaluate: score a saved run on its dev data, write its predictions beside the training ones."""
    if not flags["run_dir"]:
        raise InputError("--option evaluate: which run? give --run_dir")
    overrides = {"use_gpu", "data_dir", "eval_batch_size", "precision", "attention"}
    overrides |= {f"{name}_{split}" for name in TASK_NAMES for split in SPLITS}
    for name in given - overrides - {"option", "run_dir", "log_every"}:
        raise InputError(f"--{name}: belongs to training; --option evaluate takes it from the run")
    device = choose_device(flags["use_gpu"])
    changed = {name: flags[name] for name in given & overrides}
    model, tokenizer, flags, _ = load_run(flags["run_dir"], device, changed)
    data, _ = read_data(flags, model.tasks, tokenizer)
    parts = build(flags | {"option": "finetune"}, model, data, device)
    folder = RunFolder(flags["run_dir"])
    scores = evaluate_saved(parts)
    print("\n".join(score_table(scores, model.tasks)))
    write_all_predictions(parts, folder.path / "evaluate")
    print(f"predictions: {folder.path / 'evaluate'}")


def start_run(flags, given, defaults):
    """Read everything a training run needs, make its directory, and train."""
    folder = RunFolder(flags["run_dir"] or name_run(flags, defaults))
    if flags["resume"]:
        config = folder.config()
        check_same_run(config, flags, given)
        flags = config["flags"] | {name: flags[name] for name in given & FREE_FLAGS}
    else:
        folder.refuse_existing(flags["overwrite"])
    torch.manual_seed(flags["seed"])
    device = choose_device(flags["use_gpu"])
    weights = Path(config["weights"]["folder"]) if flags["resume"] else find_weights(flags["weights"])
    print(f"weights: {weights}")
    tokenizer = BertTokenizer.from_pretrained(weights)
    tasks = task_table(flags)
    data, files = read_data(flags, tasks, tokenizer)
    hashes = {name: sha256(path) for name, path in files.items()}
    if flags["resume"]:
        check_same_data(config, hashes)
    print("\n".join(report(data)))
    bert = BertModel.from_pretrained(weights, attention=flags["attention"])
    model = build_model(flags, tasks, bert).to(device)
    parts = build(flags, model, data, device)
    print("\n".join(parameter_table(model, parts.may_train)))
    state = None
    if flags["resume"]:
        state = folder.load_last()
    else:
        folder.create(
            {
                "flags": flags,
                "command": command_line(),
                **describe_environment(device),
                "weights": {"folder": str(weights.resolve()), "sha256": hash_weights(weights)},
                "data": hashes,
                "bert": asdict(bert.config),
            },
            weights / "vocab.txt",
            flags["overwrite"],
        )
    print(f"run: {folder.path}", flush=True)
    try:
        progress = train(parts, folder, state)
        finish(parts, folder, progress)
    except (Interrupted, KeyboardInterrupt):
        print(f"\ninterrupted: the run is saved; continue with --resume --run_dir {folder.path}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        half = max(1, flags["batch_size"] // 2)
        raise InputError(
            f"--batch_size {flags['batch_size']}: the GPU is out of memory: try --batch_size {half} "
            f"--accumulate {2 * flags['accumulate']}, which computes the same"
        ) from None


def main(argv=None):
    """Train or evaluate as the flags say. Returns the exit status."""
    flags, given, defaults = parse_flags(argv)
    if flags["option"] == "evaluate":
        return evaluate_run(flags, given)
    return start_run(flags, given, defaults)


if __name__ == "__main__":
    run_script(main)
