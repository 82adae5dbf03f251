"""The benchmark's arithmetic and its report are right; no time is asserted."""

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from lab import timing

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "results"
ABOUT = dict(about="A part.", command="c", commit="abc", torch="2", transformers="5", date="2026-01-01")
ABOUT |= dict(machine="m", weights="w", data="d", rows=[], goals=[], notes=[])


# --- clocks and counters ------------------------------------------------------------------------------------------


def test_variants_take_turns():
    """A B, A B: every variant once per round, in one order."""
    order = []
    variants = {name: (lambda name=name: order.append(name) or len(order)) for name in "AB"}
    assert timing.take_turns(variants, 3, "") == {"A": [1, 3, 5], "B": [2, 4, 6]}
    assert order == ["A", "B", "A", "B", "A", "B"]


def test_measure_warms_up():
    calls = []
    [row] = timing.measure("a setting", "s", {"ours": lambda: calls.append(0) or {"": 1.0}}, 3)
    assert len(calls) == 4 and len(row.rounds) == 3


def test_timed_gives_the_seconds_of_one_call():
    calls = []
    [seconds] = timing.timed(CPU, lambda: calls.append(time.sleep(0.02)), repeats=3)().values()
    assert len(calls) == 3 and seconds >= 0.02


def test_profile_counts_the_calls_of_an_operation():
    x = torch.ones(4, 4)
    operations = timing.profile(CPU, lambda: [x @ x for _ in range(6)], parts=3)
    milliseconds, calls = operations["aten::mm"]
    assert calls == 2 and milliseconds > 0


def test_views_are_no_operations_and_a_read_is_one():
    x = torch.arange(4.0)

    def call():
        return (torch.ops.aten._unsafe_view(x, [2, 2]).t().flatten(0, 0) + 1).sum().item()

    assert timing.count_operations(call) == {
        "aten.add.Tensor": 1,
        "aten.sum.default": 1,
        "aten._local_scalar_dense.default": 1,
    }


def test_operations_of_a_backward_pass_are_counted():
    x = torch.ones(3, requires_grad=True)
    assert timing.count_operations(lambda: (x * x).sum().backward())["aten.mul.Tensor"] == 3


def test_matrix_peak_is_a_rate():
    """A product of two n x n matrices takes 2 n^3 operations; the clock shows 2 ms for each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "timed", lambda device, call: lambda: {"": 0.002})
        assert timing.matrix_peak(CPU, torch.float32, sizes=(10, 20)) == 2 * 20**3 / 0.002


# --- ratios and goals ---------------------------------------------------------------------------------------------


def test_ratios_and_cells_by_hand():
    """Two rounds of 1 + 1 seconds for ours, 1 + 3 and 2 + 6 for theirs."""
    base = [{"train": 1.0, "save": 1.0}] * 2
    measured = {"ours": base, "theirs": [{"train": 1.0, "save": 3.0}, {"train": 2.0, "save": 6.0}]}
    ours, theirs = timing.compare("a setting", "s", measured)
    assert theirs.totals() == [4.0, 8.0] and theirs.ratios == [2.0, 4.0]
    theirs.note = "a note"
    assert timing.row_cells(theirs)[1:] == ["theirs", "6 s (4 - 8)", "3 (2 - 4)", "train 1.5, save 4.5; a note"]
    assert timing.row_cells(ours)[2:4] == ["2 s (2 - 2)", "1"]
    [row] = timing.compare("a setting", "ms", {"ours": [{"": 0.25}]})
    assert timing.row_cells(row)[2:] == ["250 ms (250 - 250)", "1", ""]
    [row] = timing.compare("a setting", "ms", {"ours": []})
    assert timing.row_cells(row)[2:] == ["not measured", "not measured", ""]


@pytest.mark.parametrize(
    "wanted, at_least, outcome", [(2.0, True, "yes"), (3.0, True, "yes"), (4.0, True, "no"), (2.0, False, "no")]
)
def test_the_median_decides_about_a_goal(wanted, at_least, outcome):
    """2, 3 and 10 have the median 3, whatever their mean. Only a missed goal has a bound."""
    goal = timing.Goal("a ratio", wanted, [10.0, 2.0, 3.0], at_least, "the memory")
    bound, words = "the memory" * (outcome == "no"), "at least" if at_least else "at most"
    assert timing.goal_cells(goal, {}) == ["a ratio", f"{words} {wanted:g}", "3 (2 - 10)", outcome, bound]


def test_a_goal_without_values_is_not_measured():
    assert timing.Goal("a ratio", 1.0, []).outcome() == "not measured"


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_profile_explains_a_missed_goal():
    """A goal names a key of the profile's bounds; without a profile the key itself refers to that part."""
    goal = dict(text="a ratio", wanted=2.0, values=[1.0], at_least=True, bound="see the part profile")
    records = {"run": ABOUT | {"goals": [goal]}}
    assert "| a ratio | at least 2 | 1 (1 - 1) | no | see the part profile | run | abc | m |" in timing.report_lines(
        records
    )
    records["profile"] = ABOUT | {"bounds": {"see the part profile": "copies"}}
    assert "| a ratio | at least 2 | 1 (1 - 1) | no | copies | run | abc | m |" in timing.report_lines(records)


def test_report_keeps_the_other_parts(tmp_path):
    """A second call replaces its own part only; notes follow the table."""
    order, write = ("run", "growth"), partial(timing.write_report, tmp_path / "report", order=("run", "growth"))

    def record(variant):
        result = timing.Measurements(timing.compare("a setting", "s", {variant: [{"": 1.0}]}), notes=["a note"])
        return ABOUT | asdict(result)

    for part, variant in (("growth", "old"), ("run", "x"), ("growth", "new")):
        write(records={part: record(variant)})
    records = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert tuple(records) == order and "| x |" in text and "| old |" not in text
    assert text.index("## run") < text.index("## growth") < text.index("| new |") < text.rindex("a note")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("benchmark-*.json")), ids=lambda path: path.name)
def test_a_committed_report_is_made_from_the_committed_records(path, tmp_path):
    """The Markdown file is what write_report makes of the JSON file beside it."""
    (tmp_path / path.name).write_bytes(path.read_bytes())
    timing.write_report(tmp_path / path.stem, {}, list(json.loads(path.read_text())))
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (RESULTS / made.name).read_bytes(), made.name
