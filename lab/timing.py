"""The benchmark's clock, its counters, its goals and its report; nothing here depends on BERT.

A variant is a function that does some work once and returns {phase: cost}. The variants of a comparison take turns
(A B, A B, ...), so that a slow minute of the machine hits all of them. The first one is ours. Each round gives one
ratio of a variant's cost to ours, and the median of the rounds decides. A variant without rounds was not measured.

    Row            one variant's costs, round by round, with the ratios
    Goal           a number that was aimed at, the measured values, and what bounds them
    Measurements   what one part of the benchmark returns: rows, goals, and text below the table
"""

import json
import platform
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from files import write_whole
from lab.tables import markdown

MIB = 2**20

# --- clocks and counters ------------------------------------------------------------------------------------------


def timed(device, call, repeats=1):
    """Make a variant that calls a function `repeats` times, and returns the seconds of one call."""

    def variant():
        wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        wait(device)
        return {"": (time.perf_counter() - started) / repeats}

    return variant


def wait(device):
    """Wait until a GPU has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(variants, rounds, label):
    """Call every variant once per round, in their order. Returns {variant: list of its costs}."""
    results = {name: [] for name in variants}
    for _ in tqdm(range(rounds), label, disable=None, leave=False):
        for name, variant in variants.items():
            results[name].append(variant())
    return results


def matrix_peak(device, dtype, sizes=(4096, 8192), repeats=10):
    """Best rate of a square matrix product. Units: floating-point operations per second."""
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        product = timed(device, lambda a=a, b=b: a @ b)
        product()
        best = max(best, *(2 * n**3 / product()[""] for _ in range(repeats)))
    return best


def profile(device, call, parts=1):
    """Profile a call with torch.profiler. Returns {operation: (milliseconds of its own, calls)}, divided by `parts`.

    On CUDA the milliseconds are the GPU's, and operations that start no kernel have 0.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        wait(device)
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # the host's entries only: a kernel's own entry would count its time twice
    entries = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
    return {e.key: (getattr(e, clock) / 1e3 / parts, e.count / parts) for e in entries}


class OperationCounter(TorchDispatchMode):
    """Counts the operations that compute or copy while it is active. Views do neither, nor does _unsafe_view."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function is not torch.ops.aten._unsafe_view.default:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def count_operations(call):
    """The operations of one call: {operation: number}."""
    with OperationCounter() as counter:
        call()
    return counter.counts


# --- ratios and goals ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The costs of one variant, {phase: cost} per round, and their ratios to our costs of the same rounds.

    Units: costs are in `unit`, times in seconds; ms is for the table only.
    """

    setting: str
    variant: str
    unit: str
    rounds: list
    ratios: list
    note: str = ""

    def totals(self):
        """The cost of each round."""
        return [sum(phases.values()) for phases in self.rounds]


def compare(setting, unit, measured):
    """Make a Row of every variant in {variant: rounds}; the first variant is ours."""
    first = next(iter(measured.values()))
    rows = []
    for variant, rounds in measured.items():
        ratios = [sum(mine.values()) / sum(base.values()) for mine, base in zip(rounds, first, strict=True)]
        rows.append(Row(setting, variant, unit, rounds, ratios))
    return rows


def measure(setting, unit, variants, rounds):
    """Let variants take turns and make their Rows. Each variant runs once before, to warm up."""
    for variant in variants.values():
        variant()
    return compare(setting, unit, take_turns(variants, rounds, setting))


@dataclass(frozen=True)
class Goal:
    """A number that was aimed at, and the measured values, one per round (none: not measured); the median decides.

    `bound` is what stands in the way: a sentence, or a key of the profile's `bounds`.
    """

    text: str
    wanted: float
    values: list
    at_least: bool = True
    bound: str = ""

    def outcome(self):
        """Whether the goal is reached."""
        if not self.values:
            return "not measured"
        distance = statistics.median(self.values) - self.wanted
        return "yes" if (distance if self.at_least else -distance) >= 0 else "no"


@dataclass
class Measurements:
    """What one part of the benchmark returns. `bounds` is {key: sentence} for goals, from the part profile."""

    rows: list = field(default_factory=list)
    goals: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    bounds: dict = field(default_factory=dict)


# --- the report ---------------------------------------------------------------------------------------------------

EXPLANATION = """\
The variants take turns (A B, A B, ...). A cell has the median of the rounds, then the lowest and the highest. The
column `cost / ours` divides a variant's cost by ours of the same round: above 1, ours is ahead. `transformers` has its
fastest settings (lab/peer.py). lab/benchmark.py defines the parts and the goals.
"""
GOAL_COLUMNS = ("goal", "wanted", "measured", "reached", "bound by", "part", "commit", "machine")
ROW_COLUMNS = ("setting", "variant", "cost", "cost / ours", "details")


def machine(device):
    """Name of the device, with its threads if it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the platform has the name
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def three_digits(value):
    """A number with about three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_spread(values, suffix=""):
    """Median (lowest - highest)."""
    if not values:
        return "not measured"
    middle, low, high = map(three_digits, (statistics.median(values), min(values), max(values)))
    return f"{middle}{suffix} ({low} - {high})"


def row_cells(row):
    """A row of a part's table."""
    scale = 1e3 if row.unit == "ms" else 1.0
    names = row.rounds[0] if row.rounds and len(row.rounds[0]) > 1 else ()
    phases = (f"{x} {three_digits(scale * statistics.median(cost[x] for cost in row.rounds))}" for x in names)
    cost = with_spread([scale * total for total in row.totals()], f" {row.unit}")
    ratio = "1" if set(row.ratios) == {1.0} else with_spread(row.ratios)
    return [row.setting, row.variant, cost, ratio, "; ".join(filter(None, [", ".join(phases), row.note]))]


def goal_cells(goal, bounds):
    """A goal's cells in the table of goals, without part, commit and machine."""
    outcome = goal.outcome()
    bound = bounds.get(goal.bound, goal.bound) if outcome == "no" else ""
    sign = "at least" if goal.at_least else "at most"
    return [goal.text, f"{sign} {goal.wanted:g}", with_spread(goal.values), outcome, bound]


def part_lines(name, record):
    """A part's section of the report."""
    about = f"Commit {record['commit'] or 'unknown'}; {record['machine']}; torch {record['torch']}, transformers "
    about += f"{record['transformers']}; {record['date']}; weights {record['weights']}, data {record['data']}."
    lines = [f"## {name}", "", record["about"], "", f"`{record['command']}`", "", about, ""]
    if record["rows"]:
        lines += [*markdown(ROW_COLUMNS, [row_cells(Row(**row)) for row in record["rows"]]), ""]
    return lines + [line for note in record["notes"] for line in (note, "")]


def report_lines(records):
    """The report on {part: record}: the table of goals, then the parts."""
    bounds = records.get("profile", {}).get("bounds", {})
    goals = [
        [*goal_cells(Goal(**goal), bounds), name, record["commit"], record["machine"]]
        for name, record in records.items()
        for goal in record["goals"]
    ]
    lines = ["# Speed beside transformers", "", EXPLANATION, *markdown(GOAL_COLUMNS, goals), ""]
    return lines + [line for name, record in records.items() for line in part_lines(name, record)]


def write_report(path, records, order):
    """Write PATH.json and PATH.md, parts in `order`; a part without a new record keeps its old one."""
    old = path.with_suffix(".json")
    if old.is_file():
        records = json.loads(old.read_text()) | records
    records = {name: records[name] for name in order if name in records}
    write_whole(old, json.dumps(records, indent=1) + "\n")
    write_whole(path.with_suffix(".md"), "\n".join(report_lines(records)).rstrip() + "\n")
