"""Checks of part classifier: the model's forward pass, the loss, and the training step."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch

from gradients import Sum
from multitask_classifier import Outputs, TaskLoss, train_step
from optimizer import SGD
from tasks import build_tasks


def by_exit(name, tensors):
    """Return {"name i": tensor} for {i: tensor}, and the exits in their order."""
    return {f"{name} {i}": tensor for i, tensor in tensors.items()} | {f"{name} of exits": sorted(tensors)}


def logits(draw):
    """Run a single sentence and pairs of each encoding through the model."""
    results = {}
    for encoding in ("concat", "embed_concat", "siamese")[: 1 + draw.size]:
        model = draw.model(build_tasks(pairs={"para": encoding, "sts": encoding}))
        for name, task in model.tasks.items():
            results[f"logits of {name}, {encoding}"] = model(draw.batch(task)).logits[model.depth]
    return results


def exits(draw):
    """Ask for several exits, pass embeddings, and pass cached features."""
    model = draw.model(layers=2 + draw.size, with_exits=True)
    task = model.tasks[draw.choice(("sst", "para", "sts"))]
    batch, depth = draw.batch(task), model.depth
    first = model(batch, exits=(1,))
    both = model(batch, exits=(1, depth))
    embeds = tuple(2 * h for h in first.embeds)
    changed = model(batch, embeds=embeds, exits=(depth,))
    # a model that would fail above layer 1
    layer, model.bert.bert_layers[1] = model.bert.bert_layers[1], None
    alone = model(batch, exits=(1,)).logits
    model.bert.bert_layers[1] = layer
    features = draw.normal(len(batch), model.width(task))
    cached = model(replace(batch, segments=(), features=features))
    draw.show(task=task.name, input_ids=batch.segments[0][0], mask=batch.segments[0][1])
    return {
        "embeds": first.embeds[0],
        **by_exit("state", both.states),
        **by_exit("logits", both.logits),
        **by_exit("logits for embeds * 2, exit", changed.logits),
        **by_exit("logits without upper layers, exit", alone),
        **by_exit("logits for features, exit", cached.logits),
        "state of the dropout generator": str(both.rng.dtype),
    }


def loss(draw):
    """Sum the losses of some exits."""
    results = {}
    for name, task in build_tasks().items():
        batch, weights = draw.batch(task), {1: 1.0, 3: 0.5} if draw.size == 0 else {2: draw.uniform(0.2, 2), 5: 0.3}
        scores = {i: draw.normal(len(batch), 5 if name == "sst" else 1) for i in (1, 2, 3, 5)}
        draw.show(**{f"logits of {name}": str(scores), f"labels of {name}": batch.labels, "weights": str(weights)})
        results[f"loss of {name}"] = TaskLoss()(None, batch, Outputs((), {}, scores, None), weights)
    return results


class Rows:
    """A stand-in for a Dataset: batches are rows of one large batch."""

    def __init__(self, batch):
        self.batch_of_all = batch

    def batch(self, rows, positions=slice(None)):
        """Return some rows as a batch, as Dataset.batch does."""
        rows, whole = rows[positions], self.batch_of_all
        segments = tuple(tuple(x[rows] for x in segment) for segment in whole.segments)
        ids = tuple(whole.ids[row] for row in rows)
        return replace(whole, segments=segments, labels=whole.labels[rows], ids=ids)


class NoScaler:
    """A stand-in for the loss scaler of fp16, which is off."""

    def scale(self, loss):
        """Return the loss."""
        return loss

    def unscale_(self, optimizer):
        """Do nothing."""

    def step(self, optimizer):
        """Take the optimiser's step."""
        optimizer.step()

    def update(self):
        """Do nothing."""


def draw_parts(draw, clip):
    """Return the parts of a run that a step needs, and an optimiser."""
    model = draw.model(layers=2, with_exits=True)
    rows = {name: Rows(draw.batch(task, b=6)) for name, task in model.tasks.items()}
    parts = SimpleNamespace(
        model=model,
        data={name: {"train": data} for name, data in rows.items()},
        gradients=Sum(list(model.parameters())),
        precision=SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, scaler=NoScaler()),
        settings=SimpleNamespace(task_weights={"sst": 1.0, "para": 0.5, "sts": 2.0}, clip=clip),
    )
    optimizer = SGD(model.parameters(), lr=0.1)
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.1
    return parts, optimizer


def half_term(model, batch, outputs, exit_weights):
    """Return a second loss term."""
    return 0.5 * outputs.logits[max(exit_weights)].square().sum(-1)


def take_step(draw, batches, clip=0.0, multiplier=1.0, name="sst"):
    """Take a step on these batches of a task, lists of rows. Returns the change of some parameters, and the step's."""
    parts, optimizer = draw_parts(draw, clip)
    chosen = [
        parts.model.bert.pooler_dense.weight,
        parts.model.heads[name].bias,
        parts.model.bert.embed_layer_norm.bias,
    ]
    before = [parameter.detach().clone() for parameter in chosen]
    step = [(name, [torch.tensor(rows) for rows in batches], {1: 0.5, 2: 1.0})]
    rows_before = [len(rows) for rows in batches]
    results, _ = train_step(parts, optimizer, {"loss": TaskLoss(), "half": half_term}, step, multiplier)
    changes = torch.cat([(new.detach() - old).flatten() for new, old in zip(chosen, before, strict=True)])
    draw.show(task=name, rows_of_each_batch=str(rows_before), clip=clip, multiplier=multiplier)
    return changes, parts, results


def normalisation(draw):
    """Take steps with one batch, with accumulated batches, and with a short last batch."""
    names = ("sst", "para", "sts")
    results = {}
    for batches in ([[0, 1]], [[0, 1], [2, 3], [4]])[: 1 + draw.size]:
        name = names[draw.size]
        results[f"change of the parameters with {len(batches)} batches"], *_ = take_step(draw, batches, name=name)
    return results


def step(draw):
    """Take a step with clipping and a smaller learning rate; look at what it returns and leaves behind."""
    clip = draw.choice((0.05, 0.1))
    name = draw.choice(("sst", "para", "sts"))
    changes, parts, results = take_step(draw, [[0, 1], [2]][: 1 + draw.size], clip, draw.uniform(0.2, 0.8), name)
    plain, *_ = take_step(draw, [[0, 1, 2]], 0.0, 0.5, name)
    sums = [float(value) for _, _, values in results for value in values.values()]
    return {
        "change with clipping": changes,
        "change without clipping": plain,
        "tasks and terms": " ".join(f"{task}:{'+'.join(values)}:{len(rows)}" for task, rows, values in results),
        "sums of the terms": sums,
        "gradients after the step": sum(p.grad is not None and bool(p.grad.any()) for p in parts.model.parameters()),
    }
