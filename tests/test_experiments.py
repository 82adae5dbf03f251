"""The experiment tables: every row's command is valid, and every number comes from a run with the row's own flags."""

import json
from types import SimpleNamespace

import pytest

from errors import InputError
from flags import check_flags, parse_flags
from lab import experiments, peer, tables
from methods import per_task
from runs import FORMAT
from tasks import build_tasks

ROWS = [(group, name) for group, content in experiments.GROUPS.items() for name in content.rows]


@pytest.mark.parametrize(("group", "name"), ROWS)
def test_every_row_is_a_valid_command(group, name):
    script, *command = experiments.command_of(group, name)
    if script == "-m":
        assert command[0] == "lab.peer"
        peer.make_parser().parse_args([*command[1:], "--run_dir", "runs/x"])
    else:
        flags, given, _ = parse_flags(command)
        check_flags(flags, given)
        # the default may change with the weights, a table's row must not
        assert "pooling" in given


def test_rows_have_directories_of_their_own():
    assert len({(group, experiments.slug(name)) for group, name in ROWS}) == len(ROWS)


@pytest.mark.parametrize("group", experiments.GROUPS)
def test_the_committed_tables_are_made_from_the_committed_rows(group, tmp_path):
    """Without any run every table of results/ follows from its JSON file, where each row has today's command."""
    content = experiments.GROUPS[group]
    recorded = json.loads((experiments.RESULTS / f"{group}.json").read_text())
    assert [row["name"] for row in recorded] == [*content.rows, *content.removed]
    for row in recorded:
        today = row["name"] in content.rows and " ".join(experiments.command_of(group, row["name"]))
        assert row["name"] in content.removed or row["command"] == today
    rows = experiments.collect(group, [*content.rows, *content.removed], tmp_path)
    assert rows == recorded
    for name, text in experiments.tables(group, rows).items():
        assert f"<!-- table -->\n{text}<!-- end table -->\n" in (experiments.RESULTS / name).read_text(), name


@pytest.mark.parametrize(("group", "name"), [("methods", "PCGrad"), ("core", "transformers, seed 1")])
def test_a_row_is_trained_by_its_own_command(group, name, tmp_path, monkeypatch):
    """A started run continues, but the peer starts again; a finished one is left alone."""
    commands, folder = [], tmp_path / group / experiments.slug(name)
    monkeypatch.setattr(
        experiments.subprocess, "run", lambda words, cwd: commands.append(words[1:]) or SimpleNamespace(returncode=0)
    )
    experiments.run_row(group, name, None, tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    experiments.run_row(group, name, str(tmp_path), tmp_path)
    expected = [*experiments.command_of(group, name), "--run_dir", str(folder)]
    resume = [] if group == "core" else ["--resume"]
    assert commands == [expected, [*expected, "--data_dir", str(tmp_path), *resume]]
    assert folder.exists() == (group != "core")
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text("{}")
    experiments.run_row(group, name, None, tmp_path)
    assert len(commands) == 2
    (folder / "summary.json").unlink()
    monkeypatch.setattr(experiments.subprocess, "run", lambda words, cwd: SimpleNamespace(returncode=130))
    with pytest.raises(InputError, match="the same command continues"):
        experiments.run_row(group, name, None, tmp_path)


def write_run(folder, words, version=FORMAT, **changed):
    """A finished run's files with hand-made numbers; `changed` are flags that it records otherwise."""
    folder.mkdir(parents=True)
    config = {
        "flags": parse_flags(words)[0] | {"max_length": 512} | changed,
        "format": version,
        "commit": "c0ffee",
        "device": "cpu: test",
        "threads": 1,
        "torch": "2",
    }
    config |= {"data": {"a.csv": "00"}, "weights": {"folder": "", "sha256": {"m": "11"}}}
    scores = {"raw": 0.61, "norm": 0.72, "tasks": {"sst": {"accuracy": 0.5}, "sts": {"pearson": 0.66}}}
    best = {"norm": 0.73, "tasks": scores["tasks"] | {"para": {"accuracy": 0.7, "positive_rate": 0.25}}}
    summary = {"best": scores | best, "last": scores, "phase_norms": [0.73, 0.72], "steps": 3}
    summary |= {"train_seconds": 12.3, "eval_seconds": 4.4, "peak_mib": 9, "exits": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_row_is_read_from_the_files_of_its_run(tmp_path):
    group, name = "methods", "PCGrad"
    write_run(tmp_path / "run", experiments.command_of(group, name)[1:])
    row = experiments.read_row(group, name, tmp_path / "run")
    assert (row["last"]["norm"], row["best"]["norm"], row["last"]["sts"]) == (0.72, 0.73, 0.66)
    line = experiments.tables(group, [row])["methods.md"].splitlines()[2]
    assert line == "| PCGrad | 0.500 | 0.660 | 0.720 | 0.610 | 0.730 | 0.250 | 12 | 4 | 9 | `--gradients pcgrad` |"


def test_a_sweep_is_described_below_the_table(tmp_path):
    """Half of the layers at 90% of the norm and one and a half times the speed."""
    group, name = "exits", "SLF + early exit"
    write_run(tmp_path / "run", experiments.command_of(group, name)[1:])
    row = experiments.read_row(group, name, tmp_path / "run")
    assert "times as many" not in experiments.tables(group, [row])["exits.md"]
    lines = ["setting,task,score,mean_layers,examples_per_second", "full depth,sst,0.1,1,1", "full depth,all,0.8,6,100"]
    lines += ["0.999,all,0.8,5.9,99", "auto,all,0.72,3,150"]
    (tmp_path / "run" / "evaluate").mkdir()
    (tmp_path / "run" / "evaluate" / "sweep.csv").write_text("\n".join(lines) + "\n")
    row = experiments.read_row(group, name, tmp_path / "run")
    note = experiments.tables(group, [row])["exits.md"].splitlines()[-1]
    assert "norm 0.7200 against 0.8000 at full depth (90.0%)" in note
    assert "3.00 layers instead of 6.00 (50%) and predict 1.50 times as many" in note
    assert note.endswith("With a threshold of .999 the mean is 5.90 layers.")


def test_a_run_with_other_flags_gives_no_row(tmp_path):
    write_run(tmp_path / "run", [*experiments.command_of("methods", "PCGrad")[1:], "--lr", "0.5"])
    assert experiments.read_row("methods", "PCGrad", tmp_path / "run") is None
    assert experiments.read_row("methods", "PCGrad", tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("Bregman for SST and STS, seed 1", {"bregman": 1.0, "bregman_tasks": ["sst", "sts"], "lnsr": 0.0}),
        ("mean pooling, Bregman", {"bregman": 1.0, "lnsr": 0.0}),
        ("mean pooling, seed 1", {"bregman": 0.0, "lnsr": 0.0}),
    ],
)
def test_a_run_of_the_old_format_is_still_read(tmp_path, name, recorded):
    """Until format 2, --bregman and --lnsr took a weight; a run without the term is not a run with it."""
    write_run(tmp_path / "run", experiments.command_of("core", name)[1:], 1, keep_last=False, **recorded)
    assert experiments.read_row("core", name, tmp_path / "run")["last"]["norm"] == 0.72
    recorded = recorded | {"bregman": 1.0 - recorded["bregman"]}
    write_run(tmp_path / "other", experiments.command_of("core", name)[1:], 1, **recorded)
    assert experiments.read_row("core", name, tmp_path / "other") is None


def test_a_run_with_other_flags_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    write_run(tmp_path / "methods" / "pcgrad", [*experiments.command_of("methods", "PCGrad")[1:], "--lr", "0.5"])
    experiments.main(["methods", "--only", "PCGrad", "GradVac", "--collect", "--runs", str(tmp_path)])
    first, *others = capsys.readouterr().out.splitlines()
    assert "PCGrad" in first and "other flags" in first and str(tmp_path / "methods" / "pcgrad") in first
    assert others == ["no result: PCGrad", "no result: GradVac"]


def test_recorded_numbers_stay_while_the_command_is_the_same(tmp_path, capsys, monkeypatch):
    """A run's files win over the record; a recorded row of another command counts no more; a removed one stays."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    runs = tmp_path / "runs"
    write_run(runs / "methods" / "pcgrad", experiments.command_of("methods", "PCGrad")[1:])
    old = experiments.read_row("methods", "PCGrad", runs / "methods" / "pcgrad") | {"steps": 77}
    commands = {name: " ".join(experiments.command_of("methods", name)) for name in ("PCGrad", "GradVac")}
    [removed] = experiments.METHODS.removed
    recorded = [old | {"name": name, "command": command} for name, command in commands.items()]
    recorded += [old | {"name": "SGD", "command": "other"}, old | {"name": removed, "command": "gone"}]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "methods.json").write_text(json.dumps(recorded))
    rows = experiments.collect("methods", ["PCGrad", "GradVac", "SGD", removed], runs)
    assert [(row["name"], row["steps"]) for row in rows] == [("PCGrad", 3), ("GradVac", 77), (removed, 77)]
    assert capsys.readouterr().out == "no result: SGD\n"
    (tmp_path / "results" / "methods.md").write_text("The question?\n")
    experiments.main(["methods", "--collect", "--runs", str(runs)])
    text = (tmp_path / "results" / "methods.md").read_text()
    assert text.startswith("The question?\n\n<!-- table -->\n| run |") and text.count("(flag removed)") == 1


def test_a_table_is_replaced_between_its_markers(tmp_path):
    path = tmp_path / "core.md"
    path.write_text("a\n<!-- table -->\nold\n<!-- end table -->\nz\n")
    tables.replace_between(path, "table", "new\n")
    assert path.read_text() == "a\n<!-- table -->\nnew\n<!-- end table -->\nz\n"
    tables.replace_between(tmp_path / "other.md", "table", "new\n")
    assert (tmp_path / "other.md").read_text() == "<!-- table -->\nnew\n<!-- end table -->\n"


@pytest.mark.parametrize("entries", [["sst=0.9", "0.5"], ["0.5", "sst=0.9"]])
def test_an_entry_that_names_a_task_wins(entries):
    assert per_task(entries, "--flag", ["sst", "sts"], float) == {"sst": 0.9, "sts": 0.5}


def write_predictions(folder, values, gold):
    """Dev predictions of every task in a run's two formats; the runs agree on the labels."""
    (folder / "predictions").mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    for task in build_tasks().values():
        lines = [task.output[0], *(f"{i} , {value} " for i, value in enumerate(values))]
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
    assert second["mean_against_peer"]["difference"] == pytest.approx(0.5)
    assert second["mean_against_peer"]["runs"] == 2
    result = second["against_peer"]
    assert result["low"] < 0.25 < result["high"] and first["against_peer"]["not_better"] == 0
    assert "mean_against_peer" not in first and "mean_against_peer" not in third
    assert all(row.keys() == {"name"} for row in others)
    text = tables.comparison_table(rows)
    assert len([line for line in text.splitlines() if line.startswith(("| a", "| b"))]) == 4
    assert "mean norm of transformers' 2 seeds" in text and "| a, mean of 2 seeds | +0.5000 |" in text


def test_without_transformers_nothing_is_compared(tmp_path):
    rows = [{"name": "a, seed 1"}, {"name": "a, seed 2"}]
    experiments.compare_seeds(rows, tmp_path)
    assert tables.comparison_table(rows) == "" and rows[0] == {"name": "a, seed 1"}


def test_a_recorded_comparison_stays_without_predictions(tmp_path):
    rows = [{"name": "a, seed 1", "against_peer": {"difference": 1.0}}, {"name": "transformers, seed 1"}]
    experiments.compare_seeds(rows, tmp_path)
    assert rows[0]["against_peer"] == {"difference": 1.0}
