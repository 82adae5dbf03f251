"""Training plans: what each phase of training trains, and on which exits. Read first: nothing.

A plan is a generator. The loop asks for a phase, trains it, evaluates, and sends the dev score back:

    phase = next(plan)
    while phase: train(phase); phase = plan.send(score)          # StopIteration ends the run

so a plan may choose by the scores it was sent (Smart Alternating), and a resumed run rebuilds the plan's state by
sending the recorded scores to a fresh one. A plan knows nothing but these scores: no model, no clock, no chance.

With L layers, h_i the state after layer i and g_i its exit, L_i = H(y, g_i(h_i; w_i)) is the loss of exit i. A plan
is a choice, over time, of the L_i that count and of the parameters that move:

    plain                    sum_i weight_i L_i                  everything, from first to last epoch
    Sequential Layer Focus   L_1, then L_2, ..., then L_L        layer i and exit i; then a second plan for everything
    Smart Alternating        A: L_L  or  B: sum_i L_i            everything; the dev score chooses between A and B
    two-stage                L_L, then sum_{i<L} L_i             everything; then the exits alone

Source: BERTer 3.3 and its "Novel Fine-Tuning Strategy"; DeeBERT (two-stage); BERxiT compares such strategies.
Differs: the papers leave open how long stage 1 of Sequential Layer Focus takes (here a budget per layer), what counts
as better in Smart Alternating (here strictly above the epoch before, at full depth), and what happens to the parts
that layers share while single layers train (here they wait for stage 2).
"""

import math
from dataclasses import dataclass

EVERYTHING = ("",)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one set of trainable parameters and one choice of exits.

    `fraction` is its length in epochs; `trainable` are prefixes of parameter names (within what the run may train at
    all); `exit_weights` is a cycle of {exit layer: weight}, one entry per batch of a task; `stretch` is (k, n): this
    phase is the k-th of n that share an optimiser and a learning-rate schedule; `keep` says whether the model after
    this phase may be kept as the best one. `rows_from`, in epochs, is where in the data its rows begin, by default
    where those of the phase before end; `frozen_below` is the number of layers whose last state is kept (frozen.py).
    """

    label: str
    fraction: float
    exit_weights: tuple
    trainable: tuple = EVERYTHING
    stretch: tuple = (0, 1)
    keep: bool = True
    rows_from: float | None = None
    frozen_below: int = 0


def plain(epochs, exit_weights, size=1.0):
    """Train everything for a number of phases of `size` epochs each."""
    for epoch in range(epochs):
        yield Phase(f"epoch {epoch + 1}/{epochs}", size, exit_weights, stretch=(epoch, epochs))


def smart_alternating(epochs, depth, joint, size=1.0):
    """Each epoch train on the last exit (stage A) or on all exits (stage B), as the dev scores decide.

    The first epoch is A. A stage goes on while the score after it is strictly above that of the epoch before, and
    gives way to the other one when it is not; the first epoch has none before it, so the second is A too. `joint` is
    stage B's {exit layer: weight}. The backbone trains in both. Exits that stage A does not run get no gradient, so
    the optimiser, which lives through all epochs, leaves them as they are.

    Source: BERTer, "Novel Fine-Tuning Strategy".
    Differs: as long as every epoch is better than the one before, B never comes and the exits before the last stay
    untrained; the paper does not say what to do then, and neither is anything done here.
    """
    exit_weights = {"A": {depth: 1.0}, "B": joint}
    titles = {"A": "stage A (last exit)", "B": "stage B (all exits)"}
    stage, before = "A", -math.inf
    for epoch in range(epochs):
        label = f"epoch {epoch + 1}/{epochs}, {titles[stage]}"
        score = yield Phase(label, size, (exit_weights[stage],), stretch=(epoch, epochs))
        if not score > before:
            stage = "B" if stage == "A" else "A"
        before = score


def two_stage(epochs, depth, joint, size=1.0):
    """Train everything on the last exit, then freeze that and train the other exits for as many epochs.

    `joint` is {exit layer: weight}; the second stage uses all of it but the last exit. Only the model after the very
    last phase may be kept: in the first stage the other exits are untrained, and in the second the full-depth score
    that would choose is the same after every epoch, since nothing it depends on moves.

    Source: DeeBERT (Xin et al., 2020), fine-tuning.
    """
    others = {i: weight for i, weight in joint.items() if i != depth}
    stages = (
        ("stage 1 (last exit)", {depth: 1.0}, EVERYTHING),
        ("stage 2 (other exits)", others, ("exits.", "lte.")),
    )
    for title, exit_weights, trainable in stages:
        for epoch in range(epochs):
            label, last = f"{title}, epoch {epoch + 1}/{epochs}", exit_weights is others and epoch + 1 == epochs
            yield Phase(label, size, (exit_weights,), trainable, (epoch, epochs), keep=last)


def layer_and_exit(i, depth):
    """Prefixes of the parameters that belong to layer i and exit i alone, the layer's adapters among them."""
    exit_prefixes = ("bert.pooler_dense.", "heads.") if i == depth else (f"exits.{i - 1}.",)
    return (f"bert.bert_layers.{i - 1}.", *exit_prefixes, f"adapters.layers.{i - 1}.")


def sequential_layer_focus(depth, layer_epochs, second, keep_states=False):
    """Stage 1: train layer by layer, each with its own exit; stage 2: whatever the plan `second` says.

    In stage 1 layer i learns from L_i alone, for `layer_epochs` (a fraction of an epoch or several), with its own
    optimiser and schedule. What is below is frozen, and deeper layers are not asked for, so that no gradient goes
    below layer i and nothing above it runs. What layers share (embeddings, LTE, shared parts of adapters) waits for
    stage 2. No model of stage 1 may be kept, for its deeper layers are not trained yet. `second` is a fresh plan; it
    is sent the scores of its own phases only. With `keep_states` all layers learn from the same examples, whose states
    below the layer in training are kept; this takes `layer_epochs` of at most 1.

    Source: BERTer 3.3, Sequential Layer Focus.
    """
    parts = math.ceil(layer_epochs)
    for i in range(1, depth + 1):
        for part in range(parts):
            told = f", part {part + 1}/{parts}" if parts > 1 else ""
            yield Phase(
                f"stage 1, layer {i}/{depth}{told}",
                layer_epochs / parts,
                ({i: 1.0},),
                layer_and_exit(i, depth),
                (part, parts),
                keep=False,
                rows_from=0.0 if keep_states else None,
                frozen_below=i - 1 if keep_states else 0,
            )
    yield from second
