"""The benchmark's clocks, its arithmetic of ratios and goals, and its report; nothing here depends on BERT.

A variant is a function that does some work once and returns {phase: cost}. The variants of a comparison take turns
(A B, B A, A B, ...), so that a slow minute of the machine hits all of them. Ours comes first: it is the baseline.

    Row            one variant's costs, round by round, beside the baseline's costs of the same rounds
    Goal           a number that was aimed at, with the measured values; their median decides
    Measurements   what one part of the benchmark returns: rows, goals and sentences about them
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
    """Wait until the device has finished its queue."""
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
        """End a phase now."""
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
    """Make a variant that calls {phase: function} in turn, each with the result of the function before it.

    `prepare()`, if there is one, runs first and is not timed.
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
    """Time the functions {phase: (owner, name)} while this context is open. Yields {phase: seconds}.

    A function that runs inside another one of them counts to the outer one's phase.
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
    """Run a function. Returns {"start": MiB before it, "added": MiB of the peak above start, "seconds": duration}."""
    torch.set_num_threads(threads)
    before, started = memory_mib(device, peak=False), time.perf_counter()
    call()
    return {"start": before, "added": memory_mib(device) - before, "seconds": time.perf_counter() - started}


def in_fresh_process(device, call):
    """Run measure_memory in a process of its own, with as many threads as this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure_memory, device, torch.get_num_threads(), call).result()


# --- ratios and goals ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The costs of one variant beside the baseline's.

    `rounds` holds {phase: cost} per round. `amount`, if not 0, is the number of things done for that cost (examples,
    sentences), and the table shows a rate. `flop` is {label: (operations, phases in which they run)}; `peak` is the
    machine's rate of operations.
    Units: costs are seconds or MiB; `unit` is the table's (ms, s, MiB, or things per second).
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
        """One number per round, in the table's unit."""
        scale = {"ms": 1e3}.get(self.unit, 1.0)
        totals = [sum(phases.values()) for phases in self.rounds]
        return [self.amount / total if self.amount else scale * total for total in totals]

    def ratios(self, *phases):
        """Cost over the baseline's cost of the same round, of some phases or of all: above 1 the baseline is ahead."""
        pairs = zip(self.rounds, self.baseline, strict=True)
        return [sum(mine[p] for p in phases or mine) / sum(base[p] for p in phases or base) for mine, base in pairs]

    def gains(self):
        """How many times as fast as the baseline the variant is, per round."""
        return [1 / ratio for ratio in self.ratios()]

    def shares(self):
        """{label: share of the matrix peak that the variant reaches, per round}."""
        return {
            label: [operations / sum(phases[name] for name in names) / self.peak for phases in self.rounds]
            for label, (operations, names) in self.flop.items()
        }

    def phases(self):
        """{phase: median cost}."""
        return {name: statistics.median(phases[name] for phases in self.rounds) for name in self.rounds[0]}

    def record(self):
        """The row as plain data: all that the report's table needs."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("baseline", "flop", "peak")}
        return kept | {"values": self.values(), "ratios": self.ratios(), "peak_shares": self.shares()}


def compare(setting, unit, measured, **details):
    """Make a Row of every variant in {variant: rounds}; the first variant is the baseline of all of them."""
    baseline = next(iter(measured.values()))
    return [Row(setting, variant, unit, rounds, baseline, **details) for variant, rounds in measured.items()]


def measure(setting, unit, variants, rounds, **details):
    """Let variants take turns and make their Rows. With several rounds, each variant runs once before, to warm up."""
    for variant in variants.values() if rounds > 1 else ():
        variant()
    return compare(setting, unit, alternate(variants, rounds, setting), **details)


@dataclass(frozen=True)
class Goal:
    """A number that was aimed at and the measured values, one per round; the median decides."""

    text: str
    limit: float
    values: list
    at_least: bool = True

    def line(self):
        """The goal, the measurement, and whether the goal is reached."""
        median, bound = statistics.median(self.values), "at least" if self.at_least else "at most"
        reached = median >= self.limit if self.at_least else median <= self.limit
        outcome = f"{'reached' if reached else 'missed'} by {abs(median / self.limit - 1):.0%}"
        return f"{self.text}: goal {bound} {self.limit:,g}, measured {with_spread(self.values)}: {outcome}"


def goals_against(rows, limits):
    """Make goals from {variant: limit}: in every setting the variant costs at least `limit` times as much as ours."""
    return [
        Goal(f"{row.setting}: cost of {row.variant} / cost of ours", limits[row.variant], row.ratios())
        for row in rows
        if row.variant in limits
    ]


@dataclass
class Measurements:
    """What one part of the benchmark returns: rows of its table, goals, and sentences about both."""

    rows: list
    goals: list = field(default_factory=list)
    notes: list = field(default_factory=list)


# --- the report ---------------------------------------------------------------------------------------------------

# the columns' names; explained at the top of the report
COLUMNS = ("setting", "variant", "median (low - high)", "cost / ours (low - high)", "of matrix peak", "phases")
EXPLANATION = """\
Every variant takes its turn in every round (A B, B A, ...); a cell shows the median of the rounds, then the lowest and
the highest. `cost / ours` is the variant's cost divided by ours in the same round: above 1, ours is ahead. `of matrix
peak` is the share of the machine's best rate of matrix products; only operations on real tokens count, padding does
not. A setting names the precision, then rows x tokens of a batch and the share of its tokens that are no padding.
lab/benchmark.py defines the parts and the goals, lab/peer.py the two settings of transformers, plain and best.
"""


def three_digits(value):
    """A number with about three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_spread(values, suffix=""):
    """Median (lowest - highest)."""
    middle, low, high = map(three_digits, (statistics.median(values), min(values), max(values)))
    return f"{middle}{suffix} ({low} - {high})"


def cells(row):
    """A line of the table from Row.record()."""
    ratio = "1" if set(row["ratios"]) == {1.0} else with_spread(row["ratios"])
    shares = ", ".join(f"{label} {statistics.median(share):.0%}" for label, share in row["peak_shares"].items())
    scale = 1e3 if row["unit"] == "ms" else 1.0
    names = row["rounds"][0] if len(row["rounds"][0]) > 1 else ()
    costs = {name: scale * statistics.median(phases[name] for phases in row["rounds"]) for name in names}
    details = filter(None, [", ".join(f"{name} {three_digits(cost)}" for name, cost in costs.items()), row["note"]])
    value = with_spread(row["values"], f" {row['unit']}")
    return [row["setting"], row["variant"], value, ratio, shares, "; ".join(details)]


def table(records):
    """Lines of a Markdown table of rows' records, its columns aligned."""
    content = [COLUMNS, *map(cells, records)]
    widths = [max(map(len, column)) for column in zip(*content, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in content]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def report_lines(title, record):
    """A part's section of the report, from its record in the JSON file."""
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in record["matrix_peak"].items())
    about = f"commit {record['commit'] or 'unknown'}, {record['device']}, {record['threads']} threads, torch "
    about += f"{record['torch']}, transformers {record['transformers']}, {record['started'][:10]}, "
    about += f"{record['seconds'] / 60:.1f} min; matrix peak in GFLOP/s: {peaks}"
    lines = [f"## {title}", "", record["about"], "", f"`{record['command']}`", "", f"({about})", ""]
    lines += [*table(record["rows"]), ""] if record["rows"] else []
    lines += [*(f"- {goal}" for goal in record["goals"]), ""] if record["goals"] else []
    return lines + [line for note in record["notes"] for line in (note, "")]


def goal_lines(records):
    """The goals of all parts in a file of their own, each with its measurement."""
    lines = ["# Speed: which goals are reached?", ""]
    for name, record in records.items():
        lines += [f"- {name}: {goal}" for goal in record["goals"]]
    about = sorted({record["device"] for record in records.values()})
    commits = sorted({record["commit"] for record in records.values()})
    lines += ["", f"Median (lowest - highest) of the rounds. Device {', '.join(about)}; commits {', '.join(commits)}."]
    return lines


def write_report(path, records, order):
    """Write PATH.json, PATH.md and PATH-goals.md, parts in `order`; a part without a new record keeps its old one."""
    old = path.with_suffix(".json")
    if old.is_file():
        records = json.loads(old.read_text()) | records
    records = {name: records[name] for name in order if name in records}
    write_whole(old, json.dumps(records, indent=1) + "\n")
    lines = ["# Speed: how fast is each part beside transformers and torch.optim?", "", EXPLANATION]
    for name, record in records.items():
        lines += report_lines(name, record)
    write_whole(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
    write_whole(path.with_name(f"{path.name}-goals.md"), "\n".join(goal_lines(records)) + "\n")
