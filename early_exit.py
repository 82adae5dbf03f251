"""Early exit: a classifier after every layer, and inference that leaves at the first exit that is sure enough.

Many inputs do not need every layer. After layer i, exit i predicts with a pooler and heads of its own. v_i is the
vector that its head sees (its state), g_i(v_i) its prediction. Training adds up the losses of all exits (BERTer 3.3 and
"Novel Fine-Tuning Strategy", after DeeBERT and BERxiT):

    loss = sum_i w_i (L_i + J_i)        L_i = H(y, g_i(v_i)) is the task's loss at exit i, w_i the exit's weight

--exit_loss chooses the w_i. (The paper writes g_i(h_i; w_i): its h_i is the hidden state of [CLS], its w_i are
the parameters of g_i.)

At inference a row leaves at the first exit whose certainty reaches the threshold of its task. Every row that gets to
the last exit leaves there. There are two kinds of certainty:

    confidence   the largest probability of g_i (classification only)
    LTE          "learning to exit": u_i = sigmoid(c . v_i + b), with one (c, b) per task for all its exits

--early_exit trains u_i with J_i = (u_i - t_i)^2, for every task. The target t_i is 1 where g_i is right, else 0. For
a regression it is 1 - tanh(|g_i - y| / scale). J_i trains (c, b) and, through v_i, the pooler and BERT. It does not
train the heads, because no gradient passes through t_i.

The thresholds are chosen on dev. A threshold looks better on the rows that chose it than on new rows. So dev is cut
into FOLDS parts, and the rows of each part are scored with thresholds that were chosen on the other parts.

Differs: BERTer has no scale. Its labels go from 0 to 5, so an error of 2 and one of 5 have almost the same target. Here
the scale is half the range of the labels, so that the largest error gives tanh(2). BERxiT's published code trains the
opposite, the probability to go on, and leaves below a threshold.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from errors import InputError
from methods import LossTerm, Method, at_least_zero, belongs, convert, per_task
from tasks import widen

POLICIES = ("auto", "confidence", "lte")
# a threshold that no certainty reaches: every row goes to the last exit
UNREACHABLE = 1.01
# inference packs the unfinished rows of this many batches; more batches fill the deep layers better, but they put
# rows of more unequal length side by side (more padding) and need more memory
POOLED_BATCHES = 4
# candidates for a threshold cut the sorted certainties into this many equal parts; more would fit the noise of dev
CANDIDATES = 50
# the prices that choose_thresholds puts on a layer, in units of the score, the highest first
PRICES = (*np.geomspace(1.0, 1e-6, 200), 0.0)
# share of the mean score that the thresholds may lose on the rows that choose them
ALLOWED_LOSS = 0.005
# parts of dev for cross-fitting
FOLDS = 5


# --- the modules --------------------------------------------------------------------------------------------------


class Exit(nn.Module):
    """The classifier g_i of layer i: one pooler for all tasks and one head per task.

    The pooler starts as a copy of the pretrained one, the heads start from random numbers. The last layer has no Exit:
    its exit is the model's own pooler and heads. With mean pooling there is no pooler to copy.
    Shapes: pool: [b,s,d] -> [b,d].
    Source: BERTer 3.3; DeeBERT.
    """

    def __init__(self, bert, heads, with_pooler):
        super().__init__()
        self.pooler_dense = copy.deepcopy(bert.pooler_dense) if with_pooler else None
        self.pooler_af = nn.Tanh()
        self.heads = heads

    def pool(self, h):
        """Pass the vector of the first token through this exit's pooler."""
        return self.pooler_af(self.pooler_dense(h[:, 0]))  # [b,d] W^T: [b,d]


class LTE(nn.Module):
    """Learning to exit: estimates from the head's input how good the head's prediction is.

    Shapes: certainty: [b,w] -> [b].
    Source: BERTer 3.3; BERxiT. Differs: BERTer reads h_i, the hidden state of [CLS], and has one LTE for all tasks.
    """

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        # zeros: an untrained LTE has u = 1/2 for every input
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def certainty(self, state):
        """The estimated certainty u, from 0 to 1."""
        # c . v + b: [b,w] to [b,1] to [b]; under autocast the linear layer returns 16 bits
        return widen(self.linear(widen(state))).squeeze(-1).sigmoid()


# --- the losses ---------------------------------------------------------------------------------------------------


def certainty_target(task, logits, labels, decision_threshold):
    """The target t of the LTE: how good the prediction is, a number from 0 to 1, without a gradient.

    Shapes: logits [b,o], labels [b] -> [b].
    Source: BERTer 3.3.
    Differs: the error of a regression is that of the clamped prediction, in units of half the labels' range.
    """
    # detached: t must not push the heads towards predictions that are easy to judge
    values, _ = task.objective.decode(logits.detach(), decision_threshold)  # [b]
    if task.is_regression:
        low, high = task.label_range
        return 1 - torch.tanh((values - labels).abs() / ((high - low) / 2))
    return (values == labels).to(values.dtype)


class LTELoss(LossTerm):
    """The loss term of the LTE: sum_i w_i J_i with J_i = (u_i - t_i)^2, over the exits of the step.

    Source: BERTer 3.3, L_i becomes L_i + J_i.
    """

    def __call__(self, model, batch, outputs, exit_weights):
        task, lte = batch.task, model.lte[batch.task.name]
        total = torch.zeros(len(batch), device=batch.labels.device)  # [b]
        for i, weight in exit_weights.items():
            # with a cosine, the decision threshold is that of the last evaluation: 1/2 before the first one
            target = certainty_target(task, outputs.logits[i], batch.labels, model.decision_threshold(task.name))
            # states are not detached: the layers learn to show how sure an exit may be
            total = total + weight * (lte.certainty(outputs.states[i]) - target) ** 2
        return total


class DistillLoss(LossTerm):
    """Self-distillation: sum_i w_i D(exit i, last exit) over the exits i < L of the step.

    D is the divergence of the task's objective. The last exit is the teacher: no gradient reaches its logits.
    Source: Zhang et al. (2019), Be Your Own Teacher; Liu et al. (2020), FastBERT.
    Differs: D is the symmetrised KL at temperature 1, or the squared difference of a regression; both papers use a
        one-sided KL. Exits also learn from the labels, as in Zhang et al.; FastBERT trains its exits without labels
        and with a frozen teacher. Zhang et al. also pull the exits' features together; this term does not.
    """

    def __call__(self, model, batch, outputs, exit_weights):
        total = torch.zeros(len(batch), device=batch.labels.device)  # [b]
        # without the last exit (stage 1 of SLF) the step has no teacher
        if model.depth not in exit_weights:
            return total
        teacher = outputs.logits[model.depth].detach()  # [b,o]
        for i, weight in exit_weights.items():
            if i != model.depth:
                total = total + weight * batch.task.objective.divergence(outputs.logits[i], teacher)
        return total


# --- exit weights: depth L -> a cycle of {exit: weight}; the steps of a task take its entries in turn -------------


def weigh_joint(depth):
    """All exits count alike: sum_i L_i. Source: BERTer, "Novel Fine-Tuning Strategy"."""
    return (dict.fromkeys(range(1, depth + 1), 1.0),)


def weigh_deeper(depth):
    """Deeper exits count more: w_i = 2 i / (L + 1).

    Source: PABEE, equation 7.
    Differs: the weights sum to L and not to 1, so that the exits keep their balance with the other loss terms.
    """
    return ({i: 2 * i / (depth + 1) for i in range(1, depth + 1)},)


def weigh_alternating(depth):
    """One step trains the last exit alone, the next one all exits, and so on. Source: BERxiT."""
    return ({depth: 1.0}, *weigh_joint(depth))


# the choices of --exit_loss: distilled adds DistillLoss to the joint weights, two_stage is a plan of slf.py
EXIT_WEIGHTS = {
    "joint": weigh_joint,
    "weighted": weigh_deeper,
    "alternating": weigh_alternating,
    "distilled": weigh_joint,
    "two_stage": weigh_joint,
}


# --- inference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExitSettings:
    """How a run leaves early: {task: policy} and {task: threshold}, with None for a threshold to choose on dev."""

    policies: dict
    thresholds: dict

    def complete(self, all_exits):
        """All thresholds, {task: threshold}; missing ones are chosen on the rows of `all_exits`, {task: AllExits}."""
        missing = {name: all_exits[name] for name, threshold in self.thresholds.items() if threshold is None}
        return self.thresholds | choose_thresholds(missing, self.policies)


def choose_policies(tasks, policy):
    """Choose the kind of certainty of each task: {task: "confidence" or "lte"}; auto is LTE for a regression.

    Raises: InputError for the confidence of a regression, which has no probabilities.
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
    _, probabilities = task.objective.decode(logits, model.decision_threshold(task.name))  # [b,classes]
    return probabilities.amax(-1)


def cut(batch, part):
    """Cut some rows out of a batch, without the columns that are padding in all of them. Shapes: p rows, c columns."""
    segments = []
    for ids, mask, segment_ids in batch.segments:
        # [c]: positions of the columns in which some row has a token. nonzero() waits for the GPU once; an index of
        # booleans would wait at each use.
        used = mask[part].any(0).nonzero().squeeze(-1)
        segments.append((ids[part, used], mask[part, used], segment_ids[part, used]))  # three times [p,c]
    return replace(batch, segments=tuple(segments), labels=None, ids=batch.ids[part])


class Unfinished:
    """The rows of a batch that have not left yet, packed at the front of buffers.

    After each layer the unfinished rows are packed again, so leftovers from many batches form one full batch.
    Shapes: rows [b], positions in the batch; masks: one [b,s] per encoder pass; hidden: one [b,s,d] per pass.
    """

    def __init__(self, masks):
        self.masks = tuple(mask.clone() for mask in masks)  # copies, because `keep` overwrites them
        self.rows = torch.arange(len(masks[0]), device=masks[0].device)
        self.hidden, self.count = None, len(self.rows)

    def parts(self, size):
        """Start a layer: slices of at most `size` of the unfinished rows. `keep` then collects the rows that stay."""
        count, self.count = self.count, 0
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def read(self, part):
        """Cut out p rows: hidden states (None before layer 1), masks, and which c of the s columns they use."""
        used = tuple(mask[part].any(0).nonzero().squeeze(-1) for mask in self.masks)  # [c]: columns with a token
        masks = tuple(mask[part, columns] for mask, columns in zip(self.masks, used, strict=True))  # [p,c]
        hidden = tuple(h[part, columns] for h, columns in zip(self.hidden, used, strict=True)) if self.hidden else None
        return hidden, masks, used

    def keep(self, part, stays, hidden, used):
        """Add the rows that do not leave to those kept so far. Shapes: stays [r], positions in part; hidden [p,c,d]."""
        if self.hidden is None:
            # zeros: attention masks the cells that a row never fills, but a NaN in them would still spread
            self.hidden = tuple(h.new_zeros(*m.shape, h.shape[-1]) for h, m in zip(hidden, self.masks, strict=True))
        # in place: a kept row moves forward or stays, so it never overwrites one that is still to be read
        front = slice(self.count, self.count + len(stays))
        for h, deeper, mask, columns in zip(self.hidden, hidden, self.masks, used, strict=True):
            h[front, columns] = deeper[stays]  # [r,c,d]
            mask[front] = mask[part][stays]  # [r,s]
        self.rows[front] = self.rows[part][stays]
        self.count = front.stop


class ExitInference:
    """Inference in which a row leaves at the first exit whose certainty reaches the threshold of its task.

    With UNREACHABLE thresholds it computes the same as full depth, bit by bit.
    Source: BERTer 3.3.
    """

    # evaluation.predict passes the rows of this many batches at once
    batches_at_once = POOLED_BATCHES

    def __init__(self, policies, thresholds):
        self.policies, self.thresholds = policies, thresholds

    def certainty(self, model, state, logits, task):
        """How sure an exit is. Shapes: state [b,w], logits [b,o] -> [b]."""
        if self.policies[task.name] == "lte":
            return model.lte[task.name].certainty(state)
        return confidence(model, logits, task)

    def run_exit(self, model, i, hidden, masks, task):
        """Run exit i. Shapes: hidden: one [p,c,d] per pass -> logits [p,o], whether each row leaves [p]."""
        state = model.state(i, hidden, masks, task)  # [p,w]
        logits = model.head(i, state, task)
        if i == model.depth:
            return logits, torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return logits, self.certainty(model, state, logits, task) >= self.thresholds[task.name]

    def __call__(self, model, batch, batch_size):
        """Predict a batch of any size, `batch_size` rows at a time. Shapes: outputs [b,o], executed layers [b]."""
        unfinished, left = Unfinished(model.masks(batch)), []
        for i in range(1, model.depth + 1):
            for part in unfinished.parts(batch_size):
                hidden, masks, used = unfinished.read(part)
                if i == 1:
                    hidden = model.embed(cut(batch, part))  # [p,c,d]: `cut` leaves out the columns that `read` does
                [(_, hidden)] = model.encode(hidden, masks, batch.task, i - 1, i)  # layer i alone
                logits, leaves = self.run_exit(model, i, hidden, masks, batch.task)
                leaving = leaves.nonzero().squeeze(-1)
                rows = unfinished.rows[part][leaving]  # an index copies, so `keep` cannot overwrite these
                left.append((rows, logits[leaving], torch.full_like(rows, i)))
                if i < model.depth:
                    unfinished.keep(part, (~leaves).nonzero().squeeze(-1), hidden, used)
        rows, outputs, layers = (torch.cat(pieces) for pieces in zip(*left, strict=True))
        order = rows.argsort()  # back into the order of the batch
        return outputs[order], layers[order]


# --- all exits of one full pass: choosing and scoring thresholds without running the model again ------------------


def every_exit(model, batch):
    """Run every layer once, and every exit. The confidence of a regression is NaN.

    Shapes: outputs [b,L,o], confidence [b,L], LTE [b,L].
    """
    task, exits = batch.task, range(1, model.depth + 1)
    predicted = model(batch, exits=tuple(exits))
    outputs = torch.stack([widen(predicted.logits[i]) for i in exits], dim=1)
    lte = torch.stack([model.lte[task.name].certainty(predicted.states[i]) for i in exits], dim=1)
    if task.is_regression:
        return outputs, torch.full_like(lte, torch.nan), lte
    return outputs, torch.stack([confidence(model, predicted.logits[i], task) for i in exits], dim=1), lte


@dataclass(frozen=True)
class AllExits:
    """The predictions and certainties of every exit for some rows of a task's dataset.

    Shapes: rows, labels [n]; values, confidence, lte [n,L].
    Units: values are class indices or label units.
    """

    task: object
    rows: np.ndarray
    labels: np.ndarray
    values: np.ndarray
    confidence: np.ndarray
    lte: np.ndarray

    def take(self, chosen):
        """The same for some of the rows: positions, or a boolean for each row."""
        parts = (self.rows, self.labels, self.values, self.confidence, self.lte)
        return AllExits(self.task, *(part[chosen] for part in parts))

    def certainty(self, policy):
        """The certainty that a policy compares with its threshold. Shapes: [n,L]."""
        return self.lte if policy == "lte" else self.confidence


@dataclass(frozen=True)
class ExitScores:
    """The task's metric, the mean number of executed layers, and the share of the rows that left at each exit [L]."""

    score: float
    mean_layers: float
    shares: np.ndarray


def first_exit(certainty, threshold):
    """The layer after which each row leaves. Shapes: certainty [n,L], threshold a number or [n] -> [n]."""
    # in the certainties' own precision, as ExitInference compares; [n,L] with [1,1] or [n,1]
    sure = certainty >= np.reshape(threshold, (-1, 1)).astype(certainty.dtype)
    sure[:, -1] = True
    return sure.argmax(1) + 1  # argmax returns the first True


def scores_at(task_exits, policy, threshold):
    """The ExitScores of leaving at a threshold. Shapes: threshold: a number, or [n] with one per row."""
    layers = first_exit(task_exits.certainty(policy), threshold)
    # the prediction of the exit where each row leaves: [n,1] to [n]
    values = np.take_along_axis(task_exits.values, layers[:, None] - 1, axis=1)[:, 0]
    shares = np.bincount(layers, minlength=task_exits.values.shape[1] + 1)[1:] / len(layers)
    return ExitScores(task_exits.task.metric.function(values, task_exits.labels), float(layers.mean()), shares)


def layer_scores(task_exits):
    """The score of each exit if all rows left there. Shapes: [L]."""
    return np.array([task_exits.task.metric.function(values, task_exits.labels) for values in task_exits.values.T])


# --- choosing thresholds ------------------------------------------------------------------------------------------


def candidates(task_exits, policy):
    """The thresholds to choose from, lowest first: quantiles of the certainties, and UNREACHABLE.

    Shapes: thresholds, normalised scores, mean layers: three arrays with one number for each candidate.
    """
    certainty = task_exits.certainty(policy)[:, :-1]  # not the last exit: a row that gets there leaves
    thresholds = (*np.unique(np.quantile(certainty, np.linspace(0, 1, CANDIDATES + 1))), UNREACHABLE)
    results = [scores_at(task_exits, policy, threshold) for threshold in thresholds]
    scores = [task_exits.task.metric.normalise(result.score) for result in results]
    return np.array(thresholds), np.array(scores), np.array([result.mean_layers for result in results])


def choose_thresholds(all_exits, policies, allowed_loss=ALLOWED_LOSS):
    """Choose the thresholds of all tasks, so that few layers run and the mean score stays almost that of full depth.

    Each task picks the threshold that maximises score - price * layers. The highest price is used that keeps the
    tasks' summed score at or above (1 - allowed_loss) of full depth's. All tasks pay the same price for a layer, so a
    task with good early exits saves more layers.
    `all_exits` is {task: AllExits}. Returns {task: threshold}.
    """
    offers = {name: candidates(task_exits, policies[name]) for name, task_exits in all_exits.items()}
    # the last candidate of a task is full depth
    floor = (1 - allowed_loss) * sum(scores[-1] for _, scores, _ in offers.values())
    for price in PRICES:
        picks = {name: int(np.argmax(scores - price * layers)) for name, (_, scores, layers) in offers.items()}
        # at the last price, 0, each task picks its best score: at least that of full depth
        if sum(offers[name][1][k] for name, k in picks.items()) >= floor:
            break
    return {name: float(offers[name][0][k]) for name, k in picks.items()}


def assign_folds(n, seed=0):
    """Draw the fold of each of n rows, a number from 0 to FOLDS - 1; all folds are about equally large. Shapes: [n]."""
    return np.random.default_rng(seed).permutation(np.arange(n) % FOLDS)


def cross_fit(all_exits, settings):
    """For each row the threshold that was chosen without the row's fold: {task: [n]}.

    The score of a row with such a threshold estimates the score of a new row: its own label had no part in the choice.
    A task whose threshold the settings fix has that threshold in all rows.
    """
    folds = {name: assign_folds(len(task_exits.rows)) for name, task_exits in all_exits.items()}
    thresholds = {name: np.empty(len(task_exits.rows)) for name, task_exits in all_exits.items()}
    for k in range(FOLDS):
        others = {name: task_exits.take(folds[name] != k) for name, task_exits in all_exits.items()}
        for name, threshold in settings.complete(others).items():
            thresholds[name][folds[name] == k] = threshold
    return thresholds


# --- flags and record ---------------------------------------------------------------------------------------------


def exit_threshold(text):
    """Read one --exit_threshold: a number, or None for auto."""
    return None if text == "auto" else at_least_zero(text)


def sweep_levels(entries):
    """The thresholds of a list with commas, which --option evaluate sweeps; an empty list for anything else."""
    if len(entries) != 1 or "," not in entries[0]:
        return []
    return [convert("--exit_threshold", entries[0], level, at_least_zero) for level in entries[0].split(",")]


def add_flags(group):
    """The flags of early exit."""
    group.add_argument(
        "--early_exit", action="store_true", help="train an exit after every layer, and use the exits at inference"
    )
    group.add_argument(
        "--exit_policy",
        choices=POLICIES,
        default="auto",
        help="the certainty that decides to leave; auto: confidence for classification, LTE for regression",
    )
    group.add_argument(
        "--exit_threshold",
        nargs="+",
        metavar="T",
        default=["auto"],
        help="leave at this certainty: a number, task=number, or auto (chosen on dev); "
        "with --option evaluate also a list to sweep, .5,.9,.99",
    )
    group.add_argument(
        "--exit_loss",
        choices=tuple(EXIT_WEIGHTS),
        default="joint",
        help="joint: all exits count alike; weighted: deeper ones more; alternating: the last one, then all; "
        "distilled: the last one teaches the others; two_stage: first the last one",
    )


def conflicts(flags, typed):
    """Flags that make no sense without --early_exit; --option evaluate reads it from the saved run."""
    evaluates, names = flags["option"] == "evaluate", ("exit_policy", "exit_threshold", "exit_loss")
    yield from belongs(typed, names, flags["early_exit"] or evaluates, "--early_exit")
    sentence = "--exit_threshold with a list sweeps a saved run: use it with --option evaluate"
    yield not evaluates and bool(sweep_levels(flags["exit_threshold"])), sentence


def needs(flags):
    """--early_exit needs an exit after every layer."""
    return {"exits"} if flags["early_exit"] else set()


def terms(flags, model, noise):
    """The loss terms of the LTE and of self-distillation, if they are on."""
    on = {"lte": LTELoss()} if flags["early_exit"] else {}
    return on | ({"distill": DistillLoss()} if flags["exit_loss"] == "distilled" else {})


def build_exit_settings(flags, tasks):
    """How the run leaves early at inference, or None."""
    if not flags["early_exit"]:
        return None
    thresholds = per_task(flags["exit_threshold"], "--exit_threshold", list(tasks), exit_threshold)
    return ExitSettings(choose_policies(tasks, flags["exit_policy"]), dict.fromkeys(tasks) | thresholds)


EXITS = Method("early exit (BERTer 3.3)", add_flags, conflicts, needs, terms, exit_settings=build_exit_settings)
