"""The benchmark's arithmetic and its report are right; no time is asserted."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from lab import timing

CPU = torch.device("cpu")


def row(**details):
    """Two rounds, of 1 + 3 and 2 + 6 seconds, against a baseline of 1 + 1 and 1 + 1 seconds."""
    rounds = [{"forward": 1.0, "optimizer": 3.0}, {"forward": 2.0, "optimizer": 6.0}]
    base = [{"forward": 1.0, "optimizer": 1.0}] * 2
    return timing.Row("a setting", "theirs", details.pop("unit", "s"), rounds, base, **details)


def test_row_arithmetic():
    """Totals, rates, ratios per round, medians of phases and shares of the peak, worked by hand."""
    assert row().values() == [4.0, 8.0]
    assert row(unit="ms").values() == [4000.0, 8000.0]
    assert row(unit="sentences/s", amount=16.0).values() == [4.0, 2.0]
    assert row().ratios() == [2.0, 4.0] and row().gains() == [0.5, 0.25]
    assert row().ratios("forward") == [1.0, 2.0]
    *_, phases = timing.cells(row(unit="ms", note="a note").record())
    assert phases == "forward 1,500, optimizer 4,500; a note"
    flop = {"step": (60.0, ("forward", "optimizer")), "without": (60.0, ("forward",))}
    assert row(flop=flop, peak=100.0).shares() == {"step": [0.15, 0.075], "without": [0.6, 0.3]}


def test_table_says_what_the_rows_say():
    """A line per row under a header; the baseline's own ratio is 1."""
    rounds = {"ours": [{"": 2.0}, {"": 2.0}, {"": 2.0}], "theirs": [{"": 3.0}, {"": 5.0}, {"": 4.0}]}
    header, rule, ours, theirs = timing.table([row.record() for row in timing.compare("a setting", "s", rounds)])
    assert len({len(line) for line in (header, rule, ours, theirs)}) == 1
    assert [cell.strip() for cell in ours.split("|")[1:5]] == ["a setting", "ours", "2 s (2 - 2)", "1"]
    assert [cell.strip() for cell in theirs.split("|")[2:5]] == ["theirs", "4 s (3 - 5)", "2 (1.5 - 2.5)"]


@pytest.mark.parametrize(
    "limit, at_least, outcome",
    [
        (2.0, True, "reached by 50%"),
        (4.0, True, "missed by 25%"),
        (2.0, False, "missed by 50%"),
        (4.0, False, "reached by 25%"),
    ],
)
def test_goal_is_decided_by_the_median(limit, at_least, outcome):
    """2, 3 and 10 have the median 3, whatever their mean."""
    line = timing.Goal("a ratio", limit, [10.0, 2.0, 3.0], at_least).line()
    bound = "at least" if at_least else "at most"
    assert line == f"a ratio: goal {bound} {limit:g}, measured 3 (2 - 10): {outcome}"


def test_goals_are_about_the_named_variants_only():
    rounds = {"ours": [{"": 2.0}], "plain": [{"": 3.0}], "best": [{"": 1.0}]}
    [goal] = timing.goals_against(timing.compare("a setting", "s", rounds), {"plain": 1.2})
    assert goal.values == [1.5] and goal.limit == 1.2 and "plain" in goal.text


def test_alternate_takes_turns():
    """Every variant once per round, the order turned round each time."""
    order = []
    variants = {name: (lambda name=name: order.append(name) or len(order)) for name in "AB"}
    assert timing.alternate(variants, 3, "") == {"A": [1, 4, 5], "B": [2, 3, 6]}
    assert order == ["A", "B", "B", "A", "A", "B"]


def test_measure_warms_up_where_there_are_several_rounds():
    calls = []
    for rounds, expected in ((1, 1), (3, 4)):
        calls.clear()
        [found] = timing.measure("a setting", "s", {"ours": lambda: calls.append(0) or {"": 1.0}}, rounds)
        assert len(calls) == expected and len(found.rounds) == rounds


def test_timed_hands_results_on_and_leaves_out_the_preparation():
    """Phases follow one another, each repeat starts anew, and only phases are timed."""
    seen, prepare = [], partial(time.sleep, 0.2)
    phases = {"first": lambda before: seen.append(before) or 3, "second": lambda before: seen.append(before) or 4}
    found = timing.timed(CPU, phases, repeats=2, prepare=prepare)()
    assert seen == [None, 3, None, 3]
    assert list(found) == ["first", "second"] and sum(found.values()) < 0.2


def test_profile_counts_nested_calls_once():
    """An inner function belongs to the outer one's phase; afterwards both are what they were."""

    class Owner:
        def inner(self):
            time.sleep(0.01)
            return 1

        def outer(self):
            return self.inner() + 1

    before = Owner.inner, Owner.outer
    with timing.profiled(CPU, {"inner": (Owner, "inner"), "outer": (Owner, "outer")}) as seconds:
        assert Owner().outer() == 2 and seconds["inner"] == 0 and seconds["outer"] >= 0.01
        assert Owner().inner() == 1 and seconds["inner"] >= 0.01
    assert (Owner.inner, Owner.outer) == before


def test_memory_of_a_call():
    """A call that fills 64 MiB adds about that much to a fresh process."""
    told = timing.in_fresh_process(CPU, partial(torch.ones, 2**24))
    assert 60 < told["added"] < 120 and told["start"] > 20 and told["seconds"] > 0


def test_report_keeps_the_other_parts(tmp_path):
    """A second call replaces its own part only; goals and notes follow the table."""
    about = dict(command="c", commit="", device="cpu", threads=1, torch="2", transformers="5", started="2026-01-01T")
    about |= dict(about="A part.", seconds=60, matrix_peak={"fp32": 1e9}, rows=[], goals=["a goal"], notes=["note"])
    order = ("tokenize", "step")

    def rows(variant):
        return {"rows": [timing.compare("a setting", "s", {variant: [{"": 1.0}]})[0].record()]}

    timing.write_report(tmp_path / "report", {"step": about | rows("old")}, order)
    timing.write_report(tmp_path / "report", {"tokenize": about | rows("x")}, order)
    timing.write_report(tmp_path / "report", {"step": about | rows("new")}, order)
    records = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert list(records) == ["tokenize", "step"] and "| x  " in text and "| old " not in text
    assert text.index("| new ") < text.rindex("- a goal") < text.rindex("note")
    goals = (tmp_path / "report-goals.md").read_text()
    assert "- tokenize: a goal\n- step: a goal\n" in goals


def test_the_committed_report_is_made_from_the_committed_records(tmp_path):
    """The Markdown files in results/ are what write_report makes of the JSON file beside them."""
    results = Path(__file__).parents[1] / "results"
    (tmp_path / "benchmark-cpu.json").write_bytes((results / "benchmark-cpu.json").read_bytes())
    order = json.loads((results / "benchmark-cpu.json").read_text())
    timing.write_report(tmp_path / "benchmark-cpu", {}, order)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (results / path.name).read_bytes(), path.name
