#!/usr/bin/env python3
"""Fine-tune one BERT on sentiment, paraphrase and similarity at once: the model, the flags and the one training loop.

Read first: bert.py, tasks.py, datasets.py. Then read here in this order: `MultitaskBERT` (a BERT with one head per
task), `train` (the loop: it knows no task and no extension), `build` (which parts fill the loop's slots). Neither the
model nor the loop ever sees a flag; the functions that come after them turn flags into what they are given.

    python multitask_classifier.py --option finetune --use_gpu

An extension plugs into a slot: a loss term `term(model, batch, outputs, exit_weights) -> [b]`, a training plan
(slf.py), a way to combine gradients (gradients.py), an adapter (adapters.py), an inference policy (early_exit.py).
One that is off is not built, so that the baseline stays bit-identical.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

# ours, but it needs none of the packages: it says what to do where they are not installed
from errors import InputError, run_script, smaller, spare_memory, stop_without  # isort: skip

try:
    import numpy as np
    import torch
    from torch import nn
    from tqdm import tqdm
except ImportError as error:
    stop_without(error.name)

import gradients
import parallel
import slf
from adapters import build_adapters, parameter_report, trained_with
from base_bert import BertConfig, find_weights
from bert import BertModel, Dropout, dropout_state
from closing import ExitSettings, close, close_sweep
from datasets import SPLITS, Batch, bucketed_batches, find_data_dir, read_dataset, report
from early_exit import LTE, Exit, ExitInference, LTELoss, choose_policies, exit_weights
from evaluation import at_exit, evaluate, fit_threshold, full_depth, predict
from files import write_whole
from flags import (
    EXIT_FLAGS,
    check_flags,
    encoding,
    has_exits,
    parse_flags,
    per_task,
    positive,
    positive_int,
    sweep_levels,
    threshold,
)
from frozen import KeptStates
from optimizer import SCHEDULES, SGD, AdamW, RMSprop, clip_gradients, parameter_groups
from runs import (
    FREE_FLAGS,
    RunFolder,
    check_same_files,
    check_same_run,
    command_line,
    describe_environment,
    hash_weights,
    memory_mib,
    name_run,
    sha256,
)
from samplers import all_tasks_order, epoch_rows, generator, task_order
from smart import LNSR, AdversarialSmart, Bregman, GaussianSmart
from tasks import TASK_NAMES, build_tasks, widen
from tokenizer import BertTokenizer

OPTIMIZERS = {"adamw": AdamW, "rmsprop": RMSprop, "sgd": SGD}
# learning rates that train: by optimiser and by what is trained, for a BERT of at most SMALL hidden units and for a
# larger one. Measured with the small default weights (README, "Defaults by measurement"); the others are the papers'.
SMALL = 512
LEARNING_RATES = {
    "adamw": {"finetune": (1e-4, 2e-5), "pretrain": (1e-3, 1e-3), "adapter": (2e-3, 3e-4)},
    "rmsprop": {"finetune": (1e-4, 1e-5), "pretrain": (1e-3, 1e-3), "adapter": (2e-3, 3e-4)},
    "sgd": {"finetune": (0.3, 1e-2), "pretrain": (1e-1, 1e-1), "adapter": (1e-1, 1e-1)},
}
# room for the special tokens of any pair encoding and one word; the length of a text if the weights take as much
SHORTEST, LONGEST = 5, 512
# about how many training rows a decision threshold is fitted on
THRESHOLD_ROWS = 2000
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# what --compile uses, and how many variants of a layer it may translate
COMPILER, TRANSLATIONS = "inductor", 128
# glibc's names for the sizes from which it gives freed memory back, and the largest sizes that it takes (before 2.35)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST, LARGEST_BEFORE = -1, -3, 2**31 - 1, 2**25


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

    def __init__(self, bert, tasks, hidden_dropout_prob=0.3, pooling="cls", exits=False, adapters=None, init=None):
        super().__init__()
        self.bert, self.tasks, self.pooling = bert, tasks, pooling
        self.depth = bert.config.num_hidden_layers
        self.dropout = Dropout(hidden_dropout_prob)
        self.heads = self.make_heads(init)
        with_pooler = pooling == "cls"
        self.exits = nn.ModuleList(
            Exit(bert, lambda: self.make_heads(init), with_pooler) for _ in range(self.depth - 1) if exits
        )
        self.lte = nn.ModuleDict({name: LTE(self.width(task)) for name, task in tasks.items() if exits})
        self.adapters = adapters
        if adapters is not None:
            adapters.attach(bert)
        self.register_buffer("thresholds", torch.full((len(tasks),), 0.5))

    def width(self, task):
        """Size of the vector that a task's heads see."""
        d = self.bert.config.hidden_size
        # a letter of uvd is a vector: u, v and |u - v|
        return d * len(task.siamese_features) if task.encoding == "siamese" else d

    def make_heads(self, init):
        """A head per task, drawn from the generator `init`."""
        heads = nn.ModuleDict()
        for name, task in self.tasks.items():
            heads[name] = task.make_head(self.width(task))
            for parameter in heads[name].parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, 0.0, self.bert.config.initializer_range, generator=init)
                else:
                    nn.init.constant_(parameter, task.start)
        return heads

    def _apply(self, *how, **kw):
        """Move or convert the model, all but the thresholds: a GPU must not be waited for to compare with one."""
        thresholds = self.thresholds
        super()._apply(*how, **kw)
        self.thresholds = thresholds
        return self

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
        return heads[task.name](self.dropout(state) if task.head_dropout else state)

    def encode(self, hidden, masks, task, start=0, stop=None):
        """Run layers start + 1 .. stop over every encoder pass, yielding (i, hidden) after layer i.

        Shapes: hidden: one [b,s,d] per pass.
        """
        passes = [self.bert.encode(h, m, task.name, start, stop) for h, m in zip(hidden, masks, strict=True)]
        for steps in zip(*passes, strict=True):
            yield steps[0][0], tuple(h for _, h in steps)

    def forward(self, batch, embeds=None, start=None, exits=None):
        """Run the layers up to the last of `exits` (by default the full depth) and each exit's head.

        `embeds` replaces the embedding lookup; `start=(i, hidden)` enters after layer i with known hidden states, for
        which nothing is embedded.
        """
        exits, task = exits or (self.depth,), batch.task
        if batch.features is not None:
            states = {self.depth: batch.features}
            return Outputs((), states, {self.depth: self.head(self.depth, batch.features, task)}, None)
        embeds = embeds or (() if start else self.embed(batch))
        first, hidden = start or (0, embeds)
        rng, masks, states, logits = dropout_state(hidden[0].device)[0](), self.masks(batch), {}, {}
        for i, deeper in self.encode(hidden, masks, task, first, max(exits)):
            if i in exits:
                states[i] = self.state(i, deeper, masks, task)
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


def mean_pool(h, mask):
    """Mean of the hidden states of the real tokens. Shapes: [b,s,d], [b,s] -> [b,d]."""
    weights = mask.unsqueeze(-1).to(h.dtype)
    return (h * weights).sum(1) / weights.sum(1)


def pair_features(u, v, kind):
    """Features of two sentence vectors: [u; v] or [u; v; |u - v|]. Source: Sentence-BERT, section 3; BERTer 2."""
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
    """Everything the loop needs; made from the flags by `build`."""

    model: MultitaskBERT
    data: dict  # {task: {split: Dataset}}
    plan: Callable  # () -> generator of phases
    terms: dict  # {name: loss term}
    kept: KeptStates  # of frozen layers, in phases that ask for it
    gradients: object
    make_optimizer: Callable  # parameters by name -> optimizer
    may_train: Callable  # parameter name -> whether this run may train it
    schedule: Callable  # progress -> multiplier of the learning rate
    device: torch.device
    precision: Callable  # () -> autocast context
    scaler: torch.amp.GradScaler
    exit_settings: object  # how to leave early at inference, or None
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

    def how(self):
        """How to run an evaluation: arguments of `evaluation.predict`."""
        return {"batch_size": self.eval_batch_size, "precision": self.precision}


class Interrupted(BaseException):
    """SIGINT or SIGTERM, at a place where the state can be saved; nothing but its handler may catch it."""


class SignalGuard:
    """Turns SIGINT and SIGTERM into a request that the loop honours between two steps.

    While `immediate` is set (evaluation changes nothing) the signal interrupts at once; a second one always does.
    """

    def __init__(self, immediate=False):
        self.immediate = immediate

    def __enter__(self):
        self.received = None
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


def phase_rows(parts, phase, position):
    """The rows of each task that a phase may use, {task: rows}: a pure function of seed and position."""
    usable = {name: splits["train"].usable for name, splits in parts.data.items()}
    sizes = {name: len(rows) for name, rows in usable.items()}
    rows_from = position if phase.rows_from is None else phase.rows_from
    rows = epoch_rows(sizes, parts.split, rows_from, phase.fraction, parts.seed)
    return {name: usable[name][chosen] for name, chosen in rows.items()}


def phase_steps(parts, phase, position):
    """The steps of a phase: each a list of (task, rows, {exit layer: weight}); a pure function of seed and position.

    A task goes through the phase's cycle of exits by its own batches, so that it meets all of them in any task order.
    """
    batches = {}
    for name, chosen in phase_rows(parts, phase, position).items():
        rng = generator(parts.seed, "batches", name, position)
        lengths = parts.data[name]["train"].lengths()[chosen]
        size = parts.batch_size * parallel.world_size() * parts.accumulate
        batches[name] = [chosen[b] for b in bucketed_batches(lengths, size, rng)]
    counts = {name: len(batch) for name, batch in batches.items()}
    k, n = phase.stretch
    if parts.all_tasks:
        order = all_tasks_order(counts)
    else:
        rng = generator(parts.seed, "order", position)
        order = [[pair] for pair in task_order(parts.sampler, counts, k / max(1, n - 1), rng)]
    cycle = phase.exit_weights
    return [[(name, batches[name][b], cycle[b % len(cycle)]) for name, b in step] for step in order]


def set_trainable(model, phase, may_train):
    """Let only this phase's parameters have gradients. Returns {name: parameter}."""
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(may_train(name) and name.startswith(phase.trainable))
        if parameter.requires_grad:
            trainable[name] = parameter
    return trainable


def train_step(parts, optimizer, step, multiplier):
    """One optimiser step over the (task, rows, exit weights) of `step`.

    Each loss is divided by the number of examples its task has in the whole step, so that k accumulated batches
    equal one batch k times as large, and a short last batch counts by its examples. Of each batch a process takes its
    share; the gradients are summed when they are combined.
    Returns a list of (task, rows, {term: sum over this process's examples}), and the cosines between the tasks'
    gradients where they are measured, without waiting for the device (only gradient surgery waits for it once).
    """
    done, size = [], parts.batch_size * parallel.world_size()
    for name, rows, exits in step:
        data = parts.data[name]["train"]
        for start in range(0, len(rows), size):
            together = rows[start : start + size]
            positions, weight = parallel.share(len(together))
            batch = data.batch(together, positions).to(parts.device)
            with parts.precision():
                below = parts.kept.start(parts.model, batch, together[positions])
                outputs = parts.model(batch, start=below, exits=tuple(exits))
            values = {
                key: weight * term(parts.model, batch, outputs, exits) for key, term in parts.terms.items()
            }
            loss = parts.task_weights[name] * sum(values.values()).sum() / len(rows)
            parts.gradients.add(name, parts.scaler.scale(loss))
            done.append((name, together, {key: value.detach().sum() for key, value in values.items()}))
    parts.gradients.combine()
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    parts.scaler.unscale_(optimizer)
    if parts.clip:
        clip_gradients([p for group in optimizer.param_groups for p in group["params"]], parts.clip)
    parts.scaler.step(optimizer)
    parts.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return done, parts.gradients.cosines


def check_finite(parts, folder, done, first_step):
    """Stop the run at the first loss that is not a number, saving the batch's ids.

    `done` holds the results of several steps; their values are summed over the processes and fetched from the device
    here, together. Returns [(task, examples, {term: mean})].
    """
    sums = torch.stack([value for results, _ in done for *_, values in results for value in values.values()])
    sums, means = iter(parallel.add_up(sums).tolist()), []
    for offset, (results, _) in enumerate(done):
        for name, rows, values in results:
            values = {key: next(sums) / len(rows) for key in values}
            if not all(map(np.isfinite, values.values())):
                record = {"step": first_step + offset, "task": name, "terms": {k: str(v) for k, v in values.items()}}
                path = folder.path / "nan-batch.json"
                ids = [parts.data[name]["train"].identifier(row) for row in rows]
                write_whole(path, json.dumps(record | {"ids": ids}, indent=1))
                raise InputError(
                    f"{path}: the loss of {name} is {values} at step {first_step + offset}: lower --lr, or look at "
                    "the examples whose ids are saved there"
                )
            means.append((name, len(rows), values))
    return means


def mean_terms(rows):
    """Mean of each task's terms over logged batches: {task: {term: mean}}."""
    means = {}
    for name in dict.fromkeys(name for name, _, _ in rows):
        mine = [(count, values) for task, count, values in rows if task == name]
        total = sum(count for count, _ in mine)
        means[name] = {key: sum(c * v[key] for c, v in mine) / total for key in mine[0][1]}
    return means


def mean_cosines(pending):
    """Mean cosine between the gradients of every pair of tasks over the pending steps: {"sst-para": cosine}."""
    values = {}
    for _, cosines in pending:
        for pair, cosine in cosines.items():
            values.setdefault(pair, []).append(float(cosine))
    return {pair: sum(found) / len(found) for pair, found in values.items()}


def snapshot(parts, optimizer, progress):
    """Everything a resumed run needs, loadable with weights_only=True.

    The processes are alike, except for the generators that dropout draws from: all of those are here.
    """
    get_state, _ = dropout_state(parts.device)
    return {
        "model": parts.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "terms": {key: term.state_dict() for key, term in parts.terms.items() if hasattr(term, "state_dict")},
        "gradients": parts.gradients.state_dict() if hasattr(parts.gradients, "state_dict") else {},
        "scaler": parts.scaler.state_dict(),
        "rng": torch.stack(parallel.gather(get_state())),
    }


def restore(parts, state):
    """Put the saved tensors back (the optimiser's follow once it is built)."""
    parts.model.load_state_dict(state["model"])
    for key, saved in state["terms"].items():
        parts.terms[key].load_state_dict(saved)
    if state["gradients"]:
        parts.gradients.load_state_dict(state["gradients"])
    parts.scaler.load_state_dict(state["scaler"])
    _, set_state = dropout_state(parts.device)
    # a tensor of its own: torch crashes on a row of another one
    set_state(state["rng"][parallel.rank()].clone())


def evaluate_dev(parts, depth):
    """Dev scores and predictions at a depth; thresholds of decisions that are fitted, on training rows, come first.

    Differs: a threshold is fitted at one depth and serves the exits before it too, as one label for all of them.
    """
    how = parts.how() | {"infer": at_exit(depth)}
    for name, splits in parts.data.items():
        task = splits["train"].task
        if task.fit_threshold:
            parts.model.set_threshold(name, 0.5)
            usable = splits["train"].usable
            seen = predict(parts.model, splits["train"], usable[:: max(1, len(usable) // THRESHOLD_ROWS)], **how)
            labels = splits["train"].labels[seen.rows]
            parts.model.set_threshold(name, parallel.from_first(fit_threshold(seen.probabilities[:, 1], labels)))
    return evaluate(parts.model, parts.dev(), **how)


def main_metrics(metrics, tasks):
    """{task: its main metric}."""
    return {name: values[tasks[name].metric] for name, values in metrics.items()}


def log_steps(parts, folder, phase, progress, optimizer, pending, seconds):
    """Write a log line for the pending steps. Returns what the progress bar says."""
    rows = check_finite(parts, folder, pending, progress.total_steps - len(pending) + 1)
    terms, count = mean_terms(rows), sum(count for _, count, _ in rows)
    folder.log(
        kind="step",
        phase=phase.label,
        step=progress.total_steps,
        terms=terms,
        lr=optimizer.param_groups[0]["lr"],
        seconds=round(seconds, 3),
        examples_per_second=round(count / seconds, 1),
        peak_mib=round(memory_mib(parts.device)),
        **({"cosines": cosines} if (cosines := mean_cosines(pending)) else {}),
    )
    losses = " ".join(f"{name} {sum(values.values()):.3f}" for name, values in terms.items())
    return f"{losses} {count / seconds:.0f} ex/s"


def keep_states(parts, phase, position, signals):
    """Compute what enters the layer in training for a phase's examples; forget it where nothing is frozen.

    Raises: Interrupted at once on SIGINT or SIGTERM: last.pt already holds what came before.
    """
    if not phase.frozen_below:
        return parts.kept.forget()
    rows = phase_rows(parts, phase, position)
    examples = {name: (parts.data[name]["train"], chosen) for name, chosen in rows.items()}
    signals.immediate = True
    how = (parts.eval_batch_size, parts.precision, parallel.progress_bars())
    parts.kept.climb(parts.model, examples, phase.frozen_below, *how)
    signals.immediate = False


def train_phase(parts, folder, phase, progress, optimizer, signals):
    """Take the (remaining) steps of a phase.

    A signal that reaches one process stops all of them after the same step, and they save at the same steps.
    Raises: Interrupted after saving, on SIGINT or SIGTERM; InputError where a loss is not a number.
    """
    started = time.monotonic()
    steps = phase_steps(parts, phase, progress.epochs)
    keep_states(parts, phase, progress.epochs, signals)
    k, n = phase.stretch
    quiet = not parallel.progress_bars()
    pending, logged_at = [], time.monotonic()
    saved_at = told_at = logged_at
    parts.model.train()
    bar = tqdm(steps[progress.step :], phase.label, len(steps), initial=progress.step, disable=quiet)
    for step in bar:
        # the middle of the step, so that neither the first nor the last one has a learning rate of 0
        share = (k + (progress.step + 0.5) / len(steps)) / n
        pending.append(train_step(parts, optimizer, step, parts.schedule(share)))
        for term in parts.terms.values():
            if hasattr(term, "after_step"):
                term.after_step(parts.model, share)
        progress.step += 1
        progress.total_steps += 1
        now = time.monotonic()
        stop, due = parallel.any_process(signals.received is not None, now - saved_at > 60 * parts.save_every)
        save = stop or due
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
    """Evaluate after a phase, keep the model where it is the best, and save what resuming needs.

    Returns (scores, predictions) where the model is the best so far, else None.
    """
    started = time.monotonic()
    # taken beforehand, as long as all processes are at the same place
    before = snapshot(parts, optimizer, progress)
    signals.immediate = True
    try:
        # a model that may not be kept is only asked how far the exit that it trained has come
        depth = parts.model.depth if phase.keep else max(phase.exit_weights[-1])
        scores, predictions = evaluate_dev(parts, depth)
        scores = parallel.from_first(scores)
    except (Interrupted, InputError):
        folder.save_last(before)
        raise
    finally:
        signals.immediate = False
    progress.eval_seconds += time.monotonic() - started
    is_best = phase.keep and scores.norm > progress.best
    if is_best:
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
    best = "  best so far" if is_best else ""
    print(f"{phase.label}: dev {told}  raw {scores.raw:.4f}  norm {scores.norm:.4f}{best}", flush=True)
    for warning in scores.warnings if phase.keep else ():
        print(f"warning: {warning}", flush=True)
    folder.save_last(snapshot(parts, optimizer, progress))
    return (scores, predictions) if is_best else None


def send(plan, score):
    """The plan's next phase, or None at its end."""
    try:
        return plan.send(score)
    except StopIteration:
        return None


def train(parts, folder, state=None):
    """The one training loop: phases from the plan, steps within each.

    Returns the Progress at the end and, where the last model is the best one, its dev scores and predictions.
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
    optimizer = known = None
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
            known = evaluate_phase(parts, folder, phase, progress, optimizer, signals)
            phase = send(plan, progress.scores[-1])
        # one that came while the last state was saved
        if parallel.any_process(signals.received is not None)[0]:
            raise Interrupted
    return progress, known


# --- the parts of a run ----------------------------------------------------------------------------------------------


def choose_device(use_gpu):
    """The device to train on; a warning where a GPU is wanted and there is none."""
    if use_gpu:
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available() and not parallel.several():
            return torch.device("mps")
        print("warning: --use_gpu, but torch sees no GPU (CUDA or MPS): training on the CPU", file=sys.stderr)
    return torch.device("cpu")


def keep_freed_memory():
    """Let the C library keep large freed blocks for the next step, where it is glibc (Linux).

    By default it gives them back to the system, and the next step's come anew, to be zeroed page by page at their first
    touch: the gradient of the word embeddings alone, 47 MB, took 76 ms of a step of 600; kept, it takes 10 to 36.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, LARGEST)
        mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE)


def compile_layers(bert, device, backend):
    """Let torch.compile translate the layers, at the first step and for all batch sizes and lengths above 1.

    Raises: InputError where what it writes for a CPU cannot be compiled.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if backend == "inductor" and device.type == "cpu" and not shutil.which(compiler):
        raise InputError(f"--compile: needs a C++ compiler, and there is no {compiler}: install it, or set CXX")
    # a translation per task, adapter and frozen part; the layers share them
    torch._dynamo.config.recompile_limit = TRANSLATIONS
    for layer in bert.bert_layers:
        layer.compile(dynamic=True, backend=backend)


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
    """All datasets of a run: {task: {split: Dataset}}, and {"task split": path}."""
    given = {(name, split): args[f"{name}_{split}"] for name in tasks for split in SPLITS}
    wanted = {key: tasks[key[0]].file(key[1]) for key, path in given.items() if not path}
    folder = None
    if wanted:
        folder, is_sample = find_data_dir(args["data_dir"], wanted.values(), may_be_sample=len(wanted) == len(given))
        if is_sample:
            print(f"data: no course data in data/, so the sample in {folder.parent.name}/sample (./setup.sh --data)")
    data, files = {name: {} for name in tasks}, {}
    for (name, split), path in given.items():
        path = Path(path) if path else folder / wanted[name, split]
        data[name][split] = read_dataset(tasks[name], path, tokenizer, args["max_length"], labelled=split != "test")
        files[f"{name} {split}"] = path
    return data, files


def cut_training(data, counts, seed):
    """Train on some rows only: {task: at most this many, drawn by the seed}; prints what is left."""
    for name, count in counts.items():
        train = data[name]["train"]
        chosen = generator(seed, "train_rows", name).permutation(train.usable)[:count]
        print(f"--train_rows: {len(chosen):,} of {len(train.usable):,} {name} rows")
        train.usable = np.sort(chosen)


@torch.no_grad()
def cache_features(model, dataset, batch_size, precision):
    """Compute once what the heads of a frozen BERT see: fills dataset.features. Shapes: [n,w]."""
    model.eval()
    device, states = next(model.parameters()).device, []
    order = np.argsort(dataset.lengths(), kind="stable")
    starts, quiet = parallel.deal(range(0, len(order), batch_size)), not parallel.progress_bars()
    # one context for all batches: autocast then casts the weights once
    with spare_memory(smaller("--eval_batch_size", batch_size)), precision():
        for start in tqdm(starts, f"features {dataset.path.name}", disable=quiet, leave=False):
            batch = dataset.batch(order[start : start + batch_size]).to(device)
            states.append((widen(model(batch).states[model.depth]).cpu(),))
    states = torch.cat([state for (state,) in parallel.gather_batches(states)])
    features = torch.empty_like(states)
    features[torch.from_numpy(order)] = states
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
    """The model of a run around a BERT, new parts drawn from the seed."""
    init, adapters = torch.Generator().manual_seed(flags["seed"]), None
    if flags["adapter"] != ["none"]:
        adapters = build_adapters(bert.config, list(tasks), flags["adapter"], flags["adapter_size"], init)
    dropout, exits = flags["hidden_dropout_prob"], has_exits(flags)
    return MultitaskBERT(bert, tasks, dropout, flags["pooling"], exits, adapters, init)


def build_trainable(flags):
    """What the run may train at all, as (row of LEARNING_RATES, function of a parameter's name)."""
    if flags["option"] == "pretrain":
        return "pretrain", lambda name: not name.startswith("bert.")
    if flags["adapter"] != ["none"] and not flags["train_backbone"]:
        return "adapter", lambda name: trained_with(name, flags["adapter"])
    return "finetune", lambda name: True


def build_terms(flags, model):
    """The loss terms: the task's own, and those of the extensions that are on."""

    def noise(purpose):
        # a generator of its own, so that an extension leaves everybody else's random numbers alone
        return torch.Generator().manual_seed(int(generator(flags["seed"], purpose).integers(2**62)))

    terms = {"loss": TaskLoss()}
    if flags["early_exit"]:
        terms["lte"] = LTELoss()
    mixed = flags["precision"] != "fp32"
    if flags["smart"] is not None and flags["smart_weight"] != 0:
        chosen = flags["smart"] or flags["tasks"]
        if flags["smart_form"] == "gaussian":
            given = {"weight": flags["smart_weight"], "sigma": flags["smart_noise"]}
            form = GaussianSmart
        else:
            given = {key: flags[f"smart_{key}"] for key in ("weight", "radius", "step", "noise")}
            form = AdversarialSmart
        given = {key: value for key, value in given.items() if value is not None}
        terms["smart"] = form(chosen, noise("smart"), mixed_precision=mixed, **given)
    if flags["bregman"]:
        terms["bregman"] = Bregman(model, flags["bregman"], flags["bregman_tasks"])
    if flags["lnsr"]:
        terms["lnsr"] = LNSR(noise("lnsr"), flags["lnsr"], flags["lnsr_noise"])
    return terms


def build_plan(flags, depth):
    """The training plan, as a function that makes a fresh one."""
    epochs, size = flags["epochs"], flags["epoch_size"]

    def plan():
        if flags["smart_alternating"]:
            joint = exit_weights(flags["exit_loss"], depth)[-1]
            second = slf.smart_alternating(epochs, depth, joint, size)
        elif flags["exit_loss"] == "two_stage":
            second = slf.two_stage(epochs, depth, exit_weights("joint", depth)[-1], size)
        else:
            cycle = exit_weights(flags["exit_loss"], depth) if has_exits(flags) else ({depth: 1.0},)
            second = slf.plain(epochs, cycle, size)
        if not flags["slf"]:
            return second
        return slf.sequential_layer_focus(depth, flags["slf_epochs"], second, flags["slf_cache"])

    return plan


def build_exit_settings(flags, tasks):
    """How the run leaves early at inference, or None."""
    if not flags["early_exit"]:
        return None
    policies = choose_policies(tasks, flags["exit_policy"])
    thresholds = per_task(flags["exit_threshold"], "--exit_threshold", list(tasks), threshold)
    if flags["lte_threshold"] is not None:
        thresholds |= {name: flags["lte_threshold"] for name, policy in policies.items() if policy == "lte"}
    return ExitSettings(policies, dict.fromkeys(tasks) | thresholds, flags["exit_quality"])


def build(flags, model, data, device):
    """Fill the loop's slots as the flags say."""
    keep_freed_memory()
    if flags["compile"]:
        compile_layers(model.bert, device, COMPILER)
    precision = make_precision(flags["precision"], device)
    trained_set, may_train = build_trainable(flags)
    if trained_set == "pretrain" and not has_exits(flags) and flags["smart"] is None:
        for splits in data.values():
            for dataset in splits.values():
                cache_features(model, dataset, flags["eval_batch_size"], precision)
    for_small, for_large = LEARNING_RATES[flags["optimizer"]][trained_set]
    learning_rate = flags["lr"] or (for_small if model.bert.config.hidden_size <= SMALL else for_large)

    momentum = {"momentum": flags["momentum"], "nesterov": flags["nesterov"]} if flags["optimizer"] == "sgd" else {}

    def make_optimizer(parameters):
        groups = parameter_groups(parameters.items(), flags["weight_decay"])
        optimizer = OPTIMIZERS[flags["optimizer"]](groups, lr=learning_rate, **momentum)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    combine = {"sum": gradients.Sum, "pcgrad": gradients.PCGrad, "gradvac": gradients.GradVac}[flags["gradients"]]
    order = torch.Generator().manual_seed(flags["seed"])
    return Parts(
        model=model,
        data=data,
        plan=build_plan(flags, model.depth),
        terms=build_terms(flags, model),
        kept=KeptStates(),
        gradients=combine(list(model.parameters()), order),
        make_optimizer=make_optimizer,
        may_train=may_train,
        schedule=lambda progress: SCHEDULES[flags["schedule"]](progress, flags["warmup"]),
        device=device,
        precision=precision,
        scaler=torch.amp.GradScaler(device.type, enabled=flags["precision"] == "fp16"),
        exit_settings=build_exit_settings(flags, model.tasks),
        task_weights=dict.fromkeys(data, 1.0) | per_task(flags["task_weights"], "--task_weights", list(data), positive),
        batch_size=flags["batch_size"],
        accumulate=flags["accumulate"],
        eval_batch_size=flags["eval_batch_size"],
        all_tasks=flags["step"] == "all_tasks" or flags["gradients"] != "sum",
        split=flags["split"],
        sampler=flags["sampler"],
        clip=flags["clip"],
        seed=flags["seed"],
        log_every=flags["log_every"],
        save_every=flags["save_every"],
        keep_last=flags["keep_last"],
    )


# --- a run from start to end --------------------------------------------------------------------------------------


def finish(parts, folder, progress, known):
    """Score the best model unless `known`, write its predictions, pictures and the summary."""
    folder.load_best(parts.model)
    print(f"\nbest model: {progress.best_phase} (last phase: norm {progress.last_scores['norm']:.4f})")
    started = time.monotonic()
    scores, exits = close(
        parts.model, parts.data, folder.path, parts.how(), parts.exit_settings, parallel.progress_bars(), known
    )
    counted = exits["dev"] if exits else scores
    summary = {
        "best": {"phase": progress.best_phase, **scores},
        "last": progress.last_scores,
        "phase_norms": progress.scores,
        "steps": progress.total_steps,
        "train_seconds": round(progress.train_seconds, 1),
        "eval_seconds": round(progress.eval_seconds, 1),
        "finish_seconds": round(time.monotonic() - started, 1),
        "mean_layers": float(np.mean([metrics["mean_layers"] for metrics in counted["tasks"].values()])),
        "positive_rate": scores["tasks"].get("para", {}).get("positive_rate"),
        "peak_mib": round(memory_mib(parts.device)),
        "exits": exits,
    }
    folder.summary(summary)
    print(f"minutes: training {progress.train_seconds / 60:.1f}, evaluation {progress.eval_seconds / 60:.1f}")
    if not parts.keep_last:
        folder.remove_last()


@dataclass
class SavedRun:
    """A finished run, ready to answer: `infer` leaves early where the run was trained to."""

    model: MultitaskBERT
    tokenizer: BertTokenizer
    flags: dict
    infer: Callable


def recorded_flags(config):
    """A run's flags; one that is younger than the run has its default, with which nothing changes."""
    return parse_flags([])[0] | config["flags"]


def load_run(path, device, given=None):
    """Load a saved run; flags in `given` override what the run was trained with."""
    folder = RunFolder(path)
    config = folder.config()
    flags = recorded_flags(config) | (given or {})
    tokenizer = BertTokenizer.from_pretrained(folder.path)
    try:
        sizes = BertConfig(**config["bert"])
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{folder.path / 'config.json'}: bert: {error}: the run directory is damaged") from None
    bert = BertModel(sizes, attention=flags["attention"])
    model = build_model(flags, task_table(flags), bert)
    folder.load_best(model)
    exits = folder.read_summary().get("exits")
    batch_size = flags["eval_batch_size"]
    infer = ExitInference(exits["policies"], exits["thresholds"], batch_size) if exits else full_depth
    return SavedRun(model.to(device).eval(), tokenizer, flags, infer)


def evaluate_run(flags, given):
    """--option evaluate: score a saved run on its dev data, write its predictions beside the training ones."""
    if not flags["run_dir"]:
        raise InputError("--option evaluate: which run? give --run_dir")
    overrides = {"use_gpu", "data_dir", "eval_batch_size", "precision", "attention", *EXIT_FLAGS}
    overrides |= {f"{name}_{split}" for name in TASK_NAMES for split in SPLITS}
    for name in given - overrides - {"option", "run_dir", "early_exit"}:
        raise InputError(f"--{name}: belongs to training; --option evaluate takes it from the run")
    device = choose_device(flags["use_gpu"])
    levels = sweep_levels(flags["exit_threshold"])
    changed = {name: flags[name] for name in given & overrides}
    if levels:
        changed["exit_threshold"] = ["auto"]
    run = load_run(flags["run_dir"], device, changed)
    if given & {"early_exit", *EXIT_FLAGS} and not run.flags["early_exit"]:
        raise InputError(f"{flags['run_dir']}: was trained without --early_exit: it cannot leave early")
    data, files = read_data(run.flags, run.model.tasks, run.tokenizer)
    before = RunFolder(flags["run_dir"]).config()["data"]
    for name, path in files.items():
        if sha256(path) not in (before.get(name), before.get(path.name)):
            print(f"note: {path} is not a file of the training run: do not compare its scores with that run's")
    # a few hundred batches are sooner done than the layers translated
    parts = build(run.flags | {"option": "finetune", "compile": False}, run.model, data, device)
    folder = Path(flags["run_dir"]) / "evaluate"
    if levels:
        close_sweep(run.model, parts.dev(), folder, parts.exit_settings, levels, parts.how())
    else:
        close(run.model, data, folder, parts.how(), parts.exit_settings, parallel.progress_bars())


def check_fits(flags, tasks, config, weights):
    """Fail where the weights do not go with the tasks' encodings or with --max_length.

    Raises: InputError.
    """
    packed = [task.name for task in tasks.values() if task.encoding != "siamese" and len(task.columns) > 1]
    if packed and config.type_vocab_size < 2:
        raise InputError(
            f"--pairs: {weights} has one kind of segment (type_vocab_size 1), {packed[0]} packs two: "
            f"use --pairs {' '.join(f'{name}=siamese' for name in packed)}"
        )
    if not SHORTEST <= flags["max_length"] <= config.max_position_embeddings:
        raise InputError(
            f"--max_length {flags['max_length']}: give a length from {SHORTEST} to "
            f"{config.max_position_embeddings}, the positions of {weights}"
        )


def run_folder(flags, defaults):
    """The run directory that the flags name."""
    return RunFolder(flags["run_dir"] or name_run(flags, defaults))


def start_run(flags, given, defaults):
    """Read everything a training run needs, make its directory, and train."""
    folder = run_folder(flags, defaults)
    if flags["resume"]:
        config = folder.config()
        check_same_run(config, flags, given)
        flags = recorded_flags(config) | {name: flags[name] for name in given & FREE_FLAGS}
    else:
        folder.refuse_existing(flags["overwrite"])
    # dropout differs between processes, all other random numbers come from generators that are alike
    torch.manual_seed(flags["seed"] + parallel.rank())
    device = choose_device(flags["use_gpu"])
    recorded = flags["resume"] and "weights" not in given
    weights = Path(config["weights"]["folder"]) if recorded else find_weights(flags["weights"])
    print(f"weights: {weights}")
    tokenizer = BertTokenizer.from_pretrained(weights)
    tasks, sizes = task_table(flags), BertConfig.from_json(weights / "config.json")
    flags["max_length"] = flags["max_length"] or min(LONGEST, sizes.max_position_embeddings)
    check_fits(flags, tasks, sizes, weights)
    data, files = read_data(flags, tasks, tokenizer)
    hashes = {name: sha256(path) for name, path in files.items()}
    parallel.check_same("flags", {name: flags[name] for name in flags.keys() - {"data_dir", "weights"}})
    parallel.check_same("data files", hashes)
    if flags["resume"]:
        check_same_files(config["data"], hashes, files)
        now = hash_weights(weights)
        before = config["weights"]["sha256"]
        check_same_files(before, now, {name: weights / name for name in before | now})
    print("\n".join(report(data)))
    cut_training(data, per_task(flags["train_rows"], "--train_rows", list(data), positive_int), flags["seed"])
    bert = BertModel.from_pretrained(weights, attention=flags["attention"])
    model = build_model(flags, tasks, bert).to(device)
    parallel.copy_from_first(model)
    parts = build(flags, model, data, device)
    print("\n".join(parameter_table(model, parts.may_train)))
    if model.adapters is not None:
        print("\n".join(parameter_report(model.adapters)))
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
    advice = "free some, then go on with --resume"
    if flags["batch_size"] > 1:
        half = f"--batch_size {flags['batch_size'] // 2} --accumulate {2 * flags['accumulate']}"
        advice += f", or start again with --overwrite {half}, which computes the same"
    if flags["slf_cache"]:
        advice += " (and without --slf_cache)"
    try:
        with spare_memory(advice):
            progress, known = train(parts, folder, state)
            with SignalGuard(immediate=True):
                finish(parts, folder, progress, known)
    except (Interrupted, KeyboardInterrupt):
        if parallel.rank() == 0:
            told = "is complete" if folder.complete() else f"is saved; continue with --resume --run_dir {folder.path}"
            print(f"\ninterrupted: the run {told}", file=sys.stderr)
        return 130


def main(argv=None):
    """Train or evaluate as the flags say. Returns the exit status."""
    flags, given, defaults = parse_flags(argv)
    check_flags(flags, given)
    use_gpu = flags["use_gpu"]
    if flags["resume"]:
        use_gpu = recorded_flags(run_folder(flags, defaults).config())["use_gpu"]
    with parallel.processes(use_gpu):
        if flags["option"] == "evaluate":
            return evaluate_run(flags, given)
        return start_run(flags, given, defaults)


if __name__ == "__main__":
    run_script(main)
