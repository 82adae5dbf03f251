"""Metrics by hand and against scipy, scores against published rows, prediction files byte for byte."""

import csv
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from tiny import make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from datasets import read_dataset
from errors import InputError
from evaluation import (
    AtExit,
    Predictions,
    evaluate,
    fit_decision_threshold,
    predict,
    score,
    summarise,
    write_predictions,
)
from files import write_whole
from tasks import MATTHEWS, Metric, accuracy, build_tasks, pearson, spearman
from tokenizer import BertTokenizer

TASKS = build_tasks(("sst", "cfimdb", "para", "sts"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e"]


def rng(seed=0):
    return np.random.default_rng(seed)


class FakeModel(nn.Module):
    """Two layers, and logits that are sums over an example's own tokens, so that padding must not matter."""

    def __init__(self, outputs):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(len(WORDS), outputs, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.depth = 2
        self.modes, self.widths = [], []

    def decision_threshold(self, name):
        return 0.5

    def forward(self, batch, exits=None):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.widths.append([segment[0].shape[1] for segment in batch.segments])
        logits = sum((self.weight[input_ids] * mask.unsqueeze(-1)).sum(1) for input_ids, mask, _ in batch.segments)
        return SimpleNamespace(logits={1: torch.zeros_like(logits), 2: self.dropout(logits)})


@pytest.fixture
def make_data(tmp_path):
    """Make a dataset of the named task from (texts..., label) rows."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)

    def make_data(name, rows, labelled=True, tasks=TASKS):
        task = tasks[name]
        path = tmp_path / f"{name}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["", "id", *task.columns, *[task.label_column] * labelled])
            for i, row in enumerate(rows):
                writer.writerow([i, f"{i:025x}", *row])
        return read_dataset(task, path, tokenizer, labelled=labelled)

    return make_data


def random_rows(columns, labels, seed=0):
    generator = rng(seed)
    texts = [[" ".join(generator.choice(list("abcde"), generator.integers(1, 15))) for _ in columns] for _ in labels]
    return [(*text, label) for text, label in zip(texts, labels, strict=True)]


def predictions_of(name, values, labels, exits=None, **fields):
    """Predictions with the given values, without files or a model; `fields` replace fields of the task's row."""
    task, values = replace(TASKS[name], **fields), np.asarray(values, np.float32)
    data = SimpleNamespace(task=task, labels=np.asarray(labels, np.float64))
    probabilities = None if task.is_regression else np.eye(len(task.label_names))[values.astype(int)]
    exits = np.full(len(values), 6) if exits is None else np.asarray(exits)
    return Predictions(data, np.arange(len(values)), values, values[:, None], probabilities, exits)


# --- metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["para", "sst"])
def test_classification_metrics_equal_scikit_learn(name):
    classes = len(TASKS[name].label_names)
    labels, values = rng(0).integers(0, classes, 300), rng(1).integers(0, classes, 300)
    labels[:150] = values[:150]
    metrics, _ = score(predictions_of(name, values, labels))
    assert metrics["accuracy"] == accuracy(values, labels) == pytest.approx((values == labels).mean(), rel=1e-12)
    assert metrics["confusion"] == sklearn.metrics.confusion_matrix(labels, values).tolist()
    assert metrics["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, values, average="macro"), rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_macro_f1_leaves_out_classes_that_do_not_occur():
    """F1 = 2 hits / (labels + predictions): 4/4, 2/3, 0/1 (predicted, but wrong), 2/2; class 4 does not occur."""
    metrics, _ = score(predictions_of("sst", [0, 0, 1, 2, 3], [0, 0, 1, 1, 3]))
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4, rel=1e-12)
    assert np.shape(metrics["confusion"]) == (5, 5)


def test_confusion_has_gold_rows_and_predicted_columns():
    """Gold 0 predicted as 1 twice, gold 2 predicted as 0 once."""
    metrics, _ = score(predictions_of("sst", [1, 1, 0], [0, 0, 2]))
    expected = np.zeros((5, 5), int)
    expected[0, 1], expected[2, 0] = 2, 1
    assert metrics["confusion"] == expected.tolist()


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e-7, 0.0), (1e-3, 1e3), (-2.0, 5.0)])
def test_correlations_equal_scipy_at_every_scale(scale, shift):
    labels = np.round(rng(0).uniform(0, 5, 400), 1)
    values = (labels + rng(1).normal(size=400)) * scale + shift
    assert pearson(values, labels) == pytest.approx(scipy.stats.pearsonr(values, labels)[0], rel=1e-9)
    assert spearman(values, labels) == pytest.approx(scipy.stats.spearmanr(values, labels)[0], rel=1e-9)


def test_pearson_by_hand():
    """Deviations -1, 0, 1 and -1, -1, 2: 3 / sqrt(2 * 6)."""
    assert pearson([1, 2, 3], [0, 0, 3]) == pytest.approx(3 / 12**0.5)


@pytest.mark.parametrize("value", [0.0, 2.5, 3.3, 1e6 / 3])
def test_constant_predictions_have_correlation_zero(value):
    """The mean of many equal numbers is not always that number: what is left of them must not correlate."""
    labels = rng(0).uniform(0, 5, 4044)
    constant = np.full(4044, value, np.float32)
    assert pearson(constant, labels) == spearman(constant, labels) == pearson(labels, constant) == 0.0


# --- scores and warnings ------------------------------------------------------------------------------------


def test_score_of_a_classification_by_hand():
    metrics, warnings = score(predictions_of("para", [1, 1, 0, 0], [1, 0, 0, 0], exits=[2, 4, 6, 6]))
    assert metrics == {
        "accuracy": 0.75,
        # paraphrase: 2 of 3, not: 4 of 5
        "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2),
        "majority": 0.75,
        "predicted_shares": [0.5, 0.5],
        "confusion": [[2, 1], [0, 1]],
        "positive_rate": 0.5,
        "mean_layers": 4.5,
    }
    assert warnings == []


def test_score_of_a_regression_by_hand():
    metrics, warnings = score(predictions_of("sts", [1, 2, 3], [0, 0, 3]))
    assert metrics == {
        "pearson": pytest.approx(3 / 12**0.5),
        # ranks 1, 2, 3 and 1.5, 1.5, 3: 1.5 / sqrt(2 * 1.5)
        "spearman": pytest.approx(1.5 / 3**0.5),
        "mean_prediction": pytest.approx(2.0),
        "sd_prediction": pytest.approx((2 / 3) ** 0.5),
        "mean_layers": 6.0,
    }
    assert warnings == []


def test_score_uses_the_labels_of_the_predicted_rows_only():
    found = predictions_of("sst", [3, 1], [3, 9, 1])
    found.rows = np.array([0, 2])
    assert score(found)[0]["accuracy"] == 1.0


@pytest.mark.parametrize("noise", [0.0, 2e-7])
def test_constant_similarity_counts_as_zero_with_a_warning(noise):
    """A model that gives one value, up to rounding that happens to follow the labels."""
    labels = rng(0).uniform(0, 5, 200)
    metrics, warnings = score(predictions_of("sts", 1.7 + noise * (labels > 2.5), labels))
    assert metrics["pearson"] == metrics["spearman"] == 0.0
    assert len(warnings) == 1
    assert warnings[0].startswith("sts: every prediction is 1.700")


def test_undefined_similarity_counts_as_zero_with_a_warning():
    metrics, warnings = score(predictions_of("sts", [1.0, np.nan, 3.0], [1, 2, 3]))
    assert metrics["pearson"] == metrics["spearman"] == 0.0
    assert "nan" in warnings[0]


def test_a_collapsed_classifier_scores_like_the_majority_and_is_warned_of():
    labels = np.arange(1000) % 8 < 3
    metrics, warnings = score(predictions_of("para", np.zeros(1000), labels))
    assert metrics["accuracy"] == metrics["majority"] == 0.625
    assert metrics["positive_rate"] == 0.0
    assert len(warnings) == 1
    assert "para" in warnings[0]
    assert "100.0%" in warnings[0]
    assert "'not a paraphrase'" in warnings[0]
    some = np.zeros(1000)
    some[:15] = 1
    assert score(predictions_of("para", some, labels))[1] == []
    some[:9], some[9:] = 1, 0
    assert len(score(predictions_of("para", some, labels))[1]) == 1


def test_the_main_metric_is_stored_under_its_own_name():
    """A classification scored by Matthews' correlation, and regressions scored by Spearman's or by an error."""
    labels, values = [1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 1]
    metrics, _ = score(predictions_of("para", values, labels, metric=MATTHEWS))
    # 2 hits each way, 1 miss each way: (2 * 2 - 1 * 1) / 3^2
    assert metrics["matthews"] == pytest.approx(1 / 3)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    labels, values = [1.0, 2.0, 3.0, 5.0], [1.0, 3.0, 2.0, 4.0]
    metrics, _ = score(predictions_of("sts", values, labels, metric=Metric("spearman", spearman, low=-1.0)))
    assert metrics["spearman"] == pytest.approx(0.8)
    distance = Metric("negative error", lambda values, labels: -float(np.abs(values - labels).mean()), -5.0, 0.0)
    metrics, _ = score(predictions_of("sts", values, labels, metric=distance))
    assert metrics["negative error"] == -0.75 and metrics["pearson"] > 0.8
    found = summarise({"a": replace(TASKS["sts"], metric=distance)}, {"a": metrics}, [])
    assert (found.raw, found.norm) == (-0.75, pytest.approx(4.25 / 5))


@pytest.mark.parametrize(
    "sst, para, sts, raw, norm",
    [
        pytest.param(0.510, 0.632, 0.818, 0.653, 0.684, id="BERTer best"),
        pytest.param(0.314, 0.369, 0.199, 0.294, 0.428, id="BERTer baseline"),
        pytest.param(0.519, 0.883, 0.880, 0.761, 0.781, id="SMARTer BERT split1"),
    ],
)
def test_raw_and_norm_of_published_rows(sst, para, sts, raw, norm):
    """Printed from unrounded scores: the last digit may differ by one, while the formulas are .02 apart."""
    metrics = {"sst": {"accuracy": sst}, "para": {"accuracy": para}, "sts": {"pearson": sts}}
    found = summarise(TASKS, metrics, ["a warning"])
    assert (found.raw, found.norm) == pytest.approx((raw, norm), abs=0.001)
    assert (found.raw, found.norm) == pytest.approx(((sst + para + sts) / 3, (sst + para + sts / 2 + 0.5) / 3))
    assert found.tasks is metrics
    assert found.warnings == ["a warning"]


def test_scores_of_a_single_task():
    assert summarise(TASKS, {"sts": {"pearson": -0.5}}, []).norm == 0.25
    assert summarise(TASKS, {"sst": {"accuracy": 0.4}}, []).norm == 0.4


# --- predicting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_predictions_come_in_the_order_of_the_rows_at_every_batch_size(make_data, encoding):
    tasks = build_tasks(pairs={"sts": encoding})
    data = make_data("sts", random_rows("xy", rng(1).uniform(0, 5, 23)), tasks=tasks)
    model = FakeModel(1)
    one_by_one = torch.cat([model.eval()(data.batch(np.array([i]))).logits[2] for i in range(23)]).detach()
    for batch_size in (1, 4, 23, 64):
        found = predict(model, data, batch_size=batch_size)
        np.testing.assert_allclose(found.outputs, one_by_one.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.values, one_by_one.squeeze(-1).clamp(0, 5).numpy(), rtol=1e-5, atol=1e-5)
        assert found.rows.tolist() == list(range(23))
        assert found.layers.tolist() == [2] * 23
        assert found.probabilities is None


def test_predictions_of_chosen_rows_follow_their_order(make_data):
    data = make_data("sst", random_rows("x", rng(1).integers(0, 5, 12)))
    model = FakeModel(5)
    everything, rows = predict(model, data), [7, 3, 11, 0]
    some = predict(model, data, rows, batch_size=2)
    assert some.rows.tolist() == rows
    np.testing.assert_allclose(some.outputs, everything.outputs[rows], rtol=1e-5, atol=1e-5)
    assert some.values.tolist() == everything.outputs[rows].argmax(1).tolist()
    np.testing.assert_allclose(some.probabilities.sum(1), 1, rtol=1e-6)


def test_prediction_runs_in_evaluation_mode_without_gradients_and_longest_first(make_data):
    data = make_data("sst", random_rows("x", rng(1).integers(0, 5, 20)))
    model = FakeModel(5)
    for mode in (True, False):
        model.train(mode)
        model.modes.clear()
        predict(model, data, batch_size=4)
        assert model.modes == [(False, False)] * 5
        assert model.training is mode
    widths = [width for (width,) in model.widths[:5]]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == data.lengths().max()


def test_an_inference_policy_replaces_full_depth(make_data):
    """Rows leave after as many layers as they have tokens: outputs and exits return to their rows."""
    data = make_data("sst", random_rows("x", rng(1).integers(0, 5, 15)))

    class LeaveByLength:
        batches_at_once, seen = 3, []

        def __call__(self, model, batch, batch_size):
            self.seen.append((len(batch), batch_size))
            lengths = batch.segments[0][1].sum(1)
            return lengths.unsqueeze(-1).expand(-1, 5), lengths

    found = predict(FakeModel(5), data, batch_size=4, infer=LeaveByLength())
    assert LeaveByLength.seen == [(12, 4), (3, 4)]
    assert found.layers.tolist() == data.lengths().tolist()
    assert found.outputs[:, 0].tolist() == data.lengths().tolist()


def test_a_fixed_exit_runs_the_layers_below_it_only(make_data):
    data, model = make_data("sst", random_rows("x", rng(1).integers(0, 5, 6))), make_model(TASKS, with_exits=True)
    found = predict(model, data, infer=AtExit(2))
    batch = data.batch(found.rows)
    expected = model.eval()(batch, exits=(2,)).logits[2].detach()
    np.testing.assert_allclose(found.outputs, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert found.layers.tolist() == [2] * 6
    assert predict(model, data).layers.tolist() == [model.depth] * 6


class CountCasts(TorchDispatchMode):
    """Counts the copies to bfloat16 of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape == self.shape
        return function(*args, **kwargs)


def test_autocast_casts_the_weights_once_for_all_batches_of_a_prediction(make_data):
    data = make_data("sst", random_rows("x", [0, 1, 2, 3, 4, 0, 1]))
    model = make_model(TASKS, layers=3, dtype=torch.float32)
    with CountCasts(model.bert.bert_layers[0].interm_dense.weight.shape) as casts:
        predict(model, data, batch_size=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert casts.count == 3


def test_the_threshold_of_the_model_decides(make_data):
    data = make_data("para", random_rows("xy", rng(1).integers(0, 2, 30)))
    model = FakeModel(1)
    probability = 1 / (1 + np.exp(-predict(model, data).outputs[:, 0].astype(np.float64)))
    threshold = float(np.median(probability))
    model.decision_threshold = lambda name: {"para": threshold}[name]
    assert predict(model, data).values.tolist() == (probability > threshold).tolist()
    assert predict(model, data).values.sum() == 15


def test_evaluation_scores_usable_rows_only(make_data):
    rows = random_rows("x", rng(1).integers(0, 5, 120))
    rows[5] = ("a b", "")
    datasets = {
        "sst": make_data("sst", rows),
        "sts": make_data("sts", random_rows("xy", rng(2).uniform(0, 5, 20))),
    }
    model = FakeModel(5)
    plain = model.forward
    model.forward = lambda batch, exits=None: first_outputs(plain(batch), {"sst": 5, "sts": 1}[batch.task.name])
    scores, predictions = evaluate(model, datasets, batch_size=16)
    assert predictions["sst"].rows.tolist() == [i for i in range(120) if i != 5]
    hits = predictions["sst"].values == datasets["sst"].labels[predictions["sst"].rows]
    assert scores.tasks["sst"]["accuracy"] == pytest.approx(hits.mean())
    r = scipy.stats.pearsonr(predictions["sts"].values, datasets["sts"].labels)[0]
    assert scores.tasks["sts"]["pearson"] == pytest.approx(r, rel=1e-6)
    assert scores.norm == pytest.approx((hits.mean() + (r + 1) / 2) / 2, rel=1e-6)
    assert scores.raw == pytest.approx((hits.mean() + r) / 2, rel=1e-6)


def first_outputs(outputs, n):
    """The same outputs with the first n logits only."""
    return SimpleNamespace(logits={layer: logits[:, :n] for layer, logits in outputs.logits.items()})


# --- thresholds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, labels, threshold",
    [
        pytest.param([0.2, 0.4, 0.8, 0.9], [0, 0, 1, 1], 0.6, id="the middle of the gap"),
        pytest.param([0.9, 0.2, 0.8, 0.4], [1, 0, 1, 0], 0.6, id="in any order"),
        # between .4 and .5 five of six are right, between .7 and .9 four
        pytest.param([0.1, 0.4, 0.5, 0.7, 0.9, 0.95], [0, 0, 1, 0, 1, 1], 0.45, id="one exception"),
        pytest.param([0.998, 0.9984, 0.9988, 0.999], [0, 0, 1, 1], 0.9986, id="all close to 1"),
        pytest.param([0.9991, 0.9992, 0.9994, 0.9995], [0, 0, 1, 1], 0.9993, id="all very close to 1"),
        # equal scores stay together: above .3 all, which is three of four
        pytest.param([0.1, 0.6, 0.6, 0.6], [0, 0, 1, 1], 0.35, id="ties"),
    ],
)
def test_thresholds_by_hand(scores, labels, threshold):
    assert fit_decision_threshold(np.array(scores), np.array(labels)) == pytest.approx(threshold)


@pytest.mark.parametrize("label", [0, 1])
def test_threshold_of_one_class_predicts_that_class(label):
    scores = np.array([0.2, 0.5, 0.97])
    threshold = fit_decision_threshold(scores, np.full(3, label))
    assert 0 < threshold < 1
    assert ((scores > threshold) == label).all()


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_than_the_fitted_one(seed):
    scores = rng(seed).uniform(0.02, 0.98, 40).round(seed % 3 + 1)
    labels = (scores + rng(seed + 100).normal(0, 0.3, 40) > 0.6).astype(float)
    best = max(accuracy(scores > t, labels) for t in np.linspace(0.0005, 0.9995, 1999))
    assert accuracy(scores > fit_decision_threshold(scores, labels), labels) == pytest.approx(best)


def test_a_fitted_threshold_decodes_as_it_was_fitted():
    """All cosines above .9: at cos > 0 each is a paraphrase, the fitted threshold is as good as any."""
    task = build_tasks(("para",), {"para": "siamese"}, losses={"para": "cosine"})["para"]
    labels = (rng(0).random(500) < 0.4).astype(float)
    cosines = np.clip(0.95 + 0.02 * labels + rng(1).normal(0, 0.005, 500), -1, 1)
    logits = torch.from_numpy(cosines.astype(np.float32)).unsqueeze(-1)
    plain, probabilities = task.objective.decode(logits, 0.5)
    assert plain.min() == 1
    fitted = task.objective.decode(logits, fit_decision_threshold(probabilities[:, 1].numpy(), labels))[0].numpy()
    assert accuracy(fitted, labels) > 0.95
    assert accuracy(fitted, labels) == pytest.approx(max(accuracy(cosines > t, labels) for t in np.sort(cosines)))


# --- prediction files ---------------------------------------------------------------------------------------


def test_prediction_files_of_the_course_byte_for_byte(make_data, tmp_path):
    ids = [f"{i:025x}" for i in range(3)]
    cases = {
        "sst": ([0, 4, 2], "id \t Predicted_Sentiment \n{} , 0 \n{} , 4 \n{} , 2 \n"),
        "para": ([1, 0, 1], "id \t Predicted_Is_Paraphrase \n{} , 1.0 \n{} , 0.0 \n{} , 1.0 \n"),
        "sts": ([4.2, 0, 3.14159], "id \t Predicted_Similiary \n{} , 4.2000 \n{} , 0.0000 \n{} , 3.1416 \n"),
    }
    for name, (values, expected) in cases.items():
        data = make_data(name, [("a",) * len(TASKS[name].columns)] * 3, labelled=False)
        found = predictions_of(name, values, [np.nan] * 3)
        found.data = data
        write_predictions(tmp_path / "out", found, "test")
        written = (tmp_path / "out" / f"{name}-test-output.csv").read_bytes()
        assert written == expected.format(*ids).encode()


def test_prediction_files_hold_the_chosen_rows_in_their_order(make_data, tmp_path):
    data = make_data("sst", random_rows("x", [1, 2, 3, 4]))
    found = predictions_of("sst", [4, 0], data.labels)
    found.data, found.rows = data, np.array([2, 0])
    write_predictions(tmp_path, found, "dev")
    lines = (tmp_path / "sst-dev-output.csv").read_text().splitlines()
    assert lines[1:] == [f"{2:025x} , 4 ", f"{0:025x} , 0 "]


def test_the_readable_table_holds_texts_labels_and_exits(make_data, tmp_path):
    texts = ('a "b", c\td', "d; e")
    data = make_data("para", [(*texts, "1.0"), ("a", "b", "0.0")])
    found = predictions_of("para", [1, 1], data.labels, exits=[3, 6])
    found.data, found.probabilities = data, np.array([[0.25, 0.75], [0.4, 0.6]])
    write_predictions(tmp_path, found, "dev")
    with open(tmp_path / "para-dev-readable.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["id", "sentence1", "sentence2", "prediction", "label", "probability", "gold", "layers"],
        [f"{0:025x}", *texts, "1", "paraphrase", "0.7500", "1", "3"],
        [f"{1:025x}", "a", "b", "1", "paraphrase", "0.6000", "0", "6"],
    ]


def test_the_readable_table_of_a_regression_without_gold_labels(make_data, tmp_path):
    data = make_data("sts", [("a", "b")], labelled=False)
    found = predictions_of("sts", [3.25], [np.nan])
    found.data = data
    write_predictions(tmp_path, found, "test")
    with open(tmp_path / "sts-test-readable.csv", newline="") as file:
        assert list(csv.reader(file))[1] == [f"{0:025x}", "a", "b", "3.2500", "", "", "", "6"]


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, "old\n")

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(InputError, match="no space left"):
        write_whole(path, "new\n")
    assert path.read_text() == "old\n"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_under_torch_save_is_one_line(tmp_path, monkeypatch):
    """torch.save answers a failed write with an error of its own, which hides the first one."""

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 1000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    state = {"weight": torch.ones(1000)}
    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save(state, Full())
    with pytest.raises(InputError, match="No space left on device"):
        write_whole(tmp_path / "last.pt", lambda out: torch.save(state, Full()))

    def fail_otherwise(out):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        write_whole(tmp_path / "last.pt", fail_otherwise)
    assert list(tmp_path.iterdir()) == []
