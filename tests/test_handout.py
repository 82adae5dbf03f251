"""The handout: pages are complete and current, their examples are recomputed, and scores come from the record."""

import doctest
import inspect
import json
import re

import pytest
import torch
from test_structure import ROOT, commands
from tiny import refusal

from flags import check_flags, parse_flags
from teaching import handout, scores
from teaching.__main__ import main
from teaching.parts import PARTS

SECTIONS = ["What and why", "The equation", "@write", "An example by hand", "Hints", "@check", "Questions"]
PAGES = {name: (handout.PAGES / f"{name}.md").read_text() for name in PARTS}
ANSWERS = (ROOT / "teaching" / "answers.md").read_text()


def section(text, title):
    """The text of one section."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |^@|\Z)", text, re.MULTILINE | re.DOTALL)[1]


def numbered(text):
    """The numbers of a numbered list."""
    return re.findall(r"^(\d)\. ", text, re.MULTILINE)


def run_example(name):
    """Run the doctest of a page: (failed, attempted). Nothing is printed, and random numbers go on as before."""
    test = doctest.DocTestParser().get_doctest(PAGES[name], {}, name, f"{name}.md", 0)
    with torch.random.fork_rng():
        return tuple(doctest.DocTestRunner().run(test, out=lambda text: None))[:2]


# --- typed pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_a_page_has_all_sections_two_hints_and_two_questions(name):
    marks = re.findall(r"^(?:## (.+)|(@\w+))$", PAGES[name], re.MULTILINE)
    assert [title or mark for title, mark in marks] == SECTIONS
    assert "Source: " in section(PAGES[name], "The equation")
    assert numbered(section(PAGES[name], "Hints")) == ["1", "2"]
    assert numbered(section(PAGES[name], "Questions")) == ["1", "2"]
    assert numbered(section(ANSWERS, name)) == ["1", "2"]


@pytest.mark.parametrize("name", PARTS)
def test_the_example_of_a_page_is_right(name):
    failed, attempted = run_example(name)
    assert failed == 0 and attempted >= 4


@pytest.mark.parametrize("name", PARTS)
def test_the_example_of_a_page_fails_while_the_part_is_blank(name, monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError

    for blank in PARTS[name].blanks:
        owner, _, last = blank.rpartition(".")
        function = handout.find_function(blank)
        kind = staticmethod if isinstance(function, staticmethod) else lambda f: f
        monkeypatch.setattr(handout.find_function(owner) if "." in owner else __import__(owner), last, kind(missing))
    assert run_example(name)[0] > 0


def test_every_part_has_its_page_and_its_week():
    named = [name for names, _ in handout.WEEKS for name in names]
    assert named == list(PARTS)
    assert {path.stem for path in handout.PAGES.glob("*.md")} == {*PARTS, "cover", "skeleton"}
    assert re.findall(r"^## (\w+)$", ANSWERS, re.MULTILINE) == list(PARTS)


# --- made pages -----------------------------------------------------------------------------------------------------


def test_the_handout_is_written_once(tmp_path):
    assert not main(["handout", str(tmp_path / "handout")])
    written = {path.name: path.read_text() for path in (tmp_path / "handout").iterdir()}
    assert set(written) == {"README.md", "skeleton.md", *(f"{name}.md" for name in PARTS)}
    assert "not empty" in refusal(handout.write_handout, tmp_path / "handout")
    for name, text in written.items():
        assert re.findall(r"^@\w+$", text, re.MULTILINE) == [], name
        links = re.findall(r"\]\(([^)#]+)\)", text)
        assert [link for link in links if "://" not in link and link not in written] == []


def test_a_course_of_some_parts_has_their_pages_only(tmp_path):
    assert not main(["handout", str(tmp_path / "handout"), "--parts", "attention", "layer"])
    cover = (tmp_path / "handout" / "README.md").read_text()
    assert {path.stem for path in (tmp_path / "handout").iterdir()} == {"README", "skeleton", "attention", "layer"}
    points = PARTS["attention"].points + PARTS["layer"].points
    assert re.search(rf"\| all 2 parts \| [\d.]+ \| {points} \|", cover) and "(slf.md)" not in cover


@pytest.mark.parametrize("name", PARTS)
def test_a_page_prints_points_signatures_and_docstrings_of_today(name):
    part, page = PARTS[name], handout.part_page(name)
    assert f"\n{part.points} points, about {part.minutes} minutes.\n" in page
    for blank in part.blanks:
        function = handout.find_function(blank)
        function = getattr(function, "__func__", function)
        assert f"# {blank}\ndef {function.__name__}(" in page
        [parameters] = re.findall(rf"^# {re.escape(blank)}\ndef \w+\((.*)\):$", page, re.MULTILINE)
        assert [word.partition("=")[0] for word in parameters.split(", ")] == list(
            inspect.signature(function).parameters
        )
        for line in (function.__doc__ or "").splitlines():
            assert line.strip() in page
    for check in part.checks:
        assert f"| {check.title} | {check.points} |" in page
    for word in part.forbidden:
        assert f"`{word}`" in page


def test_the_cover_sums_points_and_hours():
    cover = handout.cover_page()
    points = sum(part.points for part in PARTS.values())
    hours = sum(part.minutes for part in PARTS.values()) / 60
    assert f"| | all {len(PARTS)} parts | {hours:.1f} | {points} | |" in cover


def test_the_training_commands_of_the_pages_parse():
    lines = [words for words in commands(handout.cover_page()) if "multitask_classifier.py" in words]
    assert len(lines) == len(scores.RUNS)
    for words in lines:
        flags, typed, _ = parse_flags(words[2:])
        check_flags(flags, typed)


# --- expected scores --------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path, monkeypatch):
    """An empty record in a folder of its own."""
    monkeypatch.setattr(scores, "RECORD", tmp_path / "expected.json")
    return tmp_path / "expected.json"


def make_row(name, seed, **changes):
    """A row of the record: SST .5, .6, .7, ... for seeds 1, 2, 3, ..."""
    row = {"run": name, "seed": seed, "command": scores.RUNS[name].command, "minutes": 2.0}
    return row | {"scores": {"sst": 0.4 + seed / 10, "norm": 0.5}} | changes


def test_mean_and_standard_deviation_by_hand():
    """.5, .6, .7: the deviations are -.1, 0, .1, so the variance is .02 / 2 = .01."""
    assert scores.mean_and_deviation([0.5, 0.6, 0.7]) == ".600 (.100)"
    assert scores.mean_and_deviation([0.5]) == ".500"
    assert scores.mean_and_deviation([-0.25, -0.25]) == "-.250 (.000)"
    assert scores.mean_and_deviation([1.0]) == "1.000"
    assert scores.mean_and_deviation([]) == ""


def test_the_table_shows_what_was_run_with_todays_commands(record):
    name = "SST alone, frozen"
    assert f"| {name} | 0 | not run yet |" in scores.score_table("attention")
    old = make_row(name, 3, command="multitask_classifier.py --epochs 1")
    record.write_text(json.dumps([make_row(name, 1), make_row(name, 2), old]))
    table = scores.score_table("attention")
    assert f"| {name} | 2 | .550 (.071) | | | | .500 (.000) | 2.0 |" in re.sub(r" +", " ", table)
    assert f"{scores.RUNS[name].command} --seed 1    # {name}" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_every_part_shows_a_run_and_names_only_parts():
    shown = {part for run in scores.RUNS.values() for part in run.parts}
    assert shown == set(PARTS)


def test_missing_seeds_are_trained_and_recorded_one_by_one(record, monkeypatch, capsys):
    trained = []

    def train(name, seed, data_dir):
        trained.append((name, seed, data_dir))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return make_row(name, seed)

    monkeypatch.setattr(scores, "train_seed", train)
    name = "SST alone, fine-tuned"  # three seeds
    with pytest.raises(KeyboardInterrupt):
        main(["expected", "--only", name, "--data_dir", "somewhere"])
    assert trained == [(name, seed, "somewhere") for seed in (1, 2, 3)]
    assert [row["seed"] for row in json.loads(record.read_text())] == [1, 2]
    main(["expected", "--only", name])
    assert trained[3:] == [(name, 3, None)]
    main(["expected", "--only", name, "sample, frozen", "--seeds", "1"])
    assert trained[4:] == [("sample, frozen", 1, None)]
    # the record is in the order of the list, whatever was trained first
    assert [row["run"] for row in json.loads(record.read_text())] == ["sample, frozen", name, name, name]
    capsys.readouterr()
    main(["expected", "--list"])
    assert capsys.readouterr().out.count("\n") == sum(run.seeds for run in scores.RUNS.values())
    assert len(trained) == 5


def test_a_run_is_read_from_its_files(program, monkeypatch):
    """The scores are those of the best epoch in summary.json."""
    folder = program.train("expected", "--epochs", 1)
    summary = json.loads((folder / "summary.json").read_text())["best"]
    row = scores.read_run("sample, frozen", 7, folder)
    assert row["seed"] == 7 and row["command"] == scores.RUNS["sample, frozen"].command
    expected = {"sst": summary["tasks"]["sst"]["accuracy"], "para": summary["tasks"]["para"]["accuracy"]}
    expected |= {"sts": summary["tasks"]["sts"]["pearson"], "norm": summary["norm"]}
    assert row["scores"] == expected and row["minutes"] >= 0
    assert row["torch"] == torch.__version__


def test_a_failed_run_is_not_recorded(record, monkeypatch):
    started = []

    def run(words, cwd, env):
        started.append((words[1:], env["OMP_NUM_THREADS"]))
        return type("Done", (), {"returncode": 130})

    monkeypatch.setattr(scores.subprocess, "run", run)
    line = refusal(scores.run_expected, ["SST alone, frozen"], 1, "/somewhere")
    assert "SST alone, frozen, seed 1" in line and not record.exists()
    [(words, threads)] = started
    assert threads == "1" and words[:3] == ["multitask_classifier.py", "--weights", "minilm"]
    assert words[-2:] == ["--data_dir", "/somewhere"] and "--overwrite" in words
