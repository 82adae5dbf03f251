"""What METHODS.md promises: a method, a task, a plan, an adapter and a sampler from outside take part in a run."""

import argparse
import json
import re
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from driver import main
from tiny import log_of, make_batch, make_model, page_of, read_csv, weights_of
from torch import nn

import adapters
import flags
import predict
import samplers
import tasks
from errors import InputError
from methods import Method
from slf import Phase

PAGE = (Path(__file__).parents[1] / "METHODS.md").read_text()
RDROP_CODE, TASK_CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
LABELS = ("entailment", "neutral", "contradiction")


def module_of(code, name):
    """A module made of the page's code."""
    module = types.ModuleType(name)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


class Scale(nn.Module):
    """An adapter that multiplies every unit by a learned number."""

    def __init__(self, d):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(d))

    def forward(self, output, context):
        return output * self.factor


def last_exit_then_all(depth, epochs):
    """A plan: the last exit alone, then every exit."""
    for epoch in range(epochs):
        yield Phase(
            f"own {epoch + 1}", 1.0, ({depth: 1.0},) if epoch == 0 else (dict.fromkeys(range(1, depth + 1), 1.0),)
        )


OWN_PLAN = Method(
    title="own plan",
    add_flags=lambda group: group.add_argument("--own_plan", action="store_true", help="the last exit, then all"),
    needs=lambda flags: {"exits"} if flags["own_plan"] else set(),
    plan=lambda flags, depth, plan: partial(last_exit_then_all, depth, flags["epochs"]) if flags["own_plan"] else plan,
)


@pytest.fixture
def registered(monkeypatch):
    """The five of them, known to the program for one test."""
    rdrop = module_of(RDROP_CODE, "rdrop")
    monkeypatch.setattr(flags, "METHODS", flags.METHODS)
    added = [rdrop.RDROP, OWN_PLAN]
    flags.METHODS.extend(added)
    monkeypatch.setitem(
        samplers.SAMPLERS, "reversed", lambda steps, progress, rng: samplers.sequential(steps, progress, rng)[::-1]
    )
    monkeypatch.setitem(
        adapters.KINDS, "scale", adapters.Kind(("output",), lambda config, generator: Scale(config.hidden_size))
    )
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS)
    module_of(TASK_CODE, "nli")
    yield rdrop
    del tasks.TASKS["nli"]
    for method in added:
        flags.METHODS.remove(method)


def write_entailment(folder):
    """Three files of a three-class pair task, made of the sample's pairs."""
    pairs = read_csv(folder / "sts-train.csv", "\t")
    for split, count in (("train", 18), ("dev", 9), ("test-student", 6)):
        lines = ["\tid\tsentence1\tsentence2" + "\tlabel" * (split != "test-student")]
        for k, pair in enumerate(pairs[:count]):
            label = "" if split == "test-student" else f"\t{k % 3}"
            lines.append(f"{k}\t{split}{k}\t{pair['sentence1']}\t{pair['sentence2']}{label}")
        (folder / f"nli-{split}.csv").write_text("\n".join(lines) + "\n")


def test_a_file_outside_adds_a_method_a_task_a_plan_an_adapter_and_a_sampler(program, registered, capsys):
    write_entailment(program.data)
    own = ("--tasks", "sst", "nli", "--rdrop", 2, "--own_plan", "--sampler", "reversed", "--adapter", "scale")
    own += ("--early_exit", "--train_backbone", "--pairs", "nli=siamese", "--keep_last")
    run = program.train("outside", *own)
    phases = [line for line in log_of(run) if line["kind"] == "phase"]
    assert [line["phase"] for line in phases] == ["own 1", "own 2"]
    steps = [line for line in log_of(run) if line["kind"] == "step"]
    assert all(line["terms"]["nli"]["rdrop"] > 0 for line in steps)
    changed = {name for name, tensor in weights_of(run).items() if ".scale." in name and not torch.all(tensor == 1)}
    assert len(changed) == 2 * 2  # two layers, two tasks
    summary = json.loads((run / "summary.json").read_text())
    nli = summary["best"]["tasks"]["nli"]
    assert len(nli["predicted_shares"]) == 3 and set(summary["exits"]["thresholds"]) == {"sst", "nli"}
    page = page_of(run / "report.html")
    assert page["tasks"]["nli"]["labels"] == list(LABELS) and page["exits"] == summary["exits"]
    assert {sentence["task"] for sentence in page["sentences"]} == {"sst", "nli"} == page["curves"].keys()
    assert {row["label"] for row in read_csv(run / "predictions" / "nli-test-readable.csv")} <= set(LABELS)
    assert not main(["--option", "evaluate", "--run_dir", str(run), "--nli_dev", str(program.data / "nli-dev.csv")])
    capsys.readouterr()
    assert not predict.main([str(run), "nli", "the film is good", "the film is bad"])
    assert capsys.readouterr().out.split("\t")[0] in LABELS


def test_r_drop_vanishes_without_dropout_and_is_off_by_default(program, registered):
    term, model = registered.RDrop(2.0), make_model(dropout=0.0).train()
    batch = make_batch(model.tasks["sst"])
    assert torch.equal(term(model, batch, model(batch), {3: 1.0}), torch.zeros(4, dtype=torch.float64))
    model = make_model(dropout=0.3).train()
    assert (term(model, batch, model(batch), {3: 1.0}) > 0).all()
    with_record = weights_of(program.train_quickly("rdrop-off", "--epochs", 1))
    for method in [method for method in flags.METHODS if method.title in ("R-Drop", "own plan")]:
        flags.METHODS.remove(method)
    without = weights_of(program.train_quickly("rdrop-absent", "--epochs", 1))
    flags.METHODS.extend([registered.RDROP, OWN_PLAN])
    assert all(torch.equal(with_record[name], tensor) for name, tensor in without.items())


def test_a_term_that_returns_one_number_for_the_batch_is_refused(program, registered, monkeypatch):
    """A [b,1] or a scalar would be spread over the other terms' [b], and the loss would count several times."""
    monkeypatch.setattr(registered.RDrop, "__call__", lambda *_: torch.zeros(8, 1))
    with pytest.raises(ValueError, match="rdrop"):
        program.train("wrong-shape", "--rdrop", 1)


def test_two_terms_of_one_name_are_refused(program, registered):
    flags.METHODS.append(registered.RDROP)
    try:
        with pytest.raises((InputError, argparse.ArgumentError), match="rdrop"):
            program.train("twice", "--rdrop", 1)
    finally:
        flags.METHODS.remove(registered.RDROP)


def test_the_page_names_only_what_is_there():
    """The table's files, and the names in code spans that a reader would look for."""
    for name, attribute in re.findall(r"`(\w+)\.([A-Z_]+)`", PAGE):
        if name != "rdrop":
            __import__(name)
            assert hasattr(sys.modules[name], attribute), f"{name}.{attribute}"


WRONG_NAMES = [("needs", {"exit"}), ("trains", {"heads.typo"}), ("rates", {"heads.typo": 0.5})]


@pytest.mark.parametrize("slot, names", WRONG_NAMES)
def test_a_name_that_is_not_there_is_reported_with_its_method(program, slot, names):
    flags.METHODS.append(Method("wrong names", **{slot: lambda *_: names}))
    try:
        line = program.refused("wrong-names")
    finally:
        flags.METHODS.pop()
    assert "'wrong names'" in line and slot in line and repr(min(names)) in line


def test_a_plan_that_keeps_no_model_is_refused_before_the_training(program):
    def keeps_nothing():
        yield Phase("only", 1.0, ({2: 1.0},), keep=False)

    flags.METHODS.append(Method("keeps nothing", plan=lambda flags, depth, plan: keeps_nothing))
    try:
        assert "'only'" in program.refused("keeps-nothing")
    finally:
        flags.METHODS.pop()
    assert not program.path("keeps-nothing").exists()


@pytest.mark.parametrize("part", [(1, 1), (-1, 2), (0, 0)])
def test_a_part_outside_its_phases_is_refused(part):
    with pytest.raises(ValueError, match="'late'"):
        Phase("late", 1.0, ({2: 1.0},), part=part)
