#!/usr/bin/env python3
"""Points for a student's copy, part by part: runs the tests of each part and counts those that pass.

    python tests/grade.py             all parts
    python tests/grade.py attention   one part, with what went wrong

A part's points are in proportion to its passed tests; a test that cannot run here (no weights, no transformers) does
not count. The exit status is 0, with --strict 1 unless every point was reached.
"""

import argparse
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

try:
    import pytest
except ImportError:
    print("error: pytest is not installed here: run ./setup.sh once, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
# {part: (points, tests)}
PARTS = {
    "tokenizer": (10, ["test_tokenizer.py"]),
    "attention": (
        20,
        [
            "test_bert.py::test_sdpa_equals_plain",
            "test_bert.py::test_padding_changes_nothing",
            "test_bert.py::test_attention_dropout_acts_in_training_only",
            "test_bert.py::test_a_row_of_padding_stays_finite",
        ],
    ),
    "layer": (
        10,
        [
            "test_bert.py::test_hidden_dropout_acts_at_each_site_in_training",
            "test_bert.py::test_encode_starts_and_stops_where_it_is_told",
            "test_bert.py::test_course_parameter_names",
        ],
    ),
    "embedding": (
        10,
        [
            "test_bert.py::test_segments_and_positions_matter_and_segments_default_to_the_first",
            "test_bert.py::test_too_long_a_text_is_refused",
        ],
    ),
    "bert": (
        20,
        [
            "test_bert.py::test_golden_values",
            "test_bert.py::test_random_model_equals_transformers",
            "test_bert.py::test_minilm_equals_transformers",
        ],
    ),
    "optimizer": (15, ["test_optimizer.py"]),
    "classifier": (
        15,
        [
            "test_program.py::test_the_methods_of_the_course_equal_the_forward_pass",
            "test_program.py::test_predictions_do_not_depend_on_batches_order_or_padding",
            "test_program.py::test_pretrain_leaves_bert_alone_and_trains_the_heads",
        ],
    ),
    "early_exit": (10, ["test_early_exit.py"]),
    "slf": (5, ["test_slf.py"]),
    "smart": (10, ["test_smart.py"]),
    "gradients": (5, ["test_gradients.py"]),
    "adapters": (5, ["test_adapters.py"]),
}


class Counter:
    """A pytest plugin that remembers which tests passed and which did not."""

    def __init__(self):
        self.passed, self.failed = [], []

    def pytest_runtest_logreport(self, report):
        """A test is passed once it was called without an error; set-up and clean-up can fail too."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report):
        """A file that cannot be imported fails as a whole."""
        if report.failed:
            self.failed.append(report.nodeid)


def grade(points, tests):
    """Run the tests of a part. Returns (points reached, Counter, what pytest printed)."""
    counter, printed = Counter(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        status = pytest.main(["--tb=short", *(f"tests/{test}" for test in tests)], plugins=[counter])
    if status == pytest.ExitCode.USAGE_ERROR and not counter.failed:
        counter.failed.append("the tests of this part are missing")
    done, total = len(counter.passed), len(counter.passed) + len(counter.failed)
    return points * done / total if total else 0.0, counter, printed.getvalue()


def main(argv=None):
    """Grade the parts and print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--strict", action="store_true", help="exit status 1 unless every point is reached")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"no part {part}: choose from {', '.join(PARTS)}")
    os.chdir(ROOT)
    reached, possible = 0.0, 0
    for part in args.parts or PARTS:
        points, tests = PARTS[part]
        got, counter, printed = grade(points, tests)
        reached, possible = reached + got, possible + points
        total = len(counter.passed) + len(counter.failed)
        print(f"{part:<12}{got:>6.1f} of {points:<4}{len(counter.passed):>4} of {total} tests", flush=True)
        for name in counter.failed:
            print(f"{'':<12}failed: {name.removeprefix('tests/')}")
        if args.parts and counter.failed:
            print(printed)
    print(f"{'total':<12}{reached:>6.1f} of {possible}")
    return int(args.strict and reached < possible)


if __name__ == "__main__":
    sys.exit(main())
