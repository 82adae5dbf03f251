"""Checks of part gradients: projection, the order of the tasks, GradVac's turn."""

import numpy as np
import torch

from gradients import GradVac, PCGrad


def draw_gradients(draw, count, d):
    """Return gradients [count,d], the first two of which conflict."""
    gradients = draw.normal(count, d)
    gradients[1] -= 2 * gradients[0] * (gradients[0] @ gradients[1]) / gradients[0].square().sum()
    if gradients[0] @ gradients[1] > 0:
        gradients[1] = -gradients[1]
    return gradients


def combined(combiner, parameters, losses):
    """Return the update that a combiner makes of the losses of several tasks."""
    for task, loss in losses.items():
        combiner.add(task, loss)
    combiner.combine()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def run(rule, draw, steps):
    """Return the updates of two tasks over some steps, and the rule itself."""
    parameters = [torch.nn.Parameter(draw.normal(2)), torch.nn.Parameter(draw.normal(1 + draw.size))]
    combiner, updates = rule(parameters, draw.generator()), []
    for step in range(steps):
        gradients = draw_gradients(draw, 2, 3 + draw.size)
        if step % 2:
            gradients[1] = -gradients[1]  # no conflict
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        draw.show(**{f"gradients of step {step + 1}": gradients})
        updates.append(combined(combiner, parameters, {"sst": flat @ gradients[0], "para": flat @ gradients[1]}))
    return torch.cat(updates), combiner


def projection(draw):
    """Compute factors, and project two gradients that conflict and two that do not."""
    rule, factors = PCGrad([], draw.generator()), []
    for _ in range(1 + 4 * draw.size):
        norm, other, dot = draw.uniform(0.5, 2), draw.uniform(0.5, 2), draw.uniform(-0.4, 0.4)
        factors += [rule.factor("sst-para", dot, norm, other), rule.factor("sst-para", -dot, norm, other)]
    draw.show(dot=dot, norm=norm, other_norm=other)
    updates, _ = run(PCGrad, draw, 2)
    return {"factor(dot), factor(-dot)": [float(factor) for factor in factors], "updates": updates}


def three_tasks(draw):
    """Project the gradients of three tasks or more many times: all orders of the visits must occur."""
    count = 3 if draw.size < 2 else 4
    gradients = draw_gradients(draw, count, 3 + draw.size)
    gradients[2] = -gradients[0] - 0.5 * gradients[1] + 0.1 * gradients[2]  # conflicts with both
    gram = (gradients @ gradients.T).numpy()
    draw.show(gradients=gradients, gram=torch.from_numpy(gram))
    tasks = ["sst", "para", "sts", "cfimdb"][:count]
    original = gram.copy()
    rule = PCGrad([], draw.generator())
    rows = np.array([rule.coefficients(tasks, gram) for _ in range(200)])  # [200,count,count]
    results = {}
    for i, task in enumerate(tasks):
        # what depends on the order of the visits: the different rows, sorted
        results[f"rows of {task} over all orders"] = np.unique(rows[:, i].round(8), axis=0)
    for name, number, place in (("infinite", np.inf, (0, 0)), ("NaN", np.nan, (0, 1)), ("large", -np.inf, (0, 1))):
        broken = gram.copy()
        broken[place] = broken[place[::-1]] = number
        results[f"coefficients of {name} gradients"] = rule.coefficients(tasks, broken)
    # the order comes from the rule's own generator: the same in every process and in a resumed run
    seed, drawn = draw.number(0, 2**31), []
    for other in (1, 2):
        torch.manual_seed(other)
        np.random.seed(other)
        again = PCGrad([], torch.Generator().manual_seed(seed))
        drawn.append(np.array([again.coefficients(tasks, gram) for _ in range(20)]))
    results["the same order for the same generator"] = str(np.array_equal(*drawn))
    # GradVac reads |g_i| as changed so far, and a target for each ordered pair; a gradient of 0 moves no target
    vaccine = GradVac([], draw.generator())
    start = {f"{a}-{b}": draw.uniform(-0.2, 0.6) for a in tasks for b in tasks if a != b}
    zero = gram.copy()
    zero[-1] = zero[:, -1] = 0
    for name, products in (("", gram), (" and a gradient of 0", zero)):
        rows, targets = [], []
        for _ in range(200):
            vaccine.targets = dict(start)
            rows.append(vaccine.coefficients(tasks, products))
            targets.append([float(vaccine.targets[pair]) for pair in start])
        for i, task in enumerate(tasks):
            found = np.unique(np.array(rows)[:, i].round(8), axis=0)
            results[f"GradVac's rows of {task} over all orders{name}"] = found
        for pair, column in zip(start, np.array(targets).T, strict=True):
            results[f"targets of {pair} over all orders{name}"] = np.unique(column.round(8))
    gram[:] = original
    return results


def turn(draw):
    """Compute GradVac's factors for one pair, whose target moves."""
    rule, factors, targets = GradVac([], draw.generator()), [], []
    for _ in range(2 + 4 * draw.size):
        norm, other = draw.uniform(0.5, 2), draw.uniform(0.5, 2)
        dot = draw.uniform(-0.9, 0.9) * norm * other
        factors.append(float(rule.factor("sst-para", dot, norm, other)))
        targets.append(float(rule.targets["sst-para"]))
    draw.show(dot=dot, norm=norm, other_norm=other)
    rule.targets["sst-sts"] = 0.4
    factors.append(float(rule.factor("sst-sts", 0.2, 1.0, 1.0)))
    factors.append(float(rule.factor("sst-sts", 0.6, 1.0, 1.0)))
    factors.append(float(rule.factor("sst-sts", -1 - 1e-12, 1.0, 1.0)))  # rounding: a cosine below -1
    return {"factors": factors, "targets of sst-para": targets, "target of sst-sts": float(rule.targets["sst-sts"])}


def vaccine(draw):
    """Combine the gradients of two tasks over several steps."""
    updates, rule = run(GradVac, draw, 2 + 2 * draw.size)
    targets = [float(rule.targets.get(pair, 9.0)) for pair in ("sst-para", "para-sst")]
    return {"updates": updates, "targets": targets}
