"""Checks of part optimizer: update rules, schedules, clipping."""

import torch

from optimizer import SGD, AdamW, RMSprop, clip_gradients, cosine, linear

from .common import call


def run(optimizer, parameters, gradients):
    """Take a step for each list of gradients; return all values of the parameters."""
    values = []
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        values += [parameter.detach().flatten().clone() for parameter in parameters]
    return torch.cat(values)


def draw_run(draw, steps, case):
    """Return parameters, and gradients for some steps."""
    shapes = [(2,)] if draw.size == 0 else [(2, 2), (2,)]
    parameters = [torch.nn.Parameter(draw.normal(*shape)) for shape in shapes]
    gradients = [[draw.normal(*shape) for shape in shapes] for _ in range(steps)]
    show_run(draw, parameters, gradients, case)
    return parameters, gradients


def as_text(tensors):
    """Return the numbers of some tensors, of which one may be None."""
    return str([None if x is None else x.detach().numpy().round(5).tolist() for x in tensors])


def show_run(draw, parameters, gradients, case):
    """Print the parameters of a case and each step's gradients if it fails."""
    draw.show(**{f"p for {case}": as_text(parameters)})
    draw.show(**{f"g of step {t} for {case}": as_text(step) for t, step in enumerate(gradients, 1)})


def run_groups(draw, rule):
    """Take steps with two groups, of which one decays; one parameter has no gradient in the first step."""
    case = f"two groups, {rule.__name__}"
    matrix, bias = (torch.nn.Parameter(draw.normal(*shape)) for shape in ((2, 2), (2,)))
    groups = [{"params": [matrix], "weight_decay": 0.2}, {"params": [bias], "weight_decay": 0.0}]
    lr = draw.uniform(0.05, 0.2)
    optimizer = rule(groups, lr=lr)
    gradients = [[draw.normal(2, 2), draw.normal(2)] for _ in range(2 + draw.size)]
    gradients[0][1] = None
    show_run(draw, [matrix, bias], gradients, case)
    draw.show(**{f"settings for {case}": f"lr={lr:.5f}, weight_decay=0.2 and 0, the others by default"})
    results = {f"p of {case}": run(optimizer, [matrix, bias], gradients)}
    return results | {f"{key} of {case}": optimizer.state[matrix][key] for key in rule.state_names}


def adamw(draw):
    """Take steps of AdamW: with and without the correction of the bias, and with weight decay."""
    results = {}
    for correct, decay in ((True, 0.0), (False, 0.0), (True, 0.1)):
        case = f"correct_bias={correct} weight_decay={decay}"
        parameters, gradients = draw_run(draw, 1 + draw.size, case)
        settings = dict(lr=draw.uniform(0.01, 0.2), betas=(draw.uniform(0.5, 0.9), draw.uniform(0.9, 0.99)), eps=0.01)
        optimizer = AdamW(parameters, weight_decay=decay, correct_bias=correct, **settings)
        draw.show(**{f"settings for {case}": str(settings)})
        results[f"p with {case}"] = run(optimizer, parameters, gradients)
    return results | run_groups(draw, AdamW)


def rmsprop_and_sgd(draw):
    """Take steps of RMSprop and SGD."""
    results = {}
    for decay in (0.0, 0.1):
        case = f"weight_decay={decay}"
        parameters, gradients = draw_run(draw, 1 + draw.size, case)
        settings = dict(lr=draw.uniform(0.01, 0.2), gamma=draw.uniform(0.5, 0.9), eps=0.01, weight_decay=decay)
        draw.show(**{f"settings for {case}": str(settings)})
        results[f"p with {case}"] = run(RMSprop(parameters, **settings), parameters, gradients)
    return results | run_groups(draw, RMSprop) | run_groups(draw, SGD)


def schedules(draw):
    """Evaluate both schedules before, at and after the end of the warm-up."""
    results = {}
    for schedule in (linear, cosine):
        warmup = 0.25 if draw.size == 0 else draw.uniform(0.05, 0.6)
        progress = [0.0, warmup / 2, warmup, (1 + warmup) / 2, 1.0] + [
            draw.uniform(0, 1) for _ in range(10 * draw.size)
        ]
        name = schedule.__name__
        draw.show(**{f"progress for {name}": progress[:5], f"warmup for {name} with warmup": warmup})
        results[f"{name} with warmup"] = lambda s=schedule, xs=progress, w=warmup: [s(x, w) for x in xs]
        results[f"{name} without"] = lambda s=schedule, xs=progress: [s(x) for x in xs]
    return results


def clipping(draw):
    """Clip gradients that are too large, small enough, zero and absent; refuse a maximum of 0."""
    results = {}
    for name, norm, most in (
        ("large", 5.0, draw.uniform(1.5, 4)),
        ("small", 2.0, draw.uniform(2.5, 4)),
        ("zero", 0.0, 1.0),
    ):
        parameters = [torch.nn.Parameter(draw.normal(2)) for _ in range(2 + draw.size)]
        for parameter in parameters[1:]:
            parameter.grad = draw.normal(2) + 0.1
        size = torch.cat([parameter.grad for parameter in parameters[1:]]).norm()
        for parameter in parameters[1:]:
            parameter.grad *= norm / size
        gradients = torch.cat([parameter.grad for parameter in parameters[1:]])
        draw.show(**{f"gradients for {name}": gradients, f"max_norm for {name}": most})
        results[f"norm of {name} gradients"] = clip_gradients(parameters, most)
        results[f"{name} gradients"] = torch.cat([parameter.grad for parameter in parameters[1:]])
    for most in (0.0, -1.0):
        refused = call(clip_gradients, [], most)
        results[f"max_norm {most:g}"] = refused if isinstance(refused, str) else "no InputError"
    results["norm without gradients"] = clip_gradients([torch.nn.Parameter(draw.normal(2))], 1.0)
    return results
