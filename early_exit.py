"""Early exit: a classifier after every layer, and inference that leaves at the first sure one.

Read first: bert.py, tasks.py. Most inputs do not need every layer. After layer i an exit gives the answer g_i with
its own pooler and heads, and training adds up the exits' losses (BERTer 3.3, after DeeBERT and BERxiT):

    loss = sum_i w_i (L_i + J_i)        L_i = H(y, g_i(h_i; w_i)),  w_i from `exit_weights`

Inference leaves at the first exit whose certainty reaches a threshold; the last one always answers. Two certainties:

    confidence   the largest probability of g_i (classification only)
    LTE          "learning to exit": u_i = sigmoid(c . h_i + b), one (c, b) per task for all its exits, trained with
                 J_i = (u_i - t_i)^2,  t_i = 1[g_i is right], or 1 - tanh(|g_i - y| / scale) for a regression

The target t_i is a label: nothing is learned through it. J_i does reach the backbone through h_i.
Differs: BERTer has no scale; with labels from 0 to 5 tanh would hardly tell an error of 2 from one of 5, so the
scale is half the label's range and the largest possible error is at tanh(2). h_i is the vector that the head sees.
BERxiT's public code trains the opposite sign (the probability to go on) and leaves *below* a threshold.
J_i is trained with --early_exit only, and then for every task, so that a saved run may be asked to leave by either
certainty; training plans that have exits for their own sake (--slf) do without it.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from errors import InputError
from tasks import widen

POLICIES = ("auto", "confidence", "lte")
# no certainty reaches it, so every row goes to the last exit
FULL_DEPTH = 1.01
# batches whose survivors are cut anew after every layer: more fill the deep batches better, but join rows of more
# unequal length (more padding) and need more memory
POOLED_BATCHES = 4
# the candidates for a threshold split the certainties into this many equal parts: more fit the noise of half a dev set
CANDIDATES = 50
# what a layer may cost, in units of the score, from dear to cheap
PRICES = (*np.geomspace(1.0, 1e-6, 200), 0.0)


# --- the modules and their loss -----------------------------------------------------------------------------------


class Exit(nn.Module):
    """The classifier g_i of layer i: one pooler shared by the tasks and one head per task.

    The pooler starts from the pretrained one, the heads from nothing. The last layer's exit is the ordinary pooler
    and heads of the model, so it is not built here. With mean pooling there is no pooler to copy.
    Shapes: pool: [b,s,d] -> [b,d].
    Source: BERTer 3.3, L_i = H(y, g_i(h_i; w_i)); DeeBERT.
    """

    def __init__(self, bert, make_heads, with_pooler):
        super().__init__()
        self.pooler_dense = copy.deepcopy(bert.pooler_dense) if with_pooler else None
        self.pooler_af = nn.Tanh()
        self.heads = make_heads()

    def pool(self, h):
        """The vector of the first token through this exit's pooler."""
        return self.pooler_af(self.pooler_dense(h[:, 0]))


class LTE(nn.Module):
    """Learning to exit: how sure a task may be of an answer, judged from the vector that the head sees.

    It starts at zero, where u = 1/2 whatever it sees.
    Shapes: certainty: [b,w] -> [b].
    Source: BERTer 3.3, u_i = sigmoid(c . h_i + b); BERxiT.
    """

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def certainty(self, state):
        """The estimated certainty u, from 0 to 1."""
        return widen(self.linear(widen(state))).squeeze(-1).sigmoid()


def certainty_target(task, logits, labels, threshold):
    """What the LTE's certainty of an answer should have been, as a label without gradient.

    Shapes: logits [b,o], labels [b] -> [b].
    Source: BERTer 3.3.
    Differs: the error of a regression is measured in halves of the label's range.
    """
    values, _ = task.decode(logits.detach(), threshold)
    if task.is_regression:
        low, high = task.label_range
        return 1 - torch.tanh((values - labels).abs() / ((high - low) / 2))
    return (values == labels).to(values.dtype)


class LTELoss:
    """The loss term of the LTE: the weighted sum of J_i = (u_i - t_i)^2 over the step's exits.

    Zero while the LTE is frozen (stage 1 of Sequential Layer Focus): it would only pull at the layers below.
    Source: BERTer 3.3, L_i becomes L_i + J_i.
    """

    def __call__(self, model, batch, outputs, exit_weights):
        task, lte = batch.task, model.lte[batch.task.name]
        total = torch.zeros(len(batch), device=batch.labels.device)
        if not lte.linear.weight.requires_grad:
            return total
        for i, weight in exit_weights.items():
            target = certainty_target(task, outputs.logits[i], batch.labels, model.threshold(task.name))
            total = total + weight * (lte.certainty(outputs.states[i]) - target) ** 2
        return total


# --- exit weights -------------------------------------------------------------------------------------------------


def weigh_joint(depth):
    """Every exit alike: sum_i L_i. Source: BERTer 3.3."""
    return (dict.fromkeys(range(1, depth + 1), 1.0),)


def weigh_deeper(depth):
    """Deeper exits more: sum_i w_i L_i, w_i = 2 i / (L + 1), which sum to L as in the joint loss.

    Source: PABEE, equation 7, up to the constant factor L, which keeps the balance with other loss terms.
    """
    return ({i: 2 * i / (depth + 1) for i in range(1, depth + 1)},)


def weigh_alternating(depth):
    """By turns, a batch of a task on the last exit alone and one on all of them. Source: BERxiT."""
    return ({depth: 1.0}, *weigh_joint(depth))


EXIT_WEIGHTS = {"joint": weigh_joint, "weighted": weigh_deeper, "alternating": weigh_alternating}


def exit_weights(kind, depth):
    """The cycle of {exit layer: weight}, one entry per batch of a task, that a training phase takes."""
    return EXIT_WEIGHTS[kind](depth)


# --- inference ----------------------------------------------------------------------------------------------------


def choose_policies(tasks, policy):
    """The kind of certainty of every task: {task: "confidence" or "lte"}; auto is LTE for a regression only.

    Raises: InputError for confidence on a regression, which has no probabilities.
    """
    for name, task in tasks.items():
        if policy == "confidence" and task.is_regression:
            raise InputError(
                f"--exit_policy confidence: {name} is a regression and has no probabilities: use auto or lte"
            )
    automatic = {name: "lte" if task.is_regression else "confidence" for name, task in tasks.items()}
    return automatic if policy == "auto" else dict.fromkeys(tasks, policy)


def confidence(model, logits, task):
    """The largest probability of a classification. Shapes: [b,o] -> [b]."""
    return task.decode(logits, model.threshold(task.name))[1].amax(-1)


def cut(batch, part):
    """Some rows of a batch, to embed, without the columns that only the other rows need."""
    segments = tuple(
        tuple(x[part, mask[part].any(0)] for x in (input_ids, mask, types)) for input_ids, mask, types in batch.segments
    )
    return replace(batch, segments=segments, labels=None, ids=batch.ids[part])


class ExitInference:
    """Inference that lets rows leave at the first exit whose certainty reaches their task's threshold.

    It takes the place of `full_depth` in evaluation.predict. The rows that stay move up in the buffers of hidden
    states and masks, and are cut anew into batches without the columns that only rows that left had needed: few
    stragglers of many batches fill one batch. Above a threshold of 1 this computes the same as the full depth.
    `rows_at_once` tells predict how many rows to hand over.
    Source: BERTer 3.3.
    """

    def __init__(self, policies, thresholds, batch_size=32):
        self.policies, self.thresholds, self.batch_size = policies, thresholds, batch_size
        self.rows_at_once = POOLED_BATCHES * batch_size

    def certainty(self, model, state, logits, task):
        """How sure an exit is. Shapes: state [b,w], logits [b,o] -> [b]."""
        if self.policies[task.name] == "lte":
            return model.lte[task.name].certainty(state)
        return confidence(model, logits, task)

    def __call__(self, model, batch):
        """Answer a batch of any size. Shapes: outputs [b,o], executed layers [b]."""
        task, hidden, outputs = batch.task, None, None
        masks = tuple(mask.clone() for mask in model.masks(batch))
        rows = torch.arange(len(batch), device=masks[0].device)
        layers = torch.full_like(rows, model.depth)
        remaining = len(rows)
        for i in range(1, model.depth + 1):
            present, remaining = remaining, 0
            for start in range(0, present, self.batch_size):
                part = slice(start, min(start + self.batch_size, present))
                used = [mask[part].any(0) for mask in masks]  # the columns that some row of this part needs
                part_masks = tuple(mask[part, columns] for mask, columns in zip(masks, used, strict=True))
                if i == 1:
                    part_hidden = model.embed(cut(batch, part))
                else:
                    part_hidden = tuple(h[part, columns] for h, columns in zip(hidden, used, strict=True))
                [(_, part_hidden)] = model.encode(part_hidden, part_masks, task, i - 1, i)
                state = model.state(i, part_hidden, part_masks, task)
                logits = model.head(i, state, task)
                if outputs is None:
                    outputs = logits.new_empty(len(batch), logits.shape[-1])
                    # zeros: what a row never fills is masked, but has to be a number
                    hidden = tuple(h.new_zeros(*m.shape, h.shape[-1]) for h, m in zip(part_hidden, masks, strict=True))
                if i == model.depth:
                    outputs[rows[part]] = logits
                    continue
                leaves = self.certainty(model, state, logits, task) >= self.thresholds[task.name]
                left, stays = rows[part][leaves], (~leaves).nonzero().squeeze(-1)
                outputs[left], layers[left] = logits[leaves], i
                # never beyond `part`, so that nothing unread is overwritten
                kept = slice(remaining, remaining + len(stays))
                for h, deeper, mask, columns in zip(hidden, part_hidden, masks, used, strict=True):
                    h[kept, columns] = deeper[stays]
                    mask[kept] = mask[part][stays]
                rows[kept] = rows[part][stays]
                remaining = kept.stop
        return outputs, layers


# --- all exits of one full pass: choosing and sweeping thresholds without running again ---------------------------


def every_exit(model, batch):
    """Run every layer once and ask every exit.

    A certainty that does not exist (confidence of a regression) is NaN.
    Shapes: outputs [b,L,o], confidence [b,L], LTE [b,L].
    """
    task, exits = batch.task, range(1, model.depth + 1)
    found = model(batch, exits=tuple(exits))
    outputs = torch.stack([widen(found.logits[i]) for i in exits], dim=1)
    lte = torch.stack([model.lte[task.name].certainty(found.states[i]) for i in exits], dim=1)
    if task.is_regression:
        return outputs, torch.full_like(lte, torch.nan), lte
    return outputs, torch.stack([confidence(model, found.logits[i], task) for i in exits], dim=1), lte


@dataclass(frozen=True)
class AllExits:
    """What every exit says of the given rows of a dataset.

    Shapes: rows, labels [n]; values, confidence, lte [n,L].
    Units: values are class indices or label units.
    """

    rows: np.ndarray
    labels: np.ndarray
    values: np.ndarray
    confidence: np.ndarray
    lte: np.ndarray

    @property
    def depth(self):
        """Number of exits."""
        return self.values.shape[1]

    def take(self, chosen):
        """The same for some of the rows, by position."""
        parts = (self.rows, self.labels, self.values, self.confidence, self.lte)
        return AllExits(*(part[chosen] for part in parts))

    def certainty(self, policy):
        """The certainty that a policy goes by. Shapes: [n,L]."""
        return self.lte if policy == "lte" else self.confidence


@dataclass(frozen=True)
class ExitScores:
    """Score, mean number of executed layers, and share of the rows that left at each exit [L]."""

    score: float
    mean_layers: float
    shares: np.ndarray


def first_exit(certainty, threshold):
    """The layer after which each row leaves. Shapes: certainty [n,L] -> [n]."""
    sure = certainty >= threshold
    sure[:, -1] = True
    return sure.argmax(1) + 1


def scores_at(exits, policy, threshold, metric):
    """What leaving at a threshold gives, from one full pass; `metric(values, labels)` is the task's."""
    layers = first_exit(exits.certainty(policy), threshold)
    values = np.take_along_axis(exits.values, layers[:, None] - 1, axis=1)[:, 0]
    shares = np.bincount(layers, minlength=exits.depth + 1)[1:] / len(layers)
    return ExitScores(metric(values, exits.labels), float(layers.mean()), shares)


def layer_scores(exits, metric):
    """The score of each exit if all rows left there. Shapes: [L]."""
    return np.array([metric(values, exits.labels) for values in exits.values.T])


def halves(n, seed=0):
    """Two random halves of positions 0..n-1, each in order: one to choose thresholds on, one to report."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def candidates(exits, policy, metric):
    """Thresholds to choose from, the lowest first: quantiles of the certainties, and full depth.

    Shapes: thresholds, scores, mean layers, each [n].
    """
    certainty = exits.certainty(policy)[:, :-1]
    thresholds = (*np.unique(np.quantile(certainty, np.linspace(0, 1, CANDIDATES + 1))), FULL_DEPTH)
    found = [scores_at(exits, policy, t, metric) for t in thresholds]
    return np.array(thresholds), np.array([x.score for x in found]), np.array([x.mean_layers for x in found])


def choose_thresholds(exits, policies, metrics, loss=0.005):
    """Thresholds of all tasks with few layers whose mean score is at least (1 - loss) of the full depth's.

    Every task takes the candidate with the largest score - price * layers, and the price is the highest one that costs
    no more than the loss. So all tasks pay the same score for a layer: one with good early exits saves more.
    `exits`, `policies`, `metrics`: {task: ...}, the metrics on a scale from 0 to 1. Give it one of the `halves` and
    report the other. Returns {task: threshold}.
    """
    offers = {name: candidates(found, policies[name], metrics[name]) for name, found in exits.items()}
    floor = (1 - loss) * sum(layer_scores(found, metrics[name])[-1] for name, found in exits.items())
    for price in PRICES:
        chosen = {name: int(np.argmax(scores - price * layers)) for name, (_, scores, layers) in offers.items()}
        if sum(offers[name][1][k] for name, k in chosen.items()) >= floor:
            break
    return {name: float(offers[name][0][k]) for name, k in chosen.items()}
