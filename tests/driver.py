"""multitask_classifier.py with settings that only tests use.

    --keep_last          keep last.pt when the run is complete
    --save_minutes M     minutes between two saved states within a phase
    --steps_per_line N   steps per line of log.jsonl
    --dies RANK STEP     the process of that rank dies at the end of that step, before the step is counted

Tests call `main`; as a program it stands in for multitask_classifier.py where a test needs a process.
"""

import argparse
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

# as a program: Python puts only this folder on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import multitask_classifier
import parallel
from errors import run_script
from runs import Recorder, RunFolder


def dying(rank, step, after_step=Recorder.after_step):
    """Recorder.after_step with a sudden end in one process."""

    def after(recorder, results):
        if parallel.rank() == rank and recorder.history.total_steps + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return after_step(recorder, results)

    return after


def main(argv=None):
    """Run the program with these settings taken out of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--keep_last", action="store_true")
    parser.add_argument("--save_minutes", type=float, default=Recorder.save_minutes)
    parser.add_argument("--steps_per_line", type=int, default=Recorder.steps_per_line)
    parser.add_argument("--dies", type=int, nargs=2, metavar=("RANK", "STEP"), default=(0, 0))
    settings, rest = parser.parse_known_args(argv)
    changed = {
        "save_minutes": settings.save_minutes,
        "steps_per_line": settings.steps_per_line,
        "after_step": dying(*settings.dies),
    }
    keep = mock.patch.object(RunFolder, "remove_last", lambda folder: None) if settings.keep_last else nullcontext()
    with keep, mock.patch.multiple(Recorder, **changed):
        return multitask_classifier.main(rest)


if __name__ == "__main__":
    run_script(main, lenient=True)
