"""Checks of part smart: the ascent, two penalties, the teacher's average."""

from dataclasses import replace

import torch

from smart import AdversarialSmart, Bregman, GaussianSmart
from tasks import build_tasks

from .common import call

TASKS = ("sst", "para", "sts")


def draw_case(draw):
    """Return a model, a batch, the outputs of the loop's pass and exit weights. Size 2 has dropout."""
    model = draw.model(build_tasks(pairs={"sts": "siamese"}), layers=2, with_exits=True)
    task = model.tasks[TASKS[draw.size]]
    if draw.size == 2:
        model.train()
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.2
    batch = draw.batch(task, b=1 + draw.size)
    torch.manual_seed(draw.number(0, 2**31))
    weights = {model.depth: 1.0} if draw.size == 0 else {1: 0.5, model.depth: 1.0}
    draw.show(task=task.name, input_ids=batch.segments[0][0], mask=batch.segments[0][1], exit_weights=str(weights))
    return model, batch, model(batch, exits=tuple(weights)), weights


def ascent(draw):
    """Perturb a batch."""
    model, batch, outputs, weights = draw_case(draw)
    term = AdversarialSmart(TASKS, draw.generator(), radius=draw.choice((0.03, 0.1)))
    start, end = term.perturb(model, batch, outputs, weights)
    touched = sum(parameter.grad is not None for parameter in model.parameters())
    starts = {"parameters with a gradient": touched} | {f"start of pass {k}": delta for k, delta in enumerate(start, 1)}
    return starts | {f"end of pass {k}": delta for k, delta in enumerate(end, 1)}


def penalised(term, model, batch, outputs, weights):
    """Return a penalty, and its gradient to a few parameters."""
    value = term.penalty(model, batch, outputs, weights)
    chosen = [model.bert.pooler_dense.weight, model.bert.embed_layer_norm.bias]
    gradients = torch.autograd.grad(value.sum(), chosen, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, gradients, strict=True)]
    return {"penalty": value, "gradient of the pooler": gradients[0], "gradient of the embeddings": gradients[1]}


def mixed(term, model, batch, outputs, weights):
    """Return the penalty where the loop's logits were rounded, as under autocast."""
    term.mixed_precision = True
    rounded = replace(outputs, logits={i: x.bfloat16() for i, x in outputs.logits.items()})
    return {"penalty with rounded logits": term.penalty(model, batch, rounded, weights)}


def penalty(draw):
    """Compute the adversarial penalty."""
    model, batch, outputs, weights = draw_case(draw)
    term = AdversarialSmart(TASKS, draw.generator(), weight=draw.choice((0.5, 3.0)), radius=0.3)
    results = penalised(term, model, batch, outputs, weights)
    vanishing = AdversarialSmart(TASKS, draw.generator(), radius=1e-30)
    refused = call(vanishing.penalty, model, batch, outputs, weights) == "InputError"
    results |= mixed(term, model, batch, outputs, weights)
    return results | {"a perturbation that changes nothing is refused (self.check)": refused}


def gaussian(draw):
    """Compute the Gaussian penalty."""
    model, batch, outputs, weights = draw_case(draw)
    term = GaussianSmart(TASKS, draw.generator(), weight=draw.choice((0.5, 3.0)), sigma=draw.choice((0.3, 0.6)))
    return penalised(term, model, batch, outputs, weights) | mixed(term, model, batch, outputs, weights)


def teacher(draw):
    """Move the model, and let the teacher follow, early and late in the training."""
    model = draw.model(layers=1)
    term = Bregman(model, 1.0, TASKS)
    parameter, results = model.bert.pooler_dense.bias, {}
    other = model.bert.pos_embedding.weight.requires_grad_(False)  # frozen in this phase
    head = model.heads["sst"].bias
    for progress in (0.0, 0.09, 0.1, 0.5, 1.0)[: 2 + 2 * draw.size]:
        with torch.no_grad():
            parameter += 100 * draw.normal(*parameter.shape)
            other += 100
            head += 100
        term.after_step(model, progress)
        results[f"teacher's pooler bias at progress {progress}"] = term.teacher["bert.pooler_dense.bias"].clone()
        results[f"teacher's positions at progress {progress}"] = term.teacher["bert.pos_embedding.weight"][0].clone()
        results[f"teacher's head at progress {progress}"] = term.teacher["heads.sst.bias"].clone()
        results[f"model's pooler bias at progress {progress}"] = parameter.detach().clone()
    draw.show(steps="the model moves by about 100 before each step")
    return results
