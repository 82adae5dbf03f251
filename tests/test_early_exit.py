"""Early exit against one-by-one inference, against full depth, and against values worked out by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny import make_batch, make_model
from torch import nn

from datasets import Batch, read_dataset
from early_exit import (
    FULL_DEPTH,
    LTE,
    AllExits,
    ExitInference,
    LTELoss,
    certainty_target,
    choose_policies,
    choose_thresholds,
    every_exit,
    exit_weights,
    first_exit,
    halves,
    layer_scores,
    scores_at,
)
from errors import InputError
from evaluation import METRICS, evaluate, full_depth, predict, predict_exits, sweep
from tasks import build_tasks
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
    model = make_model(tasks, layers=layers, dtype=dtype, exits=True, pooling=pooling)
    model.lte = nn.ModuleDict({name: LTE(head.in_features) for name, head in model.heads.items()})
    generator = torch.Generator().manual_seed(5)
    for heads in (model.heads, *(layer_exit.heads for layer_exit in model.exits), model.lte):
        for parameter in heads.parameters():
            nn.init.normal_(parameter, 0.0, 1.0, generator=generator)
    if adapters:
        model.bert.adapters = MaskedMean()
    return model.to(dtype).eval(), tasks


def row_of(batch, row):
    """One row of a batch as a batch without padding columns (the first segment's padding is inside embed_concat)."""
    segments = []
    for ids, mask, types in batch.segments:
        length = int(mask[row].sum())
        segments.append(tuple(x[row : row + 1, :length] for x in (ids, mask, types)))
    labels, ids = batch.labels[row : row + 1], batch.ids[row : row + 1]
    return Batch(batch.task, batch.encoding, tuple(segments), labels, ids)


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
    outputs, layers = ExitInference(POLICIES, {name: threshold}, batch_size=8)(model, batch)
    passes = 2 if tasks[name].encoding == "siamese" else 1
    assert counts == [passes * int((layers >= i).sum()) for i in range(1, model.depth + 1)]
    assert len(set(layers.tolist())) >= 3
    for row in range(len(batch)):
        alone = row_of(batch, row)
        counts[:] = [0] * model.depth
        output, layer = ExitInference(POLICIES, {name: threshold})(model, alone)
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
    outputs, layers = ExitInference(POLICIES, {"para": threshold}, batch_size=4)(model, batch)
    assert len(set(layers.tolist())) >= 3
    for row in range(len(batch)):
        full = model(row_of(batch, row), exits=(int(layers[row]),)).logits[int(layers[row])]
        torch.testing.assert_close(outputs[row], full[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_threshold_above_one_is_the_full_model_bit_by_bit(data, encoding, adapters):
    model, tasks = make_exits(encoding, torch.float32, adapters)
    for policies in (POLICIES, dict.fromkeys(tasks, "lte")):
        infer = ExitInference(policies, dict.fromkeys(tasks, FULL_DEPTH), batch_size=4)
        for dataset in data(tasks).values():
            found, full = predict(model, dataset, batch_size=4, infer=infer), predict(model, dataset, batch_size=4)
            assert np.array_equal(found.outputs, full.outputs)
            assert np.array_equal(found.values, full.values)
            assert found.exits.tolist() == [model.depth] * len(dataset)


@torch.no_grad()
def test_a_threshold_of_zero_leaves_at_the_first_exit():
    model, tasks = make_exits()
    counts = count_rows(model)
    for task in tasks.values():
        batch = make_batch(task, b=7)
        counts[:] = [0] * model.depth
        outputs, layers = ExitInference(POLICIES, dict.fromkeys(tasks, 0.0), batch_size=2)(model, batch)
        assert layers.tolist() == [1] * 7
        assert counts == [7, 0, 0, 0]
        torch.testing.assert_close(outputs, model(batch, exits=(1,)).logits[1])


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
    model.set_threshold("para", 0.99)
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
        found = scores_at(exits, POLICIES[name], threshold, METRICS[tasks[name].metric])
        infer = ExitInference(POLICIES, {name: threshold}, batch_size=8)
        scores, predictions = evaluate(model, {name: dataset}, batch_size=8, infer=infer)
        assert found.score == pytest.approx(scores.tasks[name][tasks[name].metric], abs=1e-6)
        assert found.mean_layers == scores.tasks[name]["mean_layers"]
        counts = np.bincount(predictions[name].exits, minlength=5)[1:]
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
    exits = {name: predict_exits(model, dataset) for name, dataset in datasets.items()}
    settings = {"0": dict.fromkeys(tasks, 0.0), "mixed": {"sst": 0.0, "para": 0.0, "sts": FULL_DEPTH}}
    rows = sweep(model, datasets, exits, POLICIES, settings, batch_size=8)
    assert [(row["setting"], row["task"]) for row in rows] == [
        (setting, task) for setting in ("full depth", "0", "mixed") for task in ("sst", "para", "sts", "all")
    ]
    assert [row["mean_layers"] for row in rows] == [4, 4, 4, 4, 1, 1, 1, 1, 1, 1, 4, 2]
    assert all(row["examples_per_second"] > 0 for row in rows)
    full, _ = evaluate(model, datasets, infer=full_depth)
    assert rows[3]["score"] == pytest.approx(full.norm, abs=1e-6)
    assert rows[11]["exit_1"] == pytest.approx(2 / 3)
    assert rows[11]["exit_4"] == pytest.approx(1 / 3)


# --- thresholds by hand -------------------------------------------------------------------------------------------


def hand_made(confidence, values, labels):
    """AllExits of a classification."""
    confidence, values = np.array(confidence, float), np.array(values, float)
    return AllExits(np.arange(len(labels)), np.array(labels, float), values, confidence, 1 - confidence)


def test_scores_at_thresholds_by_hand():
    """Row 0 is sure and right at exit 1, row 1 sure and wrong there, row 2 sure at exit 2, row 3 never."""
    exits = hand_made(
        [[0.9, 0.9, 0.9], [0.8, 0.9, 0.9], [0.5, 0.7, 0.9], [0.4, 0.4, 0.4]],
        [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]],
        [1, 1, 1, 1],
    )
    assert first_exit(exits.confidence, 0.7).tolist() == [1, 1, 2, 3]
    accuracy = METRICS["accuracy"]
    found = scores_at(exits, "confidence", 0.7, accuracy)
    assert (found.score, found.mean_layers, found.shares.tolist()) == (0.75, 1.75, [0.5, 0.25, 0.25])
    found = scores_at(exits, "confidence", 0.85, accuracy)
    assert (found.score, found.mean_layers, found.shares.tolist()) == (1.0, 9 / 4, [0.25, 0.25, 0.5])
    # the LTE column is 1 - confidence: row 3 leaves first
    assert scores_at(exits, "lte", 0.6, accuracy).shares.tolist() == [0.25, 0.0, 0.75]
    assert layer_scores(exits, accuracy).tolist() == [0.25, 0.75, 1.0]


def scores_of(exits, threshold):
    """Accuracy and mean layers at a threshold."""
    found = scores_at(exits, "confidence", threshold, METRICS["accuracy"])
    return found.score, found.mean_layers


def choose_one(exits, **how):
    """The threshold of one task alone."""
    return choose_thresholds({"a": exits}, {"a": "confidence"}, {"a": METRICS["accuracy"]}, **how)["a"]


def test_the_chosen_threshold_is_the_lowest_that_loses_little_enough():
    """Of ten rows that are right at exit 2, those with confidence .1 and .2 are wrong at exit 1."""
    confidence = np.stack([np.arange(1, 11) / 10, np.ones(10)], axis=1)
    values = np.ones((10, 2))
    values[:2, 0] = 0
    exits = hand_made(confidence, values, np.ones(10))
    # a row that is wrong costs as much score as its layer saves: at a price of 1 leaving all of them is worth it
    for loss, expected in [(0.0, (1.0, 1.2)), (0.2, (0.8, 1.0))]:
        assert scores_of(exits, choose_one(exits, loss=loss)) == expected
    assert choose_one(exits, loss=0.0) == choose_one(exits, loss=0.0)
    # nothing but the last exit is good enough
    useless = hand_made(confidence, np.stack([np.zeros(10), np.ones(10)], axis=1), np.ones(10))
    assert scores_of(useless, choose_one(useless)) == (1.0, 2.0)


def test_thresholds_are_chosen_together():
    """At exit 1 task a is always right, b in half of its rows: a leaves early, b does not, within the common loss."""
    confidence, labels = np.stack([np.full(10, 0.6), np.ones(10)], axis=1), np.ones(10)
    half_right = np.stack([np.arange(10) % 2, np.ones(10)], axis=1)
    exits = {"a": hand_made(confidence, np.ones((10, 2)), labels), "b": hand_made(confidence, half_right, labels)}
    policies, metrics = dict.fromkeys("ab", "confidence"), dict.fromkeys("ab", METRICS["accuracy"])
    chosen = choose_thresholds(exits, policies, metrics)
    assert scores_of(exits["a"], chosen["a"]) == (1.0, 1.0)
    assert scores_of(exits["b"], chosen["b"]) == (1.0, 2.0)
    # half of b is a quarter of the sum
    chosen = choose_thresholds(exits, policies, metrics, loss=0.25)
    assert scores_of(exits["b"], chosen["b"]) == (0.5, 1.0)
    assert choose_thresholds({}, {}, {}) == {}


def test_halves_are_disjoint_seeded_and_complete():
    first, second = halves(11, seed=3)
    assert (len(first), len(second)) == (5, 6)
    assert sorted([*first, *second]) == list(range(11))
    assert np.array_equal(first, halves(11, seed=3)[0])
    assert not np.array_equal(first, halves(11, seed=4)[0])


# --- training -----------------------------------------------------------------------------------------------------


def test_exit_weights_by_hand():
    assert exit_weights("joint", 3) == ({1: 1.0, 2: 1.0, 3: 1.0},)
    assert exit_weights("weighted", 3) == ({1: 0.5, 2: 1.0, 3: 1.5},)
    assert exit_weights("alternating", 3) == ({3: 1.0}, {1: 1.0, 2: 1.0, 3: 1.0})
    for depth in (2, 6, 12):
        assert sum(exit_weights("weighted", depth)[0].values()) == pytest.approx(depth)


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
    cosine = build_tasks(("sts",), {"sts": "siamese"}, sts_loss="cosine")["sts"]
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


def test_a_frozen_lte_has_no_loss():
    """Sequential Layer Focus trains it in stage 2 only."""
    model, tasks = make_exits()
    batch = make_batch(tasks["sst"])
    outputs = model(batch, exits=(1,))
    assert (LTELoss()(model, batch, outputs, {1: 1.0}) > 0).all()
    model.lte.requires_grad_(False)
    frozen = LTELoss()(model, batch, outputs, {1: 1.0})
    assert frozen.tolist() == [0.0] * len(batch)
    assert not frozen.requires_grad
