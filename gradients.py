"""Combine the tasks' gradients into one update: sum, PCGrad, GradVac.

Tasks that share a BERT pull its parameters in different directions. With g_i the gradient of task i, two tasks
conflict if cos(g_i, g_j) = g_i.g_j / (|g_i| |g_j|) < 0, because each of them then undoes a part of the other's step.

    Sum      g = sum_i g_i
    PCGrad   remove from g_i its component against g_j:
             if g_i.g_j < 0:  g_i <- g_i - (g_i.g_j / |g_j|^2) g_j
    GradVac  turn g_i until its cosine with g_j reaches a target phi_ij, a moving average of past cosines:
             if cos < phi:  g_i <- g_i + g_j |g_i| (phi sqrt(1 - cos^2) - cos sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2))
             phi_ij <- (1 - BETA) phi_ij + BETA cos, whether or not g_i was turned

For each task i, visit the other tasks j in random order. Update g_i in place; g_j is always j's original gradient.
The update is the sum of the changed g_i. Targets start at 0, where GradVac turns g_i exactly as PCGrad does.

All this concerns the shared parameters, those with a gradient from two tasks or more. A task's own head keeps its
gradient.
Every changed g_i is a combination sum_k C_ik g_k of the original gradients. So the dot products g_i.g_j are computed
once, the rule runs on the few numbers C in float64, and the update is one weighted sum with the weights sum_i C_ik.

Several processes first add up their gradients, separately for each task where the rule compares tasks. So every process
computes the same update.

Source: Yu et al. (2020), Algorithm 1 (PCGrad); Wang et al. (2021), Algorithm 1 (GradVac);
SMARTer BERT 6.3 proposes both as future work.
Differs: GradVac's paper compares gradients by layer or by matrix. Here, as in PCGrad, g_i is one vector of all shared
parameters.
"""

from itertools import combinations, combinations_with_replacement

import numpy as np
import torch

from methods import Method, Resumable
from parallel import sum_gradients

BETA = 1e-2


class Combiner(Resumable):
    """Base class. A subclass has `combine()`, which writes the update's gradient into the parameters' .grad.

    `task_gradients` is {task: [gradient or None per parameter]} between `add` and `combine`. After `combine`, `cosines`
    holds the cosines between the tasks' gradients, {"sst-para": 0-dim tensor}, for the log; it stays empty for a rule
    that does not compare tasks. `generator` draws whatever is random in the rule.
    """

    def __init__(self, parameters, generator=None):
        self.parameters, self.generator = list(parameters), generator
        self.task_gradients, self.cosines = {}, {}

    def add(self, task, loss):
        """Backpropagate one loss of a task into that task's gradients."""
        gradients = self.task_gradients.setdefault(task, [None] * len(self.parameters))
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        for k, parameter in enumerate(self.parameters):
            # .grad is emptied, so that PyTorch never adds to an earlier loss's gradients: on a CPU that scatters
            # the heap, and a run takes three times the memory
            gradients[k], parameter.grad = add_in_place(gradients[k], parameter.grad), None


def add_in_place(a, b):
    """a + b, in the memory of a; None counts as 0."""
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)


class Sum(Combiner):
    """The gradients of all losses of a step add up."""

    def add(self, task, loss):
        """Backpropagate one loss into a sum that all tasks share."""
        super().add("all tasks", loss)

    def combine(self):
        """Write the sum into the parameters' .grad."""
        totals = sum_gradients(self.parameters, self.task_gradients.pop("all tasks"))
        for parameter, total in zip(self.parameters, totals, strict=True):
            parameter.grad = total


def dot_products(gradients, count):
    """Dot products of the tasks' gradients: one for each parameter in its own precision, their sum in float64.

    `gradients` holds one tuple per parameter: a tensor or None for each of the `count` tasks.
    Shapes: returns [count,count].
    """
    pairs, dots = [], []
    for tensors in gradients:
        for i, j in combinations_with_replacement(range(count), 2):
            if tensors[i] is not None and tensors[j] is not None:
                pairs.append((i, j))
                dots.append(torch.dot(tensors[i].flatten(), tensors[j].flatten()))  # two [n] to []
    upper = np.zeros((count, count))
    if dots:
        # one transfer for all numbers: each transfer would wait for the GPU
        np.add.at(upper, tuple(np.transpose(pairs)), torch.stack(dots).cpu().double().numpy())
    return upper + np.triu(upper, 1).T  # the lower triangle mirrors the upper one


def pairwise_cosines(tasks, gram):
    """Cosine of every pair of tasks, {"sst-para": 0-dim tensor}, without pairs where one is zero or not finite."""
    cosines = {}
    for i, j in combinations(range(len(tasks)), 2):
        norms = np.sqrt(gram[i, i] * gram[j, j])  # |g_i| |g_j|
        if 0 < norms < np.inf:
            cosines[f"{tasks[i]}-{tasks[j]}"] = torch.tensor(gram[i, j] / norms)
    return cosines


def weighted_sum(tensors, weights):
    """Sum over tasks of weight times gradient, for several parameters at once.

    Shapes: tensors: for each task a list of gradients, one per parameter; returns one such list.
    """
    total, *others = tensors
    torch._foreach_mul_(total, weights[0])  # in place: the first task's memory becomes the sum's
    for more, weight in zip(others, weights[1:], strict=True):
        torch._foreach_add_(total, more, alpha=weight)
    return total


class PCGrad(Combiner):
    """Projecting conflicting gradients: remove from each task's gradient its component against another task's.

    `generator` draws the order in which a task visits the other tasks.

    Source: Yu et al. (2020), Algorithm 1.
    """

    def factor(self, pair, dot, norm, other_norm):
        """The factor with which g_j is added to g_i. dot is g_i.g_j, the norms are |g_i| and |g_j|."""
        return -dot / other_norm**2 if dot < 0 else 0.0

    def coefficients(self, tasks, gram):
        """The changed gradients as combinations of the original ones: C, with g_i = sum_k C_ik g_k.

        Shapes: gram: dot products of the original gradients, an array [t,t] for t tasks; returns an array [t,t], the
        identity if a number of gram is infinite or NaN.
        """
        count = len(tasks)
        combination = np.eye(count)  # [t,t]; at the start each g_i is the original
        if not np.isfinite(gram).all():
            return combination  # float16 overflowed: the sum stays infinite, and the gradient scaler skips the step
        norms = np.sqrt(np.diag(gram))  # [t]
        for i, row in enumerate(combination):  # row [t] is a view: changing it changes C
            others = [j for j in range(count) if j != i]
            for k in torch.randperm(len(others), generator=self.generator).tolist():
                j = others[k]
                norm = np.sqrt(max(0.0, row @ gram @ row))  # |g_i| as changed so far; rounding may go below 0
                if norm > 0 and norms[j] > 0:
                    dot = row @ gram[:, j]  # g_i as changed so far, times the original g_j: [t], [t] to a number
                    row[j] += self.factor(f"{tasks[i]}-{tasks[j]}", dot, norm, norms[j])
        return combination

    def combine(self):
        """Write the sum of the tasks' changed gradients into the parameters' .grad.

        A parameter with a gradient from only one task gets that gradient. A parameter without any keeps None.
        """
        tasks = list(self.task_gradients)
        totals = [sum_gradients(self.parameters, gradients) for gradients in self.task_gradients.values()]
        self.task_gradients = {}
        # parameters by the tasks that have a gradient for them: {(0, 2): [(parameter, gradient or None per task)]}
        groups = {}
        for parameter, *gradients in zip(self.parameters, *totals, strict=True):
            present = tuple(k for k, gradient in enumerate(gradients) if gradient is not None)
            groups.setdefault(present, []).append((parameter, gradients))
        groups.pop((), None)
        shared = [gradients for present, rows in groups.items() if len(present) > 1 for _, gradients in rows]
        gram = dot_products(shared, len(tasks))
        self.cosines = pairwise_cosines(tasks, gram)
        weights = self.coefficients(tasks, gram).sum(0).tolist()  # sum over i of C_ik: [t,t] to [t]
        for present, rows in groups.items():
            chosen = [weights[k] for k in present] if len(present) > 1 else [1.0]
            updates = weighted_sum([[gradients[k] for _, gradients in rows] for k in present], chosen)
            for (parameter, _), update in zip(rows, updates, strict=True):
                parameter.grad = update

    def state_dict(self):
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Continue drawing where the saved run stopped."""
        self.generator.set_state(state["generator"])


class GradVac(PCGrad):
    """Gradient vaccine: turn each task's gradient towards another one's, up to their average cosine so far.

    `targets` is {"sst-para": phi}, with task i named first. phi_ij and phi_ji differ, because each cosine is that of
    g_i as changed so far. All targets start at 0.

    Source: Wang et al. (2021), Algorithm 1.
    """

    def __init__(self, parameters, generator):
        super().__init__(parameters, generator)
        self.targets = {}

    def factor(self, pair, dot, norm, other_norm):
        """The factor with which g_j is added to g_i. Moves the pair's target too."""
        cosine = float(np.clip(dot / (norm * other_norm), -1.0, 1.0))  # rounding may exceed 1
        target = self.targets.get(pair, 0.0)
        self.targets[pair] = (1 - BETA) * target + BETA * cosine
        if not cosine < target < 1:  # a target of 1 would divide by 0: no factor makes g_i parallel to g_j
            return 0.0
        sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
        return norm * (target * sine - cosine * target_sine) / (other_norm * target_sine)

    def state_dict(self):
        """The state of the generator, and the targets."""
        return super().state_dict() | {"targets": dict(self.targets)}

    def load_state_dict(self, state):
        """Continue from the state of a saved run."""
        super().load_state_dict(state)
        self.targets = dict(state["targets"])


COMBINERS = {"sum": Sum, "pcgrad": PCGrad, "gradvac": GradVac}


def surgery_conflicts(flags, typed):
    """Pairs (applies, sentence): comparing tasks needs two of them in every step."""
    name, is_on = flags["gradients"], flags["gradients"] != "sum"
    return [
        (is_on and len(flags["tasks"]) < 2, f"--gradients {name} needs at least two --tasks"),
        (is_on and flags["option"] == "pretrain", f"--gradients {name} compares gradients in BERT: pretrain has none"),
        (
            is_on and flags["step"] == "one_task",
            f"--gradients {name} compares the tasks of one step: leave out --step one_task",
        ),
    ]


SURGERY = Method(
    "gradient surgery (PCGrad: Yu et al. 2020; GradVac: Wang et al. 2021)",
    add_flags=lambda group: group.add_argument(
        "--gradients", choices=tuple(COMBINERS), default="sum", help="rule that combines the tasks' gradients"
    ),
    conflicts=surgery_conflicts,
    needs=lambda flags: set() if flags["gradients"] == "sum" else {"all_tasks"},
    gradients=lambda flags, parameters, generator: COMBINERS[flags["gradients"]](parameters, generator),
)
