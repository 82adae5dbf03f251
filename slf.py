"""Training plans: what each phase of training trains, and on which exits. Read first: nothing.

A plan is a generator. The loop asks for a phase, trains it, evaluates, and sends the dev score back:

    phase = next(plan)
    while phase: train(phase); phase = plan.send(score)          # StopIteration ends the run

so a plan may choose by the scores it was sent (Smart Alternating), and a resumed run rebuilds the plan's state by
sending the recorded scores to a fresh one.
"""

from dataclasses import dataclass

EVERYTHING = ("",)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one set of trainable parameters and one choice of exits.

    `fraction` is its length in epochs; `trainable` are prefixes of parameter names (within what the run may train
    at all); `exit_weights` is a cycle of {exit layer: weight}, one entry per step; `stretch` is (k, n): this phase
    is the k-th of n that share an optimiser and a learning-rate schedule; `keep` says whether the model after this
    phase may be kept as the best one.
    """

    label: str
    fraction: float
    exit_weights: tuple
    trainable: tuple = EVERYTHING
    stretch: tuple = (0, 1)
    keep: bool = True


def plain(epochs, exit_weights):
    """Train everything for a number of epochs: one phase each."""
    for epoch in range(epochs):
        yield Phase(f"epoch {epoch + 1}/{epochs}", 1.0, exit_weights, stretch=(epoch, epochs))
