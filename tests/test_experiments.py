"""The experiment tables: every row's command is valid, and every number comes from a run with the row's own flags."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

import multitask_classifier
from early_exit import AllExits
from errors import InputError
from flags import check_flags, parse_flags
from lab import compare, ensemble, experiments, measure, pages, panels, peer, record, sections, tables
from lab.numbers import Source, against_baseline
from lab.record import Place, load_rows, read_row, write_row
from lab.rows import GROUPS, command_of, slug, split_name
from runs import FORMAT
from tasks import build_tasks

ROWS = [(group, name) for group, content in GROUPS.items() for name in content.rows]
# the tables of the older groups stand between markers in typed pages; those of the experiments are whole pages
EXPERIMENTS = [group for group, content in GROUPS.items() if content.question]


@pytest.mark.parametrize(("group", "name"), ROWS)
def test_every_row_is_a_valid_command(group, name):
    script, *command = command_of(group, name)
    if script == "-m":
        program = {"lab.peer": peer, "lab.ensemble": ensemble}[command[0]]
        program.make_parser().parse_args([*command[1:], "--run_dir", "runs/x"])
    else:
        flags, given, _ = parse_flags(command)
        check_flags(flags, given)
        # the default may change with the weights, a table's row must not
        assert "pooling" in given


def test_rows_have_directories_of_their_own():
    assert len({(group, slug(name)) for group, name in ROWS}) == len(ROWS)


def test_a_scale_shortens_every_row_alike(monkeypatch):
    monkeypatch.setitem(GROUPS, "smart-when", replace(GROUPS["smart-when"], scale=0.1))
    words = command_of("smart-when", "a tenth of the rows: no SMART")
    assert [words[k + 1] for k, word in enumerate(words) if word == "--epoch_size"] == ["0.01", "0.1"]
    assert words[words.index("--epochs") + 1] == "10"


def test_names_have_a_block_a_recipe_and_a_seed():
    assert split_name("best recipe: SLF, seed 2") == ("best recipe", "SLF", 2)
    assert split_name("siamese, uv") == ("", "siamese, uv", 1)


def test_the_preset_is_the_recipe_of_the_score_table(capsys):
    """A flag after the preset wins; what the preset stands for is printed."""
    assert parse_flags(["--epochs", "2", "--preset", "best"])[0]["epochs"] == 2  # also one before the preset
    capsys.readouterr()
    flags, typed, _ = parse_flags(["--preset", "best", "--epochs", "2"])
    recipe = parse_flags(command_of("score", "best recipe, seed 1")[1:])[0]
    assert {"pooling", "bregman", "epochs"} < typed and flags["epochs"] == 2
    free = ("preset", "epochs", "weights", "precision", "seed")
    assert {k: v for k, v in flags.items() if k not in free} == {k: v for k, v in recipe.items() if k not in free}
    assert capsys.readouterr().out.startswith("--preset best: --epochs 3")
    check_flags(flags, typed)


def test_further_seeds_come_last():
    args = SimpleNamespace(groups=["berter-table2", "exit-thresholds"], only=None)
    chosen = experiments.choose_rows(args)
    seeds = [split_name(name)[2] for _, name in chosen]
    assert seeds == sorted(seeds) and chosen[0] == ("berter-table2", "Baseline") and len(chosen) == 26
    with pytest.raises(InputError, match="no such row"):
        experiments.choose_rows(SimpleNamespace(groups=["core"], only=["nothing"]))


@pytest.mark.parametrize("group", GROUPS)
def test_every_recorded_row_is_in_its_table(group, tmp_path):
    """Each recorded file has the name and today's command of a row; the older groups have all their rows."""
    content, recorded = GROUPS[group], load_rows(group)
    names = [*content.rows, *content.removed]
    assert len(recorded) == len(list((record.RESULTS / "rows" / group).glob("*.json")))
    assert content.question or list(recorded) == names
    for name, row in recorded.items():
        assert row["name"] == name and (name in content.removed or row["command"] == " ".join(command_of(group, name)))
    assert experiments.collect(group, names, Place(tmp_path)) == list(recorded.values())


def test_a_row_of_another_command_is_left_out(tmp_path):
    """A check run's flags at the end of the command do not matter."""
    for name, command in {"PCGrad": " --epochs 1", "SGD": "other"}.items():
        words = " ".join(command_of("methods", name)) + command if command != "other" else command
        write_row(Place(results=tmp_path).record("methods", name), {"name": name, "command": words})
    assert list(load_rows("methods", tmp_path)) == ["PCGrad"]


def test_report_writes_the_committed_files_again(tmp_path):
    """Pages and CSVs byte for byte, pictures by size and pixels, from a copy of results/ and nothing else."""
    results = shutil.copytree(record.RESULTS, tmp_path / "results")
    made = [f"{group}.csv" for group in GROUPS] + [f"{group}.md" for group in EXPERIMENTS]
    made += ["exit-thresholds-sweep.csv", "FINDINGS.md"]
    pictures = [name for name in (*(f"{group}.png" for group in EXPERIMENTS), "sweep.png", "sweep-norm.png")]
    pictures = [name for name in pictures if (record.RESULTS / name).exists()]
    for name in (*made, *pictures):
        (results / name).unlink()
    experiments.report(results)
    assert {path.name for path in results.glob("*.*")} == {path.name for path in record.RESULTS.glob("*.*")}
    for path in results.glob("*.*"):
        committed = record.RESULTS / path.name
        if path.suffix == ".png":
            ours, theirs = (imread(one) for one in (path, committed))
            assert ours.shape == theirs.shape and (ours == theirs).all(), path.name
        else:
            assert path.read_bytes() == committed.read_bytes(), path.name


@pytest.mark.parametrize(("group", "name"), [("methods", "PCGrad"), ("core", "transformers, seed 1")])
def test_a_row_is_trained_by_its_own_command(group, name, tmp_path, monkeypatch):
    """A started run continues, but the peer starts again; a finished one is left alone."""
    commands, folder = [], tmp_path / group / slug(name)
    monkeypatch.setattr(
        experiments.subprocess, "run", lambda words, cwd: commands.append(words[1:]) or SimpleNamespace(returncode=0)
    )
    experiments.run_row(group, name, Place(tmp_path))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    experiments.run_row(group, name, Place(tmp_path, data_dir=str(tmp_path)))
    expected = [*command_of(group, name), "--run_dir", str(folder)]
    resume = [] if group == "core" else ["--resume"]
    assert commands == [expected, [*expected, "--data_dir", str(tmp_path), *resume]]
    assert folder.exists() == (group != "core")
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text("{}")
    experiments.run_row(group, name, Place(tmp_path))
    assert len(commands) == 2
    (folder / "summary.json").unlink()
    monkeypatch.setattr(experiments.subprocess, "run", lambda words, cwd: SimpleNamespace(returncode=130))
    with pytest.raises(InputError, match="the same command continues"):
        experiments.run_row(group, name, Place(tmp_path))


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


def source_of(rows):
    """A Source of hand-made rows, {group: {name: row}}."""
    return Source(lambda group: rows.get(group, {}), {})


def test_a_row_is_read_from_the_files_of_its_run(tmp_path):
    group, name = "methods", "PCGrad"
    write_run(Place(tmp_path).run(group, name), command_of(group, name)[1:])
    row = read_row(group, name, Place(tmp_path))
    assert (row["last"]["norm"], row["best"]["norm"], row["last"]["sts"]) == (0.72, 0.73, 0.66)
    head, lines = tables.table(group, source_of({group: {name: row}}))
    [line] = [line for line in lines if line[0] == name]
    assert head[2:] == ["sst", "sts", "norm", "raw", "best norm", "Quora positive", "train s", "eval s", "MiB", "flags"]
    numbers = ["0.500", "0.660", "0.720", "0.610", "0.730", "0.250", "12", "4", "9"]
    assert line[1:] == ["1", *numbers, "`--gradients pcgrad`"]


def test_a_sweep_is_described_below_the_table(tmp_path):
    """Half of the layers at 90% of the norm and one and a half times the speed."""
    group, name = "exits", "SLF + early exit"
    write_run(Place(tmp_path).run(group, name), command_of(group, name)[1:])
    row = read_row(group, name, Place(tmp_path))
    assert sections.sweep_notes({name: row}) == []
    lines = ["setting,task,score,mean_layers,examples_per_second", "full depth,sst,0.1,1,1", "full depth,all,0.8,6,100"]
    lines += ["0.999,all,0.8,5.9,99", "auto,all,0.72,3,150"]
    folder = Place(tmp_path).run(group, name) / "evaluate"
    folder.mkdir()
    (folder / "sweep.csv").write_text("\n".join(lines) + "\n")
    row = read_row(group, name, Place(tmp_path))
    note, _ = sections.sweep_notes({name: row})
    assert "norm 0.7200 against 0.8000 at full depth (90.0%)" in note
    assert "3.00 layers instead of 6.00 (50%) and predict 1.50 times as many" in note
    assert note.endswith("With a threshold of .999 the mean is 5.90 layers.")


def test_a_row_may_be_scored_after_an_earlier_phase(tmp_path):
    """Stage 1 alone: what one batch of stage 2 did to the model does not count."""
    group, name = "slf-ablation", "stage 1 only"
    folder = Place(tmp_path).run(group, name)
    write_run(folder, command_of(group, name)[1:])
    seconds = {"train_seconds": 1, "eval_seconds": 1}
    phases = [("stage 1, layer 5/6", 0.5), ("stage 1, layer 6/6", 0.6), ("epoch 1/1", 0.4)]
    dev = {"sst": {"accuracy": 0.3}, "sts": {"pearson": 0.2}}
    lines = [
        {"kind": "phase", "phase": phase, "dev": dev, "raw": 0.1, "norm": norm} | seconds for phase, norm in phases
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "measured.json").write_text(json.dumps({"compute": 0.5, "exits": {}, "predictions": {}}))
    row = read_row(group, name, Place(tmp_path))
    assert row["best"] == row["last"] == {"norm": 0.6, "raw": 0.1, "sst": 0.3, "sts": 0.2}
    assert (row["best_phase"], row["exits"], row["measured"]) == ("stage 1, layer 6/6", None, {"compute": 0.5})


def test_a_run_with_other_flags_gives_no_row(tmp_path):
    write_run(tmp_path / "methods" / "pcgrad", [*command_of("methods", "PCGrad")[1:], "--lr", "0.5"])
    assert read_row("methods", "PCGrad", Place(tmp_path)) is None
    assert read_row("methods", "PCGrad", Place(tmp_path / "nothing")) is None


def test_a_run_with_other_flags_is_reported(tmp_path, capsys):
    write_run(tmp_path / "methods" / "pcgrad", [*command_of("methods", "PCGrad")[1:], "--lr", "0.5"])
    assert experiments.collect("methods", ["PCGrad", "GradVac"], Place(tmp_path, tmp_path)) == []
    first, *others = capsys.readouterr().out.splitlines()
    assert "PCGrad" in first and "other flags" in first and str(tmp_path / "methods" / "pcgrad") in first
    assert others == ["no result: PCGrad; GradVac"]


def test_recorded_numbers_stay_while_the_command_is_the_same(tmp_path, capsys, monkeypatch):
    """A run's files win over the record; a recorded row of another command counts no more; a removed one stays."""
    place = Place(tmp_path / "runs", tmp_path / "results")
    write_run(place.run("methods", "PCGrad"), command_of("methods", "PCGrad")[1:])
    old = read_row("methods", "PCGrad", place) | {"steps": 77}
    commands = {name: " ".join(command_of("methods", name)) for name in ("PCGrad", "GradVac")}
    [removed] = GROUPS["methods"].removed
    for name, command in {**commands, "SGD": "other", removed: "gone"}.items():
        write_row(place.record("methods", name), old | {"name": name, "command": command})
    rows = experiments.collect("methods", ["PCGrad", "GradVac", "SGD", removed], place)
    assert [(row["name"], row["steps"]) for row in rows] == [("PCGrad", 3), ("GradVac", 77), (removed, 77)]
    assert capsys.readouterr().out == "no result: SGD\n"
    (tmp_path / "results" / "methods.md").write_text("The question?\n")
    monkeypatch.setattr(experiments, "RESULTS", place.results)
    experiments.main(["methods", "--collect", "--runs", str(place.runs)])
    text = (tmp_path / "results" / "methods.md").read_text()
    assert text.startswith("The question?\n\n<!-- table -->\n| run |") and text.count("(flag removed)") == 1
    assert load_rows("methods", place.results)["PCGrad"]["steps"] == 3


def test_a_table_is_replaced_between_its_markers(tmp_path):
    path = tmp_path / "core.md"
    path.write_text("a\n<!-- table -->\nold\n<!-- end table -->\nz\n")
    tables.replace_between(path, "table", "new\n")
    assert path.read_text() == "a\n<!-- table -->\nnew\n<!-- end table -->\nz\n"
    tables.replace_between(tmp_path / "other.md", "table", "new\n")
    assert (tmp_path / "other.md").read_text() == "<!-- table -->\nnew\n<!-- end table -->\n"


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
        write_predictions(tmp_path / slug(name), values, gold)
    rows = [{"name": name} for name in runs]
    compare.compare_seeds(rows, tmp_path)
    first, second, third, *others = rows
    assert [row["against_peer"]["difference"] for row in rows[:3]] == pytest.approx([0.75, 0.25, 0.25])
    assert second["mean_against_peer"]["difference"] == pytest.approx(0.5)
    assert second["mean_against_peer"]["runs"] == 2
    result = second["against_peer"]
    assert result["low"] < 0.25 < result["high"] and first["against_peer"]["not_better"] == 0
    assert "mean_against_peer" not in first and "mean_against_peer" not in third
    assert all(row.keys() == {"name"} for row in others)
    text = sections.comparison_table({row["name"]: row for row in rows})
    assert len([line for line in text.splitlines() if line.startswith(("| a", "| b"))]) == 4
    assert "mean norm of transformers' 2 seeds" in text and "| a, mean of 2 seeds | +0.5000 |" in text


def test_without_transformers_nothing_is_compared(tmp_path):
    rows = [{"name": "a, seed 1"}, {"name": "a, seed 2"}]
    compare.compare_seeds(rows, tmp_path)
    assert sections.comparison_table({row["name"]: row for row in rows}) == "" and rows[0] == {"name": "a, seed 1"}


def test_a_recorded_comparison_stays_without_predictions(tmp_path):
    rows = [{"name": "a, seed 1", "against_peer": {"difference": 1.0}}, {"name": "transformers, seed 1"}]
    compare.compare_seeds(rows, tmp_path)
    assert rows[0]["against_peer"] == {"difference": 1.0}


# --- the experiments ----------------------------------------------------------------------------------------------


def make_row(group, name, rng):
    """A recorded row with random numbers in place of a run's."""
    words, tasks = command_of(group, name), ("sst", "para", "sts")

    def scores():
        return dict(zip((*tasks, "norm", "raw"), (float(x) for x in rng.uniform(0.3, 0.9, 5)), strict=True))

    def point(**more):
        return {"score": float(rng.random()), "layers": float(rng.uniform(1, 6)), "shares": [], **more}

    row = {
        "name": name,
        "command": " ".join(words),
        "commit": "c0ffee",
        "device": "cpu: test",
        "threads": 1,
        "torch": "2",
    }
    row |= {
        "seed": split_name(name)[2],
        "started": f"{rng.random()}",
        "best": scores(),
        "last": scores(),
        "sweep": None,
    }
    row |= {"positive_rate": 0.4, "train_seconds": 90.0, "eval_seconds": 30.0, "peak_mib": 2000, "exits": None}
    names = tasks[:1] if "--tasks sst" in row["command"] else tasks
    row["metrics"] = {"last": dict.fromkeys(names, {}), "best": {"sst": {"confusion": np.eye(5, dtype=int).tolist()}}}
    row["phases"] = [{"phase": f"epoch 1/4, stage {letter} (all exits)", **scores()} for letter in "AABAABAA"]
    row["losses"] = {"step": [50, 100]} | {f"{task} loss": [1.5, 1.2] for task in tasks}
    row["losses"] |= {f"cosine {pair}": [0.1, None] for pair in ("sst-para", "sst-sts", "para-sts")}
    row["measured"] = {"trained": 1000, "compute": 2.0, "train_scores": {"sst": 0.6}}
    if "lab.ensemble" in words:
        row["measured"]["against"] = {
            "their mean": {"difference": 0.01, "low": -0.001, "high": 0.02, "not_better": 0.04}
        }
    if "--early_exit" in words:
        row["exits"] = {"cross_fitted_norm": {"exit": 0.7, "full": 0.71}, "cross_fitted_layers": 3.5}
        kinds = {"sst": ("confidence", "lte"), "para": ("confidence", "lte"), "sts": ("lte",)}
        curves = {t: {kind: [point(threshold=x) for x in (0.5, 1.01)] for kind in kinds[t]} for t in tasks}
        chosen = [
            {"allowed": x, "norm": 0.7, "layers": 3.0, "tasks": {t: point() for t in tasks}} for x in (0, 0.1, 0.2)
        ]
        exits = {"curves": curves, "chosen": {"auto": chosen, "lte": chosen}, "oracle": {t: point() for t in tasks}}
        exits["layer_scores"] = {t: [0.5] * 6 for t in tasks}
        row["measured"]["exits"] = exits

        def timed():
            return {"score": 0.5, "mean_layers": 3.0, "examples_per_second": float(rng.uniform(100, 300))}

        settings = ("full depth", "0.5", "0.999", "auto")
        row["sweep"] = {setting: timed() | {"tasks": {t: timed() for t in tasks}} for setting in settings}
    return row


@pytest.mark.parametrize("group", EXPERIMENTS)
def test_an_experiment_has_a_page(group):
    """The question on top, a line for each recipe, the numbers of the runs, the answer, and something to draw."""
    rng = np.random.default_rng(0)
    rows = {name: make_row(group, name, rng) for name in GROUPS[group].rows}
    text = pages.page(group, source_of({group: rows}))
    assert text.startswith(f"# {GROUPS[group].question}\n") and "not run" not in text.replace("Not run", "")
    recipes = [name for name in GROUPS[group].rows if split_name(name)[2] == 1]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(sum(line.startswith(f"| {name.partition(', seed ')[0]} |") for line in lines) == 1 for name in recipes)
    assert len(pages.numbers_csv(group, rows).splitlines()) == 1 + len(rows)
    assert panels.PANELS[group](rows) and panels.TITLES[group]
    answer = pages.answer(group, source_of({group: rows}))
    # all typed sentences have their numbers
    assert len(answer) >= len(pages.ANSWERS[group]["text"]) and "not run" not in " ".join(answer)
    rows.popitem()
    assert (
        f"1 of {len(GROUPS[group].rows)} runs (further seeds count) are missing"
        in pages.answer(group, source_of({group: rows}))[-1]
    )


@pytest.mark.parametrize("group", EXPERIMENTS)
def test_a_row_that_was_not_run_is_marked(group):
    text = pages.page(group, source_of({}))
    assert text.count("| not run |") == sum(split_name(name)[2] == 1 for name in GROUPS[group].rows)
    assert "Not answered: no row of this table was run." in text and panels.PANELS[group]({}) == []


def test_the_page_of_the_score_has_confusion_matrix_and_comparisons():
    row = make_row("score", "ensemble of three seeds", np.random.default_rng(0))
    text = pages.page("score", source_of({"score": {row["name"]: row}}))
    assert "| their mean | +0.0100 | -0.0010 to +0.0200 | 4.0% |" in text
    [first] = [line for line in text.splitlines() if line.startswith("| negative |")]
    assert first == "| negative | 1 | 0 | 0 | 0 | 0 |"


def test_seeds_are_averaged_in_the_table():
    rng = np.random.default_rng(0)
    rows = {name: make_row("berter-table2", name, rng) for name in ("Baseline", "Baseline, seed 2", "SLF + Smart Alt")}
    for row, norm in zip(rows.values(), (0.7, 0.72, 0.6), strict=True):
        row["last"]["norm"] = norm
    head, lines = tables.table("berter-table2", source_of({"berter-table2": rows}))
    table = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert (table["Baseline"]["seeds"], table["Baseline"]["norm"]) == ("2", "0.710 ± 0.014")
    assert table["SLF + Smart Alt"]["stages"] == "AABAABAA"
    # (.510 + .632 + (.818 + 1) / 2) / 3
    assert table["SLF + Smart Alt + Early Exit"]["paper: norm"] == "0.684"
    assert table["SLF + Smart Alt + Early Exit"]["seeds"] == "not run"


def test_a_recipe_is_compared_with_the_baseline_of_its_block():
    bases = {recipe: words[4] for recipe, words in against_baseline("berter-table2").items()}
    assert bases["best recipe: SLF"] == "best recipe: Baseline" and bases["SLF"] == "Baseline"
    assert not {"Baseline", "best recipe: Baseline"} & set(bases) and against_baseline("smarter") == {}
    # an ensemble is compared with its own members, row by row
    assert against_baseline("score") == {}


def test_the_answer_names_the_clear_differences():
    """One seed a side, one task after another: half of the interval is 1.96 x .02 x sqrt 2 = .055."""
    rng = np.random.default_rng(0)
    norms = {"Baseline": 0.7, "SLF": 0.76, "Full SMART": 0.64, "Early Exiting": 0.71, "SLF + Smart Alt": 0.9}
    rows = {name: make_row("berter-table2", name, rng) for name in norms}
    for name, norm in norms.items():
        rows[name]["last"]["norm"] = norm
    # a run of other tasks has another norm
    del rows["SLF + Smart Alt"]["last"]["sts"]
    source = source_of({"berter-table2": rows})
    higher, lower, open_, *_ = pages.answer("berter-table2", source)
    assert higher == "- Norm clearly higher than the baseline's: SLF (+.060 ± .055)."
    assert lower == "- Norm clearly lower than the baseline's: Full SMART (-.060 ± .055)."
    assert open_ == "- Norm not clearly different from the baseline's: Early Exiting (+.010 ± .055)."
    head, lines = tables.table("berter-table2", source)
    assert {line[0]: line[head.index("difference")] for line in lines}["SLF"] == "+.060 ± .055"
    rows = {"SLF": rows["SLF"]}
    text = pages.answer("berter-table2", source_of({"berter-table2": rows}))
    assert text == [f"Not answered: the rows that are compared were not run. {pages.WHY_MISSING}"]


def test_the_oracle_leaves_at_the_first_exit_that_no_other_beats():
    """Row 1 is right from exit 2 on, row 2 never, row 3 at exit 1 alone; a regression is nearest at exit 2."""
    tasks = build_tasks()
    values, labels = np.array([[0, 1, 1], [2, 2, 2], [3, 4, 4]]), np.array([1, 0, 3])
    nothing = np.zeros((3, 3))
    exits = AllExits(tasks["sst"], np.arange(3), labels, values, nothing, nothing)
    assert measure.oracle_layers(exits).tolist() == [2, 1, 1]
    result = measure.score_oracle(exits)
    assert result["score"] == pytest.approx(2 / 3, abs=1e-5) and result["layers"] == pytest.approx(4 / 3)
    one = AllExits(tasks["sts"], np.arange(1), np.array([2.0]), np.array([[1.0, 2.1, 2.5]]), nothing[:1], nothing[:1])
    assert measure.oracle_layers(one).tolist() == [2]


def test_a_short_array_of_layers_has_an_entry_for_each_row():
    assert measure.digits(np.array([6, 3, 1]), False) == "631"
    assert measure.digits(np.array([12, 3, 1]), True) == [12, 3, 1]


@pytest.mark.parametrize(
    ("words", "norms", "cost"),
    [
        # 2 layers: an epoch of plain training is 2 forward and 2 * 2 backward
        ("--epochs 2 --epoch_size 0.5", [0.1, 0.2], 1.0),
        # stage 1: (1 + 2) and (2 + 2) layer passes for half an epoch each; stage 2: an epoch of 6
        ("--slf --slf_epochs 0.5 --epochs 1", [0.1] * 3, (0.5 * 3 + 0.5 * 4 + 6) / 6),
        # the heads alone: 2 forward; then with the last layer: 2 forward, 2 backward
        ("--gradual_unfreezing 0.5 --epochs 1", [0.1] * 3, (0.5 * 2 + 0.5 * 4 + 6) / 6),
        # adapters of both layers train, so their gradients pass through both
        ("--adapter lora --epochs 2", [0.1, 0.2], 2.0),
    ],
)
def test_the_cost_of_a_plan_is_counted_by_hand(program, words, norms, cost):
    flags, given, _ = parse_flags([*words.split(), "--pooling", "mean"])
    model = multitask_classifier.make_model(
        flags, build_tasks(), multitask_classifier.BertModel.from_pretrained(program.weights)
    )
    assert measure.training_cost(flags, model, norms) == pytest.approx(cost)


def in_process(monkeypatch):
    """Rows are trained in this process: to start a program takes longer than to train a tiny model."""
    programs = {"multitask_classifier.py": multitask_classifier, "lab.measure": measure, "lab.ensemble": ensemble}
    original = experiments.subprocess.run

    def run(words, **keywords):
        if words[0] != sys.executable:
            return original(words, **keywords)
        words = words[2:] if words[1] == "-m" else words[1:]
        return SimpleNamespace(returncode=programs[words[0]].main(words[1:]) or 0)

    class Here:
        """Runs what it is given at once: a program handles signals, which only the main thread may."""

        def __init__(self, jobs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            function(*arguments)
            return SimpleNamespace(result=lambda: None)

    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.setattr(experiments, "ThreadPoolExecutor", Here)


def test_a_check_run_goes_through_rows_and_leaves_results_alone(program, tmp_path, monkeypatch):
    """Cut data, tiny weights: a row of each kind is trained, measured and recorded; the page has its numbers."""
    in_process(monkeypatch)
    monkeypatch.setattr(measure, "ALLOWED", (0.005,))  # fewer thresholds to choose
    before = {path: path.stat().st_mtime_ns for path in record.RESULTS.rglob("*")}
    names = ["SLF + Conc Before Embed", "best recipe: SLF + Smart Alt + Early Exit"]
    command = ["berter-table2", "--fraction", "0.3", "--epochs", "1", "--weights", str(program.weights)]
    command += ["--data_dir", str(program.data), "--scratch", str(tmp_path / "scratch"), "--only", *names]
    experiments.main(command)
    results = tmp_path / "scratch" / "results"
    rows = load_rows("berter-table2", results)
    assert list(rows) == names and {path: path.stat().st_mtime_ns for path in record.RESULTS.rglob("*")} == before
    for row in rows.values():
        arrays = row["measured"]["predictions"]
        assert {name: len(one["values"]) for name, one in arrays.items()} == {"sst": 16, "para": 20, "sts": 20}
        assert row["phases"] and row["losses"]["step"] and row["measured"]["exits"]["layer_scores"]
    early = rows[names[1]]["measured"]
    assert set(early["predictions"]["sst"]) == {"values", "left", "left_values"} and early["exits"]["chosen"]
    place = Place(tmp_path / "scratch" / "runs", results, str(tmp_path / "scratch" / "data"))
    experiments.time_exits([("berter-table2", name) for name in names], place)
    sweep = record.read_sweep(place.run("berter-table2", names[1]))
    assert list(sweep) == ["full depth", *experiments.TIMED.split(","), "auto"]
    assert sweep["auto"]["tasks"]["sst"]["score"] > 0
    assert record.read_sweep(place.run("berter-table2", names[0])) is None
    text = (results / "berter-table2.md").read_text()
    assert text.count("| not run |") == 14 and f"| {names[0]} | 1 |" in text


def test_rows_side_by_side_run_on_one_core_each_and_stop_in_time(tmp_path, monkeypatch):
    """Every row has a log of its own; none starts after the given time; one that was interrupted stops the others."""
    seen = []

    def run(words, cwd, env, stdout, stderr):
        seen.append((env["OMP_NUM_THREADS"], stdout.name))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(experiments.subprocess, "run", run)
    rows = experiments.choose_rows(SimpleNamespace(groups=["exits"], only=None))
    experiments.run_rows(rows, Place(tmp_path, tmp_path), 2, 1.0)
    assert sorted(seen) == sorted(("1", str(tmp_path / "exits" / f"{slug(name)}.txt")) for _, name in rows)
    experiments.run_rows(rows, Place(tmp_path, tmp_path), 2, -1.0)
    assert len(seen) == 3
    monkeypatch.setattr(experiments.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=130))
    with pytest.raises(InputError, match="interrupted"):
        experiments.run_rows(rows, Place(tmp_path, tmp_path), 2, 1.0)


def test_recorded_rows_are_not_trained_again_nor_mixed_with_rows_of_the_sample(program, tmp_path, monkeypatch, capsys):
    """In a clone the runs are gone and the records stay; a clone has no course data."""
    trained = []
    monkeypatch.setattr(experiments, "run_rows", lambda rows, *_: trained.extend(rows))
    monkeypatch.setattr(experiments, "record_rows", lambda *_: None)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    command = ["methods", "--only", "adapter LHUC", "PCGrad", "--data_dir", str(program.data)]
    path = Place(results=tmp_path).record("methods", "PCGrad")
    write_row(path, {"name": "PCGrad", "command": " ".join(command_of("methods", "PCGrad"))})
    experiments.main(command)
    assert trained == [("methods", "adapter LHUC")]
    assert capsys.readouterr().out == "1 rows are recorded already, 1 are to be trained\n"
    experiments.main([*command, "--list"])
    assert "methods: PCGrad (recorded)" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"get them with ./setup.sh --data"):
        experiments.main([*command[:-1], str(tmp_path / "empty")])
    write_row(path, {"name": "PCGrad", "command": "other flags"})
    experiments.main(command)
    assert sorted(trained[1:]) == [("methods", "PCGrad"), ("methods", "adapter LHUC")]


@pytest.mark.parametrize("words", [["report"], ["core", "--list"], ["core", "--time"], ["core", "--collect"]])
def test_a_check_run_trains(words):
    with pytest.raises(InputError, match="a check run trains"):
        experiments.main([*words, "--fraction", "0.1"])


def test_a_check_run_keeps_the_files_of_a_folder_that_it_did_not_make(tmp_path, program):
    command = ["methods", "--fraction", "0.5", "--data_dir", str(program.data), "--scratch", str(tmp_path)]
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="has files that no check run wrote"):
        experiments.main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "check-run").touch()
    place = experiments.check_place(experiments.make_parser().parse_args(command))
    assert not (tmp_path / "mine").exists() and list(Path(place.data_dir).iterdir())


def test_flags_of_a_check_run_need_a_fraction():
    with pytest.raises(InputError, match="add --fraction"):
        experiments.main(["core", "--epochs", "1"])
