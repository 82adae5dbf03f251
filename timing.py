"""The clocks, ratios, goals and report files of benchmark.py: nothing here knows BERT. Read first: nothing.

A variant is a function that does its work once and returns {phase: cost}. Variants take turns (A B, B A, A B, ...);
a Row holds one variant's costs, round by round, beside those of the baseline, which is the first one and ours; a Goal
is a number that was aimed at, with what was measured. `Found` is what a part of the benchmark gives back.
"""

import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from multiprocessing import get_context
from unittest.mock import patch

import torch
from tqdm import tqdm

from files import write_whole
from runs import memory_mib

MIB = 2**20


# --- clocks -------------------------------------------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Seconds between marks. On CUDA the marks are events, so that measuring does not make the host wait."""

    def __init__(self, device):
        self.device, self.marks = device, []
        synchronize(device)
        self.mark("")

    def mark(self, phase):
        """End a phase here."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            synchronize(self.device)
            now = time.perf_counter()
        self.marks.append((phase, now))

    def phases(self, repeats=1):
        """{phase: seconds}, divided by the number of repeats."""
        synchronize(self.device)
        seconds = {}
        for (_, before), (phase, now) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(now) / 1e3 if self.device.type == "cuda" else now - before
            seconds[phase] = seconds.get(phase, 0.0) + passed / repeats
        return seconds


def timed(device, phases, repeats=1, prepare=None):
    """A variant that calls {phase: function} in turn, each with what the one before it returned.

    `prepare()`, where given, comes first and is not timed.
    """

    def variant():
        if prepare:
            prepare()
        watch = Stopwatch(device)
        for _ in range(repeats):
            result = None
            for name, call in phases.items():
                result = call(result)
                watch.mark(name)
        return watch.phases(repeats)

    return variant


def alternate(variants, rounds, label):
    """Call every variant once per round, forwards and backwards in turn. Returns {variant: its results}."""
    results, names = {name: [] for name in variants}, list(variants)
    for k in tqdm(range(rounds), label, disable=None, leave=False):
        for name in names if k % 2 == 0 else names[::-1]:
            results[name].append(variants[name]())
    return results


@contextmanager
def profiled(device, functions):
    """While this is open, functions {phase: (owner, name)} are timed. Yields {phase: seconds}.

    A function inside another one of them counts to the outer one.
    """
    seconds, running = dict.fromkeys(functions, 0.0), []

    def wrap(phase, original):
        @wraps(original)
        def measured(*args, **kw):
            if running:
                return original(*args, **kw)
            running.append(phase)
            watch = Stopwatch(device)
            try:
                return original(*args, **kw)
            finally:
                watch.mark(phase)
                seconds[phase] += watch.phases()[phase]
                running.clear()

        return measured

    with ExitStack() as stack:
        for phase, (owner, name) in functions.items():
            stack.enter_context(patch.object(owner, name, wrap(phase, getattr(owner, name))))
        yield seconds


def measure_matrix_peak(device, dtype, sizes, repeats=5):
    """Best rate of a square matrix product. Units: floating-point operations per second."""
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        product = timed(device, {"product": lambda _, a=a, b=b: a @ b})
        product()
        best = max(best, *(2 * n**3 / product()["product"] for _ in range(repeats)))
    return best


# --- memory -------------------------------------------------------------------------------------------------------


def measure_memory(device, threads, call):
    """Run a call. Returns {"start": MiB before it, "added": MiB of the peak above that, "seconds": what it took}."""
    torch.set_num_threads(threads)
    before, started = memory_mib(device, peak=False), time.perf_counter()
    call()
    return {"start": before, "added": memory_mib(device) - before, "seconds": time.perf_counter() - started}


def in_fresh_process(device, call):
    """measure_memory in a process of its own, with as many threads as this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure_memory, device, torch.get_num_threads(), call).result()


# --- ratios and goals ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The costs of one variant, with a baseline's to compare them with.

    `rounds` holds {phase: cost} per round; `amount`, where set, is what was got for the cost; `flop` is
    {label: (operations, phases they are compared with)}, `peak` the rate they are compared with.
    Units: costs are seconds or MiB; `unit` is what the table shows (ms, s, MiB, or something per second).
    """

    setting: str
    variant: str
    unit: str
    rounds: list
    baseline: list
    amount: float = 0.0
    flop: dict = field(default_factory=dict)
    peak: float = 0.0
    note: str = ""

    def values(self):
        """The rounds' results in the table's unit."""
        scale = {"ms": 1e3}.get(self.unit, 1.0)
        totals = [sum(phases.values()) for phases in self.rounds]
        return [self.amount / total if self.amount else scale * total for total in totals]

    def ratios(self, *phases):
        """Cost (of the given phases, or all) over the baseline's in the same round: above 1 the baseline is ahead."""
        pairs = zip(self.rounds, self.baseline, strict=True)
        return [sum(mine[p] for p in phases or mine) / sum(base[p] for p in phases or base) for mine, base in pairs]

    def gains(self):
        """How many times as fast as the baseline."""
        return [1 / ratio for ratio in self.ratios()]

    def shares(self):
        """{label: share of the matrix peak that was reached, per round}."""
        return {
            label: [operations / sum(phases[name] for name in names) / self.peak for phases in self.rounds]
            for label, (operations, names) in self.flop.items()
        }

    def phases(self):
        """{phase: median cost}."""
        return {name: statistics.median(phases[name] for phases in self.rounds) for name in self.rounds[0]}

    def record(self):
        """The row as plain data."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("baseline", "flop", "peak")}
        return kept | {"values": self.values(), "ratios": self.ratios(), "peak_shares": self.shares()}


def compare(setting, unit, measured, **details):
    """Rows of the variants of one setting; the first is the baseline of all. `measured`: {variant: rounds}."""
    baseline = next(iter(measured.values()))
    return [Row(setting, variant, unit, rounds, baseline, **details) for variant, rounds in measured.items()]


def measure(setting, unit, variants, rounds, **details):
    """Rows of variants that take turns; where there are several rounds, they are called once before, to warm up."""
    for variant in variants.values() if rounds > 1 else ():
        variant()
    return compare(setting, unit, alternate(variants, rounds, setting), **details)


@dataclass(frozen=True)
class Goal:
    """A number that was aimed at, and what was measured, round by round; the median decides."""

    text: str
    limit: float
    values: list
    at_least: bool = True
    unit: str = ""

    def line(self):
        """Whether the goal is reached, and by how much."""
        median, bound = statistics.median(self.values), "at least" if self.at_least else "at most"
        reached = median >= self.limit if self.at_least else median <= self.limit
        told = f"goal: {self.text} {bound} {self.limit:,g}{self.unit}: {with_spread(self.values, self.unit)}"
        return f"{told}; reached: {'yes' if reached else 'no'}, by {abs(median / self.limit - 1):.0%}"


def goals_against(rows, limits):
    """Goals {variant: limit}: its cost is at least that many times ours, in every setting."""
    return [
        Goal(f"{row.setting}: cost of {row.variant} / ours", limits[row.variant], row.ratios())
        for row in rows
        if row.variant in limits
    ]


@dataclass
class Found:
    """What a part of the benchmark found: rows of its table, goals, and paragraphs about it."""

    rows: list
    goals: list = field(default_factory=list)
    notes: list = field(default_factory=list)


# --- the report ---------------------------------------------------------------------------------------------------


def three_digits(value):
    """A number with about three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_spread(values, suffix=""):
    """Median (lowest - highest)."""
    middle, low, high = map(three_digits, (statistics.median(values), min(values), max(values)))
    return f"{middle}{suffix} ({low} - {high})"


def table(rows):
    """Lines of a Markdown table of rows, its columns aligned."""
    cells = [["setting", "variant", "median (low - high)", "cost / ours (low - high)", "of matrix peak", "of which"]]
    for row in rows:
        ratio = "1" if row.rounds is row.baseline else with_spread(row.ratios())
        shares = ", ".join(f"{label} {statistics.median(share):.0%}" for label, share in row.shares().items())
        phases = row.phases() if len(row.rounds[0]) > 1 else {}
        scale = {"ms": 1e3}.get(row.unit, 1.0)
        parts = ", ".join(f"{name} {three_digits(scale * cost)}" for name, cost in phases.items())
        detail = "; ".join(filter(None, [parts, row.note]))
        cells.append([row.setting, row.variant, with_spread(row.values(), f" {row.unit}"), ratio, shares, detail])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def report_lines(title, told):
    """A part's section of the report; `told` is what its record in the JSON file holds."""
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in told["matrix_peak"].items())
    about = f"commit {told['commit'] or 'unknown'}, {told['device']}, {told['threads']} threads, torch {told['torch']}"
    about += f", transformers {told['transformers']}, {told['started'][:10]}, {told['seconds'] / 60:.1f} min"
    lines = [f"## {title}", "", told["about"], "", f"`{told['command']}`", ""]
    lines += [f"({about}; matrix peak in GFLOP/s: {peaks})", ""]
    lines += [*told["table"], ""] if told["table"] else []
    lines += [*(f"- {goal}" for goal in told["goals"]), ""] if told["goals"] else []
    return lines + [line for note in told["notes"] for line in (note, "")]


def write_report(path, records, order):
    """Write PATH.json and PATH.md, parts in `order`; parts that were not run now stay as they are."""
    old = path.with_suffix(".json")
    if old.is_file():
        records = json.loads(old.read_text()) | records
    records = {name: records[name] for name in order if name in records}
    write_whole(old, json.dumps(records, indent=1) + "\n")
    lines = ["# Ours beside transformers", ""]
    lines += ["Cost / ours: above 1, ours is ahead. The variants are explained in benchmark.py and peer.py.", ""]
    for name, told in records.items():
        lines += report_lines(name, told)
    write_whole(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
