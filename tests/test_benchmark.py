"""The benchmark runs, and its arithmetic is right; no time is asserted. Read benchmark.py before it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
from base_bert import BertConfig
from bert import BertModel
from errors import InputError
from tokenizer import SPECIAL_TOKENS

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-"
SIZES = benchmark.Sizes(
    rounds=2,
    epoch_rounds=1,
    repeats=1,
    sentences=20,
    train=24,
    dev=24,
    evaluated=24,
    remembered=24,
    steps=((3, 8),),
    optimized=(("tiny", dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),),
    matrices=(16,),
)


def row(**details):
    """Two rounds, of 1 + 3 and 2 + 6 seconds, against a baseline of 2 and 2 seconds."""
    rounds = [{"forward": 1.0, "optimizer": 3.0}, {"forward": 2.0, "optimizer": 6.0}]
    return benchmark.Row("a setting", "theirs", details.pop("unit", "s"), rounds, [{"": 2.0}, {"": 2.0}], **details)


def test_row_arithmetic():
    """Totals, rates, ratios per round, medians of phases and shares of the peak, worked by hand."""
    assert row().values() == [4.0, 8.0]
    assert row(unit="ms").values() == [4000.0, 8000.0]
    assert row(unit="sentences/s", amount=16.0).values() == [4.0, 2.0]
    assert row().ratios() == [2.0, 4.0]
    assert row().phases() == {"forward": 1.5, "optimizer": 4.5}
    flop = {"step": (60.0, ("forward", "optimizer")), "without": (60.0, ("forward",))}
    assert row(flop=flop, peak=100.0).shares() == {"step": 0.1, "without": 0.4}


def test_table_says_what_the_rows_say():
    """A line per row under a header; the baseline's own ratio is 1."""
    rounds = {"ours": [{"": 2.0}, {"": 2.0}, {"": 2.0}], "theirs": [{"": 3.0}, {"": 5.0}, {"": 4.0}]}
    header, rule, ours, theirs = benchmark.table(benchmark.compare("a setting", "s", rounds))
    assert len({len(line) for line in (header, rule, ours, theirs)}) == 1
    assert [cell.strip() for cell in ours.split("|")[1:5]] == ["a setting", "ours", "2 s (2 - 2)", "1"]
    assert [cell.strip() for cell in theirs.split("|")[2:5]] == ["theirs", "4 s (3 - 5)", "2 (1.5 - 2.5)"]


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
    assert benchmark.layer_flop(config, [5, 5, 5], passes=1) == forward
    assert benchmark.layer_flop(config, [5, 5, 5], passes=3) == counter.get_total_flops()


def test_alternate_takes_turns():
    """Every variant once per round, the order turned round each time."""
    order = []
    variants = {name: (lambda name=name: order.append(name) or len(order)) for name in "AB"}
    assert benchmark.alternate(variants, 3, "") == {"A": [1, 4, 5], "B": [2, 3, 6]}
    assert order == ["A", "B", "B", "A", "A", "B"]


def test_profile_counts_nested_calls_once():
    """An inner wrapped function belongs to the outer one's phase; putting it back restores the function."""

    class Owner:
        def inner(self):
            return 1

        def outer(self):
            return self.inner() + 1

    owner, profile = Owner(), benchmark.Profile(torch.device("cpu"))
    profile.wrap(owner, "inner", "inner")
    put_back = profile.wrap(owner, "outer", "outer")
    assert owner.outer() == 2 and list(profile.seconds) == ["outer"]
    put_back()
    assert owner.outer() == 2 and list(profile.seconds) == ["outer", "inner"]


def test_report_keeps_the_other_parts(tmp_path):
    """A second call replaces its own part only."""
    about = dict(command="c", commit="", device="cpu", threads=1, torch="2", transformers="5", started="2026-01-01T")
    about |= dict(seconds=60, matrix_peak={"fp32": 1e9}, table=["| x |"], profile={})
    benchmark.write_report(tmp_path / "report", {"step": about | {"table": ["| old |"]}})
    benchmark.write_report(tmp_path / "report", {"tokenize": about})
    benchmark.write_report(tmp_path / "report", {"step": about | {"table": ["| new |"]}})
    records = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert list(records) == ["tokenize", "step"] and "| new |" in text and "| x |" in text and "| old |" not in text


def test_unknown_part_is_refused():
    with pytest.raises(InputError, match="nonsense: no such part"):
        benchmark.main(["nonsense"])


# --- the parts, on a tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny random BERT that reads letters, with the sample data."""
    pytest.importorskip("transformers")
    vocab = [*SPECIAL_TOKENS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(BertConfig(vocab_size=len(vocab), **sizes), generator=torch.Generator().manual_seed(0))
    model.tokenizer_files = {"vocab.txt": "\n".join(vocab).encode()}
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    peaks = {"fp32": benchmark.measure_matrix_peak(torch.device("cpu"), torch.float32, SIZES.matrices)}
    return benchmark.Setup(folder, SAMPLE, torch.device("cpu"), ("fp32",), SIZES, peaks)


def test_everybody_gets_the_same_examples(setup, tmp_path):
    """The subset is written once; ours and the peer read the same texts, labels and token ids from it."""
    lengths = benchmark.write_subset(setup, tmp_path, 24, 24)
    tokenizer = benchmark.import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    for name, splits in benchmark.read_splits(setup, tmp_path, ("train", "dev")).items():
        for split, ours in splits.items():
            peer = benchmark.PeerData(tmp_path / ours.task.file(split), ours.task, tokenizer, tokenize_once=True)
            assert [ours.text(i) for i in range(len(ours))] == list(zip(*peer.columns, strict=True))
            assert ours.labels.tolist() == peer.labels
            assert ours.lengths().tolist() == peer.lengths() == lengths[split][name].tolist()
            inputs, labels = peer.collate([3, 1])
            batch = ours.batch(np.array([3, 1]))
            assert torch.equal(inputs["input_ids"], batch.segments[0][0]) and torch.equal(labels, batch.labels)
    for best in (False, True):
        assert sorted(i for batch in benchmark.peer_batches(peer, best) for i in batch) == list(range(len(peer.labels)))


@pytest.mark.parametrize("part", ["tokenize", "step", "epoch", "evaluate", "optimizer", "memory"])
def test_part_runs(setup, part, monkeypatch, capsys):
    """Every variant of a part gives a cost per round; its record is plain data and its table complete."""
    # each variant of the memory part starts a process, and the epoch part has run the peers: one will do
    if part == "memory":
        monkeypatch.setattr(benchmark, "EPOCHS", {"ours": benchmark.EPOCHS["ours"]})
    record = json.loads(json.dumps(benchmark.run_part(part, setup)))
    assert f"## {part}" in capsys.readouterr().out
    assert len(record["table"]) == len(record["rows"]) + 2
    variants = {row["variant"] for row in record["rows"]}
    assert "ours" in variants
    assert part == "memory" or any(name.startswith(("transformers", "torch")) for name in variants)
    for row in record["rows"]:
        assert row["values"] and np.isfinite(row["values"]).all() and min(row["values"]) > 0
        assert row["variant"] != "ours" or set(row["ratios"]) == {1.0}
    if part == "epoch":
        assert {"collate", "forward", "backward", "clip", "optimizer"} <= set(record["profile"]["fp32"])


def test_other_logits_are_noticed(setup):
    """The step part refuses to compare models that do not compute the same."""
    tasks = benchmark.build_tasks(("sst",))
    batch, lengths = benchmark.real_batch(setup, 3, 8, np.arange(5, 40))
    assert lengths.tolist() == [8, 7, 6] and batch.segments[0][1].sum(1).tolist() == [8, 7, 6]
    ours, peer = benchmark.our_model(setup, tasks), benchmark.PeerModel(setup.weights, tasks)
    benchmark.check_same_work(ours, peer, batch)
    with torch.no_grad():
        ours.bert.pooler_dense.weight.mul_(-5)
        ours.heads["sst"].weight.mul_(50)
    with pytest.raises(RuntimeError, match="not the same work"):
        benchmark.check_same_work(ours, peer, batch)
