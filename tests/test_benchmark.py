"""Every part of the benchmark runs on a tiny model and returns numbers; no time is asserted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import multitask_classifier
from base_bert import BertConfig
from bert import BertModel
from errors import InputError
from lab import benchmark, ours, peer, timing, variants, workloads
from tasks import build_tasks
from tokenizer import SPECIAL_TOKENS

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-"
TINY = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
SIZES = workloads.Sizes(
    workloads.Examples(20, train=24, dev=24, evaluated=24, remembered=24, growth=(24, 30), pairs=40),
    rounds=1,
    epoch_rounds=1,
    repeats=1,
    steps=((3, 8),),
    lengths=(8, 12),
    optimized=(("tiny", dict(vocab_size=20, **TINY)),),
    matrices=(16,),
    compiler="eager",
    full_epoch=False,
)


def test_layer_flop_equals_a_count():
    """torch's own counter of operations on an unpadded batch, less the pooler's."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    config = BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)
    model, ids = BertModel(config), torch.ones(3, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.embed(ids)
        *_, (_, last) = model.encode(hidden, torch.ones_like(ids))
        forward = counter.get_total_flops()
        last.sum().backward()
    assert workloads.layer_flop(config, [5, 5, 5], passes=1) == forward
    assert workloads.layer_flop(config, [5, 5, 5], passes=3) == counter.get_total_flops()


def test_unknown_part_is_refused():
    with pytest.raises(InputError, match="nonsense: no such part"):
        benchmark.main(["nonsense"])


# --- the parts, on a tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny random BERT that reads letters, with the sample data."""
    pytest.importorskip("transformers")
    vocab = [*SPECIAL_TOKENS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    model = BertModel(BertConfig(vocab_size=len(vocab), **TINY), generator=torch.Generator().manual_seed(0))
    model.tokenizer_files = {"vocab.txt": "\n".join(vocab).encode()}
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    cpu = torch.device("cpu")
    peaks = {"fp32": timing.measure_matrix_peak(cpu, torch.float32, SIZES.matrices)}
    report = tmp_path_factory.mktemp("results") / "benchmark"
    return workloads.Setup(folder, SAMPLE, cpu, ("fp32",), SIZES, report, peaks=peaks)


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts that start processes do their work here: a program's main in place of the program."""

    def launch(*arguments, **environment):
        words = list(map(str, arguments))
        for name, module in (("multitask_classifier.py", multitask_classifier), ("lab.peer", peer)):
            if name in words:
                module.main(words[words.index(name) + 1 :])
                return 1.0
        assert words[0] == "-c" and compile(words[1], "code", "exec")
        return 1.0

    def measure_here(device, call):
        return timing.measure_memory(device, torch.get_num_threads(), call) | {"added": 1.0}

    monkeypatch.setattr(workloads, "launch", launch)
    monkeypatch.setattr(benchmark, "launch", launch)
    monkeypatch.setattr(benchmark, "in_fresh_process", measure_here)


def test_everybody_gets_the_same_examples(setup, tmp_path):
    """The subset is written once; ours and the peer read the same texts, labels and token ids from it."""
    lengths, whole = workloads.write_subset(setup, tmp_path, train=24, dev=24)
    assert whole == {"train": 1200, "dev": 302}
    for split in ("train", "dev"):
        datasets, peers = (
            workloads.read_split(setup, tmp_path, split),
            workloads.read_peer(setup, tmp_path, split, True),
        )
        assert np.concatenate([data.lengths() for data in datasets.values()]).tolist() == lengths[split].tolist()
        for name, data in datasets.items():
            theirs = peers[name]
            assert [data.text(i) for i in range(len(data))] == list(zip(*theirs.columns, strict=True))
            assert data.labels.tolist() == theirs.labels and data.lengths().tolist() == theirs.lengths()
            inputs, labels = theirs.collate([3, 1])
            batch = data.batch(np.array([3, 1]))
            assert torch.equal(inputs["input_ids"], batch.segments[0][0]) and torch.equal(labels, batch.labels)


# the goals that each part is to report on, one setting and precision each
GOALS = {
    "tokenize": 1,
    "step": 1,
    "epoch": 2,
    "evaluate": 2,
    "exit": 1,
    "optimizer": 1,
    "slf": 1,
    "pretrain": 1,
    "run": 2,
}
GOALS |= {"run": 2, "methods": 2, "startup": 1, "memory": 2, "data": 1, "growth": 0, "distributed": 0, "compile": 0}


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_part_runs(setup, part, in_this_process, capsys):
    """Every variant of a part gives a cost per round; its record is plain data and its table complete."""
    record = json.loads(json.dumps(benchmark.run_part(part, setup)))
    printed = capsys.readouterr().out
    assert f"## {part}" in printed and all(f"- {goal}" in printed for goal in record["goals"])
    assert len(timing.table(record["rows"])) == len(record["rows"]) + 2 and len(record["goals"]) == GOALS[part]
    for row in record["rows"]:
        assert row["values"] and np.isfinite(row["values"]).all() and min(row["values"]) > 0
        assert row["variant"] != "ours" or set(row["ratios"]) == {1.0}
    if part == "epoch":
        assert all(phase in record["notes"][0] for phase in ("collate", "forward", "optimizer", "save"))
    if part in ("exit", "growth"):
        assert record["notes"][-1].startswith("![") and setup.report.with_name(f"benchmark-{part}.png").is_file()


def test_no_part_is_forgotten():
    assert set(GOALS) == set(benchmark.PARTS)


def test_exits_of_a_saved_run(setup, tmp_path, monkeypatch):
    """The thresholds of a run's summary are one of the settings; a run without exits is refused."""
    run = ["--data_dir", str(SAMPLE), "--weights", str(setup.weights), "--run_dir", str(tmp_path / "run")]
    multitask_classifier.main([*run, *["--tasks", "sst", "--epochs", "1", "--epoch_size", "0.1", "--early_exit"]])
    monkeypatch.setattr(setup, "run_dir", tmp_path / "run")
    found = benchmark.benchmark_exit(setup, tmp_path)
    assert [row.variant for row in found.rows][::6] == ["full depth", "thresholds chosen"]
    assert "99% of the norm" in found.notes[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"exits": None}))
    with pytest.raises(InputError, match="this run has no exits"):
        benchmark.benchmark_exit(setup, tmp_path)


def test_random_exits_leave_at_the_share_asked_for(setup):
    """With 30% to stay after each exit, 70% of all rows leave at the first of two layers."""
    parts = ours.our_parts(setup, "fp32", "--early_exit --tasks sst")
    [batch], _ = workloads.real_batch(setup, 2000, 4)
    torch.manual_seed(0)
    infer = ours.RandomExits({"sst": "confidence"}, {"sst": 0.3})
    with torch.inference_mode():
        _, layers = infer(parts.model.eval(), batch, 500)
    assert (layers == 1).float().mean().item() == pytest.approx(0.7, abs=0.05)


def test_our_step_is_the_loops_step(setup, tmp_path):
    """One timed step changes the weights exactly as multitask_classifier.train_step does."""
    workloads.write_subset(setup, tmp_path, train=24, dev=24)
    data = workloads.read_train_and_dev(setup, tmp_path)
    weights = []
    for timed in (True, False):
        torch.manual_seed(0)
        parts, rows = ours.our_parts(setup, "fp32", data=data), np.arange(8)
        if timed:
            ours.our_step(parts, [data["sst"]["train"].batch(rows)], repeats=1)()
        else:
            optimizer = parts.make_optimizer(dict(parts.model.named_parameters()))
            parts.model.train()
            step = [("sst", [rows], {parts.model.depth: 1.0})]
            multitask_classifier.train_step(parts, optimizer, parts.terms, step, multiplier=1.0)
        weights.append(torch.cat([p.detach().flatten() for p in parts.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)


def test_other_logits_are_noticed(setup):
    """The step part refuses to compare models that do not compute the same."""
    [batch], lengths = workloads.real_batch(setup, 3, 8)
    assert lengths.tolist() == [8, 7, 6] and batch.segments[0][1].sum(1).tolist() == [8, 7, 6]
    model = ours.our_parts(setup, "fp32", "--tasks sst").model
    theirs = variants.peer_model(setup, build_tasks(("sst",)))
    variants.check_same_work(model, theirs, batch)
    with torch.no_grad():
        model.bert.pooler_dense.weight.mul_(-5)
        model.heads["sst"].weight.mul_(50)
    with pytest.raises(RuntimeError, match="not the same work"):
        variants.check_same_work(model, theirs, batch)


def test_a_program_that_fails_is_noticed():
    with pytest.raises(RuntimeError, match="ended with 3"):
        workloads.launch("-c", "raise SystemExit(3)")


@pytest.mark.parametrize(
    "device, b, s, limits",
    [
        ("cpu", 16, 32, [1.0]),
        ("cpu", 32, 64, [1.0, 1.1, 0.45, 0.6]),
        ("cuda", 16, 32, [2.0]),
        ("cuda", 128, 128, [1.3, 0.45]),
    ],
)
def test_goals_of_a_step(device, b, s, limits):
    """Ours takes 2 s, 1 s of it the optimiser, and reaches 30% and 60% of the peak; transformers takes 3 s."""
    mine, theirs = [{"forward": 1.0, "optimizer": 1.0}], [{"forward": 2.0, "optimizer": 1.0}]
    flop = {"step": (60.0, ("forward", "optimizer")), "without optimizer": (60.0, ("forward",))}
    measured = {"ours": mine, "transformers plain": theirs, "ours --attention sdpa": mine, "transformers best": theirs}
    goals = benchmark.step_goals(device, b, s, timing.compare("a setting", "ms", measured, flop=flop, peak=100.0))
    assert [goal.limit for goal in goals] == limits
    assert [goal.values for goal in goals] == [[{1.1: 1.0, 0.45: 0.3, 0.6: 0.6}.get(x, 1.5)] for x in limits]
