"""The experiment tables: every row's command is valid, and every number comes from a run with the row's own flags."""

import json

import pytest

import experiments
import peer
from flags import check_flags, parse_flags, per_task
from tasks import build_tasks

ROWS = [(group, name) for group, (_, rows) in experiments.GROUPS.items() for name in rows]


@pytest.mark.parametrize(("group", "name"), ROWS)
def test_every_row_is_a_valid_command(group, name):
    script, *command = experiments.command_of(group, name)
    if script == "peer.py":
        peer.make_parser().parse_args([*command, "--run_dir", "runs/x"])
    else:
        flags, given, _ = parse_flags(command)
        check_flags(flags, given)


def test_rows_have_directories_of_their_own():
    assert len({(group, experiments.slug(name)) for group, name in ROWS}) == len(ROWS)


def write_run(folder, flags):
    """A finished run's files with hand-made numbers."""
    folder.mkdir(parents=True)
    config = {
        "flags": parse_flags(flags)[0] | {"max_length": 512},
        "commit": "c0ffee",
        "device": "cpu: test",
        "threads": 1,
        "torch": "2",
    }
    config |= {"data": {"a.csv": "00"}, "weights": {"folder": "", "sha256": {"m": "11"}}}
    scores = {"raw": 0.61, "norm": 0.72, "tasks": {"sst": {"accuracy": 0.5}, "sts": {"pearson": 0.66}}}
    summary = {"best": scores | {"norm": 0.73}, "last": scores, "phase_norms": [0.73, 0.72], "steps": 3}
    summary |= {"train_seconds": 12.3, "eval_seconds": 4.4, "positive_rate": 0.25, "peak_mib": 9, "exits": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_row_is_read_from_the_files_of_its_run(tmp_path):
    group, name = "methods", "PCGrad"
    write_run(tmp_path / "run", experiments.command_of(group, name)[1:])
    row = experiments.read_row(group, name, tmp_path / "run")
    assert (row["last"]["norm"], row["best"]["norm"], row["last"]["sts"]) == (0.72, 0.73, 0.66)
    line = experiments.table(group, [row]).splitlines()[2]
    assert line == "| PCGrad | 0.500 | 0.660 | 0.720 | 0.610 | 0.730 | 0.250 | 12 | 4 | 9 | `--gradients pcgrad` |"


def test_a_sweep_is_told_below_the_table(tmp_path):
    """Half of the layers at 90% of the norm and one and a half times the speed."""
    group, name = "exits", "SLF + early exit"
    write_run(tmp_path / "run", experiments.command_of(group, name)[1:])
    assert "times as many" not in experiments.table(group, [experiments.read_row(group, name, tmp_path / "run")])
    lines = ["setting,task,score,mean_layers,examples_per_second", "full depth,sst,0.1,1,1", "full depth,all,0.8,6,100"]
    lines += ["0.999,all,0.8,5.9,99", "auto,all,0.72,3,150"]
    (tmp_path / "run" / "evaluate").mkdir()
    (tmp_path / "run" / "evaluate" / "sweep.csv").write_text("\n".join(lines) + "\n")
    told = experiments.table(group, [experiments.read_row(group, name, tmp_path / "run")]).splitlines()[-1]
    assert "norm 0.7200 of 0.8000 at full depth (90.0%) with 3.00 layers instead of 6.00 (50%), 1.50 times" in told
    assert told.endswith("at a threshold of .999 5.90 layers.")


def test_a_run_with_other_flags_gives_no_row(tmp_path):
    write_run(tmp_path / "run", [*experiments.command_of("methods", "PCGrad")[1:], "--lr", "0.5"])
    assert experiments.read_row("methods", "PCGrad", tmp_path / "run") is None
    assert experiments.read_row("methods", "PCGrad", tmp_path / "nothing") is None


def test_a_row_whose_flags_have_changed_since_its_run_says_so(tmp_path, capsys):
    write_run(tmp_path / "methods" / "pcgrad", [*experiments.command_of("methods", "PCGrad")[1:], "--lr", "0.5"])
    experiments.main(["methods", "--only", "PCGrad", "GradVac", "--collect", "--runs", str(tmp_path)])
    first, second = capsys.readouterr().out.splitlines()
    assert "PCGrad" in first and "other flags" in first and str(tmp_path / "methods" / "pcgrad") in first
    assert second == "no result: GradVac"


def test_the_readme_table_is_replaced_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    (tmp_path / "README.md").write_text("a\n<!-- core -->\nold\n<!-- end core -->\nz\n")
    experiments.update_readme("core", "new\n")
    experiments.update_readme("absent", "never\n")
    assert (tmp_path / "README.md").read_text() == "a\n<!-- core -->\nnew\n<!-- end core -->\nz\n"


def test_the_goals_of_the_benchmark_come_from_its_report(tmp_path):
    about = {"device": "cpu: x", "threads": 2, "torch": "2", "transformers": "5", "commit": "c0ffee", "seconds": 90}
    goals = {"step": ["goal: faster than 1: 2; reached: yes, by 100%"], "growth": []}
    (tmp_path / "b.json").write_text(json.dumps({part: about | {"goals": told} for part, told in goals.items()}))
    first, *_, last = experiments.benchmark_goals(tmp_path / "b.json").splitlines()
    assert first == "- step: faster than 1: 2; reached: yes, by 100%"
    assert "2 threads" in last and "commits c0ffee; 3 minutes" in last


@pytest.mark.parametrize("entries", [["sst=0.9", "0.5"], ["0.5", "sst=0.9"]])
def test_an_entry_that_names_a_task_wins(entries):
    assert per_task(entries, "--flag", ["sst", "sts"], float) == {"sst": 0.9, "sts": 0.5}


def write_predictions(folder, values, gold):
    """Dev predictions of every task in a run's two formats; the runs agree on the labels."""
    (folder / "predictions").mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    for task in build_tasks().values():
        lines = [task.header, *(f"{i} , {value} " for i, value in enumerate(values))]
        (folder / "predictions" / f"{task.name}-dev-output.csv").write_text("\n".join(lines) + "\n")
        lines = ["id,gold", *(f"{i},{label}" for i, label in enumerate(gold))]
        (folder / "predictions" / f"{task.name}-dev-readable.csv").write_text("\n".join(lines) + "\n")


def test_seeds_are_compared_one_by_one_and_together(tmp_path):
    """Right, half right and wrong: accuracies 1, 1/2, 0 and correlations 1, 0, -1, of which norm is the mean."""
    gold = [0, 1] * 40
    wrong, half = [1 - label for label in gold], [0, 1, 1, 0] * 20
    runs = {"a, seed 1": gold, "a, seed 2": half, "b, seed 1": half, "c": gold}
    runs |= {"transformers, seed 1": wrong, "transformers, seed 2": half}
    for name, values in runs.items():
        write_predictions(tmp_path / experiments.slug(name), values, gold)
    rows = [{"name": name} for name in runs]
    experiments.compare_seeds(rows, tmp_path)
    first, second, third, *others = rows
    assert [row["against_peer"]["difference"] for row in rows[:3]] == pytest.approx([0.75, 0.25, 0.25])
    assert second["together_against_peer"]["difference"] == pytest.approx(0.5)
    assert second["together_against_peer"]["runs"] == 2
    found = second["against_peer"]
    assert found["low"] < 0.25 < found["high"] and first["against_peer"]["not_better"] == 0
    assert "together_against_peer" not in first and "together_against_peer" not in third
    assert all(row.keys() == {"name"} for row in others)
    told = experiments.comparison_table(rows)
    assert len([line for line in told if line.startswith(("| a", "| b"))]) == 4
    assert "mean of transformers' (2 seeds)" in told[1] and "| a, mean of 2 seeds | +0.5000 |" in "\n".join(told)


def test_without_transformers_nothing_is_compared(tmp_path):
    rows = [{"name": "a, seed 1"}, {"name": "a, seed 2"}]
    experiments.compare_seeds(rows, tmp_path)
    assert experiments.comparison_table(rows) == [] and rows[0] == {"name": "a, seed 1"}
