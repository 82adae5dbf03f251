"""What benchmark.py times: the same examples, training steps and epochs, by our code and by transformers.

Read first: timing.py, multitask_classifier.py, peer.py.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import multitask_classifier
from base_bert import BertConfig
from bert import BertModel
from datasets import Batch, read_dataset
from errors import InputError
from flags import parse_flags
from optimizer import clip_gradients
from peer import (
    CLIP,
    MAX_LENGTH,
    WARMUP,
    WEIGHT_DECAY,
    PeerData,
    PeerModel,
    import_transformers,
    mixed_steps,
    peer_loss,
    peer_optimizer,
    peer_predict,
    peer_scores,
    peer_train,
)
from plots import plot_curves
from runs import RunFolder
from samplers import epoch_rows, generator
from slf import Phase
from tasks import build_tasks
from timing import Stopwatch, synchronize, timed
from tokenizer import BertTokenizer
from weights import WEIGHTS_FOLDER, find_weights

HERE = Path(__file__).parent
SEED = 11711
LEARNING_RATE, HEAD_DROPOUT, TRAIN_BATCH, EVAL_BATCH = 5e-5, 0.3, 16, 32
MINILM = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
# speed does not depend on what the weights are: for machines without downloaded ones
RANDOM_WEIGHTS = {"random-minilm": MINILM, "random-bert-base": {}}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SDPA = {"attn_implementation": "sdpa"}


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    Units: rounds are turns of every variant; repeats are calls within a turn; steps are rows x tokens of a batch,
    lengths its tokens; the others count examples, texts or pairs. `compiler` is torch's name for what compiles,
    `whole` says that an epoch of the real data is trained too.
    """

    rounds: int = 5
    epoch_rounds: int = 3
    repeats: int = 3
    sentences: int = 8000
    train: int = 640
    dev: int = 320
    evaluated: int = 960
    remembered: int = 320
    growth: tuple = (160, 320, 640)
    pairs: int = 400_000
    steps: tuple = ((16, 32), (16, 64), (32, 64))
    lengths: tuple = (16, 32, 64, 96, 128)
    optimized: tuple = (("MiniLM", MINILM), ("bert-base", {}))
    matrices: tuple = (1024, 2048)
    compiler: str = "inductor"
    whole: bool = True


GPU_SIZES = dict(repeats=10, train=9600, dev=2400, evaluated=9600, matrices=(4096, 8192)) | dict(
    steps=((16, 32), (16, 64), (128, 128)), growth=(2400, 4800, 9600)
)
QUICK_SIZES = dict(rounds=1, epoch_rounds=1, repeats=1, sentences=500, train=24, dev=24, evaluated=48) | dict(
    remembered=24, pairs=5000, growth=(24, 48), steps=((8, 16),), lengths=(8, 16), optimized=(("MiniLM", MINILM),)
)
QUICK_SIZES |= dict(matrices=(512,), compiler="aot_eager", whole=False)


@dataclass
class Setup:
    """What every part works with: weights and data folders, device, precisions, sizes, a trained run, the report."""

    weights: Path
    data_dir: Path
    device: torch.device
    precisions: tuple
    sizes: Sizes
    report: Path
    run_dir: str | None = None
    peaks: dict = field(default_factory=dict)

    def precision(self, name):
        """The autocast context of a precision."""
        return multitask_classifier.make_precision(name, self.device)()

    def draw(self, part, panels, title):
        """Draw curves beside the report. Returns the line that shows them there."""
        path = self.report.with_name(f"{self.report.name}-{part}.png")
        plot_curves(path, panels, title)
        return f"![{title}]({path.name})"


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


def read_split(setup, folder, split):
    """{task: Dataset} of a folder, read by our code."""
    tokenizer, tasks = BertTokenizer.from_pretrained(setup.weights), build_tasks()
    return {name: read_dataset(task, folder / task.file(split), tokenizer, MAX_LENGTH) for name, task in tasks.items()}


def read_train_and_dev(setup, folder):
    """{task: {split: Dataset}}, as the training loop takes it."""
    train, dev = read_split(setup, folder, "train"), read_split(setup, folder, "dev")
    return {name: {"train": train[name], "dev": dev[name]} for name in train}


def read_peer(setup, folder, split, tokenize_once):
    """{task: PeerData} of a folder, read by the peer."""
    tokenizer = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    return {
        name: PeerData(folder / task.file(split), task, tokenizer, tokenize_once)
        for name, task in build_tasks().items()
    }


def draw_rows(data, split, count):
    """About `count` seeded rows of {task: Dataset}, the tasks in proportion; train as the equal split's first epoch.

    Returns ({task: rows}, how many there are to draw from).
    """
    sizes = {name: len(dataset.usable) for name, dataset in data.items()}
    if split == "train":
        rows = epoch_rows(sizes, "equal", 0, 1.0, SEED)
    else:
        rows = {name: generator(SEED, "dev", name).permutation(size) for name, size in sizes.items()}
    whole = sum(map(len, rows.values()))
    share = min(1.0, count / whole)
    # a correlation needs at least two examples that differ
    drawn = {name: data[name].usable[chosen[: max(8, round(share * len(chosen)))]] for name, chosen in rows.items()}
    return drawn, whole


def write_course_file(path, dataset, rows):
    """Write rows of a dataset as the course's CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["", "id", *dataset.task.columns, dataset.task.label_column])
        for i, row in enumerate(rows):
            writer.writerow([i, dataset.identifier(row), *dataset.text(row), f"{dataset.labels[row]:g}"])


def write_subset(setup, folder, **counts):
    """Write about so many rows of each split (train=..., dev=...).

    Returns {split: lengths of the examples [n]} and {split: how many a whole epoch has}.
    """
    lengths, whole = {}, {}
    for split, count in counts.items():
        data = read_split(setup, setup.data_dir, split)
        rows, whole[split] = draw_rows(data, split, count)
        for name, dataset in data.items():
            write_course_file(folder / dataset.task.file(split), dataset, rows[name])
        lengths[split] = np.concatenate([data[name].lengths()[chosen] for name, chosen in rows.items()])
    return lengths, whole


def real_batch(setup, b, s, tasks=("sst",)):
    """Batches of real text, one per task, padded to s tokens as length buckets pad: the shortest row has 3/4 of that.

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
        batch = Batch(table[name], table[name].encoding, segments, labels, tuple(map(str, range(b))))
        batches.append(batch.to(setup.device))
    return batches, lengths


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


# --- ours and theirs ----------------------------------------------------------------------------------------------


def flag_words(precision, more=""):
    """The flags of our runs, as the command line gives them; later ones win."""
    given = f"--option finetune --epochs 1 --split full --precision {precision} --batch_size {TRAIN_BATCH}"
    given += f" --eval_batch_size {EVAL_BATCH} --lr {LEARNING_RATE} --clip {CLIP} --weight_decay {WEIGHT_DECAY}"
    given += f" --warmup {WARMUP} --hidden_dropout_prob {HEAD_DROPOUT} --seed {SEED} {more}"
    return given.split()


def our_model(setup, flags):
    """Our multitask model on the device."""
    bert = BertModel.from_pretrained(setup.weights, attention=flags["attention"])
    return multitask_classifier.build_model(flags, multitask_classifier.task_table(flags), bert).to(setup.device)


def our_parts(setup, precision, more=""):
    """What our training loop works with, without data."""
    flags = parse_flags(flag_words(precision, more))[0]
    return multitask_classifier.build(flags, our_model(setup, flags), {}, setup.device)


def our_step(parts, batches, repeats, phase=None, start=lambda batch: None):
    """A variant that takes our training step on the same batches, phase by phase, as the loop's train_step does it.

    `start(batch)` says where a batch enters the model, as (layer, hidden), or None.
    """
    model, terms = parts.model, parts.terms.values()
    phase = phase or Phase("full", 1.0, ({model.depth: 1.0},))
    weights = phase.exit_weights[0]

    def prepare():
        multitask_classifier.set_trainable(model.train(), phase, parts.may_train)

    def forward(_):
        losses = {}
        for batch in batches:
            with parts.precision():
                outputs = model(batch, start=start(batch), exits=tuple(weights))
            losses[batch.task.name] = sum(term(model, batch, outputs, weights) for term in terms).mean()
        return losses

    def backward(losses):
        for name, loss in losses.items():
            parts.gradients.add(name, loss)
        parts.gradients.combine()

    def update(_):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameters = multitask_classifier.set_trainable(model, phase, parts.may_train)
    optimizer = parts.make_optimizer(parameters)
    clip = partial(clip_gradients, list(parameters.values()), CLIP)
    phases = {"forward": forward, "backward": backward, "clip": lambda _: clip(), "optimizer": update}
    return timed(parts.device, phases, repeats, prepare)


def our_epoch(setup, folder, precision, more=""):
    """Read, train, evaluate, save: ours. Returns ({phase: seconds}, dev norm)."""
    torch.manual_seed(SEED)
    flags = parse_flags(flag_words(precision, more))[0]
    model = our_model(setup, flags)
    with tempfile.TemporaryDirectory() as run, redirect_stdout(None):
        watch = Stopwatch(setup.device)
        parts = multitask_classifier.build(flags, model, read_train_and_dev(setup, folder), setup.device)
        watch.mark("read")
        started = time.perf_counter()
        progress, _ = multitask_classifier.train(parts, RunFolder(run))
        synchronize(setup.device)
        whole = time.perf_counter() - started
    phases = {**watch.phases(), "train": progress.train_seconds, "evaluate": progress.eval_seconds}
    phases["save"] = max(0.0, whole - progress.train_seconds - progress.eval_seconds)
    return phases, progress.last_scores["norm"]


def peer_model(setup, tasks, best=True):
    """The peer's model on the device."""
    return PeerModel(setup.weights, tasks, HEAD_DROPOUT, **(SDPA if best else {})).to(setup.device)


def peer_step(setup, model, batch, precision, best):
    """A variant that takes transformers' training step on one batch, phase by phase."""
    optimizer, name = peer_optimizer(model, LEARNING_RATE, **({"fused": True} if best else {})), batch.task.name
    ids, mask, types = batch.segments[0]

    def forward(_):
        with setup.precision(precision):
            logits = model(name, input_ids=ids, attention_mask=mask, token_type_ids=types)
        return peer_loss(name, logits, batch.labels)

    def update(_):
        optimizer.step()
        optimizer.zero_grad()

    def clip(_):
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    phases = {"forward": forward, "backward": torch.Tensor.backward, "clip": clip, "optimizer": update}
    return timed(setup.device, phases, setup.sizes.repeats, model.train)


def peer_evaluate(model, data, autocast, device, best):
    """The dev norm of {task: PeerData}, transformers."""
    values = {name: peer_predict(model, part, EVAL_BATCH, autocast, device, best) for name, part in data.items()}
    return peer_scores(data, values)[-1]


def peer_epoch(setup, folder, precision, best):
    """Read, train, evaluate, save: transformers, plain or with its best settings. As our_epoch."""
    torch.manual_seed(SEED)
    model, autocast = peer_model(setup, build_tasks(), best), partial(setup.precision, precision)
    with tempfile.TemporaryDirectory() as run:
        watch = Stopwatch(setup.device)
        train, dev = (read_peer(setup, folder, split, best) for split in ("train", "dev"))
        watch.mark("read")
        rows = {name: range(len(part.labels)) for name, part in train.items()}
        steps = mixed_steps(train, rows, TRAIN_BATCH, best, random.Random(SEED))
        optimizer = peer_optimizer(model, LEARNING_RATE, **({"fused": True} if best else {}))
        warmup = round(WARMUP * len(steps))
        schedule = import_transformers().get_linear_schedule_with_warmup(optimizer, warmup, len(steps))
        peer_train(model, train, steps, optimizer, schedule, autocast, setup.device)
        watch.mark("train")
        norm = peer_evaluate(model, dev, autocast, setup.device, best)
        watch.mark("evaluate")
        torch.save(model.state_dict(), Path(run) / "best.pt")
        watch.mark("save")
    return watch.phases(), norm


EPOCHS = {
    "ours": our_epoch,
    "ours --attention sdpa": partial(our_epoch, more="--attention sdpa"),
    "transformers plain": partial(peer_epoch, best=False),
    "transformers best": partial(peer_epoch, best=True),
}


@torch.inference_mode()
def check_same_work(ours, peer, batch):
    """Give the peer our heads and make sure that both compute the same logits."""
    peer.heads.load_state_dict(ours.heads.state_dict())
    ids, mask, types = batch.segments[0]
    expected = peer.eval()(batch.task.name, input_ids=ids, attention_mask=mask, token_type_ids=types)
    difference = (ours.eval()(batch).logits[ours.depth] - expected).abs().max().item()
    if not difference < 1e-2:
        raise RuntimeError(f"the logits of ours and of transformers differ by {difference}: not the same work")


def step_variants(setup, precision, batch):
    """The training step on the very same padded batch."""
    variants, repeats = {}, setup.sizes.repeats
    for attention, best in (("plain", False), ("sdpa", True)):
        parts = our_parts(setup, precision, f"--tasks sst --attention {attention}")
        peer = peer_model(setup, parts.model.tasks, best)
        check_same_work(parts.model, peer, batch)
        variants["ours --attention sdpa" if best else "ours"] = our_step(parts, [batch], repeats)
        name = "transformers best" if best else "transformers plain"
        variants[name] = peer_step(setup, peer, batch, precision, best)
    if setup.device.type == "cuda":
        compiled = torch.compile(peer_model(setup, parts.model.tasks))
        variants["transformers best, compiled"] = peer_step(setup, compiled, batch, precision, best=True)
    return variants


def launch(*arguments, **environment):
    """Run Python in this folder, in a process of its own. Returns the seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])[:200]} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - started
