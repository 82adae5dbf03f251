"""Which rows an epoch uses, and which task comes next: pure functions of a seed.

Nothing here holds state. A phase is a part of the training, often an epoch (slf.py). Its rows and their order follow
from the seed and the phase's start, counted in epochs. So a resumed run needs no saved iterator.

Data splitting (SMARTer BERT 5.3.2). The largest task dominates the training unless an epoch takes only a part of it:
    full          every row of every task
    equal         "split1": as many paraphrase rows as SST has, the next ones of a shuffled order in each epoch
    proportional  "split2": the same, and 1/17 of the similarity rows, as in the paper
How many rows a task gives under each split stands in its row of the task table (`epoch_rows`).

Differs: the paper draws its 17 parts of Quora once and takes them in turn. Here the order is shuffled anew for each
pass through the file, so the parts of one pass are not those of the next.

Task order. `sequential` trains one task after the other, as BERTer's baseline does. `round_robin` and `random`
interleave the same batches. `proportional`, `sqrt` and `annealed` draw the task of each step with probability
p ~ N^alpha (alpha 1, 1/2, and 1 - .8 (e-1)/(E-1) in epoch e of E; Stickland and Murray 2019). Then a task's batches
may be used more than once or not at all in an epoch, while the number of steps stays the same. N is the number of
steps that the split leaves a task. With the split `equal` these three hardly differ: they are meant for `full`. The
order `proportional` has nothing to do with the split of that name.
"""

import math
import zlib

import numpy as np

DATA_SPLITS = ("full", "equal", "proportional")


def make_rng(seed, *key):
    """A numpy generator for one purpose: the same seed and key draw the same numbers, another key draws others."""
    # crc32 maps a word to the same number in every process; Python's hash() does not
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in key)])


# --- rows ---------------------------------------------------------------------------------------------------------


def endless_rows(name, size, start, count, seed):
    """Rows start .. start + count - 1 of an endless sequence of permutations of 0..size-1, one after another.

    Shapes: int array [count].
    """
    first, last = start // size, (start + count - 1) // size
    passes = [make_rng(seed, "rows", name, k).permutation(size) for k in range(first, last + 1)]
    return np.concatenate(passes)[start - first * size :][:count]  # [passes * size] cut to [count]


def rows_per_epoch(tasks, sizes, data_split):
    """How many rows of each task one epoch uses: {task: rows}, from {task: Task} and {task: rows of its file}.

    Source: SMARTer BERT 5.3.2.
    """
    return {
        name: tasks[name].epoch_rows[data_split](name, sizes) if data_split in tasks[name].epoch_rows else size
        for name, size in sizes.items()
    }


def phase_rows(rows, sizes, start, fraction, seed):
    """Rows of each task for the part of the training from `start` to `start + fraction`, both in epochs.

    `rows` is {task: rows in an epoch}, `sizes` {task: rows of its file}. Consecutive parts take consecutive rows, so
    each row is used once before any row is used again.
    Shapes: {task: int array}.
    """
    chosen = {}
    for name, count in rows.items():
        # 1e-6: the end of one part must be the start of the next, however the sums of fractions were rounded
        first, last = (math.floor(epochs * count + 1e-6) for epochs in (start, start + fraction))
        chosen[name] = endless_rows(name, sizes[name], first, max(1, last - first), seed)
    return chosen


# --- task order: {task: number of batches}, annealing, generator -> [(task, k)] ------------------------------------
# Step k = 0, 1, 2, ... of a task takes its batch k, and after the last batch the first one again.
# `annealing` is (e - 1) / (E - 1) in epoch e of E, or 0 if E is 1: it is 1 in the last epoch.


def sequential(counts, annealing, rng):
    """One task after the other."""
    return [(name, k) for name in counts for k in range(counts[name])]


def round_robin(counts, annealing, rng):
    """The tasks in turn, until each has used its batches."""
    return [(name, k) for k in range(max(counts.values())) for name in counts if k < counts[name]]


def number_steps(order, counts):
    """Number the entries of a sequence of tasks, each task for itself."""
    used, numbered = dict.fromkeys(counts, 0), []
    for name in map(str, order):  # numpy draws strings of its own type
        numbered.append((name, used[name]))
        used[name] += 1
    return numbered


def shuffled(counts, annealing, rng):
    """All batches in random order."""
    return number_steps(rng.permutation([name for name in counts for _ in range(counts[name])]), counts)


def drawn(alpha):
    """Make the order that draws each step's task with p ~ N^a, a = alpha(annealing)."""

    def order(counts, annealing, rng):
        weights = np.array([count ** alpha(annealing) for count in counts.values()])
        return number_steps(rng.choice(list(counts), size=sum(counts.values()), p=weights / weights.sum()), counts)

    return order


ALPHAS = {
    "proportional": lambda annealing: 1.0,
    "sqrt": lambda annealing: 0.5,
    "annealed": lambda annealing: 1.0 - 0.8 * annealing,
}
SAMPLERS = {"sequential": sequential, "round_robin": round_robin, "random": shuffled}
SAMPLERS |= {name: drawn(alpha) for name, alpha in ALPHAS.items()}


def all_tasks_order(counts):
    """Steps that take one batch of every task; shorter tasks start again until the longest one ends.

    Returns a list of lists of (task, k).
    """
    return [[(name, k) for name in counts] for k in range(max(counts.values()))]
