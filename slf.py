"""Training plans: what each phase of training trains, and on which exits.

A plan is a generator. The loop takes a phase, trains it, evaluates the model, and sends the dev score back:

    phase = next(plan)
    while phase: train(phase); phase = plan.send(score)          # StopIteration ends the run

So a plan may choose by the scores that it receives, as Smart Alternating does. After a phase that is not evaluated the
score is None. A plan sees nothing else: no model, no clock, no random numbers. A resumed run sends the recorded scores
to a fresh plan and is back where it stopped.

There are L layers. L_i is the loss of exit i, the classifier after layer i, and w_i the weight of that loss. A plan
chooses for each phase which L_i count and what trains:

    plain                    sum_i w_i L_i                       everything, in every epoch
    Sequential Layer Focus   L_1, then L_2, ..., then L_L        layer i and exit i; then a second plan for everything
    gradual unfreezing       L_L                                 the heads, then one more layer a phase, last to first
    Smart Alternating        A: L_L  or  B: sum_i w_i L_i        everything; the dev score chooses between A and B
    two-stage                L_L, then sum_{i<L} w_i L_i         everything; then the earlier exits alone

Source: BERTer 3.3 and its "Novel Fine-Tuning Strategy"; DeeBERT (two-stage); BERxiT compares such strategies.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from early_exit import EXIT_WEIGHTS, LTELoss
from methods import Method, belongs, phase_epochs
from tasks import headless_losses

# --- what a phase trains: functions of the model that list modules --------------------------------------------------


def everything(model):
    """The whole model."""
    return [model]


def earlier_exits(model):
    """The exits before the last one, and the LTE, which decides about leaving at them."""
    return [model.exits, model.lte]


@dataclass(frozen=True)
class LayerAndExit:
    """Layer i and exit i."""

    i: int

    def __call__(self, model):
        # the layer with its adapters, the exit with its pooler and heads
        return model.layer_modules(self.i) + model.exit_modules(self.i)


@dataclass(frozen=True)
class LastLayers:
    """The last exit (BERT's own pooler and the ordinary heads) and a number of layers below it."""

    layers: int

    def __call__(self, model):
        # layers are numbered 1..L, so the last one alone starts at L
        lowest = model.depth - self.layers + 1
        above = [module for i in range(lowest, model.depth + 1) for module in model.layer_modules(i)]
        return model.exit_modules(model.depth) + above


# --- the plans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the training with one set of trainable parameters and one choice of exits.

    `modules(model)` lists the modules whose parameters train. `exit_weights` is a cycle of {exit layer: weight}, one
    entry for each step of a task.
    """

    label: str
    fraction: float  # length in passes over the rows that --split leaves, such as .5 or 2
    exit_weights: tuple
    modules: Callable = everything
    # (k, n): number k, from 0, of n phases with one learning-rate schedule; they share an optimiser too, as long as
    # the same parameters train
    part: tuple = (0, 1)
    keep: bool = True  # whether the model after this phase may be kept as the best one
    without: tuple = ()  # classes of the loss terms that do not count
    # with keep=False: whether dev is scored all the same, at the deepest of the phase's exits. If not, the plan
    # receives None instead of a score
    scored: bool = False

    def __post_init__(self):
        k, n = self.part
        if not 0 <= k < n:
            raise ValueError(f"phase {self.label!r}: part {self.part}: the number k must be from 0 to n - 1")


def plain(epochs, exit_weights, size=1.0):
    """Train everything for a number of phases of `size` epochs each."""
    for epoch in range(epochs):
        # all epochs share one optimiser and one schedule: epoch k is part k of them
        yield Phase(f"epoch {epoch + 1}/{epochs}", size, exit_weights, part=(epoch, epochs))


def smart_alternating(epochs, depth, joint, size=1.0):
    """Train each epoch on the last exit (stage A) or on all exits (stage B), as the dev scores decide.

    Keep the stage while the dev score improves, otherwise switch. Epoch 1 is stage A and has no predecessor, so
    epoch 2 is also stage A. `joint` is stage B's {exit layer: weight}. The backbone trains in both stages. In stage A
    the exits before the last get no gradient, so the optimiser leaves them as they are. An epoch has the length `size`;
    all epochs share one schedule, as in `plain`.

    Source: BERTer, "Novel Fine-Tuning Strategy".
    Differs: while every epoch improves, stage B never comes and the other exits stay untrained. The paper does not
        say what to do then; nothing is done here.
    """
    weights = {"A": {depth: 1.0}, "B": joint}
    titles = {"A": "stage A (last exit)", "B": "stage B (all exits)"}
    stage, previous = "A", -math.inf
    for epoch in range(epochs):
        label = f"epoch {epoch + 1}/{epochs}, {titles[stage]}"
        # the loop sends the full-depth norm of this epoch
        score = yield Phase(label, size, (weights[stage],), part=(epoch, epochs))
        # `not ... >` and not `<=`: a NaN counts as no improvement
        if not score > previous:
            stage = "B" if stage == "A" else "A"
        previous = score


def two_stage(epochs, depth, joint, size=1.0):
    """Train BERT on the last exit alone, then freeze both and train the other exits for as many epochs.

    `joint` is {exit layer: weight}; the second stage uses all of it but the last exit. Only the model after the very
    last phase may be kept. In the first stage the other exits are untrained. In the second stage the full-depth model
    is frozen, so its score is the same after every epoch and cannot rank the epochs.

    Source: DeeBERT (Xin et al., 2020), fine-tuning.
    """
    others = {i: weight for i, weight in joint.items() if i != depth}
    for epoch in range(epochs):
        label = f"stage 1 (last exit), epoch {epoch + 1}/{epochs}"
        # scored, because a fitted decision threshold enters the LTE's targets in stage 2
        yield Phase(label, size, ({depth: 1.0},), part=(epoch, epochs), keep=False, scored=True)
    # other parameters train now, so the loop makes a new optimiser; the schedule starts again
    for epoch in range(epochs):
        label = f"stage 2 (other exits), epoch {epoch + 1}/{epochs}"
        is_last = epoch + 1 == epochs
        yield Phase(label, size, (others,), earlier_exits, (epoch, epochs), keep=is_last)


def sequential_layer_focus(depth, layer_epochs, second):
    """Stage 1: train layer by layer, each with its own exit; stage 2: the phases of the plan `second`.

    In stage 1, layer i learns from L_i alone for `layer_epochs` (a fraction of an epoch or several), with its own
    optimiser and schedule. The layers below are frozen and the layers above do not run, so no gradient flows below
    layer i. What the layers share (embeddings, learning to exit, shared parts of adapters) waits for stage 2. No
    model of stage 1 may be kept, because its deeper layers are not fine-tuned yet; each is scored all the same. LTELoss
    does not count in stage 1. `second` receives the scores of its own phases only.

    Source: BERTer 3.3, Sequential Layer Focus.
    Differs: the paper does not say how long stage 1 takes (here: a budget for each layer), nor when shared parts train.
    """
    for i in range(1, depth + 1):
        yield Phase(
            f"stage 1, layer {i}/{depth}",
            layer_epochs,
            ({i: 1.0},),  # L_i alone: the forward pass stops after layer i
            LayerAndExit(i),
            keep=False,  # the layers above are as they were pretrained
            scored=True,  # shows what layer i has learned; the evaluation stops after layer i, too
            # the learning to exit is shared by the layers: its loss would only pull at the layer in training
            without=(LTELoss,),
        )
    yield from second


def gradual_unfreezing(depth, layer_epochs, second):
    """Train pooler and heads alone, then with the last layer, then with the last two, and so on; then `second`.

    Every phase takes `layer_epochs` epochs and has its own optimiser and schedule. The embeddings train in `second`.

    Source: Howard and Ruder (2018), section 3.3.
    Differs: the paper unfreezes the last layer together with the head; here the heads (with BERT's pooler) train first,
        because they are new and the layer is pretrained.
    """
    # 0 layers: pooler and heads alone. With all L layers everything may train, so that is left to `second`.
    for layers in range(depth):
        label = f"unfreezing, heads and {layers}/{depth} layers"
        yield Phase(label, layer_epochs, ({depth: 1.0},), LastLayers(layers), keep=False, without=(LTELoss,))
    yield from second


# --- the records --------------------------------------------------------------------------------------------------

TITLE = "training plans (BERTer 3.3; unfreezing: ULMFiT)"


def start_plan(flags, depth, has_exits):
    """The plain plan, which the methods' records may replace or wrap."""
    cycle = EXIT_WEIGHTS[flags["exit_loss"]](depth) if has_exits else ({depth: 1.0},)
    return partial(plain, flags["epochs"], cycle, flags["epoch_size"])


def build_two_stage(flags, depth, plan):
    """Replace the plan if --exit_loss is two_stage."""
    if flags["exit_loss"] != "two_stage":
        return plan
    [joint] = EXIT_WEIGHTS["joint"](depth)  # a cycle of one entry
    return partial(two_stage, flags["epochs"], depth, joint, flags["epoch_size"])


def check_two_stage(flags, typed):
    """Conflicts of the two-stage plan: pairs (applies, sentence)."""
    on = flags["exit_loss"] == "two_stage"
    yield on and flags["slf"], "--exit_loss two_stage and --slf are both plans with a first stage: choose one"


def build_alternating(flags, depth, plan):
    """Replace the plan if --smart_alternating is on."""
    if not flags["smart_alternating"]:
        return plan
    # stage B weighs the exits as --exit_loss says; check_alternating refuses cycles of several entries
    [joint] = EXIT_WEIGHTS[flags["exit_loss"]](depth)
    return partial(smart_alternating, flags["epochs"], depth, joint, flags["epoch_size"])


def check_alternating(flags, typed):
    """Conflicts of Smart Alternating: pairs (applies, sentence)."""
    kind = flags["exit_loss"]
    # a cycle of several entries also switches between exits, step by step
    both = flags["smart_alternating"] and (kind == "two_stage" or len(EXIT_WEIGHTS[kind](2)) > 1)  # 2: any depth
    yield both, f"--exit_loss {kind} and --smart_alternating both choose the exits: choose one"


def add_slf_flags(group):
    """The flags of Sequential Layer Focus."""
    group.add_argument("--slf", action="store_true", help="Sequential Layer Focus: layer by layer, then all layers")
    group.add_argument("--slf_epochs", type=phase_epochs, default=0.25, help="passes over each task's part per layer")


def check_slf(flags, typed):
    """Conflicts of Sequential Layer Focus: pairs (applies, sentence)."""
    frozen = flags["slf"] and flags["option"] == "pretrain"
    yield frozen, "--slf trains BERT layer by layer, --option pretrain freezes it: leave one out"
    yield from belongs(typed, ["slf_epochs"], flags["slf"], "--slf")


def check_unfreezing(flags, typed):
    """Conflicts of gradual unfreezing: pairs (applies, sentence)."""
    on = flags["gradual_unfreezing"]
    yield on and flags["option"] == "pretrain", "--gradual_unfreezing trains BERT, --option pretrain freezes it"
    yield on and flags["slf"], "--gradual_unfreezing and --slf both freeze layers at the start: choose one"
    adapted = on and flags["adapter"] != ["none"] and not flags["train_backbone"]
    yield adapted, "--gradual_unfreezing unfreezes BERT, --adapter freezes it: add --train_backbone"
    for loss in headless_losses(flags):
        # a mean of the tokens has no pooler either, so the first phase would train nothing of this task
        yield on and flags["pooling"] != "cls", f"{loss} has no head: with --gradual_unfreezing add --pooling cls"


def first_stage(plan, switch, epochs):
    """Make the builder that puts a first stage before the plan so far, if the flag `switch` is on.

    The flag `epochs` is the length of the first stage, in epochs per layer.
    """

    def build(flags, depth, second):
        if not flags[switch]:
            return second
        return lambda: plan(depth, flags[epochs], second())

    return build


TWO_STAGE = Method(TITLE, conflicts=check_two_stage, plan=build_two_stage)
SMART_ALTERNATING = Method(
    TITLE,
    lambda group: group.add_argument(
        "--smart_alternating", action="store_true", help="train the last exit or all exits, as the dev score decides"
    ),
    check_alternating,
    needs=lambda flags: {"exits"} if flags["smart_alternating"] else set(),
    plan=build_alternating,
)
SLF = Method(
    TITLE,
    add_slf_flags,
    check_slf,
    needs=lambda flags: {"exits"} if flags["slf"] else set(),
    plan=first_stage(sequential_layer_focus, "slf", "slf_epochs"),
)
GRADUAL_UNFREEZING = Method(
    TITLE,
    lambda group: group.add_argument(
        "--gradual_unfreezing",
        type=phase_epochs,
        nargs="?",
        const=0.25,
        metavar="EPOCHS",
        help="train the heads first and unfreeze a layer every EPOCHS (.25), last to first; then all layers",
    ),
    check_unfreezing,
    plan=first_stage(gradual_unfreezing, "gradual_unfreezing", "gradual_unfreezing"),
)
