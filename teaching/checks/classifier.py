"""Checks of part classifier: the model's forward pass, the loss, and the training step."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import parallel
from base_bert import dropout_state
from gradients import PCGrad
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
    # with dropout, and layers that draw random numbers
    get, put = dropout_state(torch.device("cpu"))
    for module in model.train().modules():
        if hasattr(module, "p"):
            module.p = 0.5
    torch.manual_seed(draw.number(0, 2**31))
    state = get()
    model.embed(batch)
    before_layers = get()
    put(state)
    dropped = model(batch)
    torch.manual_seed(1)
    dropped_features = model(replace(batch, segments=(), features=features))
    backwards = model.eval()(batch, exits=(depth, 1))
    return {
        **by_exit("logits with dropout, exit", dropped.logits),
        **by_exit("logits of features with dropout, exit", dropped_features.logits),
        **by_exit("state for features, exit", cached.states),
        **by_exit("logits for exits (L, 1), exit", backwards.logits),
        "given embeds are returned": torch.stack([x.sum() for x in changed.embeds]),
        "embeds keep their graph": str(all(x.requires_grad for x in first.embeds)),
        "embeds": first.embeds[0],
        **by_exit("state", both.states),
        **by_exit("logits", both.logits),
        **by_exit("logits for embeds * 2, exit", changed.logits),
        **by_exit("logits without upper layers, exit", alone),
        **by_exit("logits for features, exit", cached.logits),
        "rng is the state before the first layer": torch.equal(dropped.rng, before_layers),
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


class Scaler:
    """A stand-in for the loss scaler of fp16: twice the loss, and half the gradients before the step."""

    def __init__(self):
        self.calls = []

    def scale(self, loss):
        """Return twice the loss."""
        return 2 * loss

    def unscale_(self, optimizer):
        """Halve the gradients."""
        self.calls.append("unscale_")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= 2

    def step(self, optimizer):
        """Take the optimiser's step."""
        self.calls.append("step")
        optimizer.step()

    def update(self):
        """Note the call."""
        self.calls.append("update")


class LateSum(PCGrad):
    """A stand-in for gradient surgery: the parameters have no gradient before `combine`, and then the plain sum."""

    def coefficients(self, tasks, gram):
        """Change no gradient."""
        return np.eye(len(tasks))

    def combine(self):
        """Add the gradients, and report a cosine."""
        super().combine()
        self.cosines = {"sst-para": torch.tensor(0.25)}


def draw_parts(draw, clip):
    """Return the parts of a run that a step needs, and an optimiser."""
    model = draw.model(layers=2, with_exits=True)
    rows = {name: Rows(draw.batch(task, b=6)) for name, task in model.tasks.items()}
    parts = SimpleNamespace(
        model=model,
        data={name: {"train": data} for name, data in rows.items()},
        gradients=LateSum(list(model.parameters()), None),
        precision=SimpleNamespace(device=torch.device("cpu"), autocast=autocast, scaler=Scaler()),
        settings=SimpleNamespace(task_weights={"sst": 1.0, "para": 0.5, "sts": 2.0}, clip=clip),
    )
    everything = list(model.parameters())
    groups = [{"params": everything[k::2], "initial_lr": rate} for k, rate in enumerate((0.1, 0.03))]
    optimizer = SGD(groups, lr=0.7)  # the rate of an earlier step
    return parts, optimizer


def autocast():
    """Return a context that leaves float64 as it is, but can be asked for."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def half_term(model, batch, outputs, exit_weights):
    """Return a second loss term, another one under autocast."""
    return (9.0 if torch.is_autocast_enabled("cpu") else 0.5) * outputs.logits[max(exit_weights)].square().sum(-1)


def take_step(draw, batches, clip=0.0, multiplier=1.0, name="sst", more=()):
    """Take a step on these batches of a task, lists of rows. Returns the change of some parameters, and the step's."""
    parts, optimizer = draw_parts(draw, clip)
    chosen = [
        parts.model.bert.pooler_dense.weight,
        parts.model.heads[name].bias,
        parts.model.bert.embed_layer_norm.bias,
    ]
    before = [parameter.detach().clone() for parameter in chosen]
    step = [(name, [torch.tensor(rows) for rows in batches], {1: 0.5, 2: 1.0})]
    step += [(other, [torch.tensor(rows) for rows in groups], weights) for other, groups, weights in more]
    passes = []
    parts.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_autocast_enabled("cpu")))
    rows_before = [len(rows) for rows in batches]
    terms = {"loss": TaskLoss(), "half": half_term}
    # as if this process had half of the weight in the sums
    with mock.patch.object(parallel, "share", lambda count: (slice(0, count, 2), 0.5)):
        results, parts.returned = train_step(parts, optimizer, terms, step, multiplier)
    changes = torch.cat([(new.detach() - old).flatten() for new, old in zip(chosen, before, strict=True)])
    parts.passes = str(all(passes))
    share = "every second row, weight 0.5"
    draw.show(task=name, rows_of_each_batch=str(rows_before), clip=clip, multiplier=multiplier, share=share)
    return changes, parts, results


def normalisation(draw):
    """Take steps with one batch, with accumulated batches, and with a short last batch."""
    names = ("sst", "para", "sts")
    results = {}
    for batches in ([[0, 1]], [[0, 1], [2, 3], [4]])[: 1 + draw.size]:
        name = names[draw.size]
        results[f"change of the parameters with {len(batches)} batches"], *_ = take_step(draw, batches, name=name)
    more = [("para", [[3, 4, 5]], {2: 0.7})]
    results["change of the parameters with two tasks"], *_ = take_step(draw, [[0, 1, 2], [3, 4]], name="sts", more=more)
    return results


def step(draw):
    """Take a step with clipping and a smaller learning rate; look at what it returns and leaves behind."""
    clip = draw.choice((0.05, 0.1))
    name = draw.choice(("sst", "para", "sts"))
    changes, parts, results = take_step(draw, [[0, 1], [2]][: 1 + draw.size], clip, draw.uniform(0.2, 0.8), name)
    plain, *_ = take_step(draw, [[0, 1, 2]], 0.0, 0.5, name)
    sums = [value for _, _, values in results for value in values.values()]
    return {
        "change with clipping": changes,
        "calls of the scaler": " ".join(parts.precision.scaler.calls),
        "the model's pass runs under autocast": parts.passes,
        "cosines": float(parts.returned["sst-para"]),
        "change without clipping": plain,
        "tasks and terms": " ".join(f"{task}:{'+'.join(values)}:{len(rows)}" for task, rows, values in results),
        "sums of the terms": [float(value) for value in sums],
        "sums that hold their graph": sum(getattr(value, "requires_grad", False) for value in sums),
        "parameters with a gradient after the step": sum(p.grad is not None for p in parts.model.parameters()),
    }
