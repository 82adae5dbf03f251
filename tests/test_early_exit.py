"""Early exit against one-by-one inference, against full depth, and against values worked out by hand."""

import argparse
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_batch, make_model
from torch import nn

from datasets import Batch, read_dataset
from early_exit import (
    ALLOWED_LOSS,
    EXIT_WEIGHTS,
    EXITS,
    FOLDS,
    LTE,
    UNREACHABLE,
    AllExits,
    DistillLoss,
    ExitInference,
    ExitSettings,
    LTELoss,
    assign_folds,
    candidates,
    certainty_target,
    choose_policies,
    choose_thresholds,
    cross_fit,
    every_exit,
    exit_threshold,
    first_exit,
    layer_scores,
    scores_at,
    sweep_levels,
)
from errors import InputError
from evaluation import evaluate, mean_norm, predict, predict_exits
from methods import LossTerm
from report import score_exits, sweep
from tasks import ACCURACY, Metric, build_tasks
from tokenizer import BertTokenizer

ENCODINGS = ("concat", "embed_concat", "siamese")
ROWS = 26
POLICIES = {"sst": "confidence", "para": "confidence", "sts": "lte"}


class MaskedMean(nn.Module):
    """An adapter that depends on the task, on the layer, and on all tokens that the mask leaves visible."""

    def forward(self, layer_index, task, h, extended_mask):
        visible = extended_mask.squeeze(1).softmax(-1)  # [b,1,s]
        change = (layer_index + 1) * (0.5 if task == "sts" else -0.3) * (visible @ h)
        return lambda site, output: output + change if site == "feed_forward" else output


def make_exits(encoding="concat", dtype=torch.float64, adapters=False, layers=4, pooling="cls"):
    """A model in evaluation mode with exits, random LTEs and, where wanted, adapters; and its tasks."""
    tasks = build_tasks(pairs={"para": encoding, "sts": encoding})
    model = make_model(tasks, layers=layers, dtype=dtype, with_exits=True, pooling=pooling)
    model.lte = nn.ModuleDict({name: LTE(head.in_features) for name, head in model.heads.items()})
    generator = torch.Generator().manual_seed(5)
    for heads in (model.heads, *(layer_exit.heads for layer_exit in model.exits), model.lte):
        for parameter in heads.parameters():
            nn.init.normal_(parameter, 0.0, 1.0, generator=generator)
    if adapters:
        model.bert.make_adapt = MaskedMean()
    return model.to(dtype).eval(), tasks


def row_of(batch, row):
    """One row of a batch as a batch without padding columns (the first segment's padding is inside embed_concat)."""
    segments = []
    for ids, mask, types in batch.segments:
        length = int(mask[row].sum())
        segments.append(tuple(x[row : row + 1, :length] for x in (ids, mask, types)))
    labels, ids = batch.labels[row : row + 1], batch.ids[row : row + 1]
    return Batch(batch.task, tuple(segments), labels, ids)


def spreading_threshold(certainty):
    """The threshold at which most exits are used, in a gap so wide that rounding decides nothing."""
    certainty = np.asarray(certainty)
    values = np.sort(certainty[:, :-1].flatten())
    wide = np.flatnonzero(np.diff(values) > 2e-5)
    middles = (values[wide] + values[wide + 1]) / 2
    return float(max(middles, key=lambda t: np.sort(np.bincount(first_exit(certainty, t), minlength=5)[1:]).tolist()))


def count_rows(model):
    """Hooks that count the rows each layer is given: a list that fills as the model runs."""
    counts = [0] * model.depth

    def count(i, layer, arguments):
        counts[i] += len(arguments[0])

    for i, layer in enumerate(model.bert.bert_layers):
        layer.register_forward_pre_hook(partial(count, i))
    return counts


@pytest.fixture
def data(tmp_path):
    """Datasets of the three tasks with random texts of unequal length, at least one of each label."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer, rng = BertTokenizer.from_pretrained(tmp_path), np.random.default_rng(0)

    def read(tasks, n=ROWS):
        datasets = {}
        for name, task in tasks.items():
            lines = ["\t".join(["", "id", *task.columns, task.label_column])]
            for i in range(n):
                texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 15))) for _ in task.columns]
                lines.append("\t".join([str(i), f"{i:025x}", *texts, str(i % (task.label_range[1] + 1))]))
            path = tmp_path / f"{name}.csv"
            path.write_text("\n".join(lines) + "\n")
            datasets[name] = read_dataset(task, path, tokenizer)
        return datasets

    return read


# --- inference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(
    ("name", "encoding"), [("sst", "concat"), *((name, encoding) for name in ("para", "sts") for encoding in ENCODINGS)]
)
@torch.no_grad()
def test_batched_inference_equals_one_by_one(name, encoding, adapters):
    model, tasks = make_exits(encoding, torch.float32, adapters)
    batch = make_batch(tasks[name], b=25, s=12)
    _, confidence, lte = every_exit(model, batch)
    threshold = spreading_threshold(lte if name == "sts" else confidence)
    counts = count_rows(model)
    outputs, layers = ExitInference(POLICIES, {name: threshold})(model, batch, 8)
    passes = 2 if tasks[name].encoding == "siamese" else 1
    assert counts == [passes * int((layers >= i).sum()) for i in range(1, model.depth + 1)]
    assert len(set(layers.tolist())) >= 3
    for row in range(len(batch)):
        alone = row_of(batch, row)
        counts[:] = [0] * model.depth
        output, layer = ExitInference(POLICIES, {name: threshold})(model, alone, 8)
        assert layer == layers[row]
        assert counts == [passes] * int(layer) + [0] * (model.depth - int(layer))
        torch.testing.assert_close(outputs[row], output[0], rtol=1e-5, atol=1e-5)
        full = model(alone, exits=(int(layer),)).logits[int(layer)][0]
        torch.testing.assert_close(output[0], full, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mean_pooling_sees_the_tokens_that_stayed():
    model, tasks = make_exits("embed_concat", torch.float32, pooling="mean")
    batch = make_batch(tasks["para"], b=20, s=12)
    threshold = spreading_threshold(every_exit(model, batch)[1])
    outputs, layers = ExitInference(POLICIES, {"para": threshold})(model, batch, 4)
    assert len(set(layers.tolist())) >= 3
    for row in range(len(batch)):
        full = model(row_of(batch, row), exits=(int(layers[row]),)).logits[int(layers[row])]
        torch.testing.assert_close(outputs[row], full[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_threshold_above_one_is_the_full_model_bit_by_bit(data, encoding, adapters):
    model, tasks = make_exits(encoding, torch.float32, adapters)
    for policies in (POLICIES, dict.fromkeys(tasks, "lte")):
        infer = ExitInference(policies, dict.fromkeys(tasks, UNREACHABLE))
        for dataset in data(tasks).values():
            found, full = predict(model, dataset, batch_size=4, infer=infer), predict(model, dataset, batch_size=4)
            assert np.array_equal(found.outputs, full.outputs)
            assert np.array_equal(found.values, full.values)
            assert found.layers.tolist() == [model.depth] * len(dataset)


@torch.no_grad()
def test_a_threshold_of_zero_leaves_at_the_first_exit():
    model, tasks = make_exits()
    counts = count_rows(model)
    for task in tasks.values():
        batch = make_batch(task, b=7)
        counts[:] = [0] * model.depth
        outputs, layers = ExitInference(POLICIES, dict.fromkeys(tasks, 0.0))(model, batch, 2)
        assert layers.tolist() == [1] * 7
        assert counts == [7, 0, 0, 0]
        torch.testing.assert_close(outputs, model(batch, exits=(1,)).logits[1])


class FirstOfEachPartStays(ExitInference):
    """After layer 1 the first row of every part stays; nothing leaves later."""

    def certainty(self, model, state, logits, task):
        self.first = getattr(self, "first", 0) + 1
        return torch.arange(len(logits)) if self.first <= 4 else torch.zeros(len(logits))


def test_leftovers_of_four_batches_fill_one(data):
    model, tasks = make_exits()
    dataset, passes = data(tasks, 16)["sst"], [0] * model.depth
    for i, layer in enumerate(model.bert.bert_layers):
        layer.register_forward_pre_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
    found = predict(model, dataset, batch_size=4, infer=FirstOfEachPartStays(POLICIES, dict.fromkeys(tasks, 1)))
    assert passes == [4, 1, 1, 1]
    assert sorted(found.layers) == [1] * 12 + [4] * 4


def test_the_kind_of_certainty_follows_the_task():
    tasks = build_tasks()
    assert choose_policies(tasks, "auto") == POLICIES
    assert choose_policies(tasks, "lte") == dict.fromkeys(tasks, "lte")
    classes = {name: tasks[name] for name in ("sst", "para")}
    assert choose_policies(classes, "confidence") == {"sst": "confidence", "para": "confidence"}
    with pytest.raises(InputError, match="--exit_policy confidence: sts is a regression"):
        choose_policies(tasks, "confidence")


@torch.no_grad()
def test_confidence_respects_the_decision_threshold():
    """A probability of .6 is a sure no where yes begins at .99: 1 - .5 * .6 / .99 = .697."""
    model, tasks = make_exits()
    model.set_decision_threshold("para", 0.99)
    batch = make_batch(tasks["para"], b=3)
    for heads in (model.heads, *(layer_exit.heads for layer_exit in model.exits)):
        nn.init.zeros_(heads["para"].weight)
        nn.init.constant_(heads["para"].bias, math.log(0.6 / 0.4))
    _, confidence, _ = every_exit(model, batch)
    torch.testing.assert_close(confidence, torch.full_like(confidence, 1 - 0.5 * 0.6 / 0.99))


# --- one full pass against real runs --------------------------------------------------------------------------------


def test_scores_of_one_full_pass_equal_those_of_real_exit_runs(data):
    model, tasks = make_exits()
    datasets = data(tasks)
    for name, dataset in datasets.items():
        exits = predict_exits(model, dataset, batch_size=8)
        assert np.isnan(exits.confidence).all() == tasks[name].is_regression
        threshold = spreading_threshold(exits.certainty(POLICIES[name]))
        found = scores_at(exits, POLICIES[name], threshold)
        infer = ExitInference(POLICIES, {name: threshold})
        scores, predictions = evaluate(model, {name: dataset}, batch_size=8, infer=infer)
        assert found.score == pytest.approx(scores.tasks[name][tasks[name].metric.name], abs=1e-6)
        assert found.mean_layers == scores.tasks[name]["mean_layers"]
        counts = np.bincount(predictions[name].layers, minlength=5)[1:]
        np.testing.assert_array_equal(found.shares * ROWS, counts)
        assert len(counts.nonzero()[0]) >= 3
        full = predict(model, dataset, batch_size=8)
        np.testing.assert_allclose(exits.values[:, -1], full.values, rtol=1e-6)


def test_predicting_all_exits_keeps_the_chosen_rows_in_their_order(data):
    model, tasks = make_exits()
    dataset = data(tasks)["para"]
    whole, some = predict_exits(model, dataset), predict_exits(model, dataset, [7, 3, 20], batch_size=2)
    assert some.rows.tolist() == [7, 3, 20]
    assert some.labels.tolist() == dataset.labels[[7, 3, 20]].tolist()
    np.testing.assert_allclose(some.lte, whole.lte[[7, 3, 20]], rtol=1e-6)
    np.testing.assert_allclose(some.confidence, whole.take([7, 3, 20]).confidence, rtol=1e-6)


def test_a_sweep_has_a_row_per_setting_and_task_and_starts_at_full_depth(data):
    model, tasks = make_exits()
    datasets = data(tasks)
    settings = ExitSettings(POLICIES, {"sst": 0.0, "para": 0.0, "sts": UNREACHABLE})
    rows = sweep(model, datasets, settings, [0.0, 0.5], {"batch_size": 8})
    assert [(row["setting"], row["task"]) for row in rows] == [
        (setting, task) for setting in ("full depth", "0", "0.5", "auto") for task in ("sst", "para", "sts", "all")
    ]
    assert [row["mean_layers"] for row in rows[:8]] == [4, 4, 4, 4, 1, 1, 1, 1]
    assert [row["mean_layers"] for row in rows[12:]] == [1, 1, 4, 2]
    assert all(row["examples_per_second"] > 0 for row in rows)
    full, _ = evaluate(model, datasets)
    assert rows[3]["score"] == pytest.approx(full.norm, abs=1e-6)
    assert rows[15]["exit_1"] == pytest.approx(2 / 3)
    assert rows[15]["exit_4"] == pytest.approx(1 / 3)
    assert [row["threshold"] for row in rows[8:12]] == [0.5, 0.5, 0.5, ""]


# --- thresholds by hand -------------------------------------------------------------------------------------------


TASKS = build_tasks()


def hand_made(confidence, values, labels, task=TASKS["para"]):
    """AllExits of a classification, or of the given task."""
    confidence, values = np.array(confidence, float), np.array(values, float)
    return AllExits(task, np.arange(len(labels)), np.array(labels, float), values, confidence, 1 - confidence)


def test_scores_at_thresholds_by_hand():
    """Row 0 is sure and right at exit 1, row 1 sure and wrong there, row 2 sure at exit 2, row 3 never."""
    exits = hand_made(
        [[0.9, 0.9, 0.9], [0.8, 0.9, 0.9], [0.5, 0.7, 0.9], [0.4, 0.4, 0.4]],
        [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]],
        [1, 1, 1, 1],
    )
    assert first_exit(exits.confidence, 0.7).tolist() == [1, 1, 2, 3]
    found = scores_at(exits, "confidence", 0.7)
    assert (found.score, found.mean_layers, found.shares.tolist()) == (0.75, 1.75, [0.5, 0.25, 0.25])
    found = scores_at(exits, "confidence", 0.85)
    assert (found.score, found.mean_layers, found.shares.tolist()) == (1.0, 9 / 4, [0.25, 0.25, 0.5])
    # the LTE column is 1 - confidence: row 3 leaves first
    assert scores_at(exits, "lte", 0.6).shares.tolist() == [0.25, 0.0, 0.75]
    assert layer_scores(exits).tolist() == [0.25, 0.75, 1.0]
    # a threshold of its own for every row
    found = scores_at(exits, "confidence", np.array([0.95, 0.7, 0.5, 0.3]))
    assert (found.score, found.mean_layers, found.shares.tolist()) == (0.25, 1.5, [0.75, 0.0, 0.25])


def test_thresholds_between_two_floats_decide_as_torch_decides():
    """Chosen thresholds are float64; a real run compares them with float32 certainties."""
    certainty = torch.full((1, 2), 0.9998348)
    above = torch.nextafter(certainty[0, 0], torch.tensor(1.0)).item()
    for share in (0.2, 0.4, 0.6, 0.8):
        threshold = certainty[0, 0].item() * (1 - share) + above * share
        expected = 1 if certainty[0, 0] >= threshold else 2
        assert first_exit(certainty.numpy(), threshold).tolist() == [expected]
        assert first_exit(certainty.numpy(), np.array([threshold])).tolist() == [expected]


def scores_of(exits, threshold):
    """Accuracy and mean layers at a threshold."""
    found = scores_at(exits, "confidence", threshold)
    return found.score, found.mean_layers


def choose_one(exits, allowed_loss=ALLOWED_LOSS):
    """The threshold of one task alone."""
    return choose_thresholds({"a": exits}, {"a": "confidence"}, allowed_loss)["a"]


def test_the_chosen_threshold_is_the_lowest_that_loses_little_enough():
    """Of ten rows that are right at exit 2, those with confidence .1 and .2 are wrong at exit 1."""
    confidence = np.stack([np.arange(1, 11) / 10, np.ones(10)], axis=1)
    values = np.ones((10, 2))
    values[:2, 0] = 0
    exits = hand_made(confidence, values, np.ones(10))
    # a row that is wrong costs as much score as its layer saves: at a price of 1 leaving all of them is worth it
    for loss, expected in [(0.0, (1.0, 1.2)), (0.2, (0.8, 1.0))]:
        assert scores_of(exits, choose_one(exits, loss)) == expected
    assert choose_one(exits, 0.0) == choose_one(exits, 0.0)
    # nothing but the last exit is good enough
    useless = hand_made(confidence, np.stack([np.zeros(10), np.ones(10)], axis=1), np.ones(10))
    assert scores_of(useless, choose_one(useless)) == (1.0, 2.0)


def test_thresholds_are_chosen_together():
    """At exit 1 task a is always right, b in half of its rows: a leaves early, b does not, within the common loss."""
    confidence, labels = np.stack([np.full(10, 0.6), np.ones(10)], axis=1), np.ones(10)
    half_right = np.stack([np.arange(10) % 2, np.ones(10)], axis=1)
    exits = {"a": hand_made(confidence, np.ones((10, 2)), labels), "b": hand_made(confidence, half_right, labels)}
    policies = dict.fromkeys("ab", "confidence")
    chosen = choose_thresholds(exits, policies)
    assert scores_of(exits["a"], chosen["a"]) == (1.0, 1.0)
    assert scores_of(exits["b"], chosen["b"]) == (1.0, 2.0)
    # half of b is a quarter of the sum
    chosen = choose_thresholds(exits, policies, 0.25)
    assert scores_of(exits["b"], chosen["b"]) == (0.5, 1.0)
    assert choose_thresholds({}, {}) == {}


def test_a_metric_counts_on_its_normalised_scale():
    """Leaving at exit 1 costs .1: a tenth of the range 0 to 1, but a thousandth of the range -100 to 1."""
    confidence, values = [[0.6, 1.0]] * 10, np.ones((10, 2))
    values[0, 0] = 0
    for low, layers in ((0.0, 2.0), (-100.0, 1.0)):
        task = replace(TASKS["para"], metric=Metric("accuracy", ACCURACY.function, low))
        exits = hand_made(confidence, values, np.ones(10), task)
        assert scores_of(exits, choose_one(exits))[1] == layers


def test_candidates_are_certainties_of_the_exits_that_may_let_a_row_go():
    exits = hand_made([[0.3, 0.5, 0.0], [0.4, 0.6, 0.9]], np.ones((2, 3)), [1, 1])
    thresholds, scores, layers = candidates(exits, "confidence")
    assert (thresholds[0], *thresholds[-2:]) == (0.3, 0.6, UNREACHABLE)
    assert (np.diff(thresholds) > 0).all() and (scores == 1).all()
    assert (layers[0], layers[-1]) == (1.0, 3.0) and (np.diff(layers) >= 0).all()


# --- cross-fitting ------------------------------------------------------------------------------------------------


def random_exits(n=43, seed=0):
    """Exits of two tasks with random certainties, which the deeper exits' hits follow."""
    rng, exits = np.random.default_rng(seed), {}
    for name in ("para", "sst"):
        confidence, labels = rng.uniform(0.3, 1, (n, 4)), rng.integers(0, 2, n)
        right = rng.random((n, 4)) < confidence * np.array([0.7, 0.9, 1, 1])
        exits[name] = hand_made(confidence, np.where(right, labels[:, None], 1 - labels[:, None]), labels, TASKS[name])
    return exits


AUTO = ExitSettings({"para": "confidence", "sst": "confidence"}, {"para": None, "sst": None})


@pytest.mark.parametrize("n", [5, 7, 43])
def test_folds_are_balanced_and_seeded(n):
    folds = assign_folds(n)
    sizes = np.bincount(folds, minlength=FOLDS)
    assert sizes.sum() == n and len(sizes) == FOLDS and sizes.max() - sizes.min() <= 1
    assert np.array_equal(folds, assign_folds(n))
    assert n == 5 or not np.array_equal(np.sort(folds), folds)
    assert not np.array_equal(assign_folds(43, seed=1), assign_folds(43, seed=2))


def test_a_fold_has_the_thresholds_that_the_other_folds_choose():
    exits = random_exits()
    folds, held_out = assign_folds(43), cross_fit(exits, AUTO)
    for k in range(FOLDS):
        others = {name: found.take(np.flatnonzero(folds != k)) for name, found in exits.items()}
        for name, threshold in choose_thresholds(others, AUTO.policies).items():
            assert (held_out[name][folds == k] == threshold).all()
    # several folds choose another threshold than all of dev does
    assert len(set(held_out["sst"]) | set(held_out["para"])) > 2


@pytest.mark.parametrize("fold", range(FOLDS))
def test_decisions_of_a_fold_do_not_depend_on_its_labels(fold):
    """Labels and predictions of a fold move the thresholds of the other folds only."""
    exits, mine = random_exits(), assign_folds(43) == fold
    changed = {}
    for name, found in exits.items():
        labels, values = found.labels.copy(), found.values.copy()
        labels[mine], values[mine] = 1 - labels[mine], np.random.default_rng(1).integers(0, 2, values[mine].shape)
        changed[name] = replace(found, labels=labels, values=values)
    before, after = cross_fit(exits, AUTO), cross_fit(changed, AUTO)
    for name in exits:
        assert np.array_equal(before[name][mine], after[name][mine])
        layers = first_exit(exits[name].confidence, before[name])
        assert np.array_equal(layers[mine], first_exit(changed[name].confidence, after[name])[mine])
    assert any(not np.array_equal(before[name], after[name]) for name in exits)


def test_useless_certainty_looks_better_where_it_was_chosen():
    """Exit 1 guesses. On the rows that chose the threshold it costs at most .005 of the score, on other rows more."""
    losses = {"chosen": [], "held out": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = np.stack([rng.random(60) < 0.5, rng.random(60) < 0.6], axis=1)
        exits = {"sst": hand_made(rng.random((60, 2)), values, np.ones(60))}
        settings = ExitSettings({"sst": "confidence"}, {"sst": None})
        full = layer_scores(exits["sst"])[-1]
        for kind, thresholds in (("chosen", settings.complete(exits)), ("held out", cross_fit(exits, settings))):
            losses[kind].append(full - scores_at(exits["sst"], "confidence", thresholds["sst"]).score)
    assert np.mean(losses["chosen"]) <= 0.005 < 0.02 < np.mean(losses["held out"])


def test_given_thresholds_are_used_as_they_are():
    exits = random_exits()
    settings = ExitSettings(AUTO.policies, {"para": 0.8, "sst": None})
    assert settings.complete(exits)["para"] == 0.8
    assert set(cross_fit(exits, settings)["para"]) == {0.8}
    # the task that is left chooses alone
    alone = {"sst": exits["sst"]}
    assert settings.complete(exits)["sst"] == choose_thresholds(alone, AUTO.policies)["sst"]


def test_the_record_of_exits_by_hand():
    """Row 0 leaves after layer 1 and is wrong there; rows 1 to 9 are right after layer 2."""
    confidence, values = np.full((10, 2), 0.5), np.ones((10, 2))
    confidence[0], values[:, 0] = 0.9, 0
    exits = {"para": hand_made(confidence, values, np.ones(10)), "sst": random_exits()["sst"]}
    settings = ExitSettings(AUTO.policies, {"para": 0.7, "sst": UNREACHABLE})
    record = score_exits(TASKS, exits, settings)
    full = float(layer_scores(exits["sst"])[-1])
    assert record["policies"] == AUTO.policies and record["thresholds"] == settings.thresholds
    assert record["cross_fitted"] == {
        "full": {"para": 1.0, "sst": full},
        "exit": {"para": 0.9, "sst": full},
        "mean_layers": {"para": 1.9, "sst": 4.0},
    }
    assert record["cross_fitted_norm"] == pytest.approx({"full": (1 + full) / 2, "exit": (0.9 + full) / 2})
    assert record["cross_fitted_norm"]["exit"] == mean_norm(TASKS, record["cross_fitted"]["exit"])
    assert record["cross_fitted_layers"] == pytest.approx(2.95)
    assert record["shares"] == {"para": [0.1, 0.9], "sst": [0, 0, 0, 1]}
    assert record["layer_scores"]["para"] == [0.0, 1.0]


def test_the_record_and_the_sweep_score_held_out_decisions(data):
    model, tasks = make_exits()
    datasets = data(tasks)
    settings = ExitSettings(POLICIES, dict.fromkeys(tasks))
    exits = {name: predict_exits(model, dataset, batch_size=8) for name, dataset in datasets.items()}
    held_out, kept = cross_fit(exits, settings), settings.complete(exits)
    record = score_exits(tasks, exits, settings)
    rows = {row["task"]: row for row in sweep(model, datasets, settings, [0.5], {"batch_size": 8})[-4:]}
    for name, found in exits.items():
        expected = scores_at(found, POLICIES[name], held_out[name])
        assert record["cross_fitted"]["exit"][name] == rows[name]["score"] == expected.score
        assert record["cross_fitted"]["mean_layers"][name] == rows[name]["mean_layers"] == expected.mean_layers
        assert record["shares"][name] == scores_at(found, POLICIES[name], kept[name]).shares.tolist()
    # the choice on all of dev gives other numbers
    assert any(
        record["cross_fitted"]["exit"][name] != scores_at(found, POLICIES[name], kept[name]).score
        for name, found in exits.items()
    )


# --- training -----------------------------------------------------------------------------------------------------


def test_exit_weights_by_hand():
    assert EXIT_WEIGHTS["joint"](3) == ({1: 1.0, 2: 1.0, 3: 1.0},)
    assert EXIT_WEIGHTS["weighted"](3) == ({1: 0.5, 2: 1.0, 3: 1.5},)
    assert EXIT_WEIGHTS["alternating"](3) == ({3: 1.0}, {1: 1.0, 2: 1.0, 3: 1.0})
    assert EXIT_WEIGHTS["distilled"](3) == EXIT_WEIGHTS["joint"](3)
    for depth in (2, 6, 12):
        assert sum(EXIT_WEIGHTS["weighted"](depth)[0].values()) == pytest.approx(depth)


def test_lte_certainty_by_hand():
    """sigmoid(.5 * 1 - 2 * .25 + ln 3) = sigmoid(ln 3) = 3/4; untrained it is 1/2."""
    lte, state = LTE(2).double(), torch.tensor([[1.0, 0.25]], dtype=torch.float64)
    assert lte.certainty(state).item() == 0.5
    with torch.no_grad():
        lte.linear.weight.copy_(torch.tensor([[0.5, -2.0]]))
        lte.linear.bias.fill_(math.log(3))
    assert lte.certainty(state).item() == pytest.approx(0.75)


def test_lte_targets_by_hand():
    """For a 0-5 label the scale is 2.5; a prediction of 7 counts as 5, the error of 4.5 as 1.8 scales."""
    tasks = build_tasks()
    logits = torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0, 0.0]])
    target = certainty_target(tasks["sst"], logits, torch.tensor([1.0, 2.0]), 0.5)
    assert target.tolist() == [1.0, 0.0]
    # p = .6 is no paraphrase where yes begins at .7
    logits = torch.full((2, 1), math.log(0.6 / 0.4))
    assert certainty_target(tasks["para"], logits, torch.tensor([1.0, 0.0]), 0.5).tolist() == [1.0, 0.0]
    assert certainty_target(tasks["para"], logits, torch.tensor([1.0, 0.0]), 0.7).tolist() == [0.0, 1.0]
    values, labels = torch.tensor([[4.0], [1.0], [7.0]]), torch.tensor([4.0, 3.5, 0.5])
    target = certainty_target(tasks["sts"], values, labels, 0.5)
    torch.testing.assert_close(target, torch.tensor([1.0, 1 - math.tanh(1.0), 1 - math.tanh(1.8)]))
    cosine = build_tasks(("sts",), {"sts": "siamese"}, losses={"sts": "cosine"})["sts"]
    target = certainty_target(cosine, torch.tensor([[0.5]]), torch.tensor([3.0]), 0.5)
    torch.testing.assert_close(target, torch.tensor([1 - math.tanh(0.2)]))


def test_the_lte_loss_is_the_weighted_sum_of_its_exits():
    model, tasks = make_exits()
    for task in tasks.values():
        batch = make_batch(task)
        outputs = model(batch, exits=(1, 3, 4))
        expected = 0
        for i, weight in {1: 0.5, 3: 2.0, 4: 1.0}.items():
            target = certainty_target(task, outputs.logits[i], batch.labels, 0.5)
            linear = model.lte[task.name].linear
            u = 1 / (1 + torch.exp(-(outputs.states[i] @ linear.weight[0] + linear.bias)))
            expected = expected + weight * (u - target) ** 2
        found = LTELoss()(model, batch, outputs, {1: 0.5, 3: 2.0, 4: 1.0})
        torch.testing.assert_close(found, expected)


def test_the_lte_loss_teaches_the_backbone_but_not_the_heads():
    """The target is a label: heads get no gradient, c and the layers below do."""
    model, tasks = make_exits()
    batch = make_batch(tasks["sts"])
    LTELoss()(model, batch, model(batch, exits=(2,)), {2: 1.0}).sum().backward()
    assert all(parameter.grad is None for parameter in model.exits[1].heads.parameters())
    assert all(parameter.grad is None for parameter in model.bert.bert_layers[2].parameters())
    for parameter in (model.lte["sts"].linear.weight, model.bert.bert_layers[0].out_dense.weight):
        assert parameter.grad.abs().sum() > 0
    assert model.lte["para"].linear.weight.grad is None


# --- self-distillation --------------------------------------------------------------------------------------------


def hand_outputs(logits):
    """The part of a forward pass that DistillLoss reads: {exit: logits}, leaves that collect gradients."""
    return SimpleNamespace(logits={i: torch.tensor(x, requires_grad=True) for i, x in logits.items()})


def test_the_distillation_loss_by_hand():
    """Bernoulli with p = 1/4, 3/4, 1/2: (p - q)(logit p - logit q) is ln 3 / 4 for exits 1 and 2, with weights 2, 1."""
    model, batch = SimpleNamespace(depth=3), make_batch(TASKS["para"], b=1)
    outputs = hand_outputs({1: [[-math.log(3)]], 2: [[math.log(3)]], 3: [[0.0]]})
    loss = DistillLoss()(model, batch, outputs, {1: 2.0, 2: 1.0, 3: 5.0})
    assert loss.shape == (1,) and loss.item() == pytest.approx(3 * math.log(3) / 4)
    loss.sum().backward()
    assert outputs.logits[3].grad is None
    # d/dz of (s(z) - 1/2) z = s (1 - s) z + s - 1/2, at z = -ln 3 and ln 3
    assert outputs.logits[1].grad.item() == pytest.approx(2 * (-3 / 16 * math.log(3) - 1 / 4))
    assert outputs.logits[2].grad.item() == pytest.approx(3 / 16 * math.log(3) + 1 / 4)
    # a regression: squared differences
    outputs = hand_outputs({1: [[1.0], [4.0]], 2: [[3.0], [3.5]]})
    model, batch = SimpleNamespace(depth=2), make_batch(TASKS["sts"], b=2)
    assert DistillLoss()(model, batch, outputs, {1: 0.5, 2: 1.0}).tolist() == [2.0, 0.125]


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_the_distillation_loss_of_a_model_is_the_weighted_divergence_to_the_last_exit(name):
    model, tasks = make_exits()
    batch, weights = make_batch(tasks[name]), {1: 0.5, 3: 2.0, 4: 1.0}
    outputs = model(batch, exits=tuple(weights))
    divergence = tasks[name].objective.divergence
    expected = 0.5 * divergence(outputs.logits[1], outputs.logits[4]) + 2 * divergence(
        outputs.logits[3], outputs.logits[4]
    )
    loss = DistillLoss()(model, batch, outputs, weights)
    torch.testing.assert_close(loss, expected.detach())
    assert (loss > 0).all()
    loss.sum().backward()
    # the teacher learns nothing: not its head, nor the layer that only the last exit sees
    assert all(parameter.grad is None for parameter in model.heads.parameters())
    assert all(parameter.grad is None for parameter in model.bert.bert_layers[3].parameters())
    assert model.exits[0].heads[name].weight.grad.abs().sum() > 0


def test_the_distillation_loss_is_zero_without_a_teacher_or_a_difference():
    model, tasks = make_exits()
    batch = make_batch(tasks["sst"])
    for weights in ({2: 1.0}, {model.depth: 1.0}):
        assert DistillLoss()(model, batch, model(batch, exits=tuple(weights)), weights).tolist() == [0.0] * len(batch)
    outputs = model(batch, exits=(1, 4))
    outputs.logits[1] = outputs.logits[4]
    assert DistillLoss()(model, batch, outputs, {1: 1.0, 4: 1.0}).tolist() == [0.0] * len(batch)


# --- the record ---------------------------------------------------------------------------------------------------


def parse(*arguments):
    """The flags of early exit, with the option of the run, and the set of typed ones."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    EXITS.add_flags(parser.add_argument_group(EXITS.title))
    given = {argument[2:] for argument in arguments if argument.startswith("--")}
    return vars(parser.parse_args(arguments)) | {"option": "finetune"}, given


def refused(flags, given):
    """The sentences of the conflicts that apply."""
    return [sentence for applies, sentence in EXITS.conflicts(flags, given) if applies]


def test_flags_decide_what_early_exit_needs_and_adds_to_the_loss():
    for arguments, needs, terms in [
        ((), set(), []),
        (("--early_exit",), {"exits"}, ["lte"]),
        (("--early_exit", "--exit_loss", "weighted"), {"exits"}, ["lte"]),
        (("--early_exit", "--exit_loss", "two_stage"), {"exits"}, ["lte"]),
        (("--early_exit", "--exit_loss", "distilled"), {"exits"}, ["lte", "distill"]),
    ]:
        flags, given = parse(*arguments)
        assert refused(flags, given) == []
        assert EXITS.needs(flags) == needs
        built = EXITS.terms(flags, None, None)
        assert list(built) == terms and all(isinstance(term, LossTerm) for term in built.values())


def test_flags_that_need_early_exit_are_refused_without_it():
    for arguments in (("--exit_policy", "lte"), ("--exit_threshold", ".5"), ("--exit_loss", "weighted")):
        flags, given = parse(*arguments)
        assert refused(flags, given) == [f"{arguments[0]} belongs to --early_exit"]
        assert refused(flags | {"option": "evaluate"}, given) == []
        assert refused(*parse("--early_exit", *arguments)) == []
    flags, given = parse("--early_exit", "--exit_threshold", ".5,.9")
    assert refused(flags, given) == ["--exit_threshold with a list sweeps a saved run: use it with --option evaluate"]
    assert refused(flags | {"option": "evaluate"}, given) == []


def test_thresholds_and_lists_of_them_are_read():
    assert exit_threshold("auto") is None and exit_threshold(".75") == 0.75
    assert sweep_levels([".5,.9,1"]) == [0.5, 0.9, 1.0]
    assert sweep_levels(["auto"]) == sweep_levels(["sst=.5", "para=.6"]) == []
    for text in (".5,high", ".5,-1"):
        with pytest.raises(InputError, match=f"--exit_threshold {text}"):
            sweep_levels([text])


def test_a_file_outside_can_add_a_way_to_weigh_exits(monkeypatch):
    monkeypatch.setitem(EXIT_WEIGHTS, "ends", lambda depth: ({1: 1.0, depth: 1.0},))
    flags, _ = parse("--early_exit", "--exit_loss", "ends")
    assert EXIT_WEIGHTS[flags["exit_loss"]](5) == ({1: 1.0, 5: 1.0},) and EXITS.needs(flags) == {"exits"}
