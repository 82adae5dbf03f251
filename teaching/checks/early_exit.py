"""Checks of part early_exit: the target and loss of learning to exit, and the rule for leaving."""

from dataclasses import replace

import numpy as np
import torch

from early_exit import ExitInference, LTELoss, certainty_target, first_exit
from tasks import build_tasks


def target(draw):
    """Compute targets for a classification, a pair task and a regression."""
    results = {}
    tasks = build_tasks()
    tasks["other"] = replace(tasks["sts"], name="other", labels=(1.0, 4.0))
    for name, task in tasks.items():
        b = 3 + 3 * draw.size
        logits = draw.normal(b, 5 if name == "sst" else 1).requires_grad_()
        low, high = task.label_range
        labels = draw.uniform(low, high, b) if task.is_regression else draw.numbers(low, high, b).double()
        if not task.is_regression:
            labels[0] = task.objective.decode(logits.detach())[0][0]  # one right prediction at least
        threshold = 0.5 if draw.size == 0 else draw.uniform(0.2, 0.8)
        draw.show(**{f"logits for {name}": logits.detach(), f"labels for {name}": labels})
        draw.show(**{f"decision_threshold for {name}": threshold})
        value = certainty_target(task, logits, labels, threshold)
        results |= {f"target of {name}": value, f"target of {name} has a gradient": value.requires_grad}
    return results


def draw_model(draw):
    """Return a model with exits, in evaluation mode."""
    return draw.model(layers=2 + draw.size, with_exits=True)


def loss(draw):
    """Compute the loss of some exits, and its gradient to the states, the logits and the learning to exit."""
    model, results = draw_model(draw), {}
    model.set_decision_threshold("para", draw.uniform(0.2, 0.8))
    weights = [{1: 1.0, model.depth: 0.5}, {model.depth: 0.7}, {1: 0.4, model.depth: 0.9}][draw.size]
    for task in model.tasks.values():
        batch = draw.batch(task, b=3 + 3 * draw.size)
        outputs = model(batch, exits=tuple(range(1, model.depth + 1)))
        value = LTELoss()(model, batch, outputs, weights)
        inputs = [
            outputs.states[1],
            outputs.states[model.depth],
            model.lte[task.name].linear.weight,
            model.heads[task.name].weight,
        ]
        gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
        results[f"loss of {task.name}"] = value
        for where, gradient in zip(("state 1", "state L", "c", "the head"), gradients, strict=True):
            key = f"gradient of {where}, {task.name}"
            results[key] = "none" if gradient is None or not gradient.any() else gradient
    return results


def first(draw):
    """Find the first sure exit, for one threshold and for a threshold for each row."""
    n, depth = 2 + 4 * draw.size, 3 + draw.size
    certainty = draw.uniform(0, 1, n, depth).round(decimals=1).numpy()
    threshold = float(certainty[0, 1])  # equal to a certainty: sure enough
    rows = draw.uniform(0, 1, n).round(decimals=1).numpy()
    draw.show(certainty=torch.from_numpy(certainty), threshold=threshold, thresholds=rows)
    return {
        "first_exit(certainty, threshold)": np.asarray(first_exit(certainty, threshold)),
        "certainty afterwards": certainty,
        "first_exit(certainty, thresholds)": np.asarray(first_exit(certainty.copy(), rows)),
        "first_exit(certainty, 1.01)": np.asarray(first_exit(certainty.copy(), 1.01)),
        "first_exit(certainty, 0)": np.asarray(first_exit(certainty.copy(), 0.0)),
    }


def inference(draw):
    """Run one exit at a threshold that a row just reaches, the last exit, and whole batches."""
    pooling, tasks = ("cls", "cls", "mean")[draw.size], build_tasks(pairs={"sts": "siamese"} if draw.size else {})
    model, results = draw.model(tasks, layers=2 + draw.size, with_exits=True, pooling=pooling).requires_grad_(False), {}
    policies = {"sst": ("confidence", "lte")[draw.size % 2], "para": ("lte", "confidence")[draw.size % 2], "sts": "lte"}
    for task in model.tasks.values():
        batch = draw.batch(task, b=3 + 2 * draw.size)
        masks, every = model.masks(batch), ExitInference(policies, dict.fromkeys(model.tasks, 1.01))
        states = dict(model.encode(model.embed(batch), masks, task))
        state = model.state(1, states[1], masks, task)
        certainty = every.certainty(model, state, model.head(1, state, task), task)
        threshold = float(certainty.sort().values[len(certainty) // 2])
        draw.show(**{f"certainty for {task.name}": certainty, f"threshold for {task.name}": threshold})
        some = ExitInference(policies, dict.fromkeys(model.tasks, 0.0) | {task.name: threshold})
        logits, leaves = some.run_exit(model, 1, states[1], masks, task)
        last, all_leave = some.run_exit(model, model.depth, states[model.depth], masks, task)
        # in smaller batches a certainty may differ by a rounding error: a threshold in the middle between two
        low, high = certainty.sort().values[len(certainty) // 2 - 1 :][:2]
        between = float((low + high) / 2)
        draw.show(**{f"threshold in batches of two for {task.name}": between})
        outputs, layers = ExitInference(policies, dict.fromkeys(model.tasks, between))(model, batch, 2)
        results |= {f"logits of exit 1, {task.name}": logits, f"leaves at exit 1, {task.name}": leaves}
        results |= {f"logits of exit L, {task.name}": last, f"leaves at exit L, {task.name}": all_leave}
        results |= {f"outputs of {task.name}": outputs, f"layers of {task.name}": layers}
    return results
