"""Training plans: phase sequences by hand, resuming by replay, and what stage 1 really trains on a tiny model."""

import re

import pytest
import torch
from tiny import make_batch, make_config, make_model

import early_exit
from adapters import make_adapters
from early_exit import LTELoss
from optimizer import AdamW
from slf import (
    LastLayers,
    LayerAndExit,
    Phase,
    earlier_exits,
    everything,
    gradual_unfreezing,
    plain,
    sequential_layer_focus,
    smart_alternating,
    two_stage,
)
from tasks import build_tasks

DEPTH = 3
LAST, JOINT = {3: 1.0}, {1: 1.0, 2: 1.0, 3: 1.0}


def drive(plan, scores):
    """The phases of a plan that is sent `scores` one after another (as many as it asks for)."""
    phases, scores = [next(plan)], iter(scores)
    while True:
        try:
            phases.append(plan.send(next(scores)))
        except StopIteration:
            return phases


def stages(phases):
    """The letter of each Smart Alternating phase."""
    return "".join(re.search(r"stage ([AB]) ", phase.label)[1] for phase in phases)


PLANS = {
    "plain": lambda: plain(4, (LAST,)),
    "smart_alternating": lambda: smart_alternating(6, DEPTH, JOINT),
    "two_stage": lambda: two_stage(2, DEPTH, JOINT),
    "slf": lambda: sequential_layer_focus(DEPTH, 1.5, plain(2, (JOINT,))),
    "gradual": lambda: gradual_unfreezing(DEPTH, 0.5, plain(2, (LAST,))),
    "slf + smart_alternating": lambda: sequential_layer_focus(DEPTH, 0.25, smart_alternating(5, DEPTH, JOINT)),
}
SCORES = [0.5, 0.4, 0.45, 0.44, 0.43, 0.6, 0.7, 0.7]


@pytest.mark.parametrize("name", PLANS)
def test_replaying_the_scores_of_a_stopped_run_gives_the_same_remaining_phases(name):
    whole = drive(PLANS[name](), SCORES)
    for k in range(len(whole)):
        resumed = PLANS[name]()
        phase = next(resumed)
        for score in SCORES[:k]:
            phase = resumed.send(score)
        remaining = [phase]
        for score in SCORES[k : len(whole) - 1]:
            remaining.append(resumed.send(score))
        assert remaining == whole[k:]
        with pytest.raises(StopIteration):
            resumed.send(0.0)


@pytest.mark.parametrize("name", PLANS)
def test_labels_are_distinct(name):
    labels = [phase.label for phase in drive(PLANS[name](), SCORES)]
    assert len(set(labels)) == len(labels)


# --- Smart Alternating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], "AAAAA"),  # every epoch better: A goes on
        ([0.5, 0.4, 0.3, 0.2, 0.1], "AABAB"),  # the first has none to compare with, then each one switches
        ([0.5, 0.5, 0.5, 0.5, 0.5], "AABAB"),  # equal is not better
        ([0.5, 0.4, 0.6, 0.7, 0.6], "AABBB"),  # worse: to B; better than the epoch before, twice: B goes on
        ([0.5, 0.6, 0.5, 0.55, 0.54], "AAABB"),  # .55 is above the epoch before though below the best
        ([-0.2, -0.1, float("nan"), 0.1, 0.2], "AAABA"),  # not a number is above nothing, and nothing above it
    ],
)
def test_smart_alternating_by_hand(scores, expected):
    assert stages(drive(smart_alternating(5, DEPTH, JOINT), scores)) == expected


def test_smart_alternating_trains_everything_in_one_stretch_and_only_the_loss_changes():
    phases = drive(smart_alternating(4, DEPTH, JOINT), [0.5, 0.4, 0.3, 0.2])
    assert [phase.exit_weights for phase in phases] == [(LAST,), (LAST,), (JOINT,), (LAST,)]
    assert [phase.part for phase in phases] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(phase.modules == everything and phase.fraction == 1 and phase.keep for phase in phases)


# --- two stages -----------------------------------------------------------------------------------------------------


def test_two_stage_by_hand():
    first = dict(fraction=1.0, exit_weights=(LAST,), modules=everything)
    second = dict(fraction=1.0, exit_weights=({1: 1.0, 2: 1.0},), modules=earlier_exits)
    assert drive(two_stage(2, DEPTH, JOINT), SCORES) == [
        Phase("stage 1 (last exit), epoch 1/2", part=(0, 2), keep=False, scored=True, **first),
        Phase("stage 1 (last exit), epoch 2/2", part=(1, 2), keep=False, scored=True, **first),
        Phase("stage 2 (other exits), epoch 1/2", part=(0, 2), keep=False, **second),
        Phase("stage 2 (other exits), epoch 2/2", part=(1, 2), keep=True, **second),
    ]


# --- Sequential Layer Focus: the phases -------------------------------------------------------------------------------


def test_slf_with_a_quarter_epoch_per_layer():
    phases = drive(sequential_layer_focus(2, 0.25, plain(1, (JOINT,))), SCORES)
    assert phases == [
        Phase(
            "stage 1, layer 1/2",
            0.25,
            ({1: 1.0},),
            LayerAndExit(1),
            (0, 1),
            False,
            (LTELoss,),
            True,
        ),
        Phase(
            "stage 1, layer 2/2",
            0.25,
            ({2: 1.0},),
            LayerAndExit(2),
            (0, 1),
            False,
            (LTELoss,),
            True,
        ),
        Phase("epoch 1/1", 1.0, (JOINT,), everything, (0, 1), True),
    ]


@pytest.mark.parametrize("layer_epochs", [0.25, 1, 3])
def test_slf_gives_every_layer_its_budget_in_one_phase(layer_epochs):
    """Stage 1 keeps no model; every layer is scored once, at its own exit."""
    *first, _ = drive(sequential_layer_focus(3, layer_epochs, plain(1, (JOINT,))), [0.0] * 9)
    assert [(phase.fraction, phase.part) for phase in first] == [(layer_epochs, (0, 1))] * 3
    assert all(phase.scored and not phase.keep for phase in first)


def test_slf_sends_stage_2_only_its_own_scores():
    received = []

    def second():
        for k in range(3):
            received.append((yield Phase(f"second {k}", 1.0, (JOINT,))))

    drive(sequential_layer_focus(2, 1, second()), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert received == [0.3, 0.4, 0.5]


def test_stage_1_scores_do_not_decide_what_smart_alternating_does():
    """Stage 1 ends at .9; the first own score, .5, has none before it, so that A goes on."""
    phases = drive(sequential_layer_focus(2, 1, smart_alternating(3, 2, JOINT)), [0.8, 0.9, 0.5, 0.6, 0.7])
    assert stages(phases[2:]) == "AAA"


# --- Sequential Layer Focus: a real model -----------------------------------------------------------------------------


def belongs(name, i, depth):
    """Whether a parameter is layer i's or exit i's, told from the name's parts rather than by prefix."""
    first, *rest = name.split(".")
    if first == "bert" and rest[0] == "bert_layers":
        return int(rest[1]) == i - 1
    if first == "exits":
        return int(rest[0]) == i - 1
    if first == "adapters":
        return rest[0] == "layers" and int(rest[1]) == i - 1
    return i == depth and (first == "heads" or name.startswith("bert.pooler_dense."))


def chosen(model, phase):
    """Names of the parameters that a phase trains."""
    modules = phase.modules(model)
    wanted = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def deep_model(depth, kinds=("before", "pal")):
    """A model with exits and adapters."""
    tasks = build_tasks()
    adapters = make_adapters(make_config(depth), list(tasks), list(kinds), torch.Generator().manual_seed(0))
    return make_model(tasks, layers=depth, with_exits=True, adapters=adapters)


def test_stage_1_chooses_layer_exit_and_adapters_by_real_parameter_names():
    depth = 12
    model = deep_model(depth)
    names = {name for name, _ in model.named_parameters()}
    phases = drive(sequential_layer_focus(depth, 1, plain(1, (JOINT,))), [0.0] * 20)
    for i, phase in enumerate(phases[:depth], start=1):
        assert chosen(model, phase) == {name for name in names if belongs(name, i, depth)}
    assert chosen(model, phases[-1]) == names


def test_two_stage_freezes_all_but_the_other_exits():
    model = make_model(layers=DEPTH, with_exits=True)
    names = {name for name, _ in model.named_parameters()}
    first, *_, last = drive(two_stage(1, DEPTH, JOINT), SCORES)
    assert chosen(model, first) == names
    assert {name.split(".")[0] for name in chosen(model, last)} == {"exits", "lte"}
    assert chosen(model, last) == {name for name in names if name.split(".")[0] in ("exits", "lte")}


def test_two_stage_fits_the_decision_threshold_before_learning_to_exit_needs_it(program, monkeypatch):
    """At a threshold of 1/2 a cosine predicts 1 for almost every pair, so the LTE's targets would be the labels."""
    seen, real = [], early_exit.certainty_target

    def spy(task, logits, labels, threshold):
        seen.extend([threshold] if task.name == "para" else [])
        return real(task, logits, labels, threshold)

    monkeypatch.setattr(early_exit, "certainty_target", spy)
    words = "--early_exit --exit_policy lte --exit_loss two_stage --pairs para=siamese --para_loss cosine --epochs 1"
    program.train_quickly("two-stage-cosine", *words.split())
    # two layers: one target a step in each stage
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert set(first) == {0.5} and 0.5 not in second and len(second) == len(first)


def test_gradual_unfreezing_adds_a_layer_a_phase_from_the_last_to_the_first():
    model = deep_model(DEPTH)
    phases = drive(gradual_unfreezing(DEPTH, 0.5, plain(1, (LAST,))), [0.0] * 9)
    head = {name for name, _ in model.named_parameters() if name.startswith(("heads.", "bert.pooler_dense."))}
    assert chosen(model, phases[0]) == head
    for k, phase in enumerate(phases[:DEPTH]):
        parts = {name.split(".")[1] + name.split(".")[2] for name in chosen(model, phase) - head}
        layers = range(DEPTH - k, DEPTH)
        assert parts == {f"bert_layers{i}" for i in layers} | {f"layers{i}" for i in layers}
        assert (phase.fraction, phase.exit_weights, phase.keep) == (0.5, (LAST,), False)
        assert phase.modules == LastLayers(k)
    assert phases[DEPTH:] == [Phase("epoch 1/1", 1.0, (LAST,))]


def train_phase(model, phase, steps=2):
    """Real steps of a phase over every task: returns the names of the parameters that changed."""
    model.train()
    trained = chosen(model, phase)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        for task in model.tasks.values():
            batch = make_batch(task, seed=step)
            (exit_weights,) = phase.exit_weights
            logits = model(batch, exits=tuple(exit_weights)).logits
            sum(w * task.objective.loss(logits[i], batch.labels) for i, w in exit_weights.items()).mean().backward()
        optimizer.step()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient <= trained
        optimizer.zero_grad(set_to_none=True)
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def watch_layers(model):
    """Hooks that note, for every layer that runs, its index and whether its output keeps gradients."""
    seen = []
    for i, layer in enumerate(model.bert.bert_layers, start=1):
        layer.register_forward_hook(lambda module, inputs, h, i=i: seen.append((i, h.requires_grad)))
    return seen


def test_stage_1_changes_only_layer_i_and_exit_i_and_runs_nothing_above():
    model = make_model(layers=DEPTH, with_exits=True, dropout=0.1)
    names = {name for name, _ in model.named_parameters()}
    seen = watch_layers(model)
    phases = drive(sequential_layer_focus(DEPTH, 1, plain(1, (JOINT,))), [0.0] * 9)
    for i, phase in enumerate(phases[:DEPTH], start=1):
        seen.clear()
        changed = train_phase(model, phase)
        assert changed == {name for name in names if belongs(name, i, DEPTH)}
        passes = 2 * len(model.tasks)
        assert [seen.count((j, j == i)) for j in range(1, DEPTH + 1)] == [passes] * i + [0] * (DEPTH - i)
        assert len(seen) == passes * i
    assert any(name.startswith("bert.word_embedding") for name in train_phase(model, phases[DEPTH]))


def test_stage_a_leaves_the_exits_before_the_last_and_stage_b_moves_them():
    model = make_model(layers=DEPTH, with_exits=True)
    first, _, alternated = drive(smart_alternating(3, DEPTH, JOINT), [0.5, 0.4, 0.3])
    names = {name for name, _ in model.named_parameters()}
    before_last = {name for name in names if name.startswith("exits.")}
    changed = train_phase(model, first)
    assert not changed & before_last and any(".bert_layers." in name for name in changed)
    # the task losses alone, which train_phase uses, say nothing about LTE
    assert train_phase(model, alternated) == {name for name in names if not name.startswith("lte.")}
