"""How fast our program is, beside the same training with transformers.

    python -m lab.benchmark                           every part
    python -m lab.benchmark run profile               two parts; the other parts keep their numbers in the report
    python -m lab.benchmark gpu                       on a CUDA GPU, into a report of its own

    run         both programs from start to finish, each in a process of its own, on a third of an epoch: time, memory
    evaluate    an evaluation of the dev rows, at full depth and with exits
    startup     seconds until the first training step has been taken
    growth      cost against the number of examples and against the tokens of an example
    profile     the operations of a training step and of an evaluation, and the shapes of the batches
    gpu         bert-base with random weights on a GPU; without a GPU, counts of operations

Each function `benchmark_NAME` below is one part and returns Measurements: rows of a table, goals and notes.
workloads.py makes the examples and starts both programs, peer.py is the program with transformers, timing.py has the
clock, the ratios and the report. A short run misleads, because the first batch of each shape costs more than the later
ones. Therefore the goals of training are measured on a third of an epoch.
"""

import argparse
import random
import statistics
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

# first: it prints what to do if torch is not installed
import multitask_classifier  # isort: skip  # noqa: F401
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from base_bert import BertConfig
from building import computes_bf16, keep_freed_memory
from datasets import SAMPLE, SPLITS, find_data_dir
from errors import InputError, run_script
from lab.peer import import_transformers, mixed_steps
from lab.tables import markdown
from lab.timing import (
    MIB,
    Goal,
    Measurements,
    compare,
    count_operations,
    machine,
    matrix_peak,
    measure,
    profile,
    report_lines,
    take_turns,
    three_digits,
    timed,
    write_report,
)
from lab.workloads import (
    BATCH,
    HERE,
    NEVER,
    PROGRAMS,
    QUICK,
    SEED,
    STAYING,
    TRAININGS,
    Setup,
    Sizes,
    evaluation_variants,
    launch,
    our_parts,
    our_steps,
    our_training,
    peer_training,
    read_ours,
    read_peer,
    run_program,
    run_to_first_step,
    step_trainings,
    write_random_weights,
    write_share,
)
from methods import positive_int
from runs import describe_environment
from tasks import build_tasks
from weights import find_weights

PRECISIONS = ("bf16", "fp32")
# wanted: cost of transformers / cost of ours
FASTER = {"bf16": 1.2, "fp32": 1.15}
EXITS = "{}: gain in time / gain in layers by exits, the lowest"
# keys of the profile's sentences about missed goals
TRAINING, EVALUATION = "see the part profile (training)", "see the part profile (evaluation)"

# --- on the CPU ---------------------------------------------------------------------------------------------------


def benchmark_run(setup, folder):
    """Both programs from start to finish: reading, training, evaluating, saving; seconds and peak memory."""
    train, dev = write_share(setup, folder, setup.sizes.run)
    result, model = Measurements(), BertConfig.from_json(setup.weights / "config.json")
    for precision in setup.precisions:
        peaks = {name: [] for name in PROGRAMS}
        variants = {name: partial(run_program, setup, name, folder, precision, peaks[name]) for name in PROGRAMS}
        setting = f"{precision}, {train:,} training and {dev:,} dev examples, batch {BATCH}"
        seconds = compare(setting, "s", take_turns(variants, setup.sizes.rounds, setting))
        memory = compare(f"{precision}, peak memory", "MiB", peaks)
        result.rows += seconds + memory
        text = f"{precision}: seconds of transformers / ours, from start to finish"
        result.goals.append(Goal(text, FASTER[precision], seconds[1].ratios, bound=TRAINING))
        text, bound = f"{precision}: peak memory of transformers / ours", memory_bound(model)
        result.goals.append(Goal(text, 1.0, memory[1].ratios, bound=bound))
    return result


def memory_bound(config):
    """A sentence on the memory that training cannot do without."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in multitask_classifier.BertModel(config).parameters())
    return f"weights, gradients and AdamW's two moments take {16 * parameters / MIB:,.0f} MiB in both programs"


def benchmark_evaluate(setup, folder):
    """An evaluation of the dev rows that are in memory: ours, transformers, and ours with exits.

    The exits are untrained. The program computes their certainties, but rows leave at random, so that any mean number
    of layers can be measured.
    """
    _, dev = write_share(setup, folder, setup.sizes.evaluated)
    result = Measurements()
    for precision in setup.precisions:
        rows, goal = measure_evaluation(setup, folder, precision, f"{precision}, {dev:,} dev examples")
        text = f"{precision}: evaluation, seconds of transformers / ours"
        result.goals += [Goal(text, 1.15, rows[1].ratios, bound=EVALUATION), goal]
        result.rows += rows
    return result


def measure_evaluation(setup, folder, precision, setting):
    """Rows of an evaluation, and the goal of its exits: the gain in time against the gain in layers."""
    calls, layers = evaluation_variants(setup, folder, precision)
    variants = {name: timed(setup.device, call) for name, call in calls.items()}
    rows = measure(setting, "s", variants, setup.sizes.rounds)
    depth, kept = layers["ours"], {}
    for row in rows:
        if row.variant in layers:
            row.note = f"{layers[row.variant]:.2f} of {depth:.0f} layers"
        if layers.get(row.variant, depth) < depth:
            kept[row.variant] = [layers[row.variant] / depth / ratio for ratio in row.ratios]
    never = next(row for row in rows if row.variant == NEVER)
    bound = f"exits that no row leaves at take {statistics.median(never.ratios):.2f} times full depth"
    worst = min(kept.values(), key=statistics.median)
    return rows, Goal(EXITS.format(precision), 0.85, worst, bound=bound)


def benchmark_startup(setup, folder):
    """Seconds from the command to the end of the first training step, on all of the data."""
    precision, result = setup.precisions[0], Measurements()
    write_share(setup, folder, setup.sizes.evaluated)
    variants = {name: partial(run_to_first_step, setup, name, folder, precision) for name in PROGRAMS}
    variants["import torch"] = lambda: {"": launch("-c", "import torch")}
    result.rows += measure(f"{precision}, to the first step", "s", variants, setup.sizes.rounds)
    text = "seconds of transformers / ours to the first step"
    result.goals.append(Goal(text, 1.0, result.rows[1].ratios, bound="see the row import torch"))
    return result


def benchmark_growth(setup, folder):
    """Cost against the number of examples (runs, once each) and against the tokens of an example (a training step)."""
    precision, sizes, rows = setup.precisions[0], setup.sizes, []
    for share in sizes.growth:
        count, _ = write_share(setup, folder / f"{share}", share)
        variants = {name: partial(run_program, setup, name, folder / f"{share}", precision, []) for name in PROGRAMS}
        measured = take_turns(variants, 1, f"{count} examples")
        measured = {name: [{"train": costs["train"]} for costs in rounds] for name, rounds in measured.items()}
        rows += compare(f"{precision}, training on {count:,} examples", "s", measured)
        for row in rows[-len(PROGRAMS) :]:
            row.note = f"{1e3 * row.totals()[0] / count:.3g} ms an example"
    for s in sizes.lengths:
        trainings = step_trainings(setup, folder / f"{s}", precision, BATCH, s)
        variants = {name: timed(setup.device, call, sizes.repeats) for name, call in trainings.items()}
        rows += measure(f"{precision}, a step of {BATCH} x {s} tokens", "ms", variants, sizes.rounds)
    return Measurements(rows)


def benchmark_profile(setup, folder):
    """Milliseconds and calls of each operation, in real training steps and in an evaluation; shapes of the batches."""
    precision, n = setup.precisions[0], setup.sizes.profiled
    write_share(setup, folder, setup.sizes.run)
    data, theirs = read_ours(setup, folder), read_peer(setup, folder, "train")
    parts, rows = our_parts(setup, precision, data), {name: range(len(part.labels)) for name, part in theirs.items()}
    steps = {"ours": our_steps(parts), "transformers": mixed_steps(theirs, rows, BATCH, True, random.Random(SEED))}
    trainings = {"ours": our_training(parts), "transformers": peer_training(setup, precision, theirs)}
    operations = {}
    for name, train in trainings.items():
        train(steps[name][:n])
        last = steps[name][-n:]
        operations[name] = profile(setup.device, partial(train, last), len(last))
    shapes = {
        "ours": [data[name]["train"].batch(rows).segments[0][0].shape for name, rows in steps["ours"]],
        "transformers": [theirs[name].collate(rows)[0]["input_ids"].shape for name, rows in steps["transformers"]],
    }
    notes = [f"A training step ({precision}, the profiler's own cost included):", operation_table(operations)]
    notes += [shape_sentence(name, of_program) for name, of_program in shapes.items()]
    bounds = {TRAINING: headline(operations["ours"])}
    calls, _ = evaluation_variants(setup, folder, precision)
    for name in operations:
        calls[name]()
        operations[name] = profile(setup.device, calls[name])
    notes += [f"An evaluation at full depth ({precision}):", operation_table(operations)]
    return Measurements(notes=notes, bounds=bounds | {EVALUATION: headline(operations["ours"])})


def operation_table(operations, count=15):
    """A table of the most expensive operations of both programs, from {program: {operation: (ms, calls)}}."""
    totals = {name: tuple(map(sum, zip(*table.values(), strict=True))) for name, table in operations.items()}
    keys = {key for table in operations.values() for key in table}
    most = sorted(keys, key=lambda key: -max(table.get(key, (0, 0))[0] for table in operations.values()))
    lines = [[key, *(table.get(key, (0, 0)) for table in operations.values())] for key in most[:count]]
    lines = [["all", *totals.values()], *lines]
    head = ["operation", *(f"{name}: {x}" for name in operations for x in ("ms", "calls"))]
    return "\n".join(
        markdown(head, [[key, *(three_digits(x) for pair in pairs for x in pair)] for key, *pairs in lines])
    )


def headline(table, count=5):
    """The most expensive operations of {operation: (ms, calls)} with their shares of the time, in one line."""
    total = sum(ms for ms, _ in table.values())
    most = sorted(table.items(), key=lambda item: -item[1][0])[:count]
    return "operations: " + ", ".join(f"{key.removeprefix('aten::')} {ms / total:.0%}" for key, (ms, _) in most)


def shape_sentence(name, shapes):
    """How many different shapes a program's batches have, and their tokens, with padding."""
    tokens = np.mean([b * s for b, s in shapes])
    return f"{name}: {len(shapes):,} batches of {len(set(shapes))} different shapes, {tokens:.0f} tokens a batch."


# --- on a GPU -----------------------------------------------------------------------------------------------------

COMMAND = ("multitask_classifier.py", "--option", "finetune", "--use_gpu", "--slf", "--early_exit")
# bert-base's 12 layers with a small hidden size: the number of operations does not depend on it
NARROW = dict(hidden_size=48, intermediate_size=96)


def benchmark_gpu(setup, folder):
    """bert-base with random weights in bf16: training steps, exits, kernel launches; the main command, timed."""
    measured, seconds, on_gpu = torch.cuda.is_available(), [], setup
    if measured:
        # without --data_dir the sample has its own defaults, as for a user
        data = [] if setup.data_dir == SAMPLE.resolve() else ["--data_dir", setup.data_dir]
        words = [*COMMAND, *data, "--weights", setup.weights, "--run_dir", folder / "run"]
        seconds.append({"": launch(*words)})
        weights = write_random_weights(folder / "bert-base", setup.weights / "vocab.txt")
        on_gpu = replace(setup, weights=weights, device=torch.device("cuda"))
    result = measure_gpu(on_gpu, folder, measured)
    result.rows += compare(f"`{' '.join(COMMAND)}`", "s", {"ours": seconds})
    result.notes.append(count_step(setup, folder))
    return result


def gpu_name():
    """Name of the GPU for the report."""
    return machine(torch.device("cuda")) if torch.cuda.is_available() else "no GPU"


def measure_gpu(setup, folder, measured):
    """The rows and goals of the part gpu; without `measured` their values are missing."""
    result, peak = Measurements(), matrix_peak(setup.device, torch.bfloat16) if measured else 1.0
    for (b, s), wanted in setup.sizes.gpu_steps:
        setting = f"bert-base, bf16, {b} x {s} tokens"
        if measured:
            rows, shares = gpu_steps(setup, folder / f"{b} x {s}", setting, (b, s), peak)
        else:
            rows, shares = compare(setting, "ms", dict.fromkeys(TRAININGS, [])), []
        result.rows += rows
        if b > BATCH:
            result.goals.append(Goal(f"{setting}: share of the matrix peak", 0.45, shares))
        # like with like: transformers has the fused attention kernel, so ours has it too
        [ours] = [row for row in rows if row.variant == "ours, sdpa"]
        for row in rows:
            if row.variant.startswith("transformers"):
                ratios = [theirs / our for theirs, our in zip(row.totals(), ours.totals(), strict=True)]
                result.goals.append(Goal(f"{setting}: cost of {row.variant} / {ours.variant}", wanted, ratios))
    setting, exits = "bert-base, bf16, an evaluation of the dev rows", Goal(EXITS.format("bf16"), 0.85, [])
    if measured:
        write_share(setup, folder, setup.sizes.evaluated)
        rows, exits = measure_evaluation(setup, folder, "bf16", setting)
    else:
        rows = compare(setting, "s", dict.fromkeys(["ours", *STAYING], []))
    result.rows += rows
    [few_leave] = [row for row in rows if row.variant == next(iter(STAYING))]
    text = f"bf16: seconds at full depth / if {few_leave.variant.removeprefix('ours, ')}"
    result.goals += [exits, Goal(text, 1.0, [1 / ratio for ratio in few_leave.ratios])]
    return result


def gpu_steps(setup, folder, setting, shape, peak):
    """Rows of a training step on a batch of a shape, and our share of the matrix peak in each round."""
    trainings = step_trainings(setup, folder, "bf16", *shape, TRAININGS)
    variants = {name: timed(setup.device, call, setup.sizes.repeats) for name, call in trainings.items()}
    rows = measure(setting, "ms", variants, setup.sizes.rounds)
    with FlopCounterMode(display=False) as counter:
        trainings["ours"]()
    for row in rows:
        operations = profile(setup.device, trainings[row.variant])
        launches = sum(calls for key, (_, calls) in operations.items() if "LaunchKernel" in key)
        row.note = f"{launches:.0f} kernel launches; {headline(operations)}"
    return rows, [counter.get_total_flops() / total / peak for total in rows[0].totals()]


def count_step(setup, folder):
    """A table: the operations of a training step, ours on the meta device, where reading a number fails."""
    weights = write_random_weights(folder / "narrow", setup.weights / "vocab.txt", **NARROW)
    setup, counts = replace(setup, weights=weights), {}
    for name, device in (("ours", "meta"), ("transformers", "cpu")):
        at = replace(setup, device=torch.device(device))
        train = step_trainings(at, folder / "sentences", "fp32", BATCH, 32, (name,))[name]
        train()  # the first step also makes the optimiser's state
        counts[name] = count_operations(train)
    lines = []
    for name, count in counts.items():
        most = ", ".join(f"{key.split('.')[1]} {calls}" for key, calls in count.most_common(8))
        lines.append([name, f"{count.total()}", f"{count['aten._local_scalar_dense.default']}", most])
    head = (f"a step of 12 layers, {BATCH} x 32 tokens, fp32", "operations", "reads of a number", "most frequent")
    note = (
        "Operations that compute or copy. On a GPU each starts one kernel or a few, and a step that reads a number "
        "waits until the GPU has computed it. transformers was counted on a CPU, where its attention is several "
        "operations; on a GPU it is one kernel a layer and direction. Dropout is four of our operations here, one on a "
        "GPU. bf16 adds about 480 casts to a step of ours."
    )
    return "\n".join([note, "", *markdown(head, lines)])


# {name: function}, in the order of this file
PARTS = {name.removeprefix("benchmark_"): part for name, part in globals().items() if name.startswith("benchmark_")}


# --- the program --------------------------------------------------------------------------------------------------


def run_part(name, setup):
    """Measure one part and print its report. Returns its record."""
    torch.manual_seed(SEED)
    environment = describe_environment(setup.device)
    with tempfile.TemporaryDirectory() as folder:
        measurements = PARTS[name](setup, Path(folder))
    about = {
        "about": PARTS[name].__doc__.split("\n")[0],
        "command": f"python -m lab.benchmark {name} --rounds {setup.sizes.rounds}",
        "commit": environment["commit"],
        "torch": environment["torch"],
        "transformers": import_transformers().__version__,
        "date": environment["started"][:10],
        "machine": machine(setup.device) if name != "gpu" else gpu_name(),
        "weights": setup.weights.name,
        "data": setup.data_dir.name,
    }
    record = about | asdict(measurements)
    print("\n".join(report_lines({name: record})), flush=True)
    return record


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmark",
        description="Measure our program beside the same training with transformers.",
        epilog="Use a quiet machine. Parts that are not named keep their old numbers in the report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; none named: all of them")
    parser.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample")
    parser.add_argument("--weights", default="minilm", help="a name or a folder")
    text = "default both, or fp32 on a CPU without bf16; with --quick the first of them"
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help=text)
    parser.add_argument("--rounds", type=positive_int, help="turns of every variant; default 3, with --quick 1")
    parser.add_argument(
        "--quick", action="store_true", help="few examples, to see that every part works; not for timing"
    )
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the reports")
    return parser


def main(argv=None):
    """Run the parts and write the reports."""
    args = make_parser().parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"{name}: no such part; choose from {', '.join(PARTS)}")
    import_transformers()
    keep_freed_memory()
    folder, _ = find_data_dir(args.data_dir, [task.file(split) for task in build_tasks().values() for split in SPLITS])
    sizes = QUICK if args.quick else Sizes()
    device = torch.device("cpu")
    precisions = [name for name in PRECISIONS if name != "bf16" or computes_bf16(device)]
    precisions = tuple(args.precision or precisions[: 1 if args.quick else None])
    # absolute paths, because some parts start processes in the repository's folder
    weights, data = find_weights(args.weights).resolve(), Path(folder).resolve()
    setup = Setup(weights, data, device, precisions, replace(sizes, rounds=args.rounds or sizes.rounds))
    for part in args.parts or PARTS:
        name = f"benchmark-{'gpu' if part == 'gpu' else 'cpu'}{'-quick' if args.quick else ''}"
        write_report(Path(args.results) / name, {part: run_part(part, setup)}, PARTS)
        print(f"report: {Path(args.results) / name}.md")


if __name__ == "__main__":
    run_script(main)
