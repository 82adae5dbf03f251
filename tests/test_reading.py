"""The walk-through runs and its notebook holds the same cells; every exercise's answer is computed a second way."""

import json
import re
import runpy

import numpy as np
import pytest
import torch
from test_structure import ROOT
from tiny import SAMPLE, make_config, make_model, read_csv
from torch import nn

from base_bert import BertConfig
from bert import BertModel
from early_exit import first_exit
from evaluation import mean_norm
from optimizer import AdamW
from tasks import build_tasks, pearson
from teaching import answers, notebook
from tokenizer import split_word_pieces
from weights import WEIGHTS_FOLDER

WALKTHROUGH = ROOT / "teaching" / "walkthrough.py"
needs_minilm = pytest.mark.skipif(
    not (WEIGHTS_FOLDER / "all-MiniLM-L6-v2" / "model.safetensors").is_file(), reason="run ./setup.sh first"
)


@needs_minilm
def test_the_walkthrough_runs_and_draws_its_picture(tmp_path, monkeypatch, capsys):
    """Its own comparisons with the program's code run with it; the printed shapes are those of its comments."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(WALKTHROUGH))
    printed = capsys.readouterr().out
    assert "weights [b,h,s,s]                 [2, 12, 8, 8]" in printed
    assert "leaves here" in printed
    assert (tmp_path / "runs" / "walkthrough-attention.png").stat().st_size > 5000


def test_the_notebook_holds_the_cells_of_the_walkthrough(tmp_path):
    source = WALKTHROUGH.read_text()
    notebook.write_notebook(tmp_path / "walkthrough.ipynb")
    made = json.loads((tmp_path / "walkthrough.ipynb").read_text())
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert len(made["cells"]) == source.count("# %%\n") + source.count("# %% [markdown]\n")
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    texts = {kind: [] for kind in ("code", "markdown")}
    for cell in made["cells"]:
        texts[cell["cell_type"]].append("".join(cell["source"]))
        assert ("outputs" in cell) == (cell["cell_type"] == "code")
    # the code of all cells is the file without its comment cells
    without = source.split('"""\n\n', 1)[1]
    without = re.sub(r"# %% \[markdown\]\n(#.*\n|\n)*", "", without).replace("# %%\n", "")
    assert "".join("\n".join(texts["code"]).split()) == "".join(without.split())
    assert texts["markdown"][0].startswith("# One sentence through BERT\n\nThis file")


def test_each_exercise_of_the_walkthrough_has_an_answer():
    numbers = re.findall(r"\*\*Exercise (\d+)\.\*\*", WALKTHROUGH.read_text())
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)] and len(numbers) >= 8
    assert all(getattr(answers, f"exercise_{i}").__doc__ for i in numbers)


def test_exercise_1_the_longest_piece_is_taken_and_never_taken_back():
    vocab = {"un", "##wat", "##watch", "##able", "##a"}
    assert answers.exercise_1("unwatchable", vocab) == ["un", "##watch", "##able"]
    for words in (vocab, vocab - {"##able"}, vocab - {"un"}):
        assert answers.exercise_1("unwatchable", words) == split_word_pieces("unwatchable", words)


@pytest.mark.parametrize("config", [BertConfig(), make_config()], ids=["bert-base", "tiny"])
def test_exercise_2_counts_the_parameters(config):
    with torch.device("meta"):
        model = BertModel(config)
    sizes = (config.vocab_size, config.max_position_embeddings, config.hidden_size, config.intermediate_size)
    assert answers.exercise_2(*sizes, config.num_hidden_layers) == sum(p.numel() for p in model.parameters())


def test_exercise_3_scaling_brings_the_variance_to_1():
    k = 64
    query, key = np.random.default_rng(0).standard_normal((2, 100_000, k))
    scores = (query * key).sum(1)
    measured = scores.var(), (scores / np.sqrt(k)).var()
    assert measured == pytest.approx(answers.exercise_3(k), rel=0.02)


def test_exercise_4_without_positions_the_order_does_not_matter():
    bert = make_model().bert.eval()
    ids, mask = torch.arange(5, 14)[None], torch.ones(1, 9)
    swapped = ids.clone()
    swapped[:, [2, 6]] = ids[:, [6, 2]]
    with torch.no_grad():
        assert not torch.allclose(  # with positions it does
            bert(swapped, mask)["last_hidden_state"], answers.exercise_4(bert(ids, mask)["last_hidden_state"], 2, 6)
        )
        bert.pos_embedding.weight.zero_()
        expected = answers.exercise_4(bert(ids, mask)["last_hidden_state"], 2, 6)
        torch.testing.assert_close(bert(swapped, mask)["last_hidden_state"], expected)


@pytest.mark.parametrize(
    ("correct_bias", "answer"),
    [(True, lambda g: answers.exercise_5(g, 0.01)), (False, lambda g: answers.exercise_6(0.01))],
    ids=["exercise 5", "exercise 6"],
)
def test_exercises_5_and_6_the_size_of_the_first_step(correct_bias, answer):
    for gradient in (3.0, -0.2):
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameter.grad = torch.full_like(parameter, gradient)
        AdamW([parameter], lr=0.01, eps=1e-6, correct_bias=correct_bias).step()
        # 1e-4: exercise 6 leaves eps out
        assert abs(parameter.item()) == pytest.approx(answer(gradient), rel=2e-4)
        assert parameter.item() * gradient < 0


def test_exercise_7_layers_and_savings():
    certainty = np.array([(0.5, 0.7, 0.9, 0.9), (0.3, 0.4, 0.5, 0.6), (0.9, 0.9, 0.9, 0.9)])
    layers, saved = answers.exercise_7(certainty.tolist(), 0.7)
    assert layers == first_exit(certainty, 0.7).tolist() == [2, 4, 1]
    assert saved == pytest.approx(1 - first_exit(certainty, 0.7).mean() / 4)


def test_exercise_8_constant_predictions():
    labels = {
        name: [float(row[task.label_column]) for row in read_csv(SAMPLE / task.file("dev"), "\t")]
        for name, task in build_tasks().items()
    }
    sst, para, norm = answers.exercise_8(labels["sst"], labels["para"])
    assert (sst, para) == (0.2, 0.58)
    assert pearson(np.full(len(labels["sts"]), 2.5), labels["sts"]) == 0
    assert norm == pytest.approx(mean_norm(build_tasks(), {"sst": sst, "para": para, "sts": 0.0}))
    assert f"{norm:.3f}"[1:] in answers.exercise_8.__doc__
