"""Asking a trained run: every way in, the numbers of evaluation, and what is said when something is wrong."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import Program, read_csv, refusal, script_refusal

import predict
from tasks import build_tasks

SENTIMENTS = ("negative", "somewhat negative", "neutral", "somewhat positive", "positive")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, the data it was trained on, and the weights it started from."""
    program = Program(tmp_path_factory.mktemp("trained"))
    program.run = program.train("run", "--lr", 0.01)
    return program


@pytest.fixture
def ask(trained, capsys, monkeypatch):
    """Ask the run: ask(task, *arguments, stdin=...) gives the lines printed."""

    def answer(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        predict.main([str(trained.run), *map(str, arguments)])
        return capsys.readouterr().out.splitlines()

    return answer


def refused(ask, *arguments, stdin=None):
    """The one line with which a question is refused."""
    return refusal(lambda: ask(*arguments, stdin=stdin))


def readable(trained, task, split):
    """A run's own table of predictions."""
    return read_csv(trained.run / "predictions" / f"{task}-{split}-readable.csv")


def columns(rows, *names):
    """Some columns of a table."""
    return [[row[name] for name in names] for row in rows]


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_file_gets_the_numbers_of_evaluation(ask, trained, tmp_path, task, split):
    """A dev file has labels, a test file has none."""
    source = trained.data / build_tasks()[task].file(split)
    assert ask(task, "--file", source, "--out", tmp_path / "out.csv") == []
    answers, expected = read_csv(tmp_path / "out.csv"), readable(trained, task, split)
    texts = ("sentence",) if task == "sst" else ("sentence1", "sentence2")
    names = ("id", *texts, "prediction", "label", "probability")
    assert list(answers[0]) == list(names)
    assert columns(answers, *names) == columns(expected, *names)
    assert len({row["prediction"] for row in answers} | {row["probability"] for row in answers}) > 2


def test_a_run_with_exits_answers_by_them(trained, tmp_path):
    """Its examples leave after the layers at which they left when the run was evaluated."""
    flags = ("--early_exit", "--exit_threshold", "auto", "sst=0", "sts=1")
    run, layers = trained.train("exits", "--lr", 0.01, *flags), set()
    names = ("id", "prediction", "probability")
    for name, task in build_tasks().items():
        out = tmp_path / f"{name}.csv"
        predict.main([str(run), name, "--file", str(trained.data / task.file("dev")), "--out", str(out)])
        expected = read_csv(run / "predictions" / f"{name}-dev-readable.csv")
        assert columns(read_csv(out), *names) == columns(expected, *names)
        layers |= {row["layers"] for row in expected}
    assert layers == {"1", "2"}


def test_one_text_gives_a_label_and_its_probability(ask, trained):
    row = readable(trained, "sst", "dev")[3]
    label, probability = ask("sst", row["sentence"])[0].split("\t")
    assert label == row["label"] and label in SENTIMENTS
    assert float(probability) == pytest.approx(float(row["probability"]), abs=1.1e-4)


def test_a_pair_gives_a_label_or_a_score(ask, trained):
    row = readable(trained, "para", "dev")[5]
    label, probability = ask("para", row["sentence1"], row["sentence2"])[0].split("\t")
    assert label == row["label"]
    assert float(probability) == pytest.approx(float(row["probability"]), abs=1.1e-4)
    row = readable(trained, "sts", "dev")[5]
    score = ask("sts", row["sentence1"], row["sentence2"])
    assert float(score[0]) == pytest.approx(float(row["prediction"]), abs=1.1e-4)
    assert ask("sts", row["sentence2"], row["sentence1"]) != score


def test_standard_input_is_answered_line_by_line(ask, trained):
    rows = readable(trained, "sst", "test")
    texts = [row["sentence"] for row in rows] + ["", "é\tagain"]
    lines = ask("sst", stdin="\r\n".join(texts).encode())
    assert len(lines) == len(texts)
    assert [line.split("\t")[0] for line in lines[:-2]] == [row["label"] for row in rows]
    assert lines[-2].split("\t")[0] in SENTIMENTS


def test_pairs_of_standard_input_are_separated_by_a_tab(ask, trained):
    rows = readable(trained, "sts", "dev")
    lines = ask("sts", stdin="\n".join(f"{row['sentence1']}\t{row['sentence2']}" for row in rows).encode())
    assert [float(line) for line in lines] == pytest.approx([float(row["prediction"]) for row in rows], abs=1.1e-4)


def test_every_row_gets_an_answer(ask, tmp_path):
    path, out = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text("\tid\tsentence1\tsentence2\n0\ta\t\tx\n1\tb\ty\t\n2\tc\t\t\n3\td\tthe dog\tthe cat\n")
    ask("para", "--file", path, "--out", out)
    assert [row["id"] for row in read_csv(out)] == ["a", "b", "c", "d"]
    assert all(row["label"] and 0.5 <= float(row["probability"]) <= 1 for row in read_csv(out))
    assert len(ask("para", "--file", path)) == 4


def test_answers_to_texts_can_be_written_too(ask, tmp_path):
    assert ask("sst", "the dog", "--out", tmp_path / "out.csv") == []
    assert columns(read_csv(tmp_path / "out.csv"), "id", "sentence") == [["1", "the dog"]]


def test_a_long_text_is_cut_and_told(ask, capsys, trained):
    predict.main([str(trained.run), "sst", "the " * 1000])
    printed = capsys.readouterr()
    assert "40 tokens" in printed.err and printed.out.count("\n") == 1


def test_wrong_questions_are_refused_in_one_line(ask, trained, tmp_path):
    assert "two texts" in refused(ask, "para", "only one")
    assert "one text" in refused(ask, "sst", "not", "quoted")
    assert "cfimdb" in refused(ask, "cfimdb", "a film")
    assert "imdb" in refused(ask, "imdb", "a film")
    assert "--file" in refused(ask, "sst", "a film", "--file", trained.data / "ids-sst-dev.csv")
    assert "nowhere.csv" in refused(ask, "sst", "--file", tmp_path / "nowhere.csv")
    assert "sentence" in refused(ask, "sst", "--file", trained.data / "sts-dev.csv")
    assert "not UTF-8" in refused(ask, "sst", "a film\udce9")
    mine = tmp_path / "mine.csv"
    shutil.copy(trained.data / "ids-sst-dev.csv", mine)
    before = mine.read_bytes()
    assert "--out" in refused(ask, "sst", "--file", mine, "--out", mine) and mine.read_bytes() == before
    assert "cannot be written" in refused(ask, "sst", "a film", "--out", tmp_path / ("long" * 100))
    assert "file/out.csv" in refused(ask, "sst", "a film", "--out", trained.run / "vocab.txt" / "file/out.csv")


def test_a_blank_line_is_answered_too(ask):
    pairs = ask("sts", stdin=b"one\ttwo\n\nthree\tfour\n")
    assert len(pairs) == 3 and pairs[0] == ask("sts", "one", "two")[0]
    assert len(ask("sst", stdin=b"\na film\n")) == 2


def test_a_run_in_half_precision_is_asked_on_a_cpu(trained, tmp_path, capsys):
    copy = shutil.copytree(trained.run, tmp_path / "copy")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"precision": "fp32"', '"precision": "fp16"'))
    assert "--precision fp16" in refusal(predict.main, [str(copy), "sst", "a film"])
    predict.main([str(copy), "sst", "a film", "--precision", "fp32", "--eval_batch_size", "1"])
    answer = capsys.readouterr().out
    predict.main([str(trained.run), "sst", "a film"])
    assert capsys.readouterr().out == answer


def test_wrong_standard_input_is_refused_in_one_line(ask):
    assert "empty" in refused(ask, "sst", stdin=b"")
    assert "line 2" in refused(ask, "para", stdin=b"one\ttwo\nalone\n")
    assert "line 3" in refused(ask, "sst", stdin=b"one\ntwo\n\xff\xfe\n")


def test_wrong_runs_are_refused_in_one_line(trained, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path, trained.weights, trained.run / "vocab.txt"):
        assert str(folder) in refusal(predict.main, [str(folder), "sst", "a film"])
    copy = tmp_path / "copy"
    for name, spoil in {
        "best.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-10]),
        "vocab.txt": lambda path: path.unlink(),
        "config.json": lambda path: path.write_text("{"),
        "summary.json": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    }.items():
        shutil.copytree(trained.run, copy)
        spoil(copy / name)
        assert name in refusal(predict.main, [str(copy), "sst", "a film"])
        shutil.rmtree(copy)
    shutil.copytree(trained.run, copy)
    config = json.loads((copy / "config.json").read_text())
    spoilt = [[1], {"flags": 1}, config | {"bert": 1}, config | {"bert": {"layers": 6}}]
    for content in [*spoilt, {key: value for key, value in config.items() if key != "bert"}]:
        (copy / "config.json").write_text(json.dumps(content))
        assert "config.json" in refusal(predict.main, [str(copy), "sst", "a film"])


def test_the_script_answers_from_anywhere(trained, tmp_path):
    command = [sys.executable, predict.__file__, trained.run, "sst"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)
    done = subprocess.run(command, input="a dog\na cat\n", **how)
    assert done.returncode == 0 and done.stdout.count("\n") == 2 and done.stderr == ""


def test_the_script_refuses_in_one_line_with_status_2(trained, monkeypatch, capsys):
    assert "two texts" in script_refusal(monkeypatch, capsys, predict.__file__, trained.run, "para", "alone")
