"""The variants that the benchmark compares: our step and epoch (ours.py) beside the same ones with transformers."""

import random
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lab.ours import our_epoch, our_parts, our_step
from lab.peer import (
    CLIP,
    EVAL_BATCH,
    PeerModel,
    linear_schedule,
    mixed_steps,
    peer_loss,
    peer_optimizer,
    peer_predict,
    peer_scores,
    peer_train,
)
from lab.timing import Stopwatch, timed
from lab.workloads import HEAD_DROPOUT, LEARNING_RATE, SEED, TRAIN_BATCH, read_peer
from tasks import build_tasks


def peer_model(setup, tasks, best=True):
    """The peer's model on the device."""
    attention = {"attn_implementation": "sdpa"} if best else {}
    return PeerModel(setup.weights, tasks, HEAD_DROPOUT, **attention).to(setup.device)


def make_peer_optimizer(model, best):
    """torch's AdamW, fused with the best settings."""
    return peer_optimizer(model, LEARNING_RATE, **({"fused": True} if best else {}))


def peer_step(setup, model, batch, precision, best):
    """Make a variant that takes transformers' training step on one batch, in the same four phases as ours."""
    optimizer, name = make_peer_optimizer(model, best), batch.task.name
    ids, mask, types = batch.segments[0]

    def forward(_):
        with setup.precision(precision):
            logits = model(name, input_ids=ids, attention_mask=mask, token_type_ids=types)
        return peer_loss(batch.task, logits, batch.labels)

    def update(_):
        optimizer.step()
        optimizer.zero_grad()

    def clip(_):
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    phases = {"forward": forward, "backward": torch.Tensor.backward, "clip": clip, "optimizer": update}
    return timed(setup.device, phases, setup.sizes.repeats, model.train)


def peer_evaluate(model, data, autocast, best):
    """Compute the peer's dev norm on {task: PeerData}."""
    values = {name: peer_predict(model, part, EVAL_BATCH, autocast, best) for name, part in data.items()}
    return peer_scores(data, values)["norm"]


def peer_epoch(setup, folder, precision, best):
    """Read, train, evaluate and save with transformers. Returns ({phase: seconds}, dev norm), as our_epoch does."""
    torch.manual_seed(SEED)
    model, autocast = peer_model(setup, build_tasks(), best), partial(setup.precision, precision)
    with tempfile.TemporaryDirectory() as run:
        watch = Stopwatch(setup.device)
        train, dev = (read_peer(setup, folder, split, best) for split in ("train", "dev"))
        watch.mark("read")
        rows = {name: range(len(part.labels)) for name, part in train.items()}
        steps = mixed_steps(train, rows, TRAIN_BATCH, best, random.Random(SEED))
        optimizer = make_peer_optimizer(model, best)
        peer_train(model, train, steps, optimizer, linear_schedule(optimizer, len(steps)), autocast)
        watch.mark("train")
        norm = peer_evaluate(model, dev, autocast, best)
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
    """Copy our heads into the peer and fail if the two models do not compute the same logits."""
    peer.heads.load_state_dict(ours.heads.state_dict())
    ids, mask, types = batch.segments[0]
    expected = peer.eval()(batch.task.name, input_ids=ids, attention_mask=mask, token_type_ids=types)
    difference = (ours.eval()(batch).logits[ours.depth] - expected).abs().max().item()
    if not difference < 1e-2:
        raise RuntimeError(f"the logits of ours and of transformers differ by {difference}: not the same work")


def step_variants(setup, precision, batch):
    """Make the variants of a training step on the very same padded batch: {name: variant}."""
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
