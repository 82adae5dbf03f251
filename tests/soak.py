"""Kill runs at random moments, resume them, and compare what they leave with runs that were never stopped.

    python tests/soak.py                     8 kills in each of the 5 settings
    python tests/soak.py --kills 20 --seed 3

A run of the tiny model starts in a process of its own. After a random time within its length the process gets SIGKILL,
and the next one resumes. The same directory goes on until the run is complete; then the next run of the setting starts.
Each complete run must have the weights, optimiser, generator states, scores and predictions of the uninterrupted one,
bit for bit. Prints a line for each setting; ends with status 1 at the first difference.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# as a program: Python puts only this folder on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from driver import main as train
from tiny import Program, become_process, log_of, state_of

from errors import run_script

SETTINGS = {
    "plain": "--epochs 3",
    "SLF, exits": "--slf --slf_epochs 0.5 --smart_alternating --early_exit",
    "SMART, Bregman, PCGrad": "--smart --bregman --gradients pcgrad",
    "adapter, unfreezing, decay": "--adapter houlsby --train_backbone --gradual_unfreezing 0.5 --layer_decay 0.8",
    "pretrain, accumulated": "--option pretrain --accumulate 2 --epochs 4",
}
# a saved state every few steps, kept at the end
OFTEN = ("--save_minutes", "0.00005", "--keep_last", "--steps_per_line", "2")
# keys of summary.json that measure time or memory
MEASURED = {"train_seconds", "eval_seconds", "finish_seconds", "peak_mib"}


def run_process(argv, output):
    """In a process of its own: run the program."""
    become_process(output)
    run_script(lambda: train(argv), lenient=True)


def without_measures(value):
    """Plain data without the numbers that differ from run to run."""
    if isinstance(value, dict):
        return {k: without_measures(v) for k, v in value.items() if k not in MEASURED | {"seconds"}}
    return value


def leaves(value):
    """The tensors and plain values of a nested state, in order."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key])]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


def differences(run, whole):
    """What differs between two finished runs: a list of names, empty if nothing does."""
    found = {path.relative_to(whole) for path in whole.rglob("*")} ^ {path.relative_to(run) for path in run.rglob("*")}
    found |= {
        path.relative_to(whole)
        for path in (whole / "best.safetensors", *(whole / "predictions").iterdir())
        if not found and path.read_bytes() != (run / path.relative_to(whole)).read_bytes()
    }
    states = [without_measures(state_of(folder)) for folder in (run, whole)]
    for name in states[1].keys() - {"id", "log_position"}:
        ours, theirs = (leaves(state[name]) for state in states)
        same = (torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs, strict=True))
        found |= set() if all(same) else {f"last.pt: {name}"}
    summaries = [without_measures(json.loads((folder / "summary.json").read_text())) for folder in (run, whole)]
    steps = [[line["step"] for line in log_of(folder) if line["kind"] == "step"] for folder in (run, whole)]
    phases = [[line["norm"] for line in log_of(folder) if line["kind"] == "phase"] for folder in (run, whole)]
    found |= {"summary.json"} if summaries[0] != summaries[1] else set()
    found |= {"log.jsonl"} if phases[0] != phases[1] or steps[0] != sorted(set(steps[0])) else set()
    return sorted(map(str, found))


def moment(run):
    """What a killed run had reached."""
    if not (run / "config.json").exists():
        return "before the run"
    if not (run / "last.pt").exists():
        return "before a state"
    return "after the summary" if (run / "summary.json").exists() else "in training or its end"


def soak(program, context, name, flags, kills, rng):
    """Kill runs of one setting. Returns (complete runs, where the kills hit), or raises at a difference."""
    output = program.folder / "printed.txt"
    slug = name.replace(", ", "-").lower()
    usual, moments, complete = [*flags.split(), *OFTEN], Counter(), 0

    def start(run, *more):
        process = context.Process(target=run_process, args=(program.command(run, *usual, *more), output))
        process.start()
        return process

    # the second run gives the length: the first one also waits until everything is imported
    for whole in (f"{slug}-whole", f"{slug}-again"):
        started = time.monotonic()
        process = start(whole)
        process.join()
        length = time.monotonic() - started
        assert process.exitcode == 0, output.read_text()
    while sum(moments.values()) < kills:
        run, done = program.path(f"{slug}-{complete}"), False
        while not done:
            process = start(run.name, *(["--resume"] if (run / "config.json").exists() else []))
            # after the last kill the run ends undisturbed
            process.join(rng.uniform(0, length) if sum(moments.values()) < kills else None)
            done = process.exitcode is not None
            if done:
                assert process.exitcode == 0, output.read_text()
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                moments[moment(run)] += 1
        if found := differences(run, program.path(f"{slug}-whole")):
            raise SystemExit(f"{name}: {', '.join(found)} differ after {dict(moments)}")
        complete += 1
    return complete, moments, length


def main():
    """Kill runs of all settings, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8, help="kills in each setting")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context, rng = multiprocessing.get_context("forkserver"), random.Random(args.seed)
    context.set_forkserver_preload(["driver", "scipy.stats", "sklearn.metrics", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        program = Program(Path(folder))
        for name, flags in SETTINGS.items():
            complete, moments, length = soak(program, context, name, flags, args.kills, rng)
            where = ", ".join(f"{count} {key}" for key, count in sorted(moments.items()))
            print(
                f"{name}: {sum(moments.values())} kills ({where}), {complete} complete runs of {length:.1f} s, ", end=""
            )
            print("no difference", flush=True)


if __name__ == "__main__":
    main()
