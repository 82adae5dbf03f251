"""How the tasks' gradients become one update: sum, PCGrad, GradVac. Read first: nothing.

Tasks that share a BERT pull its parameters in different directions. With g_i the gradient of task i, two tasks
conflict where cos(g_i, g_j) = g_i.g_j / (|g_i| |g_j|) < 0: their sum then undoes part of what each asks for.

    Sum      g = sum_i g_i
    PCGrad   g_i loses its component against g_j:  if g_i.g_j < 0:  g_i <- g_i - (g_i.g_j / |g_j|^2) g_j
    GradVac  g_i is turned until its cosine with g_j reaches a target phi_ij, a moving average of past cosines:
             if cos < phi:  g_i <- g_i + g_j |g_i| (phi sqrt(1 - cos^2) - cos sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2))
             phi_ij <- (1 - BETA) phi_ij + BETA cos, whether or not g_i was turned

each for every task i over the others j in random order; g_i on the left is the one as changed so far, g_j always the
original. The update is the sum of the changed g_i. As phi = 0 turns g_i just as PCGrad does, GradVac starts as PCGrad.

Only parameters that two tasks or more have a gradient for count as shared; a task's own head keeps its own gradient.
Every changed g_i is a combination sum_k C_ik g_k of the originals. So the dot products g_i.g_j of the shared part are
computed once, the rule changes the few numbers C in float64, and one weighted sum with weights sum_i C_ik is written.

The loop hands every loss to `add` and calls `combine` once before the optimiser's step; `cosines` then holds the
step's original cosines per pair of tasks, to be logged. Several processes first sum up what they have, per task where
the rule compares tasks, and so all of them come to the same update.

Source: Yu et al. (2020), Algorithm 1 (PCGrad); Wang et al. (2021), Algorithm 1 (GradVac);
SMARTer BERT 6.3 names both as what to try next.
Differs: GradVac's paper groups parameters by layer or matrix; here, as in PCGrad, all shared ones are one vector.
"""

from itertools import combinations, combinations_with_replacement

import numpy as np
import torch

from parallel import sum_gradients

BETA = 1e-2


class Sum:
    """The ordinary way: gradients of all losses of a step add up in the parameters' .grad."""

    def __init__(self, parameters, generator=None):
        self.parameters, self.cosines = list(parameters), {}

    def add(self, task, loss):
        """Backpropagate one loss of a task."""
        loss.backward()

    def combine(self):
        """Leave the sum in the parameters' .grad."""
        totals = sum_gradients(self.parameters, [parameter.grad for parameter in self.parameters])
        for parameter, total in zip(self.parameters, totals, strict=True):
            parameter.grad = total


def dot_products(gradients, count):
    """Dot products of the tasks' gradients over all parameters: in each one's precision, then summed in float64.

    `gradients` holds one tuple per parameter: a tensor or None for each of the `count` tasks.
    Shapes: [count,count].
    """
    pairs, dots = [], []
    for tensors in gradients:
        for i, j in combinations_with_replacement(range(count), 2):
            if tensors[i] is not None and tensors[j] is not None:
                pairs.append((i, j))
                dots.append(torch.dot(tensors[i].flatten(), tensors[j].flatten()))
    upper = np.zeros((count, count))
    if dots:
        # one transfer: every value fetched from a GPU on its own would wait for it
        np.add.at(upper, tuple(np.transpose(pairs)), torch.stack(dots).cpu().double().numpy())
    return upper + np.triu(upper, 1).T


def pairwise_cosines(tasks, gram):
    """Cosine of every pair of tasks, {"sst-para": 0-dim tensor}, without pairs where one is zero or not finite."""
    cosines = {}
    for i, j in combinations(range(len(tasks)), 2):
        norms = np.sqrt(gram[i, i] * gram[j, j])
        if 0 < norms < np.inf:
            cosines[f"{tasks[i]}-{tasks[j]}"] = torch.tensor(gram[i, j] / norms)
    return cosines


def weighted_sum(tensors, weights):
    """Sum over tasks of weight times gradient, for several parameters, in the first task's memory.

    Shapes: tensors: one list of gradients, one per parameter, for each task.
    """
    total, *others = tensors
    torch._foreach_mul_(total, weights[0])
    for more, weight in zip(others, weights[1:], strict=True):
        torch._foreach_add_(total, more, alpha=weight)
    return total


class PCGrad:
    """Projecting conflicting gradients: each task gives up what goes against another one.

    `task_gradients` is {task: [gradient or None per parameter]} between `add` and `combine`. `generator` draws the
    order in which a task meets the others.

    Source: Yu et al. (2020), Algorithm 1.
    """

    def __init__(self, parameters, generator):
        self.parameters, self.generator = list(parameters), generator
        self.task_gradients, self.cosines = {}, {}

    def add(self, task, loss):
        """Backpropagate one loss of a task into that task's gradients."""
        before = self.task_gradients.get(task, [None] * len(self.parameters))
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        loss.backward()
        self.task_gradients[task] = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def push(self, pair, dot, norm, other_norm):
        """How much of g_j is added to g_i, whose norm is `norm`."""
        return -dot / other_norm**2 if dot < 0 else 0.0

    def coefficients(self, tasks, gram):
        """The changed gradients as combinations of the original ones: C, with g_i = sum_k C_ik g_k.

        Shapes: gram [t,t] for t tasks; returns [t,t].
        """
        count = len(tasks)
        mixture = np.eye(count)
        if not np.isfinite(gram).all():
            return mixture  # an overflow in half precision: the sum shows it to the gradient scaler
        norms = np.sqrt(np.diag(gram))
        for i, mine in enumerate(mixture):
            others = [j for j in range(count) if j != i]
            for k in torch.randperm(len(others), generator=self.generator).tolist():
                j = others[k]
                norm = np.sqrt(max(0.0, mine @ gram @ mine))
                if norm > 0 and norms[j] > 0:
                    mine[j] += self.push(f"{tasks[i]}-{tasks[j]}", mine @ gram[:, j], norm, norms[j])
        return mixture

    def combine(self):
        """Write the sum of the tasks' changed gradients into the parameters' .grad.

        A parameter that one task alone has a gradient for gets that one, a parameter without any keeps none.
        """
        tasks, groups = list(self.task_gradients), {}
        totals = [sum_gradients(self.parameters, gradients) for gradients in self.task_gradients.values()]
        for parameter, *tensors in zip(self.parameters, *totals, strict=True):
            present = tuple(k for k, tensor in enumerate(tensors) if tensor is not None)
            groups.setdefault(present, []).append((parameter, tensors))
        self.task_gradients = {}
        shared = [tensors for present, rows in groups.items() if len(present) > 1 for _, tensors in rows]
        gram = dot_products(shared, len(tasks))
        self.cosines = pairwise_cosines(tasks, gram)
        weights = self.coefficients(tasks, gram).sum(0).tolist()
        groups.pop((), None)
        for present, rows in groups.items():
            chosen = [weights[k] for k in present] if len(present) > 1 else [1.0]
            totals = weighted_sum([[tensors[k] for _, tensors in rows] for k in present], chosen)
            for (parameter, _), total in zip(rows, totals, strict=True):
                parameter.grad = total

    def state_dict(self):
        """What a resumed run needs."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Take over a saved state."""
        self.generator.set_state(state["generator"])


class GradVac(PCGrad):
    """Gradient vaccine: each task turns towards another one, up to how similar the two have been so far.

    `targets` is {"sst-para": phi}, from the side of the first task named: phi_ij and phi_ji differ, since the cosine
    is that of g_i as changed so far. All start at zero.

    Source: Wang et al. (2021), Algorithm 1.
    """

    def __init__(self, parameters, generator):
        super().__init__(parameters, generator)
        self.targets = {}

    def push(self, pair, dot, norm, other_norm):
        """How much of g_j is added to g_i, whose norm is `norm`; moves the pair's target."""
        cosine, target = float(np.clip(dot / (norm * other_norm), -1.0, 1.0)), self.targets.get(pair, 0.0)
        self.targets[pair] = (1 - BETA) * target + BETA * cosine
        if not cosine < target < 1:
            return 0.0
        sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
        return norm * (target * sine - cosine * target_sine) / (other_norm * target_sine)

    def state_dict(self):
        """What a resumed run needs."""
        return super().state_dict() | {"targets": dict(self.targets)}

    def load_state_dict(self, state):
        """Take over a saved state."""
        super().load_state_dict(state)
        self.targets = dict(state["targets"])
