"""Every part of the benchmark runs on a tiny model and returns numbers; no time is asserted."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import building
import multitask_classifier
from base_bert import BertConfig
from bert import BertModel
from errors import InputError
from lab import benchmark, timing, workloads
from tokenizer import SPECIAL_TOKENS

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-"
TINY = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
SIZES = replace(workloads.QUICK, lengths=(8, 12), gpu_steps=(((20, 8), 1.3), ((3, 8), 2.0)))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny random BERT that reads letters, with the sample data."""
    pytest.importorskip("transformers")
    vocab = [*SPECIAL_TOKENS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    folder = tmp_path_factory.mktemp("weights")
    (folder / "letters.txt").write_text("\n".join(vocab))
    workloads.write_random_weights(folder, folder / "letters.txt", **TINY)
    return workloads.Setup(folder, SAMPLE, torch.device("cpu"), ("fp32",), SIZES)


@pytest.fixture
def in_this_process(monkeypatch):
    """What would start a process calls the program's main function here instead."""

    def launch(*arguments):
        words = list(map(str, arguments))
        if words[0] == "-m":
            importlib.import_module(words[1]).main(words[2:])
        elif "--run_dir" in words:  # to the first step
            Path(words[words.index("--run_dir") + 1]).mkdir()
        return 10.0

    monkeypatch.setattr(workloads, "launch", launch)
    monkeypatch.setattr(benchmark, "launch", launch)


# --- the examples and the steps -----------------------------------------------------------------------------------


def test_both_sides_get_the_same_examples(setup, tmp_path):
    """The share is written once; both programs read the same texts, labels and token ids from it."""
    train, dev = workloads.write_share(setup, tmp_path, 0.05)
    ours = workloads.read_ours(setup, tmp_path)
    counts = {"train": train, "dev": dev}
    assert counts == {"train": 60, "dev": 24} == {s: sum(len(data[s]) for data in ours.values()) for s in counts}
    for split in counts:
        for name, theirs in workloads.read_peer(setup, tmp_path, split).items():
            data = ours[name][split]
            assert [data.text(i) for i in range(len(data))] == list(zip(*theirs.columns, strict=True))
            assert data.labels.tolist() == theirs.labels and data.lengths().tolist() == theirs.lengths()
            inputs, labels = theirs.collate([3, 1])
            batch = data.batch(np.array([3, 1]))
            assert torch.equal(inputs["input_ids"], batch.segments[0][0]) and torch.equal(labels, batch.labels)


def test_a_share_is_the_beginning_of_an_epoch_of_all_the_data(setup, tmp_path):
    """The rows of a small share are among those of a larger one, and an entire epoch has all rows of a task."""
    sizes = [workloads.write_share(setup, tmp_path / f"{share}", share) for share in (0.05, 0.1, 1.0)]
    assert sizes == [(60, 24), (120, 30), (1200, 302)]
    texts = []
    for share in (0.05, 0.1, 1.0):
        data = workloads.read_ours(setup, tmp_path / f"{share}", ("train",))
        texts.append({data[name]["train"].text(i) for name in data for i in range(len(data[name]["train"]))})
    assert texts[0] < texts[1] < texts[2]


def test_sentences_have_so_many_tokens_or_a_quarter_less(setup, tmp_path):
    workloads.write_sentences(setup, tmp_path, 5, 9)
    data = workloads.read_ours(setup, tmp_path, ("train",), ("sst",))["sst"]["train"]
    assert len(data) == 5 and data.lengths().tolist() == [9, 7, 9, 7, 9]
    assert workloads.read_peer(setup, tmp_path, "train", ("sst",))["sst"].lengths() == [9, 7, 9, 7, 9]


def test_both_models_compute_the_same_logits(setup):
    """With our heads copied into the peer, both models do the same work."""
    data = workloads.read_ours(setup, SAMPLE)
    model, peer = (
        workloads.our_parts(setup, "fp32", data).model.eval(),
        workloads.peer_model(setup, tuple(data)).eval(),
    )
    peer.heads.load_state_dict(model.heads.state_dict())
    for name, splits in data.items():
        batch = splits["dev"].batch(np.arange(4))
        ids, mask, types = batch.segments[0]
        with torch.inference_mode():
            theirs = peer(name, input_ids=ids, attention_mask=mask, token_type_ids=types)
            torch.testing.assert_close(model(batch).logits[model.depth], theirs, rtol=1e-5, atol=1e-6)


def test_our_steps_are_those_of_the_loop(setup, tmp_path, monkeypatch):
    """The tasks and rows, in their order, with which `train` calls `train_step` in its first epoch."""
    workloads.write_share(setup, tmp_path, 0.05)
    parts, called = workloads.our_parts(setup, "fp32", workloads.read_ours(setup, tmp_path)), []
    real = multitask_classifier.train_step

    def train_step(parts, optimizer, terms, step, multiplier):
        called.extend((name, rows.tolist()) for name, [rows], _ in step)
        return real(parts, optimizer, terms, step, multiplier)

    monkeypatch.setattr(multitask_classifier, "train_step", train_step)
    run = ["--data_dir", tmp_path, "--weights", setup.weights, "--run_dir", tmp_path / "run", "--epochs", 1]
    multitask_classifier.main([*map(str, run), "--pooling", "cls", "--seed", str(workloads.SEED)])
    assert called == [(name, rows.tolist()) for name, rows in workloads.our_steps(parts)]


def test_training_changes_every_parameter_that_the_loss_reaches(setup, tmp_path):
    trainings = workloads.step_trainings(setup, tmp_path, "fp32", 4, 8)
    assert list(trainings) == ["ours", "transformers"]
    parts = workloads.our_parts(setup, "fp32", workloads.read_ours(setup, tmp_path, ("train",), ("sst",)))
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    workloads.our_training(parts)([("sst", np.arange(4))])
    same = [name for name, p in parts.model.named_parameters() if torch.equal(p, before[name])]
    assert same == []


def test_operations_of_a_step_equal_a_count(setup, tmp_path):
    """A weight costs 2 operations a token, the attention 4 s d a token and layer; backward is twice forward."""
    b, s, d, f, layers = 3, 8, TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]
    step = workloads.step_trainings(setup, tmp_path, "fp32", b, s, ("ours",))["ours"]
    with FlopCounterMode(display=False) as counter:
        step()
    in_layers = layers * b * s * (2 * (4 * d * d + 2 * d * f) + 4 * s * d)
    assert counter.get_total_flops() == 3 * (in_layers + 2 * b * (d * d + 5 * d))  # the pooler and five logits


def test_random_exits_leave_at_the_share_asked_for(setup):
    """With 30% to stay after each exit, 70% of all rows leave at the first of two layers."""
    data = workloads.read_ours(setup, SAMPLE)
    parts = workloads.our_parts(setup, "fp32", data, "--early_exit")
    batch = data["sst"]["train"].batch(np.resize(np.arange(len(data["sst"]["train"])), 2000))
    torch.manual_seed(0)
    infer = workloads.RandomExits({"sst": "confidence"}, {"sst": 0.3})
    with torch.inference_mode():
        _, layers = infer(parts.model.eval(), batch, 500)
    assert (layers == 1).float().mean().item() == pytest.approx(0.7, abs=0.05)


# --- processes ----------------------------------------------------------------------------------------------------


def test_a_program_that_fails_is_noticed():
    with pytest.raises(RuntimeError, match="ended with 3"):
        workloads.launch("-c", "raise SystemExit(3)")


def test_a_program_ends_after_its_first_step(setup, tmp_path):
    """The run has begun, and nothing of a later time is there: no log, no summary."""
    workloads.write_share(setup, tmp_path, 0.05)
    words, run = workloads.program_words(setup, "ours", tmp_path, "fp32")
    assert workloads.launch("-c", workloads.FIRST_STEP, *words) > 0
    assert (run / "config.json").is_file() and not list(run.glob("*.jsonl")) + list(run.glob("summary*"))


def test_a_program_without_a_step_is_noticed():
    with pytest.raises(RuntimeError, match="no training step was taken"):
        workloads.launch("-c", workloads.FIRST_STEP, "tasks")


# --- the parts ----------------------------------------------------------------------------------------------------

# how many goals each part reports on with one precision
GOALS = {"run": 2, "evaluate": 2, "startup": 1, "growth": 0, "profile": 0, "gpu": 7}


def test_no_part_is_forgotten():
    assert set(GOALS) == set(benchmark.PARTS)


def test_unknown_part_is_refused():
    with pytest.raises(InputError, match="nonsense: no such part"):
        benchmark.main(["nonsense"])


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_part_runs(setup, part, in_this_process, capsys):
    """Every variant of a part has a cost per round, and every goal stands in the report."""
    record = json.loads(json.dumps(benchmark.run_part(part, setup)))
    printed = capsys.readouterr().out
    assert f"## {part}" in printed and all(f"| {goal['text']} |" in printed for goal in record["goals"])
    assert len(record["goals"]) == GOALS[part]
    measured = part != "gpu" or torch.cuda.is_available()
    for row in (timing.Row(**row) for row in record["rows"]):
        assert bool(row.rounds) == measured and len(row.ratios) == len(row.rounds)
        assert np.isfinite(row.totals()).all() and min(row.totals(), default=1) > 0
    assert all(bool(goal["values"]) == measured for goal in record["goals"])
    if part == "profile":
        assert set(record["bounds"]) == {benchmark.TRAINING, benchmark.EVALUATION}
        # which operations are the dearest depends on how busy the machine is
        assert record["notes"][1].count("| aten::") > 5 and "different shapes" in record["notes"][2]


def test_the_gpu_part_measures(setup, tmp_path, monkeypatch):
    """The same functions on the CPU: every row and every goal has values."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(building, "compile_layers", lambda *arguments: None)
    monkeypatch.setattr(benchmark, "matrix_peak", lambda *arguments: 1e9)
    result = benchmark.measure_gpu(setup, tmp_path, measured=True)
    steps = 2 * list(workloads.TRAININGS)
    assert [row.variant for row in result.rows[: len(steps)]] == steps
    assert all(row.rounds for row in result.rows) and all(row.note for row in result.rows[: len(steps)])
    assert len(result.goals) == GOALS["gpu"] and all(goal.values for goal in result.goals)


def test_a_step_on_the_meta_device_reads_no_number(setup, tmp_path):
    """The table has our operations and those of transformers; ours read nothing, since a step with reads fails."""
    *_, ours, theirs = benchmark.count_step(setup, tmp_path).splitlines()
    name, operations, reads = [cell.strip() for cell in ours.split("|")[1:4]]
    assert (name, reads) == ("ours", "0") and int(operations) > 500
    assert "transformers" in theirs and int(theirs.split("|")[2]) > 500


def test_shapes_are_counted_by_hand():
    sentence = benchmark.shape_sentence("ours", [(2, 8), (2, 8), (1, 5)])
    assert sentence == "ours: 3 batches of 2 different shapes, 12 tokens a batch."


def test_headline_has_the_most_expensive_operations():
    table = {"aten::mm": (6.0, 2), "aten::add": (3.0, 9), "step": (1.0, 1)}
    assert benchmark.headline(table, 2) == "operations: mm 60%, add 30%"
    lines = benchmark.operation_table({"ours": table, "transformers": {"aten::add": (7.0, 1)}}, 2).splitlines()
    assert lines[2:] == ["| all | 10 | 12 | 7 | 1 |", "| aten::add | 3 | 9 | 7 | 1 |", "| aten::mm | 6 | 2 | 0 | 0 |"]


def test_memory_bound_by_hand():
    """16 bytes for each parameter of BERT: weight, gradient and two moments."""
    config = BertConfig(vocab_size=2**20, hidden_size=12, num_hidden_layers=1, num_attention_heads=1)
    parameters = sum(p.numel() for p in BertModel(config).parameters())
    assert f"take {parameters / 2**16:,.0f} MiB" in benchmark.memory_bound(config)
