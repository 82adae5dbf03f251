"""The task table: what each task reads, outputs, optimises and reports. Read first: nothing.

Everything that differs between sentiment (SST, CFIMDB), paraphrase (Quora) and similarity (STS) is a row here,
so that the model, the training loop, SMART and the exits never ask which task they are looking at.
`build_tasks` makes the table of a run, since the flags for losses and pair encodings change rows.

    kind         outputs  loss                            divergence                        prediction
    classes      K        cross entropy                   symmetrised KL of the softmax     argmax
    bernoulli    1        binary cross entropy            symmetrised Bernoulli KL          p > 1/2
    fraction     1        squared error against 0 or 1    squared difference                output > 1/2
    value        1        squared error against label     squared difference                output, in the label's units
    cosine       1        cosine embedding loss           squared difference                (cos + 1) / 2 > threshold
    cosine value 1        (cos - label / 5)^2             squared difference                5 cos

A symmetrised KL needs no case distinction and no clamping when it is written with the logarithms it is made of:
KL(p|q) + KL(q|p) = sum_k (p_k - q_k)(log p_k - log q_k); for a Bernoulli pair that is (p - q)(logit p - logit q).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from errors import InputError

TASK_NAMES = ("sst", "cfimdb", "para", "sts")
ENCODINGS = ("concat", "embed_concat", "siamese")


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Shapes: `loss(logits [b, outputs], labels [b])` and `divergence(logits, logits)` give [b];
        `decode(logits, threshold)` gives (predictions [b], probabilities [b, classes] or None for a regression).
    """

    name: str
    title: str
    files: str
    columns: tuple[str, ...]
    label_column: str
    label_range: tuple[float, float]
    label_names: tuple[str, ...]
    outputs: int
    encoding: str
    metric: str
    header: str
    loss: Callable
    divergence: Callable
    decode: Callable
    make_head: Callable
    siamese_features: str = "uvd"
    fit_threshold: bool = False
    start: float = 0.0  # what a fresh head answers: its bias
    head_dropout: bool = True  # whether dropout comes before the head: a cosine would shrink by 1 - p, in training only

    @property
    def is_regression(self):
        """Whether labels are real numbers (no classes, no probabilities)."""
        return not self.label_names

    def file(self, split):
        """Name of this task's CSV file; split is train, dev or test."""
        return self.files.format("test-student" if split == "test" else split)


class CosineHead(nn.Module):
    """The cosine of the two halves of a siamese state: a head without parameters.

    Shapes: [b, 2 w] -> [b, 1].
    Source: BERTer 3.1 (cosine embedding loss).
    """

    def forward(self, state):
        u, v = widen(state).chunk(2, dim=-1)
        return F.cosine_similarity(u, v, dim=-1).unsqueeze(-1)


# --- losses: logits [b, outputs], labels [b] -> [b], always in float32 or better ---------------------------------


def widen(x):
    """Lift half precision to float32: a loss in bf16 has steps of .004 near 1."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits, labels):
    """-log p[label]."""
    return F.cross_entropy(widen(logits), labels.long(), reduction="none")


def binary_cross_entropy(logits, labels):
    """-log p(label) for one logit."""
    logits = widen(logits).squeeze(-1)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")


def squared_error(logits, labels):
    """(output - label)^2, in the label's units."""
    output = widen(logits).squeeze(-1)
    return (output - labels.to(output.dtype)) ** 2


def cosine_squared_error(high):
    """Make a loss (cos - label / high)^2, so that the target lies in [0, 1].

    Source: Reimers and Gurevych (2019), Sentence-BERT, section 3, regression objective.
    """

    def loss(logits, labels):
        cosine = widen(logits).squeeze(-1)
        return (cosine - labels.to(cosine.dtype) / high) ** 2

    return loss


def cosine_embedding(margin):
    """Make the cosine embedding loss: 1 - cos for label 1, max(0, cos - margin) for label 0.

    Source: BERTer 3.1, which gives neither the margin nor the cosine above which it says "paraphrase".
    """

    def loss(logits, labels):
        cosine = widen(logits).squeeze(-1)
        return torch.where(labels > 0.5, 1 - cosine, (cosine - margin).clamp(min=0))

    return loss


# --- divergences: two sets of logits [b, outputs] -> [b]; what SMART and Bregman call l_s -------------------------


def softmax_divergence(p_logits, q_logits):
    """KL(p|q) + KL(q|p) of two softmax distributions (SMART's l_s for classification)."""
    log_p, log_q = (widen(x).log_softmax(-1) for x in (p_logits, q_logits))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def bernoulli_divergence(p_logits, q_logits):
    """KL(p|q) + KL(q|p) of two Bernoulli distributions; a softmax over one logit would always give 0."""
    p, q = widen(p_logits).squeeze(-1), widen(q_logits).squeeze(-1)
    return (p.sigmoid() - q.sigmoid()) * (p - q)


def squared_difference(p_outputs, q_outputs):
    """Squared difference of two outputs (SMART's l_s for regression)."""
    return ((widen(p_outputs) - widen(q_outputs)) ** 2).squeeze(-1)


# --- decoding: logits -> (predictions [b], probabilities [b, classes] or None) ------------------------------------


def decode_softmax(logits, threshold=0.5):
    """The most probable class."""
    probabilities = widen(logits).softmax(-1)
    return probabilities.argmax(-1).to(probabilities.dtype), probabilities


def decide(positive, threshold):
    """Turn a score in [0, 1] and a decision threshold into (prediction, [1 - p, p]) with p = 1/2 at the threshold.

    The score is stretched linearly on either side of the threshold, so that the most probable class is the
    predicted one and the larger probability serves the exits as a confidence.
    """
    below = 0.5 * positive / threshold
    above = 0.5 + 0.5 * (positive - threshold) / (1 - threshold)
    p = positive if threshold == 0.5 else torch.where(positive < threshold, below, above)
    return (p > 0.5).to(p.dtype), torch.stack([1 - p, p], dim=-1)


def decode_bernoulli(logits, threshold=0.5):
    """1 where the sigmoid of the logit is above the threshold."""
    return decide(widen(logits).squeeze(-1).sigmoid(), threshold)


def decode_fraction(logits, threshold=0.5):
    """1 where a regressed 0/1 label is above the threshold."""
    return decide(widen(logits).squeeze(-1).clamp(0, 1), threshold)


def decode_cosine(logits, threshold=0.5):
    """1 where (cos + 1) / 2 is above the threshold, which is fitted on training data (cos > 0 says yes always)."""
    return decide((widen(logits).squeeze(-1) + 1) / 2, threshold)


def decode_value(low, high, scale):
    """Make a decoder for a regression: scale times the output, held inside the label's range."""

    def decode(logits, threshold=0.5):
        return (widen(logits).squeeze(-1) * scale).clamp(low, high), None

    return decode


# --- the table ----------------------------------------------------------------------------------------------------


def linear_head(outputs):
    """Make the function that makes a linear head for a state of the given width."""
    return lambda width: nn.Linear(width, outputs)


def cosine_head(width):
    """Make a cosine head; any width will do."""
    return CosineHead()


def sentiment(name, title, files, label_names):
    """A row for single-sentence sentiment with the given class names."""
    classes = dict(loss=cross_entropy, divergence=softmax_divergence, decode=decode_softmax)
    return Task(
        name=name,
        title=title,
        files=files,
        columns=("sentence",),
        label_column="sentiment",
        label_range=(0, len(label_names) - 1),
        label_names=label_names,
        outputs=len(label_names),
        encoding="single",
        metric="accuracy",
        header="id \t Predicted_Sentiment ",
        make_head=linear_head(len(label_names)),
        **classes,
    )


PARA_LOSSES = {
    "bce": lambda margin: dict(
        loss=binary_cross_entropy,
        divergence=bernoulli_divergence,
        decode=decode_bernoulli,
        make_head=linear_head(1),
    ),
    "mse": lambda margin: dict(
        start=0.5,
        loss=squared_error,
        divergence=squared_difference,
        decode=decode_fraction,
        make_head=linear_head(1),
    ),
    "cosine": lambda margin: dict(
        loss=cosine_embedding(margin),
        divergence=squared_difference,
        decode=decode_cosine,
        make_head=cosine_head,
        head_dropout=False,
        siamese_features="uv",
        fit_threshold=True,
    ),
}
STS_LOSSES = {
    # a head that starts at 0 drags the shared layers towards the labels' mean before it learns their order
    "mse": lambda high: dict(
        start=high / 2,
        loss=squared_error,
        divergence=squared_difference,
        decode=decode_value(0.0, high, 1.0),
        make_head=linear_head(1),
    ),
    "cosine": lambda high: dict(
        loss=cosine_squared_error(high),
        divergence=squared_difference,
        decode=decode_value(0.0, high, high),
        make_head=cosine_head,
        head_dropout=False,
        siamese_features="uv",
    ),
}


def check_choice(flag, value, choices):
    """Fail where a flag has a value that it does not know."""
    if value not in choices:
        raise InputError(f"{flag} {value}: unknown; choose from {', '.join(choices)}")


def build_tasks(
    names=("sst", "para", "sts"),
    pairs=None,
    siamese_features="uvd",
    para_loss="bce",
    sts_loss="mse",
    cosine_margin=0.0,
):
    """Make the table of a run: {name: Task} in the order of names.

    `pairs` maps a pair task to its encoding (BERTer 3.4): concat where it says nothing.
    Raises: InputError for an unknown task, encoding, feature set or loss, for a margin that is no cosine, and for
        a cosine loss on a pair that is not siamese.
    """
    pairs = pairs or {}
    for name, encoding in pairs.items():
        check_choice("--pairs", name, ("para", "sts"))
        check_choice(f"--pairs {name}", encoding, ENCODINGS)
    check_choice("--siamese_features", siamese_features, ("uvd", "uv"))
    check_choice("--para_loss", para_loss, PARA_LOSSES)
    check_choice("--sts_loss", sts_loss, STS_LOSSES)
    if not -1 <= cosine_margin < 1:
        raise InputError(f"--cosine_margin {cosine_margin}: not a cosine; give a number from -1 to below 1")
    rows = {
        "sst": sentiment(
            "sst",
            "SST sentiment",
            "ids-sst-{}.csv",
            ("negative", "somewhat negative", "neutral", "somewhat positive", "positive"),
        ),
        "cfimdb": sentiment("cfimdb", "CFIMDB sentiment", "ids-cfimdb-{}.csv", ("negative", "positive")),
        "para": Task(
            name="para",
            title="Quora paraphrase",
            files="quora-{}.csv",
            columns=("sentence1", "sentence2"),
            label_column="is_duplicate",
            label_range=(0, 1),
            label_names=("not a paraphrase", "paraphrase"),
            outputs=1,
            encoding=pairs.get("para", "concat"),
            metric="accuracy",
            header="id \t Predicted_Is_Paraphrase ",
            **{"siamese_features": siamese_features, **PARA_LOSSES[para_loss](cosine_margin)},
        ),
        "sts": Task(
            name="sts",
            title="STS similarity",
            files="sts-{}.csv",
            columns=("sentence1", "sentence2"),
            label_column="similarity",
            label_range=(0, 5),
            label_names=(),
            outputs=1,
            encoding=pairs.get("sts", "concat"),
            metric="pearson",
            header="id \t Predicted_Similiary ",
            **{"siamese_features": siamese_features, **STS_LOSSES[sts_loss](5.0)},
        ),
    }
    for name in names:
        check_choice("--tasks", name, rows)
    tasks = {name: rows[name] for name in names}
    for task in tasks.values():
        if task.make_head is cosine_head and task.encoding != "siamese":
            raise InputError(
                f"--{task.name}_loss cosine compares two sentence vectors, but {task.name} pairs are encoded "
                f"as {task.encoding}: add --pairs {task.name}=siamese"
            )
    return tasks
