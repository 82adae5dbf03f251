"""Kept states of frozen layers: those of a whole pass, in fewer layer calls, and no change of the result."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import log_of, make_model, weights_of, write_weights

from datasets import read_dataset
from errors import InputError
from flags import check_flags, parse_flags
from frozen import KeptStates
from tasks import build_tasks
from tokenizer import BertTokenizer

CACHED = ("--slf", "--slf_cache", "--slf_epochs", 0.5)


@pytest.fixture(params=["concat", "siamese", "embed_concat"])
def setting(request, program):
    """A model of four layers in float64 and what it trains on: {task: (Dataset, some rows)}."""
    tasks = build_tasks(("sst", "sts"), {"sts": request.param})
    tokenizer = BertTokenizer.from_pretrained(program.weights)
    rows = {"sst": np.arange(7), "sts": np.arange(3, 12)}
    examples = {
        name: (read_dataset(task, program.data / task.file("train"), tokenizer, 30), rows[name])
        for name, task in tasks.items()
    }
    return make_model(tasks, layers=4, dropout=0.5, exits=True), examples


def climb(kept, model, examples, layer, batch_size=4):
    kept.climb(model, examples, layer, batch_size, nullcontext)
    return kept


def test_a_pass_from_kept_states_equals_the_whole_pass(setting):
    """In batches of another composition and padding than those that filled the store."""
    model, examples = setting
    kept = climb(KeptStates(), model, examples, 2)
    assert kept.layer == 2 and model.training
    model.eval()
    for data, rows in examples.values():
        part = rows[::-2].copy()
        batch = data.batch(part)
        layer, hidden = kept.start(model, batch, part)
        found = model(batch, start=(layer, hidden), exits=(3, 4)).logits
        expected = model(batch, exits=(3, 4)).logits
        for i in (3, 4):
            torch.testing.assert_close(found[i], expected[i], rtol=0, atol=1e-12)
        for h, mask in zip(hidden, model.masks(batch), strict=True):
            assert not h.requires_grad and (h[~mask.bool()] == 0).all() and (h[mask.bool()] != 0).any(-1).all()


def test_climbing_on_runs_each_layer_once_and_ends_at_the_same_bits(setting, monkeypatch):
    model, examples = setting
    stepwise, calls = climb(KeptStates(), model, examples, 1), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *given: calls.append(given[-2:]) or encode(*given))
    climb(stepwise, model, examples, 3)
    batches = sum(-(-len(rows) // 4) for _, rows in examples.values())
    assert calls == [(1, 2)] * batches + [(2, 3)] * batches
    at_once = climb(KeptStates(), model, examples, 3)
    assert stepwise.states.keys() == at_once.states.keys()
    for key, states in stepwise.states.items():
        assert all(map(torch.equal, states, at_once.states[key]))


def test_other_examples_or_a_lower_layer_start_anew(setting):
    model, examples = setting
    kept = climb(KeptStates(), model, examples, 3)
    fewer = {name: (data, rows[:4]) for name, (data, rows) in examples.items()}
    assert len(climb(kept, model, fewer, 3).states) == 8
    expected = climb(KeptStates(), model, fewer, 1)
    found = climb(kept, model, fewer, 1)
    assert all(torch.equal(states[0], expected.states[key][0]) for key, states in found.states.items())


def test_nothing_kept_starts_nowhere():
    assert KeptStates().start(None, SimpleNamespace(task=None), np.arange(3)) is None


def test_without_dropout_the_cache_changes_no_weight(program, monkeypatch):
    """Stage 1 and stage 2 on the same examples, with kept states and without, differ by rounding alone."""
    weights = write_weights(program.folder / "kept-weights", dropout=0.0)
    usual = (
        *CACHED,
        "--weights",
        weights,
        "--hidden_dropout_prob",
        0,
        "--optimizer",
        "sgd",
        "--lr",
        0.1,
        "--epochs",
        1,
    )
    torch.set_default_dtype(torch.float64)
    try:
        kept = weights_of(program.train_quickly("kept", *usual))
        monkeypatch.setattr(KeptStates, "climb", lambda *given: None)
        recomputed = weights_of(program.train_quickly("kept-not", *usual))
        other = weights_of(program.train_quickly("kept-without", *[flag for flag in usual if flag != "--slf_cache"]))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in recomputed.items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=1e-10)
    # without it, the layers learn from other examples
    assert max(float((other[name] - tensor).abs().max()) for name, tensor in recomputed.items()) > 1e-4


@pytest.mark.parametrize("sampler", ["random", "sqrt"])
def test_every_phase_climbs_one_layer(program, monkeypatch, sampler):
    """The examples of stage 1 are the same in all phases, whichever of them a sampler takes."""
    weights, climbed = write_weights(program.folder / f"kept-four-layers-{sampler}", layers=4), []
    step = KeptStates.step
    monkeypatch.setattr(KeptStates, "step", lambda *given: climbed.append((given[-1], len(given[-2]))) or step(*given))
    program.train_quickly(f"kept-climb-{sampler}", *CACHED, "--weights", weights, "--epochs", 1, "--sampler", sampler)
    layers = [layer for layer, _ in climbed]
    assert layers == sorted(layers) and set(layers) == {1, 2, 3}
    assert len({sum(count for layer, count in climbed if layer == i) for i in (1, 2, 3)}) == 1


def test_a_run_killed_in_stage_1_ends_like_one_that_was_never_stopped(program, kill):
    weights = write_weights(program.folder / "kept-three-layers", layers=3)
    flags = (*CACHED, "--weights", weights, "--keep_last", "--save_every", 0.00001)
    whole = program.train("kept-whole", *flags)
    steps = [line["step"] for line in log_of(whole) if line["kind"] == "step" and "layer 3" in line["phase"]]
    kill(program.command("kept-killed", *flags), "multitask_classifier", "train_step", steps[-1])
    resumed = program.train("kept-killed", *flags, "--resume")
    expected, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "given", ["", "--slf --slf_epochs 1.5", "--slf --smart", "--slf --bregman 1", "--slf --lnsr 1"]
)
def test_what_the_cache_cannot_keep_is_refused(given):
    flags, named, _ = parse_flags(["--slf_cache", *given.split()])
    with pytest.raises(InputError, match="slf_cache"):
        check_flags(flags, named)
