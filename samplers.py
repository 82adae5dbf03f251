"""Which rows an epoch uses and which task comes next: pure functions of a seed. Read first: nothing.

Nothing here holds state: what epoch 3 does follows from (seed, 3), so a resumed run needs no saved iterator.

Data splitting (SMARTer BERT 5.3.2). The largest task drowns the others unless an epoch takes only a part of it:
    full          every row of every task
    equal         "split1": paraphrase gives as many rows as SST has, the next part of a shuffled order in each epoch
    proportional  "split2": similarity gives a seventeenth besides, the paper's number of parts
Task order. `sequential` is BERTer's baseline (one task after the other); `round_robin` and `random` interleave
the same batches; `proportional`, `sqrt` and `annealed` draw the task of each step with probability p ~ N^alpha
(alpha 1, 1/2, and 1 - .8 (e-1)/(E-1) in epoch e of E, Stickland and Murray 2019), so that a task's batches may be
used more than once or not at all in an epoch while the number of steps stays the same. N is the number of batches
that the split leaves a task: with `equal` these samplers hardly differ, they are meant for `full`.
"""

import math
import zlib

import numpy as np

DATA_SPLITS = ("full", "equal", "proportional")
SAMPLERS = ("sequential", "round_robin", "random", "proportional", "sqrt", "annealed")
STS_PARTS = 17


def generator(seed, *key):
    """A numpy generator for one purpose: the same seed and key give the same numbers, another key others."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in key)])


def endless_rows(name, size, start, count, seed):
    """Rows start .. start + count of an endless row of permutations of 0..size-1, one after another."""
    first, last = start // size, (start + count - 1) // size
    passes = [generator(seed, "rows", name, k).permutation(size) for k in range(first, last + 1)]
    return np.concatenate(passes)[start - first * size :][:count]


def rows_per_epoch(sizes, split):
    """How many rows of each task one epoch uses: {task: rows}.

    Source: SMARTer BERT 5.3.2, with the number of SST rows in place of its 8,328 of 17 equal Quora parts.
    Differs: without SST among the tasks, the smallest task takes its place.
    """
    rows = dict(sizes)
    if split != "full" and "para" in sizes:
        rows["para"] = min(sizes["para"], sizes.get("sst", min(sizes.values())))
    if split == "proportional" and "sts" in sizes:
        rows["sts"] = math.ceil(sizes["sts"] / STS_PARTS)
    return rows


def epoch_rows(sizes, split, start, fraction, seed):
    """Rows of each task for the stretch of training from `start` to `start + fraction`, both in epochs.

    Consecutive stretches take consecutive rows, so each row is used once before any is used again.
    Shapes: {task: int array}.
    """
    rows = {}
    for name, count in rows_per_epoch(sizes, split).items():
        # the end of one stretch must be the start of the next, however the two sums of fractions were rounded
        first, last = (math.floor(epochs * count + 1e-6) for epochs in (start, start + fraction))
        rows[name] = endless_rows(name, sizes[name], first, max(1, last - first), seed)
    return rows


def exponent(sampler, progress):
    """alpha of p ~ N^alpha; progress is (e - 1) / (E - 1), 0 where there is one epoch."""
    return {"proportional": 1.0, "sqrt": 0.5, "annealed": 1.0 - 0.8 * progress}[sampler]


def task_order(sampler, steps, progress, rng):
    """The task of every step of an epoch.

    `steps` is {task: number of batches}. Returns a list of (task, batch index) with sum(steps) entries.
    """
    names = list(steps)
    if sampler == "sequential":
        return [(name, k) for name in names for k in range(steps[name])]
    if sampler == "round_robin":
        return [(name, k) for k in range(max(steps.values())) for name in names if k < steps[name]]
    if sampler == "random":
        drawn = rng.permutation([name for name in names for _ in range(steps[name])])
    else:
        weights = np.array([steps[name] ** exponent(sampler, progress) for name in names])
        drawn = rng.choice(names, size=sum(steps.values()), p=weights / weights.sum())
    used = dict.fromkeys(names, 0)
    order = []
    for name in map(str, drawn):
        order.append((name, used[name] % steps[name]))
        used[name] += 1
    return order


def all_tasks_order(steps):
    """Steps that take one batch of every task; shorter tasks start again until the longest ends.

    Returns a list of lists of (task, batch index), for PCGrad and GradVac.
    """
    return [[(name, k % count) for name, count in steps.items()] for k in range(max(steps.values()))]
