"""What a run prints and draws at its end: tables by hand, and a picture of tasks that the program does not know."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

import report
from early_exit import UNREACHABLE, AllExits
from tasks import build_tasks

TASKS = build_tasks()
# more tasks than there are colours
NAMES = [f"task{k}" for k in range(len(report.COLORS) + 2)]


def is_png(path):
    """Whether a file is a picture and not an empty one."""
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def sweep_row(setting, name, layers):
    """A row as `sweep` returns it."""
    row = {"setting": setting, "task": name, "policy": "lte", "threshold": 0.5, "metric": "accuracy"}
    return row | {"score": layers / 10, "mean_layers": float(layers), "examples_per_second": 1234.5678 / layers}


def test_the_picture_of_unknown_tasks_is_drawn(tmp_path):
    settings = (("full depth", 6), ("0.5", 2), ("0.9", 3), ("auto", 5))
    rows = [sweep_row(setting, name, layers) for setting, layers in settings for name in (*NAMES, "all")]
    report.plot_sweep(tmp_path / "sweep.png", rows)
    assert is_png(tmp_path / "sweep.png")


def test_a_csv_has_six_significant_digits(tmp_path):
    report.write_csv(tmp_path / "rows.csv", [sweep_row("0.5", "sst", 3)])
    with open(tmp_path / "rows.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["examples_per_second"] == "411.523" and row["threshold"] == "0.5" and row["task"] == "sst"


def test_the_table_of_exits_by_hand():
    """Two tasks of ten rows and four layers."""
    empty = np.zeros((10, 4))
    exits = {name: AllExits(TASKS[name], np.arange(10), np.zeros(10), empty, empty, empty) for name in ("sst", "sts")}
    record = {
        "policies": {"sst": "confidence", "sts": "lte"},
        "thresholds": {"sst": 0.87654, "sts": UNREACHABLE},
        "cross_fitted": {
            "full": {"sst": 0.5, "sts": 0.75},
            "exit": {"sst": 0.45, "sts": 0.75},
            "mean_layers": {"sst": 1.5, "sts": 4.0},
        },
        "cross_fitted_norm": {"full": 0.6875, "exit": 0.6625},
        "cross_fitted_layers": 2.75,
        "shares": {"sst": [0.5, 0.5, 0, 0], "sts": [0, 0, 0, 1]},
    }
    _, header, sst, sts, norm = report.exit_table(exits, record)
    assert sst.split() == ["SST", "sentiment", "confidence", "0.8765", "0.500", "0.450", "1.50", "62%"]
    assert sts.split() == ["STS", "similarity", "lte", "never", "0.750", "0.750", "4.00", "0%"]
    assert norm.split() == ["norm,", "all", "tasks", "0.688", "0.662", "2.75", "31%"]
    assert len({len(line) for line in (header, sst, sts, norm)}) == 1


def test_the_table_of_scores_has_the_main_metric_of_each_task():
    metrics = {
        "para": {"accuracy": 0.7, "majority": 0.58, "positive_rate": 0.25, "macro_f1": 0.65, "mean_layers": 6.0},
        "sts": {"pearson": 0.123, "spearman": 0.9, "mean_layers": 4.5},
    }
    header, para, sts = report.score_table({name: TASKS[name] for name in metrics}, metrics)
    assert header.split() == ["task", "metric", "dev", "majority", "positive", "macro", "F1", "layers"]
    assert para.split() == ["Quora", "paraphrase", "accuracy", "0.700", "0.580", "0.250", "0.650", "6.00"]
    assert sts.split() == ["STS", "similarity", "pearson", "0.123", "4.50"]


def test_the_total_of_a_sweep_averages_the_tasks():
    """Two tasks, 10 and 20 rows: 30 rows in 3 seconds; accuracies of 1 and 0, layers 1 and 2, norm 1/2."""
    confidence, names = np.array([[0.9, 0.9]]), {"sst": (10, 1.0, 0.5), "para": (20, 0.0, 0.95)}
    exits, thresholds = {}, {}
    for name, (n, value, thresholds[name]) in names.items():
        values = np.full((n, 2), value)
        exits[name] = AllExits(TASKS[name], np.arange(n), np.ones(n), values, confidence.repeat(n, 0), values)
    policies = dict.fromkeys(exits, "confidence")
    *_, total = report.sweep_rows("mixed", thresholds, exits, policies, {"sst": 1.0, "para": 2.0})
    assert total["score"] == 0.5 and total["metric"] == "norm" and total["task"] == "all"
    assert (total["mean_layers"], total["exit_1"], total["exit_2"]) == (1.5, 0.5, 0.5)
    assert total["examples_per_second"] == pytest.approx(10)


def test_a_mistake_is_as_bad_as_the_probability_of_what_was_predicted():
    """A fitted decision threshold may choose the class that has less than half."""
    data = SimpleNamespace(labels=np.array([1.0, 0.0, 1.0]))
    probabilities = np.array([[0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    made = SimpleNamespace(values=np.array([0.0, 1, 1]), data=data, rows=np.arange(3), probabilities=probabilities)
    badness, order = report.rank_mistakes(made)
    assert badness.tolist() == [0.4, 0.7, 0] and order.tolist() == [1, 0, 2]
