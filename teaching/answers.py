"""Answers to the exercises of walkthrough.py. answers.md answers the questions of the handout. No starter has the two.

An answer is a function that computes it, with the reason in its docstring. tests/test_reading.py checks each
answer against an independent computation.
"""

import math
from collections import Counter

import numpy as np


def exercise_1(word, vocab):
    """Pieces of a word. "unwatchable" becomes un ##watch ##able: at each place the longest piece of the vocabulary.

    Without ##able the entire word is [UNK]: after "unwatch" the longest piece is ##a, and nothing continues with "ble".
    The tokenizer does not go back to try ##wat.
    """
    pieces, rest = [], word
    while rest:
        prefix = "##" if pieces else ""
        fitting = [rest[:n] for n in range(1, len(rest) + 1) if prefix + rest[:n] in vocab]
        if not fitting:
            return ["[UNK]"]
        pieces.append(prefix + max(fitting, key=len))
        rest = rest[len(max(fitting, key=len)) :]
    return pieces


def exercise_2(V, P, d, f, L):
    """Parameters of a BERT with two segments.

    Embeddings: V d + P d + 2 d, and LayerNorm 2 d. Each layer: query, key, value and output 4 (d d + d), two
    LayerNorms 4 d, and the feed-forward network d f + f + f d + d. Pooler: d d + d.
    """
    layer = 4 * (d * d + d) + 4 * d + 2 * d * f + f + d
    return (V + P + 2) * d + 2 * d + L * layer + d * d + d


def exercise_3(k):
    """Variance of a score before and after the division by sqrt(k).

    Each of the k products has mean 0 and variance 1, and they are independent, so the sum has variance k. The division
    by sqrt(k) makes it 1. Without it most of the weight of a softmax goes to one token, and the gradients of the other
    tokens are almost 0.
    """
    return k, k / math.sqrt(k) ** 2


def exercise_4(states, i, j):
    """What swapping tokens i and j does to the hidden states without position embeddings: it swaps rows i and j.

    Attention adds over all tokens and does not see their order, and everything else treats each token alone. So a BERT
    without positions cannot tell "dog bites man" from "man bites dog".
    """
    swapped = states.clone()
    swapped[:, [i, j]] = states[:, [j, i]]
    return swapped


def exercise_5(gradient, rate, eps=1e-6):
    """Size of AdamW's first step: rate * |g| / (|g| + eps / sqrt(1 - beta2)), so almost the learning rate.

    m / sqrt(v) is (1 - beta1) g / (sqrt(1 - beta2) |g|), and the correction removes both factors. So the step has the
    sign of the gradient but hardly its size. Gradient descent would step rate * |g|, which differs as the gradients do.
    """
    return rate * abs(gradient) / (abs(gradient) + eps / math.sqrt(1 - 0.999))


def exercise_6(rate, beta1=0.9, beta2=0.999):
    """Size of the first step without bias correction: rate (1 - beta1) / sqrt(1 - beta2), 3.16 times the rate."""
    return rate * (1 - beta1) / math.sqrt(1 - beta2)


def exercise_7(confidences, threshold):
    """Layers that each sentence runs, and the share of layers saved.

    At threshold .7: 2, 4 and 1 layers, so 7 of 12. 5 of 12 layers are saved, 42%. The second sentence is never sure
    enough and runs all layers.
    """
    layers = [next((i for i, c in enumerate(row, 1) if c >= threshold), len(row)) for row in confidences]
    return layers, 1 - sum(layers) / (len(confidences) * len(confidences[0]))


def exercise_8(sst, para):
    """Scores of constant predictions: the share of the most frequent class, correlation 0, and the norm.

    On the sample: SST .20, Quora .58. A constant has no correlation with anything, which counts as 0, and (0 + 1) / 2
    is .5. So the norm is (.20 + .58 + .5) / 3 = .427: compare a trained model with that, not with 0.
    """
    most_frequent = [Counter(labels).most_common(1)[0][1] / len(labels) for labels in (sst, para)]
    return (*most_frequent, float(np.mean([*most_frequent, 0.5])))
