"""The whole program on a tiny model: its files, its repeatability, and what it says when something is wrong.

The runs are real ones: main() with a command line, a weights folder and CSV files. Where a run is killed it is a
process of its own, and the kill is SIGKILL.
"""

import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain, combinations, count
from pathlib import Path

import driver
import numpy as np
import pytest
import torch
import torch._dynamo
from driver import main
from safetensors.torch import load_file
from tiny import (
    EPOCHS,
    Program,
    call_at,
    log_of,
    make_model,
    read_csv,
    refusal,
    script_refusal,
    state_of,
    weights_of,
    write_data,
    write_weights,
)
from torch._dynamo.utils import counters

import building
import evaluation
import files
import multitask_classifier
import report
import runs
from bert import BertModel
from datasets import read_dataset
from early_exit import ExitInference
from errors import InputError
from evaluation import predict
from flags import parse_flags
from multitask_classifier import load_run
from tasks import TASKS, build_tasks

PROGRAM = Path(multitask_classifier.__file__)
TASK_NAMES = ("sst", "cfimdb", "para", "sts")
STEPS_PER_EPOCH = 7
# with this, a state is saved within an epoch every few steps
OFTEN = ("--save_minutes", "0.00005", "--keep_last")


@pytest.fixture(scope="module")
def whole(program):
    """A finished run that was never stopped, with its last state."""
    return program.train("whole", "--keep_last")


@pytest.fixture
def fresh(tmp_path):
    """A program of this test's own, to be spoilt."""
    return Program(tmp_path)


def content(folder):
    """{relative path: bytes} of every file below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differences(first, second):
    """Names of the tensors that are not the same, bit for bit."""
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def assert_same_end(run, whole):
    """A run ended exactly as the one that was never stopped."""
    assert (run / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    ours, theirs = state_of(run), state_of(whole)
    assert not differences(ours["model"], theirs["model"])
    assert torch.equal(ours["rng"], theirs["rng"])
    assert ours["progress"]["scores"] == theirs["progress"]["scores"]
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for key, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(ours["optimizer"]["state"][key][name]), torch.as_tensor(value))
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    log = log_of(run)
    steps = [line["step"] for line in log if line["kind"] == "step"]
    assert steps == sorted(set(steps)) and steps[-1] == EPOCHS * STEPS_PER_EPOCH
    assert [line["phase"] for line in log if line["kind"] == "phase"] == ["epoch 1/2", "epoch 2/2"]
    assert read_csv(run / "predictions" / "sts-dev-readable.csv") == read_csv(
        whole / "predictions" / "sts-dev-readable.csv"
    )


# --- a full run ---------------------------------------------------------------------------------------------------


def test_no_model_of_the_first_stage_is_the_best_one(program, monkeypatch):
    """With dev scores that fall from phase to phase, the model after the first epoch of stage 2 is kept."""
    norms = iter([0.9, 0.8, 0.7, 0.6])
    evaluate_dev = multitask_classifier.evaluate_dev

    def falling(parts, exit_layer):
        scores, predictions = evaluate_dev(parts, exit_layer)
        return replace(scores, norm=next(norms)), predictions

    monkeypatch.setattr(multitask_classifier, "evaluate_dev", falling)
    progress = state_of(program.train_quickly("falling", "--slf", "--epochs", 2, "--keep_last"))["progress"]
    assert progress["scores"] == [0.9, 0.8, 0.7, 0.6]
    assert (progress["best"], progress["best_phase"]) == (0.7, "epoch 1/2")


def test_a_run_leaves_its_files(program, whole, capsys):
    capsys.readouterr()
    run = program.train("files")
    out = capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "vocab.txt", "log.jsonl", "best.safetensors", "summary.json", "predictions"),
        "report.html",
    }
    assert (whole / "last.pt").is_file()
    names = {
        f"{task}-{split}-{kind}.csv"
        for task in ("sst", "para", "sts")
        for split in ("dev", "test")
        for kind in ("output", "readable")
    }
    assert {path.name for path in (run / "predictions").iterdir()} == names
    summary = json.loads((run / "summary.json").read_text())
    best = summary["best"]
    sst, para, sts = (best["tasks"][name] for name in ("sst", "para", "sts"))
    assert best["raw"] == pytest.approx((sst["accuracy"] + para["accuracy"] + sts["pearson"]) / 3)
    assert best["norm"] == pytest.approx((sst["accuracy"] + para["accuracy"] + (sts["pearson"] + 1) / 2) / 3)
    assert best["norm"] == max(summary["phase_norms"]) and len(summary["phase_norms"]) == EPOCHS
    assert summary["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert f"raw {best['raw']:.4f}   norm {best['norm']:.4f}" in out
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["lr"] == 0.003 and config["weights"]["sha256"] and len(config["data"]) == 9


def test_every_row_has_a_prediction_and_the_scores_follow_from_them(whole):
    rows = read_csv(whole / "predictions" / "para-dev-readable.csv")
    right = np.mean([row["prediction"] == row["gold"] for row in rows])
    summary = json.loads((whole / "summary.json").read_text())
    assert right == pytest.approx(summary["best"]["tasks"]["para"]["accuracy"])
    lines = (whole / "predictions" / "para-dev-output.csv").read_text().splitlines()
    assert lines[0] == "id \t Predicted_Is_Paraphrase "
    assert lines[1:] == [f"{row['id']} , {float(row['prediction']):.1f} " for row in rows]


@pytest.mark.parametrize(
    "tasks", list(chain.from_iterable(combinations(TASK_NAMES, n) for n in (1, 2, 4))), ids="-".join
)
def test_every_choice_of_tasks_trains(program, tasks):
    name = "tasks-" + "-".join(tasks)
    run = program.train(name, "--tasks", *tasks, "--epochs", 1)
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["best"]["tasks"]) == list(tasks)
    heads = {key.split(".")[1] for key in load_file(run / "best.safetensors") if key.startswith("heads.")}
    assert heads == set(tasks)


@pytest.mark.parametrize("flags", [("--option", "finetune"), ("--option", "pretrain"), ("--early_exit",)], ids=" ".join)
def test_evaluating_a_saved_run_gives_the_numbers_of_training(program, capsys, flags):
    run = program.train("-".join(("evaluated", *flags)), *flags)
    before = content(run)
    trained = capsys.readouterr().out.splitlines()
    assert not main(["--option", "evaluate", "--run_dir", str(run)])
    evaluated = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("weights", "warning"))]
    start = evaluated.index(next(line for line in evaluated if line.startswith("task ")))
    table = evaluated[start : start + 5]
    assert table[-1].startswith("raw ") and [line for line in trained if line in table] == table
    after = content(run)
    assert before.items() <= after.items()
    for path in (run / "predictions").iterdir():
        assert (run / "evaluate" / "predictions" / path.name).read_bytes() == path.read_bytes()


def test_a_run_with_exits_reports_them_and_sweeps_thresholds(program):
    run = program.train("exits", "--early_exit", "--epochs", 1)
    summary = json.loads((run / "summary.json").read_text())
    left = summary["exits"]["dev"]["tasks"]
    for name in ("sst", "para", "sts"):
        rows = read_csv(run / "predictions" / f"{name}-dev-readable.csv")
        layers = [int(row["layers"]) for row in rows]
        assert set(layers) <= {1, 2} and np.mean(layers) == pytest.approx(left[name]["mean_layers"])
        assert summary["exits"]["shares"][name] == pytest.approx([layers.count(i) / len(layers) for i in (1, 2)])
    assert summary["mean_layers"] == pytest.approx(np.mean([metrics["mean_layers"] for metrics in left.values()]))
    assert not main(["--option", "evaluate", "--run_dir", str(run), "--exit_threshold", "0,.9"])
    rows = read_csv(run / "evaluate" / "sweep.csv")
    assert [(row["setting"], row["task"]) for row in rows] == [
        (setting, task) for setting in ("full depth", "0", "0.9", "auto") for task in ("sst", "para", "sts", "all")
    ]
    assert [float(row["mean_layers"]) for row in rows[:8]] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert (run / "evaluate" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_reads_other_data_and_refuses_flags_of_training(program, capsys):
    run = program.train("evaluated-elsewhere", "--epochs", 1)
    counts = {name: len(read_csv(program.data / TASKS[name].file("train"))) for name in ("sst", "sts")}
    passed = re.search(r"rows in a pass \(--split equal\): sst (\d+), para (\d+), sts (\d+)\n", capsys.readouterr().out)
    assert [int(n) for n in passed.groups()] == [counts["sst"], counts["sst"], counts["sts"]]
    other = program.folder / "other-sts.csv"
    other.write_text("".join((program.data / "sts-dev.csv").read_text().splitlines(keepends=True)[:8]))
    assert not main(["--option", "evaluate", "--run_dir", str(run)])
    assert "is not a file of the training run" not in capsys.readouterr().out
    assert not main(["--option", "evaluate", "--run_dir", str(run), "--sts_dev", str(other)])
    assert capsys.readouterr().out.count(f"{other} is not a file of the training run") == 1
    assert len(read_csv(run / "evaluate" / "predictions" / "sts-dev-readable.csv")) == 7
    # the training files are not needed
    elsewhere = program.path("without-training-files")
    elsewhere.mkdir()
    for path in (path for path in program.data.iterdir() if "train" not in path.name):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    assert not main(["--option", "evaluate", "--run_dir", str(run), "--data_dir", str(elsewhere)])
    with pytest.raises(InputError, match="--lr: belongs to training"):
        main(["--option", "evaluate", "--run_dir", str(run), "--lr", "0.1"])
    with pytest.raises(InputError, match="--run_dir"):
        main(["--option", "evaluate"])


def test_predictions_do_not_depend_on_batches_order_or_padding(program, whole):
    run = load_run(whole, torch.device("cpu"))
    model = run.model
    for name, task in model.tasks.items():
        data = read_dataset(task, program.data / task.file("dev"), run.tokenizer, run.flags["max_length"])
        alone = predict(model, data, batch_size=1).outputs
        for rows in (np.arange(len(data)), np.random.default_rng(0).permutation(len(data))):
            together = predict(model, data, rows, batch_size=len(data)).outputs
            assert np.abs(together - alone[rows]).max() <= 1e-5, name


@pytest.mark.parametrize("pairs", ["concat", "embed_concat", "siamese"])
def test_the_methods_of_the_course_equal_the_forward_pass(program, pairs):
    """The course calls with separately padded ids and masks; the loop with the batches of datasets.py."""
    tasks = build_tasks(pairs={"para": pairs, "sts": pairs})
    model, tokenizer = make_model(tasks).eval(), program.tokenizer
    methods = {"sst": model.predict_sentiment, "para": model.predict_paraphrase, "sts": model.predict_similarity}
    for name, task in tasks.items():
        data = read_dataset(task, program.data / task.file("dev"), tokenizer, 40)
        rows = np.arange(6)
        expected = model(data.batch(rows)).logits[model.depth]
        columns = [tokenizer([data.text(row)[i] for row in rows], max_length=40) for i in range(len(task.columns))]
        given = [column[key] for column in columns for key in ("input_ids", "attention_mask")]
        logits = methods[name](*given)
        assert logits.shape == ((6, 5) if name == "sst" else (6,))
        torch.testing.assert_close(logits, expected.reshape(logits.shape), rtol=0, atol=1e-12)
    # two texts that each have all positions still make a pair, cut like the loop's
    most = model.bert.config.max_position_embeddings
    ids, mask = torch.full((1, most), 7), torch.ones(1, most, dtype=torch.long)
    assert model.predict_paraphrase(ids, mask, ids, mask).isfinite().all()


def test_pretrain_leaves_bert_alone_and_trains_the_heads(program):
    run = program.train_quickly("frozen", "--option", "pretrain", "--lr", 0.01)
    untrained = program.train_quickly("frozen-untrained", "--option", "pretrain", "--lr", 1e-30)
    bert, heads = {}, {}
    for name, tensor in weights_of(run).items():
        (bert if name.startswith("bert.") else heads)[name] = tensor
    pretrained = BertModel.from_pretrained(program.weights).state_dict()
    assert not differences(bert, {f"bert.{name}": tensor for name, tensor in pretrained.items()})
    initial = weights_of(untrained)
    assert {name for name in heads if not torch.equal(heads[name], initial[name])} == heads.keys() - {"thresholds"}


def test_pretrain_trains_the_heads_with_dropout(program):
    """The features of the frozen BERT are computed without dropout; the heads are trained with it."""
    runs = [
        program.train_quickly(f"frozen-{p}", "--option", "pretrain", "--hidden_dropout_prob", p) for p in (0.0, 0.5)
    ]
    assert differences(*map(weights_of, runs)) == {f"heads.{name}.weight" for name in ("sst", "para", "sts")} | {
        f"heads.{name}.bias" for name in ("sst", "para", "sts")
    }


def test_low_precision_trains_where_the_device_has_it(program, whole):
    run = program.train("bf16", "--precision", "bf16", "--keep_last")
    changed = weights_of(run)
    assert {tensor.dtype for tensor in changed.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in changed.values())
    assert differences(changed, weights_of(whole))
    assert "fp16" in program.refused("fp16", "--precision", "fp16")
    assert not program.path("fp16").exists()


@pytest.mark.parametrize("capability, slow", [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_a_cpu_without_bf16_gets_a_warning(monkeypatch, capsys, capability, slow):
    """DEFAULT is what torch says on other processors than x86; of those nothing is known."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = torch.device("cpu")
    building.make_autocast("fp32", cpu)
    assert not capsys.readouterr().err
    building.make_autocast("bf16", cpu)
    assert ("--precision bf16: this CPU" in capsys.readouterr().err) == slow
    assert building.computes_bf16(cpu) != slow and building.computes_bf16(torch.device("cuda"))


# --- the same run again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["", "--slf --adapter before --train_backbone"])
def test_compiled_layers_train_the_same_model(program, monkeypatch, extension):
    """In training and in evaluation, and no variant is one too many to be translated."""
    flags = ("--epochs", 1, "--optimizer", "sgd", "--lr", 0.01, *extension.split())
    expected = weights_of(program.train_quickly("not-compiled", *flags, "--overwrite"))
    monkeypatch.setattr(building, "COMPILER", "eager")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = weights_of(program.train_quickly("compiled", "--compile", *flags, "--overwrite"))
    assert counters["frames"]["ok"] > 0 and found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_compiling_without_a_compiler_is_refused(program, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--compile" in program.refused("no-compiler", "--compile")


SCRIPTS = Path(multitask_classifier.__file__).parent
FREED = """
import os, torch, building

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def kept():
    before, block = resident(), torch.ones(2**24)
    grown = resident() - before
    del block
    return grown, resident() - before

print(*kept())
building.keep_freed_memory()
print(*kept())
"""


GLIBC = platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 35)


@pytest.mark.skipif(not GLIBC, reason="glibc takes so large a size since 2.35")
def test_freed_memory_stays_with_the_process():
    """Of 64 MiB that were used and freed, next to nothing is left before the call, and nearly all after it."""
    command = [sys.executable, "-c", FREED]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPTS).stdout
    (used, left), (used_later, left_later) = (map(int, line.split()) for line in told.splitlines())
    assert min(used, used_later) > 60 * 2**20
    assert left < 16 * 2**20 and left_later > 48 * 2**20


def test_a_run_that_is_older_than_a_flag_is_evaluated_and_continued(program, capsys):
    run = program.train("older", "--keep_last")
    config = json.loads((run / "config.json").read_text())
    for name in ("compile", "lnsr", "gradual_unfreezing"):
        del config["flags"][name]
    (run / "config.json").write_text(json.dumps(config))
    program.train("older", "--resume")
    capsys.readouterr()
    main(["--option", "evaluate", "--run_dir", str(run), "--data_dir", str(program.data)])
    norm = re.search(r"norm (\S+)", capsys.readouterr().out)[1]
    assert float(norm) == pytest.approx(json.loads((run / "summary.json").read_text())["best"]["norm"], abs=1e-4)


def test_the_same_seed_gives_the_same_bytes(program, whole):
    run = program.train("again", "--keep_last")
    assert_same_end(run, whole)


HARMLESS = [
    ("--steps_per_line", 1),
    ("--save_minutes", 0.00001),
    ("--eval_batch_size", 3),
    ("--tasks", "sst", "para", "sts"),
    ("--task_weights", "sst=1", "sts=1"),
]


@pytest.mark.parametrize("flags", HARMLESS, ids=lambda flags: flags[0][2:])
def test_a_flag_that_must_not_change_the_weights_does_not(program, whole, flags):
    run = program.train_quickly("harmless" + flags[0], "--keep_last", *flags, finish=True)
    assert not differences(weights_of(run), weights_of(whole))


SIAMESE = ("--pairs", "siamese")
CHANGES = [
    ("--lr", 0.001),
    ("--epochs", 3),
    ("--batch_size", 4),
    ("--hidden_dropout_prob", 0.5),
    ("--weight_decay", 0.5),
    ("--warmup", 0.5),
    ("--schedule", "cosine"),
    ("--schedule", "constant"),
    ("--clip", 0.01),
    ("--optimizer", "sgd"),
    ("--optimizer", "rmsprop"),
    ("--train_rows", "sst=8"),
    ("--split", "full"),
    ("--split", "proportional"),
    ("--sampler", "sequential"),
    ("--sampler", "round_robin"),
    ("--sampler", "proportional"),
    ("--sampler", "sqrt"),
    ("--step", "all_tasks"),
    ("--pairs", "siamese"),
    ("--pairs", "embed_concat"),
    ("--pairs", "para=siamese"),
    ("--pooling", "mean"),
    ("--para_loss", "mse"),
    ("--para_loss", "cosine", *SIAMESE),
    ("--sts_loss", "cosine", *SIAMESE),
    ("--siamese_features", "uv", *SIAMESE),
    ("--task_weights", "para=0.1"),
    ("--accumulate", 2),
    ("--seed", 1),
    ("--max_length", 8),
    ("--layer_decay", 0.5),
    ("--gradual_unfreezing", 0.5),
]


@pytest.fixture(scope="module")
def one_epoch(program):
    """{what else is set: weights after one epoch without the flag in question}."""
    extras = {(), SIAMESE, ("--para_loss", "cosine", *SIAMESE)}
    trained = {}
    for number, flags in enumerate(extras):
        trained[flags] = weights_of(program.train_quickly(f"base-{number}", "--epochs", 1, *flags))
    return trained


@pytest.mark.parametrize("flags", CHANGES, ids=lambda flags: f"{flags[0][2:]}-{flags[1]}")
def test_every_flag_changes_the_weights(program, one_epoch, flags):
    run = program.train_quickly("-".join(map(str, flags)), "--epochs", 1, "--keep_last", *flags, finish=True)
    changed, base = weights_of(run), one_epoch[tuple(flags[2:])]
    name = "bert.bert_layers.0.self_attention.query.weight"
    assert torch.isfinite(changed[name]).all() and not torch.equal(changed[name], base[name])
    shutil.rmtree(run)


def test_training_on_some_rows_takes_the_same_ones_in_every_epoch(program, capsys):
    """Twelve rows of SST in batches of four are three steps an epoch; dev and the other tasks stay whole."""
    rows = ("--train_rows", "sst=12", "para=8", "sts=8", "--split", "full", "--batch_size", 4)
    run = program.train_quickly("train-rows", *rows, finish=True)
    assert "12 of" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["steps"] == EPOCHS * (3 + 2 + 2)


def test_the_annealed_sampler_moves_from_proportional_to_even(program):
    """Its first epoch is the proportional one, its later ones are not."""
    runs = [program.train_quickly(f"sampler-{name}", "--sampler", name) for name in ("annealed", "proportional")]
    annealed, proportional = ([line["dev"] for line in log_of(run) if line["kind"] == "phase"] for run in runs)
    assert annealed[0] == proportional[0]
    assert differences(weights_of(runs[0]), weights_of(runs[1]))


def test_accumulated_batches_equal_one_large_batch(program):
    """In float64 and without dropout the two sums differ by rounding alone."""
    weights = write_weights(program.folder / "weights-without-dropout", dropout=0.0)
    usual = ("--weights", weights, "--hidden_dropout_prob", 0, "--optimizer", "sgd", "--lr", 0.1)
    torch.set_default_dtype(torch.float64)
    try:
        large = weights_of(program.train_quickly("large", *usual, "--batch_size", 8))
        small = weights_of(program.train_quickly("small", *usual, "--batch_size", 2, "--accumulate", 4))
        single = weights_of(program.train_quickly("single", *usual, "--batch_size", 2))
    finally:
        torch.set_default_dtype(torch.float32)
    name = "bert.bert_layers.0.self_attention.query.weight"
    assert large[name].dtype == torch.float64
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=0, atol=1e-10)
    assert (single[name] - large[name]).abs().max() > 1e-4


# --- stopped and continued ----------------------------------------------------------------------------------------


STEP = ("multitask_classifier", "train_step")
SAVE = ("os", "fsync")
KILLS = {
    "before the first step": [(*STEP, 1)],
    "within the first epoch": [(*STEP, 5)],
    "between the last step and the evaluation": [("multitask_classifier", "evaluate_dev", 1)],
    "in the first step of the second epoch": [(*STEP, STEPS_PER_EPOCH + 1)],
    "within the second epoch": [(*STEP, STEPS_PER_EPOCH + 5)],
    "while the first state is written": [(*SAVE, 3)],
    "while a later state is written": [(*SAVE, 7)],
    "while predictions are written": [("report", "write_predictions", 2)],
    "before last.pt takes its place": [("os", "replace", 5)],
    "again and again": [(*STEP, 4), (*SAVE, 4), (*STEP, 6)],
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
def test_a_killed_run_ends_like_one_that_was_never_stopped(program, whole, kill, kills, request):
    name = "killed-" + request.node.callspec.id.replace(" ", "-")
    resume = ()
    for owner, function, at in kills:
        kill(program.command(name, *OFTEN, *resume), owner, function, at)
        resume = ("--resume",)
    run = program.train(name, *OFTEN, "--resume")
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "at", [(*SAVE, 1), (*SAVE, 2), ("os", "replace", 3), ("os", "replace", 4)], ids=lambda at: f"{at[1]}-{at[2]}"
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_start_that_was_killed_is_no_obstacle(program, whole, kill, at, old):
    """Its files are written aside, the two of an old run are replaced, the config at the last."""
    name, flags = f"start-{old}-{'-'.join(map(str, at))}", ("--overwrite",) * old
    if old:
        program.train_quickly(name, "--epochs", 1, "--seed", 5)
    kill(program.command(name, *OFTEN, *flags), *at)
    run = program.path(name)
    if old and at[1] == "fsync":
        assert json.loads((run / "config.json").read_text())["flags"]["seed"] == 5
        assert (run / "best.safetensors").is_file() and "--overwrite" in program.refused(name)
    else:
        flags = ()
        assert "config.json" in program.refused(name, "--resume")
    assert_same_end(program.train(name, *OFTEN, *flags), whole)


# {function: (its module, the call that is interrupted, steps that are saved then)}
PLACES = {
    "train_step": (multitask_classifier, 3, 3),
    "predict": (evaluation, 3, STEPS_PER_EPOCH),
    "write_predictions": (report, 3, 2 * STEPS_PER_EPOCH),
    "load_file": (runs.safetensors.torch, 2, 2 * STEPS_PER_EPOCH),
    "send": (multitask_classifier, 2, 2 * STEPS_PER_EPOCH),
}


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_saves_and_says_how_to_continue(program, whole, monkeypatch, capsys, number, place):
    """`predict` is called within the evaluation of an epoch, after the last of its steps, `send` after the last one."""
    owner, at, steps = PLACES[place]
    name = f"{place}-{number.name}"
    with monkeypatch.context() as patch:
        call_at(patch, owner, place, at, lambda: os.kill(os.getpid(), number))
        status = main(program.command(name, "--keep_last"))
    told = capsys.readouterr().err
    assert status == 130
    assert f"--resume --run_dir {program.path(name)}" in told
    assert state_of(program.path(name))["progress"]["total_steps"] == steps
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # a resumed run need not be told the flags again
    assert not main(["--resume", "--run_dir", str(program.path(name)), "--keep_last"])
    assert_same_end(program.path(name), whole)


def test_a_signal_after_the_last_file_says_that_the_run_is_complete(program, whole, monkeypatch, capsys):
    def interrupt_when_gone():
        (program.path("complete") / "last.pt").unlink()
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        call_at(patch, runs.RunFolder, "remove_last", 1, interrupt_when_gone)
        assert main(program.command("complete")) == 130
    told = capsys.readouterr().err
    assert "complete" in told and "--resume" not in told
    files = {path.name for path in program.path("complete").iterdir()}
    assert files == {path.name for path in whole.iterdir()} - {"last.pt"}


def test_a_real_process_is_interrupted_and_continued(program, tmp_path):
    """As a user does it: the script in a terminal, Ctrl-C, and the command that it says."""
    command = [sys.executable, driver.__file__, *program.command("process", "--epochs", 5000, "--steps_per_line", 1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)
    log, deadline = program.path("process") / "log.jsonl", time.monotonic() + 60
    try:
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    told = (tmp_path / "err").read_text()
    assert "Traceback" not in told
    assert re.search(r"--resume --run_dir (\S+)", told)[1] == str(program.path("process"))
    steps = state_of(program.path("process"))["progress"]["total_steps"]
    logged = [line["step"] for line in log_of(program.path("process")) if line["kind"] == "step"]
    assert logged == list(range(1, steps + 1))


def interrupt(program, monkeypatch, name, *flags):
    """A run that was stopped in its tenth step."""
    with monkeypatch.context() as patch:
        call_at(patch, multitask_classifier, "train_step", 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(program.command(name, *flags)) == 130
    return program.path(name)


def test_a_run_on_a_gpu_is_continued_there_without_being_told(fresh, monkeypatch):
    """Each of several processes takes its GPU before the run directory is read, so the flag is looked up at once."""
    interrupt(fresh, monkeypatch, "run", "--use_gpu")
    asked, processes = [], multitask_classifier.parallel.processes
    monkeypatch.setattr(
        multitask_classifier.parallel, "processes", lambda use_gpu: asked.append(use_gpu) or processes(use_gpu)
    )
    assert not main(["--resume", "--run_dir", str(fresh.path("run"))])
    assert asked == [True]


def test_a_run_without_early_exit_cannot_be_asked_to_leave_early(program, whole):
    for flags in (["--early_exit"], ["--exit_threshold", "0.9"]):
        with pytest.raises(InputError, match="trained without --early_exit"):
            main(["--option", "evaluate", "--run_dir", str(whole), *flags])


def test_a_run_is_not_continued_as_another_one(fresh, monkeypatch):
    run = interrupt(fresh, monkeypatch, "run")
    before = content(run)
    assert "--lr 0.5" in fresh.refused("run", "--resume", "--lr", 0.5)
    assert "--batch_size 4" in fresh.refused("run", "--resume", "--batch_size", 4)
    assert "--overwrite" in fresh.refused("run", "--resume", "--overwrite")
    path = fresh.data / "sts-train.csv"
    kept = path.read_text()
    path.write_text("".join(kept.splitlines(keepends=True)[:-1]))
    assert "sts-train.csv" in fresh.refused("run", "--resume")
    path.write_text(kept)
    kept = (fresh.weights / "model.safetensors").read_bytes()
    write_weights(fresh.weights, seed=1)
    assert "model.safetensors" in fresh.refused("run", "--resume")
    (fresh.weights / "model.safetensors").write_bytes(kept)
    for name, words in {"config.json": ("0.1", "0.5"), "vocab.txt": ("the", "zzz")}.items():
        path = fresh.weights / name
        kept = path.read_text()
        path.write_text(kept.replace(*words))
        assert f"weights/{name}" in fresh.refused("run", "--resume")
        path.write_text(kept)
    path = fresh.weights / "tokenizer_config.json"
    path.write_text("{}")
    assert "tokenizer_config.json" in fresh.refused("run", "--resume")
    path.unlink()
    (fresh.weights / "vocab.txt").rename(fresh.folder / "away")
    assert "vocab.txt" in fresh.refused("run", "--resume")
    (fresh.folder / "away").rename(fresh.weights / "vocab.txt")
    assert content(run) == before
    fresh.train("run", "--resume")


def test_files_of_one_name_are_told_apart(fresh, monkeypatch):
    given = []
    for split in ("train", "dev"):
        path = fresh.folder / split / "x.csv"
        path.parent.mkdir()
        shutil.copy(fresh.data / f"ids-sst-{split}.csv", path)
        given += [f"--sst_{split}", path]
    interrupt(fresh, monkeypatch, "run", *given)
    path = fresh.folder / "train" / "x.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "train/x.csv" in fresh.refused("run", "--resume")


def test_the_state_of_another_run_is_not_continued(fresh, monkeypatch):
    other = interrupt(fresh, monkeypatch, "other", "--lr", 0.1, "--optimizer", "sgd")
    run = interrupt(fresh, monkeypatch, "run")
    kept = (run / "last.pt").read_bytes()
    for spoil in (lambda path: shutil.copy(other / "last.pt", path), partial(torch.save, [1]), partial(torch.save, {})):
        spoil(run / "last.pt")
        before = content(run)
        line = fresh.refused("run", "--resume")
        assert "last.pt" in line and "another run" in line
        assert content(run) == before
    (run / "last.pt").write_bytes(kept)
    fresh.train("run", "--resume")


def test_what_cannot_be_continued_is_said(fresh, monkeypatch):
    assert "config.json" in fresh.refused("nothing", "--resume")
    run = interrupt(fresh, monkeypatch, "run")
    saved = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(saved[: len(saved) // 2])
    log = (run / "log.jsonl").read_bytes()
    assert "last.pt" in fresh.refused("run", "--resume")
    assert (run / "log.jsonl").read_bytes() == log
    (run / "last.pt").write_bytes(saved)
    fresh.train("run", "--resume")
    before = content(run)
    assert "complete" in fresh.refused("run", "--resume")
    assert content(run) == before


# --- nothing is lost ----------------------------------------------------------------------------------------------


def test_a_run_directory_is_replaced_only_on_request(fresh):
    run = fresh.train("run", "--epochs", 1)
    before = content(run)
    line = fresh.refused("run")
    assert str(run) in line and "--overwrite" in line and "--resume" in line
    assert content(run) == before
    fresh.train("run", "--epochs", 1, "--seed", 5, "--overwrite")
    after = content(run)
    assert after.keys() == before.keys()
    assert after[Path("best.safetensors")] != before[Path("best.safetensors")]


def test_what_is_no_run_is_never_replaced(fresh):
    own = fresh.path("own")
    own.mkdir()
    (own / "thesis.txt").write_text("two years of work")
    assert "not a run" in fresh.refused("own", "--overwrite")
    # a weights folder has a config.json too
    assert "not a run" in fresh.refused("weights", "--overwrite")
    assert (own / "thesis.txt").is_file() and (fresh.weights / "model.safetensors").is_file()
    (fresh.folder / "file").write_text("")
    assert str(fresh.path("file")) in fresh.refused("file")
    (own / runs.STAGING).mkdir()
    assert "not a run" in fresh.refused("own", "--overwrite") and (own / "thesis.txt").is_file()
    (own / "config.json").write_text("1")
    assert "not a run" in fresh.refused("own", "--overwrite") and (own / "thesis.txt").is_file()
    assert "file/run" in fresh.refused("file/run")


def test_a_mistake_leaves_the_old_run_as_it_was(fresh):
    run = fresh.train("run", "--epochs", 1)
    before = content(run)
    (fresh.data / "quora-dev.csv").unlink()
    line = fresh.refused("run", "--overwrite")
    assert "quora-dev.csv" in line and "sts" not in line
    write_data(fresh.folder / "whole")
    write_weights(fresh.folder / "cut")
    path = fresh.folder / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    usual = ("--overwrite", "--data_dir", fresh.folder / "whole")
    assert "model.safetensors" in fresh.refused("run", *usual, "--weights", path.parent)
    assert "nowhere" in fresh.refused("run", *usual, "--weights", fresh.folder / "nowhere")
    assert content(run) == before


def test_wrong_numbers_stop_the_run_and_name_the_examples(program):
    line = program.refused("diverged", "--lr", 1e30, "--clip", 0, "--optimizer", "sgd")
    step = int(re.search(r"step (\d+)", line)[1])
    assert 1 < step <= STEPS_PER_EPOCH and "--lr" in line and "nan-batch.json" in line
    saved = json.loads((program.path("diverged") / "nan-batch.json").read_text())
    name = build_tasks()[saved["task"]].file("train")
    assert saved["step"] == step and set(saved["ids"]) <= {row["id"] for row in read_csv(program.data / name, "\t")}
    assert not (program.path("diverged") / "best.safetensors").exists()


def test_parameters_that_the_last_step_made_infinite_are_not_kept(program):
    """The losses of the run were all finite: the one step came after them."""
    flags = ("--lr", 3e38, "--clip", 0, "--optimizer", "sgd", "--warmup", 0, "--schedule", "constant")
    line = program.refused("last-step", "--tasks", "sts", "--epochs", 1, "--batch_size", 1000, *flags)
    assert "epoch 1/1 ends with infinite parameters or NaN: lower --lr" in line
    assert not (program.path("last-step") / "best.safetensors").exists()


def test_a_saved_runs_own_tasks_decide_which_predictions_are_copied(program):
    run = program.train("one-task", "--tasks", "cfimdb", "--epochs", 1)
    copy, evaluate = program.folder / "copy.csv", ("--option", "evaluate", "--run_dir", run)
    assert not main([*map(str, evaluate), "--cfimdb_dev_out", str(copy)])
    assert copy.read_bytes() == (run / "evaluate" / "predictions" / "cfimdb-dev-output.csv").read_bytes()
    with pytest.raises(InputError, match="--sst_dev_out: .* the run has no such task or data"):
        main([*map(str, evaluate), "--sst_dev_out", str(copy)])


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_leaves_the_run_that_was_to_be_replaced(fresh, monkeypatch, at):
    run = fresh.train("run", "--epochs", 1)
    before, calls = content(run), count(1)

    def fsync(descriptor):
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    assert "No space left on device" in fresh.refused("run", "--overwrite")
    assert content(run) == before
    assert "No space left on device" in fresh.refused("another")
    assert not content(fresh.path("another"))


@pytest.mark.parametrize("at", [5, 8, 12])
def test_a_full_disk_leaves_the_last_good_files(program, whole, monkeypatch, at):
    """From the at-th file on nothing can be written; with space again the run goes on as if nothing had been."""
    name, calls, real = f"full-{at}", count(1), os.fsync

    def fsync(descriptor):
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        line = program.refused(name, *OFTEN)
    assert "No space left on device" in line and str(program.path(name)) in line
    assert not list(program.path(name).glob("*.part")) and not list(program.path(name).glob(".*.part"))
    assert state_of(program.path(name))["progress"]["total_steps"] > 0
    program.train(name, *OFTEN, "--resume")
    assert_same_end(program.path(name), whole)


def test_a_log_that_cannot_be_written_is_said(program, monkeypatch):
    def full(path, mode="r"):
        if mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode)

    monkeypatch.setattr(runs, "open", full, raising=False)
    assert "log.jsonl" in program.refused("no-log")


# --- out of memory ------------------------------------------------------------------------------------------------


def no_memory(*arguments, **keywords):
    """As torch says it of CUDA; elsewhere it is a RuntimeError."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_room(*arguments, **keywords):
    raise RuntimeError("MPS backend out of memory (MPS allocated: 8 GB).")


def ask_for_too_much(*arguments, **keywords):
    """What this machine's own allocator says."""
    torch.empty(2**55)


@pytest.mark.parametrize("fail", [no_memory, no_room, ask_for_too_much])
def test_a_step_without_memory_names_the_batch_to_try(program, whole, monkeypatch, fail):
    name = f"memory-{fail.__name__}"
    with monkeypatch.context() as patch:
        call_at(patch, multitask_classifier, "train_step", 10, fail)
        line = program.refused(name, *OFTEN)
        assert "--overwrite --batch_size 4 --accumulate 2" in line and "--resume" in line
    assert_same_end(program.train(name, *OFTEN, "--resume"), whole)
    monkeypatch.setattr(multitask_classifier, "train_step", fail)
    assert "--batch_size" not in program.refused("memory-one", "--batch_size", 1)


def test_an_error_that_is_not_for_want_of_memory_stays_one(program, monkeypatch):
    def wrong(*arguments):
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(multitask_classifier, "train_step", wrong)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        main(program.command("wrong"))


def test_an_evaluation_without_memory_names_its_own_batch(program, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.AtExit, "__call__", no_room)
        assert "--eval_batch_size 16" in program.refused("memory-dev", "--keep_last")
        assert "even one example" in program.refused("memory-dev-one", "--eval_batch_size", 1)
        patch.setattr(multitask_classifier.MultitaskBERT, "forward", no_memory)
        assert "--eval_batch_size 16" in program.refused("memory-features", "--option", "pretrain")
        evaluated = ["--option", "evaluate", "--run_dir", str(whole), "--data_dir", str(program.data)]
        assert "--eval_batch_size 16" in refusal(main, evaluated)
        patch.setattr(multitask_classifier.MultitaskBERT, "embed", no_memory)
        # leaving early, more rows at once are asked for than the flag says
        inference = ExitInference({"sst": "confidence"}, {"sst": 0.5})
        task = build_tasks()["sst"]
        data = read_dataset(task, program.data / task.file("dev"), program.tokenizer, 40)
        assert "--eval_batch_size 16" in refusal(predict, make_model(with_exits=True), data, None, 32, inference)
    # the epoch is not lost, and the advice is taken
    assert state_of(program.path("memory-dev"))["progress"]["total_steps"] == STEPS_PER_EPOCH
    assert_same_end(program.train("memory-dev", "--keep_last", "--resume", "--eval_batch_size", 16), whole)


# --- wrong commands -----------------------------------------------------------------------------------------------

BAD_FLAGS = [
    (("--lr", "0"), "--lr"),
    (("--lr", "-1"), "--lr"),
    (("--lr", "nan"), "--lr"),
    (("--epochs", "0"), "--epochs"),
    (("--epochs", "1.5"), "--epochs"),
    (("--batch_size", "-8"), "--batch_size"),
    (("--accumulate", "0"), "--accumulate"),
    (("--hidden_dropout_prob", "1"), "--hidden_dropout_prob"),
    (("--warmup", "1"), "--warmup"),
    (("--clip", "-1"), "--clip"),
    (("--weight_decay", "-0.1"), "--weight_decay"),
    (("--seed", "-1"), "--seed"),
    (("--seed", "many"), "--seed"),
    (("--max_length", "0"), "--max_length"),
    (("--max_length", "3"), "--max_length"),
    (("--max_length", "41"), "--max_length"),
    (("--option", "train"), "--option"),
    (("--tasks", "sst", "imdb"), "imdb"),
    (("--tasks",), "--tasks"),
    (("--pairs", "glued"), "glued"),
    (("--pairs", "sst=siamese"), "sst"),
    (("--para_loss", "cosine"), "--pairs para=siamese"),
    (("--task_weights", "sst=0"), "sst=0"),
    (("--task_weights", "cfimdb=2"), "cfimdb"),
    (("--task_weights", "sst=heavy"), "sst=heavy"),
    (("--sampler", "alternating"), "--sampler"),
    (("--sampler", "random", "--gradients", "pcgrad"), "--sampler random"),
    (("--momentum", "0.9"), "--momentum"),
    (("--bregman_weight", "2"), "--bregman"),
    (("--bregman", "cfimdb"), "--bregman cfimdb"),
    (("--lnsr_weight", "2"), "--lnsr"),
    (("--layer_decay", "0"), "--layer_decay"),
    (("--layer_decay", "1.5"), "--layer_decay"),
    (("--gradual_unfreezing", "--slf"), "--gradual_unfreezing"),
    (("--gradual_unfreezing", "--adapter", "lora"), "--train_backbone"),
    (("--gradual_unfreezing", "--pairs", "siamese", "--sts_loss", "cosine", "--pooling", "mean"), "--sts_loss cosine"),
    (("--layer_decay", "0.5", "--adapter", "lora"), "--train_backbone"),
    (("--train_rows", "sst=0"), "sst=0"),
    (("--train_rows", "cfimdb=5"), "cfimdb"),
    (("--siamese_features", "uv"), "--pairs siamese"),
    (("--save_every", "1"), "--save_every"),
    (("--log_every", "1"), "--log_every"),
    (("--eval_batch_size", "0"), "--eval_batch_size"),
    (("--sts_dev", "nowhere.csv"), "nowhere.csv"),
    (("--data_dir", "nowhere"), "nowhere"),
    (("--weights", "bert-huge"), "bert-huge"),
    (("--lambda", "2"), "--lambda"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=lambda value: "".join(value) if type(value) is tuple else "")
def test_bad_flags_are_refused_before_anything_is_written(program, flags, words):
    assert words in program.refused("bad", *flags)
    assert not program.path("bad").exists()


def test_a_mistake_at_the_command_line_is_one_line_and_status_2(program, monkeypatch, capsys):
    assert "--epochs" in script_refusal(monkeypatch, capsys, PROGRAM, *program.command("bad", "--epochs", "none"))


def test_weights_with_one_kind_of_segment_take_no_packed_pairs(fresh):
    path = fresh.weights / "config.json"
    path.write_text(path.read_text().replace('"type_vocab_size": 2', '"type_vocab_size": 1'))
    assert "--pairs para=siamese sts=siamese" in fresh.refused("run")


def test_early_exit_needs_two_layers_and_two_dev_rows(fresh):
    """Thresholds are chosen on some dev rows and scored on others, and an exit comes before the last layer."""
    one = fresh.folder / "one.csv"
    one.write_text("".join((fresh.data / "sts-dev.csv").read_text().splitlines(keepends=True)[:2]))
    assert "give two dev rows of sts" in fresh.refused("run", "--early_exit", "--sts_dev", one)
    path = fresh.weights / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    assert "has one layer" in fresh.refused("run", "--early_exit")


def test_a_preset_that_does_not_fit_is_named(program):
    refused = program.refused("run", "--preset", "best", "--tasks", "sst")
    assert refused.startswith("--bregman sts: not among --tasks sst (--preset best stands for --epochs 3")


def test_a_folder_without_a_run_and_a_run_of_another_version_are_named(program, whole, tmp_path):
    config = json.loads((whole / "config.json").read_text()) | {"format": 1, "commit": "0123456789ab+"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for flags in (("--resume",), ("--option", "evaluate")):
        command = [*flags, "--run_dir", str(tmp_path / "nowhere")]
        assert refusal(main, command).startswith(f"{tmp_path / 'nowhere' / 'config.json'}: there is no run here")
        line = refusal(main, [*flags, "--run_dir", str(tmp_path)])
        assert "another version wrote this run" in line and "git checkout 0123456789ab)" in line


def test_a_run_is_named_by_what_differs_from_the_defaults(program):
    command = ["--weights", "minilm", "--data_dir", "../course", "--eval_batch_size", "3", "--slf"]
    flags, _, defaults = parse_flags(command)
    assert runs.name_run(flags, defaults) == Path("runs/finetune-data_dir_course-weights_minilm-slf")
    assert runs.name_run(defaults, defaults) == Path("runs/finetune")
    assert runs.name_run(defaults | {"smart": []}, defaults) == Path("runs/finetune-smart")


def test_texts_are_as_long_as_the_weights_have_positions(program):
    command = program.command("positions", "--epochs", 1)
    at = command.index("--max_length")
    assert not main(command[:at] + command[at + 2 :])
    assert json.loads((program.path("positions") / "config.json").read_text())["flags"]["max_length"] == 40


@pytest.mark.parametrize("script", ["multitask_classifier.py", "predict.py", "download.py"])
def test_a_python_without_torch_is_told_what_to_do(script):
    """-S leaves out the installed packages."""
    command = [sys.executable, "-S", PROGRAM.parent / script, "run", "sst", "text"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "./setup.sh" in done.stderr
