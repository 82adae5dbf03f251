"""The task table: all that differs between sentiment (SST, CFIMDB), paraphrase (Quora) and similarity (STS).

One row holds what a task reads, optimises, predicts and reports. The model, the training loop, SMART and the exits
take it from the row and never compare a task's name. METHODS.md adds a row for a task of your own.

How a task learns is an `Objective`; a row may offer several, and `--para_loss` or `--sts_loss` chooses one:

    objective    outputs  loss                            divergence                        prediction
    classes      K        cross entropy                   symmetrised KL of the softmax     argmax
    bernoulli    1        binary cross entropy            symmetrised Bernoulli KL          p > 1/2
    fraction     1        squared error against 0 or 1    squared difference                output > 1/2
    value        1        squared error against label     squared difference                output, in the label's units
    cosine       1        cosine embedding loss           squared difference                (cos + 1) / 2 > threshold
    cosine value 1        (cos - label / 5)^2             squared difference                5 cos

The divergence compares two outputs for the same input; SMART and Bregman call it l_s. The symmetrised KL has a short
form: KL(p|q) + KL(q|p) = sum_k (p_k - q_k)(log p_k - log q_k). For a Bernoulli pair it is (p - q)(logit p - logit q).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from errors import InputError

ENCODINGS = ("concat", "embed_concat", "siamese")


@dataclass(frozen=True)
class Metric:
    """A score of predictions, `function(values [n], labels [n]) -> float`, from `low` to `high` (no mistakes)."""

    name: str
    function: Callable
    low: float = 0.0
    high: float = 1.0

    def normalise(self, value):
        """Map the metric's range to 0..1, as the dev score `norm` averages it."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Objective:
    """How a task learns and predicts.

    Shapes: `loss(logits [b,o], labels [b])` and `divergence(logits, logits)` return [b];
        `decode(logits, threshold)` returns (predictions [b], probabilities [b,classes], or None for a regression);
        `make_head(w)` makes the module [b,w] -> [b,o].
    """

    loss: Callable
    divergence: Callable
    decode: Callable
    make_head: Callable
    start: float = 0.0  # a new head's bias, so its first output
    head_dropout: bool = True  # a cosine has none: dropout would multiply it by 1 - p, in training only
    fits_threshold: bool = False  # whether the decision threshold is fitted on training rows
    needs_two_vectors: bool = False  # whether the head compares two sentence vectors (siamese pairs)


@dataclass(frozen=True)
class Task:
    """One row of the table.

    `labels` are the class names in the order of the labels 0, 1, ..., or the (lowest, highest) label of a regression.
    `epoch_rows` is {data split: function(task name, {task: rows}) -> rows of this task in an epoch}; absent splits use
    all rows.
    """

    name: str
    title: str
    files: str  # CSV file name with {} for the split
    columns: tuple[str, ...]  # one text column, or the two of a pair
    label_column: str
    labels: tuple
    output: tuple[str, str]  # header line and number format of the course's prediction files
    metric: Metric
    objectives: dict  # {name: Objective}, the default first; in a run's table only the chosen one is left
    encoding: str = "single"
    siamese_features: str = "uvd"
    epoch_rows: dict = field(default_factory=dict)

    @property
    def default_loss(self):
        """The name of the first objective."""
        return next(iter(self.objectives))

    @property
    def objective(self):
        """The objective of the default loss; in a run's table it is the chosen one."""
        return self.objectives[self.default_loss]

    @property
    def is_pair(self):
        """Whether an example is a pair of texts."""
        return len(self.columns) == 2

    @property
    def is_regression(self):
        """Whether labels are real numbers: no classes, no probabilities."""
        return not isinstance(self.labels[0], str)

    @property
    def label_names(self):
        """The names of the classes; none for a regression."""
        return () if self.is_regression else self.labels

    @property
    def label_range(self):
        """The lowest and the highest label."""
        return self.labels if self.is_regression else (0, len(self.labels) - 1)

    def file(self, split):
        """Name of this task's CSV file; split is train, dev or test."""
        return self.files.format("test-student" if split == "test" else split)

    def format(self, value):
        """A prediction as the course's files write it: 3, 1.0 or 4.1270."""
        return format(value, self.output[1])


# --- metrics: predictions [n], labels [n] -> float ----------------------------------------------------------------
# The libraries are imported at the first evaluation, because loading them would delay the first training step.


def accuracy(values, labels):
    """Share of right predictions."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, values))


def matthews(values, labels):
    """Matthews correlation of two classifications; 0 where either is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, values))


def correlation(function, values, labels):
    """A correlation of scipy.stats; 0 where either side is constant and it is not defined."""
    x, y = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    # comparing with `not ... >` also catches a NaN among the numbers
    if not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return 0.0
    return float(function(x, y).statistic)


def pearson(values, labels):
    """Pearson correlation; 0 where either side is constant."""
    from scipy.stats import pearsonr

    return correlation(pearsonr, values, labels)


def spearman(values, labels):
    """Spearman's rank correlation; 0 where either side is constant."""
    from scipy.stats import spearmanr

    return correlation(spearmanr, values, labels)


ACCURACY = Metric("accuracy", accuracy)
MATTHEWS = Metric("matthews", matthews, low=-1.0)
PEARSON = Metric("pearson", pearson, low=-1.0)
SPEARMAN = Metric("spearman", spearman, low=-1.0)


# --- losses: logits [b,o], labels [b] -> [b], always in float32 or better -----------------------------------------


def widen(x):
    """Lift 16-bit numbers to float32: near 1, bf16 has steps of .004."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits, labels):
    """-log p[label]."""
    return F.cross_entropy(widen(logits), labels.long(), reduction="none")


def binary_cross_entropy(logits, labels):
    """-log p(label) for one logit."""
    logits = widen(logits).squeeze(-1)  # [b,1] to [b]
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")


def squared_error(logits, labels):
    """(output - label)^2. Units: the label's, squared."""
    output = widen(logits).squeeze(-1)  # [b,1] to [b]
    return (output - labels.to(output.dtype)) ** 2


def cosine_squared_error(high):
    """Make the loss (cos - label / high)^2, whose target lies in [0, 1].

    Source: Reimers and Gurevych (2019), Sentence-BERT, section 3, regression objective.
    """

    def loss(logits, labels):
        cosine = widen(logits).squeeze(-1)  # [b,1] to [b]
        return (cosine - labels.to(cosine.dtype) / high) ** 2

    return loss


def cosine_embedding(logits, labels):
    """1 - cos for label 1, max(0, cos) for label 0.

    Source: BERTer 3.1.
    Differs: the paper states no margin; here it is 0, the default of the usual libraries.
    """
    cosine = widen(logits).squeeze(-1)  # [b,1] to [b]
    return torch.where(labels > 0.5, 1 - cosine, cosine.clamp(min=0))


# --- divergences: two sets of logits [b,o] -> [b] -----------------------------------------------------------------


def softmax_divergence(p_logits, q_logits):
    """KL(p|q) + KL(q|p) of two softmax distributions."""
    log_p, log_q = (widen(x).log_softmax(-1) for x in (p_logits, q_logits))  # over the classes: [b,o]
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def bernoulli_divergence(p_logits, q_logits):
    """KL(p|q) + KL(q|p) of two Bernoulli distributions; a softmax over one logit would always give 0."""
    p, q = widen(p_logits).squeeze(-1), widen(q_logits).squeeze(-1)  # the logits: [b,1] to [b]
    side = torch.where(p > 0, -1.0, 1.0)  # sigmoid(x) loses digits near 1: for p > 0, -p and -q are compared
    return ((side * p).sigmoid() - (side * q).sigmoid()) * side * (p - q)


def squared_difference(p_outputs, q_outputs):
    """Squared difference of two outputs."""
    return ((widen(p_outputs) - widen(q_outputs)) ** 2).squeeze(-1)  # [b,1] to [b]


# --- decoding: logits [b,o] -> (predictions [b], probabilities [b,classes] or None) -------------------------------
# only two classes with one logit have a decision threshold; the other decoders ignore it


def decode_softmax(logits, threshold=0.5):
    """Returns (the most probable class, the probabilities of all classes)."""
    probabilities = widen(logits).softmax(-1)  # over the classes: [b,o]
    return probabilities.argmax(-1).to(probabilities.dtype), probabilities


def decide(score, threshold):
    """Turn a score in [0, 1] and a decision threshold into (prediction, [1 - p, p]) with p = 1/2 at the threshold.

    The score is stretched linearly on either side of the threshold. Then the more probable class is the predicted
    one, and its probability serves the exits as a confidence.
    """
    below = score / (2 * threshold)  # from 0 to 1/2
    above = 0.5 + (score - threshold) / (2 * (1 - threshold))  # from 1/2 to 1
    p = torch.where(score < threshold, below, above).clamp(0, 1)  # a cosine may round to above 1
    return (p > 0.5).to(p.dtype), torch.stack([1 - p, p], dim=-1)  # [b], [b,2]


def decode_bernoulli(logits, threshold=0.5):
    """1 where the sigmoid of the logit is above the threshold."""
    return decide(widen(logits).squeeze(-1).sigmoid(), threshold)


def decode_fraction(logits, threshold=0.5):
    """1 where a regressed 0/1 label is above the threshold."""
    return decide(widen(logits).squeeze(-1).clamp(0, 1), threshold)


def decode_cosine(logits, threshold=0.5):
    """1 where (cos + 1) / 2 is above the threshold, which is fitted because almost all cosines are above 0."""
    return decide((widen(logits).squeeze(-1) + 1) / 2, threshold)


def decode_value(low, high, scale=1.0):
    """Make a decoder for a regression: scale times the output, clamped to the labels' range.

    Differs: the papers do not clamp. Predictions are clamped before Pearson's r and in the prediction files.
    """

    def decode(logits, threshold=0.5):
        return (widen(logits).squeeze(-1) * scale).clamp(low, high), None  # [b,1] to [b]

    return decode


# --- heads and objectives -----------------------------------------------------------------------------------------


class CosineHead(nn.Module):
    """The cosine of the two halves of a siamese state: a head without parameters.

    Shapes: [b,w] -> [b,1].
    Source: BERTer 3.1 (cosine embedding loss).
    """

    def forward(self, state):
        u, v = widen(state).chunk(2, dim=-1)  # the two sentence vectors, [b,w/2] each
        return F.cosine_similarity(u, v, dim=-1).unsqueeze(-1)  # [b] to [b,1]


def linear_head(outputs):
    """Make the function that makes a linear head for a state of a given width."""
    return lambda width: nn.Linear(width, outputs)


def cosine_head(width):
    """Make a cosine head; it has no parameters, so the width does not matter."""
    return CosineHead()


def classes(names):
    """The objective of a task with a linear output per class."""
    return Objective(cross_entropy, softmax_divergence, decode_softmax, linear_head(len(names)))


BERNOULLI = Objective(binary_cross_entropy, bernoulli_divergence, decode_bernoulli, linear_head(1))
FRACTION = Objective(squared_error, squared_difference, decode_fraction, linear_head(1), start=0.5)
COSINE_SETTINGS = {"head_dropout": False, "needs_two_vectors": True}
COSINE = Objective(
    cosine_embedding, squared_difference, decode_cosine, cosine_head, fits_threshold=True, **COSINE_SETTINGS
)


def value(low, high):
    """The objective of a regression.

    The head starts at the middle of the labels. Started at 0, it drags the shared layers towards the labels' mean
    before they learn the labels' order.
    """
    start = (low + high) / 2
    return Objective(squared_error, squared_difference, decode_value(low, high), linear_head(1), start=start)


def cosine_value(high):
    """The objective of a regression on a cosine: label / high is the target, high times the cosine the prediction."""
    decode = decode_value(0.0, high, high)
    return Objective(cosine_squared_error(high), squared_difference, decode, cosine_head, **COSINE_SETTINGS)


# --- the table ----------------------------------------------------------------------------------------------------


def as_many_as(other):
    """Make an entry of epoch_rows: as many rows as the task `other` has, but at most all rows of the task itself.

    A run without that task takes as many as its smallest task has.
    """
    return lambda name, sizes: min(sizes[name], sizes.get(other, min(sizes.values())))


def one_part_of(parts):
    """Make an entry of epoch_rows: one of `parts` equal parts of the task's rows."""
    return lambda name, sizes: math.ceil(sizes[name] / parts)


def sentiment(name, title, files, labels):
    """A row for the sentiment of single sentences."""
    return Task(
        name=name,
        title=title,
        files=files,
        columns=("sentence",),
        label_column="sentiment",
        labels=labels,
        output=("id \t Predicted_Sentiment ", ".0f"),
        metric=ACCURACY,
        objectives={"ce": classes(labels)},
    )


SENTIMENTS = ("negative", "somewhat negative", "neutral", "somewhat positive", "positive")
TASKS = {
    "sst": sentiment("sst", "SST sentiment", "ids-sst-{}.csv", SENTIMENTS),
    "cfimdb": sentiment("cfimdb", "CFIMDB sentiment", "ids-cfimdb-{}.csv", ("negative", "positive")),
    "para": Task(
        name="para",
        title="Quora paraphrase",
        files="quora-{}.csv",
        columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        labels=("not a paraphrase", "paraphrase"),
        output=("id \t Predicted_Is_Paraphrase ", ".1f"),
        metric=ACCURACY,
        objectives={"bce": BERNOULLI, "mse": FRACTION, "cosine": COSINE},
        # SMARTer BERT 5.3.2 cuts Quora into 17 parts of 8,328 rows, about as many as SST has.
        # Differs: here the number of SST rows is taken, because the Quora file may be smaller.
        epoch_rows={"equal": as_many_as("sst"), "proportional": as_many_as("sst")},
    ),
    "sts": Task(
        name="sts",
        title="STS similarity",
        files="sts-{}.csv",
        columns=("sentence1", "sentence2"),
        label_column="similarity",
        labels=(0.0, 5.0),
        output=("id \t Predicted_Similiary ", ".4f"),  # the course's spelling
        metric=PEARSON,
        objectives={"mse": value(0.0, 5.0), "cosine": cosine_value(5.0)},
        # SMARTer BERT 5.3.2: 17 parts. Differs: 6,040 / 17 is rounded up to 356 rows, the paper has 355.
        epoch_rows={"proportional": one_part_of(17)},
    ),
}


def check_row(task):
    """Check that the fields of a task fit together, before a run depends on them.

    Raises: InputError that names the task and the field.
    """
    where = f"task {task.name}"
    low, high = task.label_range
    if "{}" not in task.files:
        raise InputError(f"{where}: files {task.files!r} has no {{}} for the split: add it")
    if len(task.columns) not in (1, 2) or not low < high:
        raise InputError(f"{where}: give one or two text columns, and at least two classes or a range of labels")
    labels = torch.tensor([low, high, low], dtype=torch.float32)
    if not (callable(task.metric.function) and task.metric.low < task.metric.high):
        raise InputError(f"{where}: metric {task.metric.name} needs a function and a range from low to high")
    # a head and its outputs on three random states; the fork leaves the run's own random numbers alone
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        objective = task.objective
        logits = objective.make_head(4)(torch.randn(3, 4))
        values, probabilities = objective.decode(logits, 0.5)
    for name, result in (
        ("loss", objective.loss(logits, labels)),
        ("divergence", objective.divergence(logits, logits)),
        ("decode", values),
    ):
        if result.shape != (3,):
            raise InputError(f"{where}: {name} returns {list(result.shape)} for 3 examples: one number each is needed")
    if not bool(((values >= low) & (values <= high)).all()):
        raise InputError(f"{where}: decode returns values outside the labels {low:g} to {high:g}")
    if not task.is_regression and tuple(probabilities.shape) != (3, len(task.label_names)):
        raise InputError(f"{where}: decode must return a probability for each of the {len(task.label_names)} classes")


def check_choice(flag, chosen, choices):
    """Fail where a flag has an unknown value."""
    if chosen not in choices:
        raise InputError(f"{flag} {chosen}: unknown; choose from {', '.join(choices)}")


def headless_losses(flags):
    """The chosen losses that compare two sentence vectors, so no head trains: ["--sts_loss cosine"]."""
    rows = [TASKS[name] for name in flags["tasks"]]
    chosen = [(row, flags.get(f"{row.name}_loss", row.default_loss)) for row in rows]
    return [f"--{row.name}_loss {loss}" for row, loss in chosen if row.objectives[loss].needs_two_vectors]


def build_tasks(names=("sst", "para", "sts"), pairs=None, siamese_features="uvd", losses=None):
    """Make the table of a run: {name: Task} in the order of names.

    `pairs` is {pair task: encoding} (BERTer 3.4), concat where it is absent; `losses` is {task: objective's name}.
    Raises: InputError for an unknown task, encoding, feature set or loss, and for a cosine on a pair that is not
        siamese.
    """
    pairs, losses, tasks = pairs or {}, losses or {}, {}
    check_choice("--siamese_features", siamese_features, ("uvd", "uv"))
    for name in pairs:
        check_choice("--pairs", name, [task.name for task in TASKS.values() if task.is_pair])
    for name in names:
        check_choice("--tasks", name, TASKS)
        row = TASKS[name]
        loss = losses.get(name) or row.default_loss
        check_choice(f"--{name}_loss", loss, row.objectives)
        objective = row.objectives[loss]
        encoding = pairs.get(name, "concat") if row.is_pair else "single"
        check_choice(f"--pairs {name}", encoding, ENCODINGS if row.is_pair else ("single",))
        if objective.needs_two_vectors and encoding != "siamese":
            raise InputError(
                f"--{name}_loss {loss} compares two sentence vectors, but {name} pairs are encoded as {encoding}: "
                f"add --pairs {name}=siamese"
            )
        tasks[name] = replace(
            row,
            encoding=encoding,
            objectives={loss: objective},
            siamese_features="uv" if objective.needs_two_vectors else siamese_features,
        )
        check_row(tasks[name])
    return tasks
