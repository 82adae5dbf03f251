"""report.html: its numbers are those of the run, its attention maps are those of the formula, its texts stay texts."""

import base64
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from driver import main
from tiny import log_of, make_config, make_model, page_of, read_csv, refusal
from torch._dynamo.utils import counters

import predict
import report
from bert import BertModel
from building import compile_layers
from datasets import Dataset, read_dataset
from early_exit import ExitInference
from evaluation import evaluate
from multitask_classifier import MultitaskBERT, load_run
from tasks import build_tasks

# a text that would end the JSON, run a script, and break an attribute, if it were not escaped
NASTY = "good </script><script>alert(\"film\")</script> <!-- &amp; 'é' 🎬"
LABELS = build_tasks()["sst"].labels


def maps_of(encoder_pass):
    """The attention weights of one encoder pass. Shapes: [L,h,s,s]."""
    s = len(encoder_pass["tokens"])
    numbers = np.frombuffer(base64.b64decode(encoder_pass["weights"]), np.uint8) / 255
    return numbers.reshape(encoder_pass["layers"], encoder_pass["heads"], s, s)


@pytest.fixture(scope="module")
def exits(program):
    """A run with exits whose dev data has texts with HTML in them."""
    path = program.folder / "nasty-sst.csv"
    lines = (program.data / "ids-sst-dev.csv").read_text().splitlines(keepends=True)
    lines += [f'{k}\tnasty{k}\t"{NASTY.replace(chr(34), 2 * chr(34))}"\t{k}\n' for k in range(5)]
    path.write_text("".join(lines))
    return program.train("page-exits", "--early_exit", "--lr", 0.01, "--sst_dev", path)


@pytest.fixture(scope="module")
def page(exits):
    """The page of that run."""
    return page_of(exits / "report.html")


# --- the numbers --------------------------------------------------------------------------------------------------


def test_the_page_has_the_numbers_of_the_run(exits, page):
    summary, config = (json.loads((exits / name).read_text()) for name in ("summary.json", "config.json"))
    assert page["run"] == config and page["summary"] == summary
    assert page["scores"].items() <= summary["best"].items()
    assert page["exits"] == summary["exits"] and page["log"] == log_of(exits)
    for name, count in (("sst", 21), ("para", 30), ("sts", 20)):
        assert page["tasks"][name]["rows"] == count
    dev = read_csv(exits / "predictions" / "para-dev-readable.csv")
    share = np.mean([row["gold"] == "1" for row in dev])
    assert page["constant"]["para"] == pytest.approx(max(share, 1 - share)) and page["constant"]["sts"] == 0
    assert page["tasks"]["sst"] | {"rows": 0} == {
        **{"title": "SST sentiment", "rows": 0, "labels": list(LABELS), "metric": "accuracy", "low": 0.0, "high": 1.0},
    }


def test_a_threshold_of_the_sliders_gives_what_inference_with_it_gives(program, exits, page):
    """The page's rows come from one full pass; here rows leave the model one by one at the threshold."""
    run = load_run(exits, torch.device("cpu"))
    files = {name: program.data / task.file("dev") for name, task in run.model.tasks.items()}
    files["sst"] = program.folder / "nasty-sst.csv"
    dev = {name: read_dataset(run.model.tasks[name], path, run.tokenizer, 40) for name, path in files.items()}
    assert page["curves"].keys() == dev.keys()
    for name, rows in page["curves"].items():
        thresholds = [row["threshold"] for row in rows]
        assert thresholds == sorted(set(thresholds)) and page["exits"]["thresholds"][name] in thresholds
        assert rows[-1]["layers"] == 2 and rows[0]["layers"] < 2
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            infer = ExitInference(page["exits"]["policies"], {name: row["threshold"]})
            scores, predictions = evaluate(run.model, {name: dev[name]}, infer=infer)
            assert row["score"] == pytest.approx(scores.tasks[name][page["tasks"][name]["metric"]], abs=1e-6)
            layers = predictions[name].layers
            assert row["layers"] == pytest.approx(layers.mean())
            assert row["shares"] == pytest.approx([np.mean(layers == i) for i in (1, 2)])


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_the_mistakes_are_the_worst_of_the_prediction_file(exits, page, name):
    rows = {row["id"]: row for row in read_csv(exits / "predictions" / f"{name}-dev-readable.csv")}
    if name == "sts":
        badness = {key: abs(float(row["prediction"]) - float(row["gold"])) for key, row in rows.items()}
    else:
        badness = {k: float(row["probability"]) for k, row in rows.items() if row["prediction"] != row["gold"]}
    mistakes = page["mistakes"][name]
    assert [row["badness"] for row in mistakes] == pytest.approx(sorted(badness.values())[::-1][:20], abs=1e-4)
    for mistake in mistakes:
        row = rows[mistake["id"]]
        assert mistake["badness"] == pytest.approx(badness[mistake["id"]], abs=1e-4)
        assert mistake["label"] == float(row["gold"]) and mistake["layers"] == int(row["layers"])
        assert mistake["prediction"] == pytest.approx(float(row["prediction"]), abs=1e-4)
        assert mistake["texts"] == [row[column] for column in build_tasks()[name].columns]


def test_the_exit_where_a_text_leaves_makes_its_prediction(page):
    assert [sentence["task"] for sentence in page["sentences"]] == ["sst", "sst", "para", "para", "sts", "sts"]
    for sentence in page["sentences"]:
        assert [exit["layer"] for exit in sentence["exits"]] == [1, 2]
        exit, name = sentence["exits"][sentence["layers"] - 1], sentence["task"]
        assert exit["prediction"] == pytest.approx(sentence["prediction"], abs=1e-5) and 0 < exit["lte"] < 1
        probabilities = exit["probabilities"]
        if name == "sts":
            assert probabilities is None
            continue
        assert sum(probabilities) == pytest.approx(1) and np.argmax(probabilities) == exit["prediction"]
        # a row leaves at the first exit that is certain enough
        sure = [max(exit["probabilities"]) >= page["exits"]["thresholds"][name] for exit in sentence["exits"]]
        assert sentence["layers"] == (1 if sure[0] else 2)
    # from the most confident mistake to a right prediction
    assert page["sentences"][2]["id"] == page["mistakes"]["para"][0]["id"]
    assert page["sentences"][3]["prediction"] == page["sentences"][3]["label"]


def test_a_run_without_exits_has_no_sliders(program):
    page = page_of(program.train("page-plain", "--epochs", 1) / "report.html")
    assert page["exits"] is None and page["curves"] is None
    for sentence in page["sentences"]:
        assert [exit["layer"] for exit in sentence["exits"]] == [2] == [sentence["layers"]]
        assert sentence["exits"][0]["lte"] is None


@pytest.mark.parametrize("option", ["finetune", "pretrain"])
def test_a_run_of_one_regression_has_its_page(program, option):
    run = program.train(f"page-sts-{option}", "--tasks", "sts", "--pairs", "sts=siamese", "--option", option)
    page = page_of(run / "report.html")
    assert list(page["tasks"]) == ["sts"] and page["tasks"]["sts"]["labels"] == []
    assert len(page["mistakes"]["sts"]) == 20 and len(page["sentences"]) == report.TEXTS
    # each text of a siamese pair has a pass of its own
    assert all(len(sentence["passes"]) == 2 for sentence in page["sentences"])


def test_evaluating_a_run_writes_the_same_page(program, exits, page):
    assert not main(["--option", "evaluate", "--run_dir", str(exits)])
    again = page_of(exits / "evaluate" / "report.html")
    for key in page.keys() - {"written_by", "exits"}:
        assert again[key] == page[key], key
    # the seconds differ
    assert again["exits"] | {"seconds": 0} == page["exits"] | {"seconds": 0}


# --- predict.py ---------------------------------------------------------------------------------------------------


def test_a_text_of_ones_own_gets_a_page(exits, tmp_path, capsys):
    path = tmp_path / "out.html"
    capsys.readouterr()
    predict.main([str(exits), "sst", NASTY, "--html", str(path)])
    label, probability = capsys.readouterr().out.strip().split("\t")
    page = page_of(path)
    [sentence] = page["sentences"]
    assert sentence["texts"] == [NASTY] and sentence["label"] is None
    exit = sentence["exits"][sentence["layers"] - 1]
    assert LABELS[int(sentence["prediction"])] == label
    assert max(exit["probabilities"]) == pytest.approx(float(probability), abs=1e-4)
    assert page["texts"] == 1 and "scores" not in page
    line = refusal(predict.main, [str(exits), "sst", NASTY, "--html", str(path)])
    assert line.startswith(f"--html {path}: exists already")


def test_of_many_texts_the_first_are_on_the_page(program, exits, tmp_path):
    source = program.data / "sts-dev.csv"
    predict.main([str(exits), "sts", "--file", str(source), *(f"--{x}={tmp_path / x}" for x in ("html", "out"))])
    page, rows = page_of(tmp_path / "html"), read_csv(tmp_path / "out")
    assert page["texts"] == len(rows) == 20
    assert [sentence["id"] for sentence in page["sentences"]] == [row["id"] for row in rows[: report.TEXTS]]


# --- texts stay texts ---------------------------------------------------------------------------------------------


def test_texts_are_escaped(exits, page):
    text = (exits / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and text.count("<script") == 2 and "<!-- &amp;" not in text
    shown = {text for row in page["mistakes"]["sst"] for text in row["texts"]}
    assert NASTY in shown


def test_the_template_shows_texts_as_text_and_loads_nothing():
    template = report.TEMPLATE.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "import("):
        assert word not in template
    assert template.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    assert template.count("{{page}}") == 1


def test_a_number_that_is_not_one_becomes_null(tmp_path):
    report.write_page(tmp_path / "page.html", {"a": [math.nan, math.inf, 1.5], "b": "NaN {{page}}"})
    assert page_of(tmp_path / "page.html") == {"a": [None, None, 1.5], "b": "NaN {{page}}"}


# --- attention ----------------------------------------------------------------------------------------------------


def softmax_by_hand(layer, h):
    """softmax(q k^T / sqrt(k)) of a layer's heads, in numpy. Shapes: h [s,d]; returns [h,s,s]."""
    attention, heads = layer.self_attention, []
    width = attention.attention_head_size
    query, key = (h @ x.weight.detach().numpy().T + x.bias.detach().numpy() for x in (attention.query, attention.key))
    for k in range(attention.num_attention_heads):
        columns = slice(k * width, (k + 1) * width)
        scores = np.exp(query[:, columns] @ key[:, columns].T / math.sqrt(width))
        heads.append(scores / scores.sum(1, keepdims=True))
    return np.array(heads)


def example(tokenizer, task, *texts, rows=1):
    """A dataset with the same texts in every row."""
    data = Dataset(task, None, tokenizer, 40)
    for k in range(rows):
        data.add(str(k), texts, k % 2)
    return data.freeze()


@pytest.mark.parametrize("attention", ["plain", "sdpa", "compiled"])
@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_the_maps_are_the_softmax_of_the_formula(program, attention, encoding):
    """Every layer and head, against numpy; the model is as before afterwards."""
    task = build_tasks(["para"], {"para": encoding})["para"]
    kind = "sdpa" if attention == "sdpa" else "plain"
    model = make_model({"para": task}, dropout=0.1, attention=kind, with_exits=True).train()
    if attention == "compiled":
        compile_layers(model.bert, torch.device("cpu"), "eager")
    data = example(program.tokenizer, task, "the film is good", "is the old film good or bad")
    batch = data.batch([0])
    with torch.no_grad():
        expected = model.eval()(batch).logits[3].numpy()
        inputs = list(zip(model.embed(batch), model.masks(batch), strict=True))
        states = [[h[0].numpy(), *(x[0].numpy() for _, x in model.bert.encode(h, m))] for h, m in inputs]
    usual = [layer.self_attention.attend for layer in model.bert.bert_layers]
    model.train()
    predictions = predict_rows(model, data)
    translated = counters["frames"]["total"]
    explained = report.explain(model, predictions, 0, torch.no_grad)
    assert counters["frames"]["total"] == translated
    assert model.training and [layer.self_attention.attend for layer in model.bert.bert_layers] == usual
    assert explained["exits"][2]["prediction"] == float(expected[0, 0] > 0)
    assert len(explained["passes"]) == len(states) == (2 if encoding == "siamese" else 1)
    for encoder_pass, hidden in zip(explained["passes"], states, strict=True):
        hand = [softmax_by_hand(layer, h) for layer, h in zip(model.bert.bert_layers, hidden, strict=False)]
        np.testing.assert_allclose(maps_of(encoder_pass), hand, rtol=0, atol=0.5 / 255 + 1e-5)
        assert encoder_pass["total"] == len(encoder_pass["tokens"]) == len(hidden[0])
        assert encoder_pass["tokens"][0] == "[CLS]" and encoder_pass["tokens"][-1] == "[SEP]"
    joined = sum((encoder_pass["tokens"] for encoder_pass in explained["passes"]), [])
    pieces = [token for token in joined if token not in ("[CLS]", "[SEP]")]
    assert pieces == [t for text in data.text(0) for t in program.tokenizer.tokenize(text)]


def predict_rows(model, data):
    """The predictions for all rows of a dataset."""
    from evaluation import predict as predict_dataset

    return predict_dataset(model, data)


def test_a_page_of_1100_rows_with_a_large_bert_is_small(program, tmp_path):
    """12 layers with 12 heads, and texts longer than a map."""
    tasks = build_tasks()
    config = replace(make_config(12, 24), num_attention_heads=12)
    model = MultitaskBERT(BertModel(config), tasks, with_exits=True).eval()
    words = "the film is good and old or bad " * 6
    predictions = {
        name: predict_rows(model, example(program.tokenizer, task, *(words for _ in task.columns), rows=1100))
        for name, task in tasks.items()
    }
    page = report.describe_predictions(model, predictions, torch.no_grad)
    assert [len(rows) for rows in page["mistakes"].values()] == [20, 20, 20]
    assert len(page["sentences"]) == 6
    [encoder_pass] = page["sentences"][0]["passes"]
    assert maps_of(encoder_pass).shape == (12, 12, report.MAP_TOKENS, report.MAP_TOKENS)
    log = [{"kind": "step", "step": k, "terms": {name: {"loss": 0.123456789} for name in tasks}} for k in range(2000)]
    report.write_page(tmp_path / "page.html", page | {"log": log})
    assert (tmp_path / "page.html").stat().st_size < 3e6
