"""Checks of part losses: packing, losses, divergences, decoding."""

import torch

import tasks
from tokenizer import pack


def packing(draw):
    """Pack single texts and pairs, with and without a limit."""
    results = []
    for _ in range(2 + 5 * draw.size):
        first, second = ([draw.number(10, 99) for _ in range(draw.number(0, 3 + 2 * draw.size))] for _ in range(2))
        for other in (None, second):
            for limit in (None, 5 + draw.size):
                results.append(
                    (first, other, limit, pack(list(first), None if other is None else list(other), 1, 2, limit))
                )
    draw.show(first=str(results[0][0]), second=str(results[2][1]), limit=5 + draw.size, cls_id=1, sep_id=2)
    return {"ids, segment ids": "\n".join(f"{list(ids)} {list(types)}" for *_, (ids, types) in results)}


def gradient(function, logits, *others):
    """Return the gradient of the sum of a loss's values."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits, *others).sum(), logits)[0]


def with_gradients(cases):
    """Return the values and the gradients of {name: (function, logits, ...)}, as functions."""
    values = {name: lambda case=case: case[0](*case[1:]) for name, case in cases.items()}
    return values | {f"gradient of {name}": lambda case=case: gradient(*case) for name, case in cases.items()}


def losses(draw):
    """Compute each loss of a few examples."""
    b, classes = 1 + 2 * draw.size, draw.number(2, 3 + draw.size)
    logits, one = 2 * draw.normal(b, classes), draw.normal(b, 1)
    labels, binary = draw.numbers(0, classes - 1, b).double(), draw.numbers(0, 1, b).double()
    cosines, values = draw.uniform(-1, 1, b + 2, 1), draw.uniform(0, 5, b)
    sides = torch.cat([binary, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    draw.show(logits=logits, labels=labels, one_logit=one, binary=binary, values=values, cosines=cosines, sides=sides)
    cases = {
        "cross_entropy(logits, labels)": (tasks.cross_entropy, logits, labels),
        "binary_cross_entropy(one_logit, binary)": (tasks.binary_cross_entropy, one, binary),
        "binary_cross_entropy of large logits": (tasks.binary_cross_entropy, 100 * one, binary),
        "squared_error(one_logit, values)": (tasks.squared_error, one, values),
        "cosine_embedding(cosines, sides)": (tasks.cosine_embedding, cosines, sides),
    }
    half = {
        f"dtype of {function.__name__} for bfloat16 logits": lambda f=function, x=x, y=y: str(
            f(x.bfloat16(), y.float()).dtype
        )
        for function, x, y in cases.values()
    }
    return with_gradients(cases) | half


def divergences(draw):
    """Compute both divergences of a few pairs of outputs."""
    b, classes = 1 + 2 * draw.size, draw.number(2, 3 + draw.size)
    p, q, one, other = draw.normal(b, classes), draw.normal(b, classes), draw.normal(b, 1), draw.normal(b, 1)
    draw.show(p_logits=p, q_logits=q, p_logit=one, q_logit=other)
    cases = {
        "softmax_divergence": (tasks.softmax_divergence, p, q),
        "bernoulli_divergence": (tasks.bernoulli_divergence, one, other),
        "softmax_divergence of large logits": (tasks.softmax_divergence, 100 * p, 100 * q),
        "bernoulli_divergence of large logits": (tasks.bernoulli_divergence, 100 * one, 100 * other),
    }
    # the penalty of SMART sends a gradient through both outputs
    both = {
        f"gradient of {function.__name__} to the second output": lambda f=function, x=x, y=y: gradient(
            lambda z, first: f(first, z), y, x
        )
        for function, x, y in cases.values()
    }
    half = {
        f"dtype of {function.__name__} for bfloat16 logits": lambda f=function, x=x, y=y: str(
            f(x.bfloat16(), y.bfloat16()).dtype
        )
        for function, x, y in cases.values()
    }
    return with_gradients(cases) | both | half


def decoding(draw):
    """Decode classes, and scores at, below and above a threshold."""
    b, threshold = 2 + 2 * draw.size, 0.5 if draw.size == 0 else draw.uniform(0.1, 0.9)
    logits = draw.normal(b, draw.number(2, 3 + draw.size))
    scores = torch.cat([draw.uniform(0, 1, b), torch.tensor([0.0, threshold, 1.0], dtype=torch.float64)])
    draw.show(logits=logits, scores=scores, threshold=threshold)
    return {
        "predictions of decode_softmax": lambda: tasks.decode_softmax(logits)[0],
        "probabilities of decode_softmax": lambda: tasks.decode_softmax(logits)[1],
        "is bool": lambda: str(tasks.decide(scores, threshold)[0].dtype == torch.bool),
        "dtype of probabilities for bfloat16": lambda: str(tasks.decode_softmax(logits.bfloat16())[1].dtype),
        "predictions of decide": lambda: tasks.decide(scores, threshold)[0],
        "probabilities of decide": lambda: tasks.decide(scores, threshold)[1],
        "predictions of decide with threshold .3": lambda: tasks.decide(scores, 0.3)[0],
        "probabilities of decide with threshold .3": lambda: tasks.decide(scores, 0.3)[1],
    }
