"""The names of the CS224N skeleton: its checks, and a script in its style, run on this project's modules.

Its check of AdamW is in test_optimizer.py.
"""

import re
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from driver import main
from test_structure import ROOT
from tiny import make_config, refusal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import classifier
import datasets
import evaluation
import weights
from bert import BertLayer, BertModel
from datasets import SkeletonRows, load_multitask_data, read_dataset
from errors import InputError
from flags import parse_flags
from multitask_classifier import MultitaskBERT
from optimizer import AdamW
from runs import name_run
from tasks import build_tasks
from tokenizer import BertTokenizer
from weights import WEIGHTS_FOLDER

NAMES = ROOT / "teaching" / "pages" / "skeleton.md"
needs_minilm = pytest.mark.skipif(
    not (WEIGHTS_FOLDER / "all-MiniLM-L6-v2" / "model.safetensors").is_file(), reason="run ./setup.sh first"
)


@pytest.fixture
def known(program, tmp_path, monkeypatch):
    """The tiny weights under the names that scripts use, and an empty working folder."""
    for name in ("all-MiniLM-L6-v2", "bert-base-uncased"):
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / name).symlink_to(program.weights)
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return program


def files(program, split):
    """The three files of a split."""
    return [str(program.data / task.file(split)) for task in build_tasks().values()]


# --- the skeleton's checks -----------------------------------------------------------------------------------------


@needs_minilm
def test_the_sanity_check_passes_right_after_loading():
    """Two padded texts, no eval(), no segment ids; the expected states come from transformers."""
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[101, 7592, 2088, 102, 0, 0], [101, 2023, 2003, 1037, 3231, 102]])
    mask = (ids > 0).long()
    theirs = transformers.BertModel.from_pretrained(WEIGHTS_FOLDER / "all-MiniLM-L6-v2").eval()
    expected, computed = theirs(ids, mask), BertModel.from_pretrained("all-MiniLM-L6-v2")(ids, mask)
    assert set(computed) == {"last_hidden_state", "pooler_output"}
    states = [x["last_hidden_state"] * mask[..., None] for x in (computed, expected)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(computed["pooler_output"], expected["pooler_output"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-6}])
def test_bad_optimizer_settings_are_value_errors(setting):
    with pytest.raises(ValueError):
        AdamW([nn.Parameter(torch.zeros(1))], **setting)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-base-uncased", "all-MiniLM-L6-v2", "auto"])
def test_models_and_tokenizers_load_by_name_and_do_not_drop(known, name):
    model, tokenizer = BertModel.from_pretrained(name), BertTokenizer.from_pretrained(name)
    assert not any(module.training for module in model.modules())
    assert model.dtype == torch.float32 and model.double().dtype == torch.float64
    assert tokenizer.vocab == known.tokenizer.vocab
    encoded = tokenizer(["the film", "a"], return_tensors="pt", padding=True, truncation=True)
    # the skeleton wraps the tensors once more
    assert torch.equal(torch.LongTensor(encoded["input_ids"]), encoded["input_ids"])


def test_unknown_names_and_other_tensors_are_refused(known, tmp_path):
    assert "vocab.txt" in refusal(BertTokenizer.from_pretrained, "bert-large-uncased")
    assert "return_tensors is 'np'" in refusal(lambda: known.tokenizer(["a"], return_tensors="np"))
    (tmp_path / "weights" / "bert-base-uncased").unlink()
    assert "./setup.sh --bert-base" in refusal(BertTokenizer.from_pretrained, "bert-base-uncased")


def test_the_skeletons_methods_compute_what_the_layer_computes():
    torch.manual_seed(0)
    layer = BertLayer(make_config(), "plain").eval()
    h, mask = torch.randn(2, 5, 16), torch.tensor([0.0, 0, 0, -1e4, -1e4]).view(1, 1, 1, 5)
    inner = layer.self_attention
    key, query, value = (inner.split_heads(linear(h)) for linear in (inner.key, inner.query, inner.value))
    attended = inner.attention(key, query, value, mask)
    middle = layer.add_norm(h, attended, layer.attention_dense, layer.attention_dropout, layer.attention_layer_norm)
    wide = layer.interm_af(layer.interm_dense(middle))
    output = layer.add_norm(middle, wide, layer.out_dense, layer.out_dropout, layer.out_layer_norm)
    torch.testing.assert_close(output, layer(h, mask), atol=0, rtol=0)


# --- data and evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_rows_are_those_of_the_files(known, split):
    sst, labels, para, sts = load_multitask_data(*files(known, split), split=split)
    for rows, task, path in zip((sst, para, sts), build_tasks().values(), files(known, split), strict=True):
        data = read_dataset(task, path, known.tokenizer, labelled=split != "test")
        assert [row[-1] for row in rows] == [data.identifier(i) for i in range(len(data))]
        assert [row[: len(task.columns)] for row in rows] == [data.text(i) for i in range(len(data))]
        if split != "test":
            kept = [row[-2] for row in rows]
            assert kept == data.labels.tolist()
            assert {type(label) for label in kept} == {float if task.is_regression else int}
    assert labels == ({} if split == "test" else {i: i for i in range(5)})


def test_a_batch_has_the_skeletons_keys_and_types(known):
    sst, _, _, sts = load_multitask_data(*files(known, "dev"), split="dev")
    rows = datasets.SentenceClassificationDataset(sst, None)
    batch = next(iter(DataLoader(rows, batch_size=3, collate_fn=rows.collate_fn)))
    assert set(batch) == {"token_ids", "token_type_ids", "attention_mask", "labels", "sents", "sent_ids"}
    assert torch.equal(batch["token_ids"], known.tokenizer([row[0] for row in sst[:3]])["input_ids"])
    assert batch["labels"].tolist() == [row[1] for row in sst[:3]] and batch["labels"].dtype == torch.int64
    pairs = datasets.SentencePairDataset(sts, None, isRegression=True)
    batch = pairs.collate_fn(pairs[:2])
    for k in (1, 2):
        assert torch.equal(batch[f"token_ids_{k}"], known.tokenizer([row[k - 1] for row in sts[:2]])["input_ids"])
    assert batch["labels"].tolist() == [row[2] for row in sts[:2]] and batch["labels"].dtype == torch.float64
    unlabelled = datasets.SentencePairTestDataset([row[:2] + row[3:] for row in sts], None)
    assert "labels" not in unlabelled.collate_fn(unlabelled[:2])


class Student(nn.Module):
    """A model as students write it for the skeleton: BERT by name, one linear layer a task on the pooled vectors."""

    def __init__(self):
        super().__init__()
        self.bert = BertModel.from_pretrained("bert-base-uncased")
        d = self.bert.config.hidden_size
        self.sentiment, self.paraphrase, self.similarity = nn.Linear(d, 5), nn.Linear(2 * d, 1), nn.Linear(2 * d, 1)

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids, attention_mask)["pooler_output"]

    def predict_sentiment(self, *text):
        return self.sentiment(self(*text))

    def predict_paraphrase(self, *texts):
        return self.paraphrase(torch.cat([self(*texts[:2]), self(*texts[2:])], 1))

    def predict_similarity(self, *texts):
        return self.similarity(torch.cat([self(*texts[:2]), self(*texts[2:])], 1))


def loaders_of(program, split="dev", batch_size=5):
    """A loader for each task, as a script of the skeleton makes them: SST, Quora, STS."""
    sst, _, para, sts = load_multitask_data(*files(program, split), split=split)
    rows = [SkeletonRows(sst, None), SkeletonRows(para, None), SkeletonRows(sts, None, isRegression=True)]
    return [DataLoader(r, batch_size=batch_size, collate_fn=r.collate_fn) for r in rows]


def test_a_script_of_the_skeleton_trains_and_evaluates(known, capsys):
    torch.manual_seed(0)
    model, device = Student(), torch.device("cpu")
    loader = loaders_of(known, "train", batch_size=8)[0]
    optimizer, losses = AdamW(model.parameters(), lr=1e-2), []
    for _ in range(10):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            logits = model.predict_sentiment(batch["token_ids"].to(device), batch["attention_mask"].to(device))
            loss = F.cross_entropy(logits, batch["labels"].view(-1), reduction="sum") / 8
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-2:]) < 0.85 * np.mean(losses[:2])
    score, f1, predicted, labels, texts, ids = evaluation.model_eval_sst(loader, model, device)
    assert not model.training
    assert score == np.mean(np.array(predicted) == labels) > 0.3 and 0 < f1 <= 1
    assert (labels, texts, ids) == tuple([row[i] for row in loader.dataset] for i in (1, 0, 2))
    para, para_values, para_ids, sst, _, _, r, values, _ = evaluation.model_eval_multitask(
        *loaders_of(known), model, device
    )
    gold = [row[2] for row in loaders_of(known)[2].dataset]
    assert r == pytest.approx(np.corrcoef(values, gold)[0, 1])
    assert set(para_values) <= {0, 1} and len(para_ids) == len(para_values) and 0 <= sst <= 1

    names = [f"{task}_{split}_out" for task in ("sst", "para", "sts") for split in ("dev", "test")]
    paths = dict(zip((n.removesuffix("_out") for n in names), sorted_files(known), strict=True))
    args = SimpleNamespace(batch_size=4, **paths, **{name: f"predictions/{name}.csv" for name in names})
    capsys.readouterr()
    evaluation.test_model_multitask(args, model, device)
    printed = capsys.readouterr().out
    assert f"dev para accuracy: {para:.3f}" in printed and f"dev sts pearson: {r:.3f}" in printed
    lines = Path(args.para_dev_out).read_text().splitlines()
    assert lines[0] == "id \t Predicted_Is_Paraphrase "
    assert lines[1:] == [f"{i} , {value:.1f} " for i, value in zip(para_ids, para_values, strict=True)]
    assert len(Path(args.sst_test_out).read_text().splitlines()) == 1 + len(loaders_of(known, "test")[0].dataset)
    test = evaluation.model_eval_test_multitask(*loaders_of(known, "test"), model, device)
    assert len(test) == 6 and [len(x) for x in test[::2]] == [len(x) for x in test[1::2]]


def sorted_files(program):
    """The dev and test file of each task, in the order SST, Quora, STS."""
    return [path for pair in zip(files(program, "dev"), files(program, "test"), strict=True) for path in pair]


@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_our_model_scores_the_same_through_both_evaluations(known, encoding):
    """predict_sentiment and its sisters repack the skeleton's separate texts as this project's batches."""
    tasks = build_tasks(pairs={"para": encoding, "sts": encoding})
    bert = BertModel.from_pretrained("auto")
    model = MultitaskBERT(bert, tasks, init=torch.Generator().manual_seed(3)).eval()
    data = {n: read_dataset(t, known.data / t.file("dev"), known.tokenizer) for n, t in tasks.items()}
    scores, _ = evaluation.evaluate(model, data)
    para, _, _, sst, _, _, sts, _, _ = evaluation.model_eval_multitask(*loaders_of(known), model, torch.device("cpu"))
    assert sst == scores.tasks["sst"]["accuracy"] and para == scores.tasks["para"]["accuracy"]
    assert sts == pytest.approx(scores.tasks["sts"]["pearson"], abs=1e-5)


# --- the scripts' flags and files -------------------------------------------------------------------------------------


def test_predictions_are_copied_to_the_files_of_the_courses_flags(program, tmp_path):
    out = {key: tmp_path / "predictions" / f"{key}.csv" for key in ("sst_dev", "para_test")}
    flags = [f"--{key}_out={path}" for key, path in out.items()]
    run = program.train("outputs", "--epochs", 1, *flags)
    for key, path in out.items():
        assert path.read_bytes() == (run / "predictions" / f"{key.replace('_', '-')}-output.csv").read_bytes()
    flags, _, defaults = parse_flags(flags)
    assert name_run(flags, defaults) == Path("runs/finetune")  # they change nothing that a run computes
    again, where = tmp_path / "again.csv", ["--run_dir", str(run), "--data_dir", str(program.data)]
    assert not main(["--option", "evaluate", *where, f"--sst_dev_out={again}"])
    assert again.read_bytes() == out["sst_dev"].read_bytes()
    line = program.refused("refused", "--tasks", "sst", "--sts_dev_out", tmp_path / "sts.csv")
    assert "--sts_dev_out" in line and "no task sts" in line


def test_classifier_trains_two_runs_and_leaves_predictions_where_the_course_looks(known, tmp_path, monkeypatch):
    flags = known.command("unused", "--option", "pretrain", "--epochs", 1)
    flags = flags[: flags.index("--run_dir")] + flags[flags.index("--run_dir") + 2 :]
    assert not classifier.main(flags)
    for task, split in (("sst", "dev"), ("sst", "test"), ("cfimdb", "dev"), ("cfimdb", "test")):
        lines = (tmp_path / "predictions" / f"pretrain-{task}-{split}-out.csv").read_text().splitlines()
        assert lines[0] == "id \t Predicted_Sentiment "
        assert re.fullmatch(r"[0-9a-f]{25} , \d ", lines[1])
    with pytest.raises(InputError, match="classifier-pretrain-sst"):
        classifier.main(flags)  # a run never overwrites another
    statuses = count(5)
    monkeypatch.setattr(classifier.multitask_classifier, "main", lambda argv: next(statuses))
    assert classifier.main(flags) == 5  # the second run does not start


# --- the list ---------------------------------------------------------------------------------------------------------


def listed():
    """The rows of the page of names: (module, name, runs)."""
    return re.findall(r"^\| [^|]+ \| `(\w+)\.([\w.]+)[^`]*` \| (yes|no)[^|]* \|", NAMES.read_text(), re.MULTILINE)


def test_the_list_says_yes_exactly_for_names_that_exist():
    rows = listed()
    assert len(rows) > 25 and {runs for _, _, runs in rows} == {"yes", "no"}
    for module, name, runs in rows:
        there = (ROOT / f"{module}.py").is_file()
        value = __import__(module) if there else None
        for part in name.split("."):
            value = getattr(value, part, None)
        assert (value is not None) == (runs == "yes"), f"{module}.{name}"
