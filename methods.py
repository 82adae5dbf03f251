"""What a method is to this program: one record with its flags, what it needs, and how it is built.

A file of methods (slf.py, smart.py, adapters.py, ...) contains their records, and flags.py lists all records. The
command line, the checks and the construction of terms, plans and adapters loop over that list. METHODS.md adds a method
step by step.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from errors import InputError

# the largest whole number that a flag takes, and the most epochs in a phase
MOST, LONGEST_PHASE = 10**9, 100


class Resumable:
    """Base class of what a run saves and continues from; a subclass with a state of its own overrides both methods."""

    def state_dict(self):
        """Tensors and numbers that a resumed run needs."""
        return {}

    def load_state_dict(self, state):
        """Continue from the state of a saved run."""


class LossTerm(Resumable):
    """Base class of the loss terms: a subclass adds `__call__(model, batch, outputs, exit_weights) -> [b]`.

    Outputs are those of the loop's forward pass, which may have run in 16 bits; a term itself runs outside autocast.
    """

    def after_step(self, model, progress):
        """Update the term's own state after an optimiser step.

        Units: progress is the finished part of the phases with a common learning-rate schedule, from 0 to 1.
        """


def nothing(*arguments):
    """Return {}, the default of a slot that a method leaves empty."""
    return {}


def same_plan(flags, depth, plan):
    """Leave the training plan as it is."""
    return plan


def no_module(*arguments):
    """Build no object, restrict nothing."""
    return None


@dataclass(frozen=True)
class Method:
    """One method of the papers. `flags` is {flag: value}; `typed` is the set of flags that the user typed.

    A method that is off returns nothing from its builders, so that the baseline stays bit-identical.
    """

    title: str  # heading of its flags in --help
    add_flags: Callable = nothing  # (argparse group)
    conflicts: Callable = nothing  # (flags, typed) -> pairs (applies, sentence)
    needs: Callable = nothing  # (flags) -> some of "exits", "embeddings", "all_tasks"; see building.py
    terms: Callable = nothing  # (flags, model, noise) -> {name: LossTerm}; noise(purpose) -> torch.Generator
    plan: Callable = same_plan  # (flags, depth, plan so far) -> plan: a function that starts a generator of phases
    adapters: Callable = no_module  # (flags, config, task names, generator) -> module for BERT's adapter slot
    trains: Callable = no_module  # (flags, model) -> names of the parameters that may train; None: all
    rates: Callable = nothing  # (flags, model) -> {parameter name: factor of the learning rate}
    gradients: Callable = no_module  # (flags, parameters, generator) -> gradients.Combiner; the first one counts
    exit_settings: Callable = no_module  # (flags, tasks) -> early_exit.ExitSettings


def belongs(typed, names, is_on, owner):
    """Conflicts for flags that make no sense while the flag that they belong to is off."""
    return [(name in typed and not is_on, f"--{name} belongs to {owner}") for name in names]


def among_tasks(flags, name):
    """Conflicts for a flag that lists tasks: each must be a task of the run."""
    tasks = flags["tasks"]
    return [(task not in tasks, f"--{name} {task}: not among --tasks {' '.join(tasks)}") for task in flags[name] or ()]


def convert(flag, entry, text, function):
    """A value from a part of what the user typed for a flag.

    Raises: InputError, with the entire `entry`, for a text that the function refuses.
    """
    try:
        return function(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{flag} {entry}: {error}") from None


def per_task(entries, flag, names, function):
    """Read `value` or `task=value ...` entries into {task: value}; an entry that names its task wins.

    Raises: InputError for an unknown task, a second value of a task, or a value that the function refuses.
    """
    chosen, entered = {}, set()
    for entry in sorted(entries or (), key=lambda entry: "=" in entry):
        name, equals, text = entry.rpartition("=")
        value = convert(flag, entry, text, function)
        if name in entered:
            raise InputError(f"{flag} {entry}: there is a value {'for this task' if name else 'for all tasks'} already")
        entered.add(name)
        for task in [name] if equals else names:
            if task not in names:
                raise InputError(f"{flag} {entry}: no such task here; tasks are {', '.join(names)}")
            chosen[task] = value
    return chosen


# --- types of flags: functions of the typed text, for argparse ----------------------------------------------------


def positive_int(text):
    """A whole number above 0, and small enough to count with."""
    value = int(text)
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text:.40} is not from 1 to {MOST:,}")
    return value


def seed(text):
    """A whole number from 0 that every generator accepts."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 2**63")
    return value


def at_least_zero(text):
    """A finite number that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive(text):
    """A finite number above 0."""
    value = at_least_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def phase_epochs(text):
    """The length of a phase in epochs, limited because all steps of a phase are listed when it starts."""
    value = positive(text)
    if value > LONGEST_PHASE:
        raise argparse.ArgumentTypeError(f"{text} is above {LONGEST_PHASE}")
    return value


def filled(text):
    """A text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def below_one(text):
    """A number from 0 to below 1."""
    value = at_least_zero(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value
