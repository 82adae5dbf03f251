"""Several processes compute what one does: real gloo processes on the whole program with a tiny float64 model.

One job of two processes and one of three (`work`) does everything that a test wants to see, run after run, since
starting a process takes longer than a run; the tests then compare what these left with runs made here.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from driver import main
from tiny import (
    Program,
    become_process,
    call_at,
    log_of,
    make_model,
    refusal,
    state_of,
    weights_of,
    write_weights,
)

import multitask_classifier
import parallel
from datasets import Dataset, read_dataset
from early_exit import ExitInference
from errors import run_script
from evaluation import evaluate, predict, predict_exits
from tasks import build_tasks

ROOT = Path(__file__).parents[1]
SIZES = (2, 3)
# examples of a step, over all processes; an epoch takes 16, 16 (of 30) and 20 of the tasks, half an epoch half of
# that, so that last batches are short, and with three processes one of them has no example of a batch of two
TOGETHER = 6
CASES = {
    "plain": "--epoch_size 1",
    "accumulate": "--accumulate 2",
    "slf": "--slf --slf_epochs 0.5",
    "gradual": "--gradual_unfreezing 0.5 --layer_decay 0.8",
    "smart alternating": "--smart_alternating --epochs 4 --epoch_size 0.3",
    "early exit": "--early_exit --exit_loss alternating --epoch_size 1",
    "smart": "--smart --smart_weight 5",
    "smart siamese": "--smart sts --pairs siamese --early_exit",
    "gaussian": "--smart --smart_form gaussian",
    "lnsr": "--lnsr --pairs embed_concat",
    "bregman": "--bregman --bregman_weight 5 --optimizer sgd --lr 0.1",
    "pcgrad": "--gradients pcgrad --adapter pal --train_backbone",
    "gradvac": "--gradients gradvac --lnsr --clip 0.1",
    "cosine": "--pairs siamese --para_loss cosine --step all_tasks",
    "pretrain": "--option pretrain",
}
# the same runs without what the case is about; for those not named here, a plain one
WITHOUT = {
    "early exit": CASES["plain"],
    "smart alternating": "--early_exit --epochs 4 --epoch_size 0.3",
    "smart siamese": "--pairs siamese --early_exit",
    "lnsr": "--pairs embed_concat",
    "bregman": "--optimizer sgd --lr 0.1",
    "pcgrad": "--adapter pal --train_backbone",
    "gradvac": "--lnsr --clip 0.1",
    "cosine": "--pairs siamese --step all_tasks",
}
# with a closing evaluation; the others stop after the last phase
CLOSED = ("plain", "smart siamese")
DROPOUT = ("--save_minutes", "0.00005", "--keep_last", "--epochs", 2)


class Equal(Program):
    """Runs in float64 without dropout, of `size` processes with a share of the batch each."""

    def __init__(self, folder):
        super().__init__(folder)
        self.dropout = self.weights
        self.weights = write_weights(folder / "weights-without-dropout", dropout=0.0)

    def run(self, name, size, flags):
        """Train in this process, one of `size`."""
        usual = ("--epochs", 1, "--epoch_size", 0.5, "--hidden_dropout_prob", 0, "--keep_last", "--steps_per_line", 2)
        usual += ("--batch_size", TOGETHER // size)
        torch.set_default_dtype(torch.float64)
        try:
            return self.train_quickly(name, *usual, *flags.split(), finish=name.startswith(CLOSED))
        finally:
            torch.set_default_dtype(torch.float32)

    def run_case(self, size, case):
        """Train a case in this process, one of `size`."""
        return self.run(f"{case}-{size}", size, CASES[case])

    def with_dropout(self, name, size, *flags):
        """The command of an ordinary run."""
        batch_size = ("--batch_size", TOGETHER // size, "--weights", self.dropout)
        return self.command(name, *batch_size, *DROPOUT, *flags)


def evaluate_everything(program):
    """Scores, predictions and exits of a seeded model, by everything that evaluates, as plain data."""
    tasks = build_tasks(pairs={"para": "concat", "sts": "siamese"})
    model = make_model(tasks, with_exits=True, dtype=torch.float32)
    dev = {
        name: read_dataset(task, program.data / task.file("dev"), program.tokenizer, 40) for name, task in tasks.items()
    }
    for lte in model.lte.values():
        torch.nn.init.normal_(lte.linear.weight, generator=torch.Generator().manual_seed(0))
    scores, predictions = evaluate(model, dev, batch_size=5)
    found = {name: predict_exits(model, data, batch_size=7) for name, data in dev.items()}
    # half of the rows leave after layer 1
    thresholds = {name: float(np.median(exits.lte[:, 0])) for name, exits in found.items()}
    left, _ = evaluate(model, dev, batch_size=2, infer=ExitInference(dict.fromkeys(tasks, "lte"), thresholds))
    # fewer batches than processes
    few = predict(model, dev["sst"], np.array([3, 1]), batch_size=2)
    arrays = [few.outputs] + [x for name in tasks for x in (predictions[name].outputs, found[name].values)]
    return [scores.tasks, left.tasks, scores.norm, [array.tolist() for array in arrays]]


def sums():
    """sum_gradients where process 0 has the first gradient, all have the second and none the third."""
    parameters = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(5)]
    number = float(parallel.rank())
    mine = [torch.ones(2, 3) if number == 0 else None, torch.full((2, 3), number).T, None]
    found = parallel.sum_gradients(parameters, mine)
    return [None if total is None else total.tolist() for total in found]


def watch_writes(folder, written):
    """From now on note every file of this process that is opened to be written, moved or removed in a folder."""
    events = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

    def hook(event, args):
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in events) and str(args[0]).startswith(str(folder)):
            written.append(str(args[0]))

    sys.addaudithook(hook)


def watch_rows(seen):
    """From now on note the rows of every training batch that count."""
    original = Dataset.batch

    def batch(self, rows, positions=slice(None)):
        if positions.step is not None:
            seen.extend([self.task.name, int(row)] for row in np.asarray(rows)[positions])
        return original(self, rows, positions)

    Dataset.batch = batch


def interrupted_run(program, size, rank):
    """A signal reaches the last process alone, in its third step; all stop and go on later. Returns the statuses."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == size - 1:
            call_at(patch, multitask_classifier, "train_step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        statuses = [main(program.with_dropout("interrupted", size, "--save_minutes", 10))]
    dist.barrier()  # process 0 has saved
    statuses.append(state_of(program.path("interrupted"))["progress"]["total_steps"])
    return [*statuses, main(program.with_dropout("interrupted", size, "--save_minutes", 10, "--resume")) or 0]


def work(program, rank, size):
    """What each process of a job does; what it found out goes into a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{program.folder}/store-{size}", rank=rank, world_size=size)
    told = {"written": [], "seen": []}
    told["sums"] = sums()
    # several pieces for the tiny model too
    parallel.PIECE = 2000
    told["evaluation"] = evaluate_everything(program)
    watch_writes(program.path(f"plain-{size}"), told["written"])
    original = Dataset.batch
    for case in CASES:
        if case == "plain":
            watch_rows(told["seen"])
        program.run_case(size, case)
        Dataset.batch = original
    told["differ"] = refusal(main, program.with_dropout("differ", size, "--seed", rank))
    if size == 2:
        told["refused"] = refusal(main, ["--resume", "--run_dir", str(program.path("single"))])
        assert not main(program.with_dropout("whole", size))
        told["interrupted"] = interrupted_run(program, size, rank)
    (program.folder / f"told-{size}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs of this file's own kind, in place of the shared ones."""
    return Equal(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def single(program):
    """A run of one process, stopped in its third step."""
    with pytest.MonkeyPatch.context() as patch:
        call_at(patch, multitask_classifier, "train_step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(program.with_dropout("single", 1)) == 130
    return program.path("single")


def finish(members):
    """Run the processes of a job; all must end well."""
    for member in members:
        member.start()
    for member in members:
        member.join(120)
        member.kill()
    assert [member.exitcode for member in members] == [0] * len(members)


@pytest.fixture(scope="module")
def jobs(program, single, forkserver):
    """{number of processes: what each of them told}."""
    told = {}
    for size in SIZES:
        finish([forkserver.Process(target=work, args=(program, rank, size)) for rank in range(size)])
        told[size] = [json.loads((program.folder / f"told-{size}-{rank}.json").read_text()) for rank in range(size)]
    return told


@pytest.fixture(scope="module")
def alone(program):
    """{case: the run of one process}, made when it is asked for."""
    made = {}

    def run(case):
        if case not in made:
            made[case] = program.run_case(1, case)
        return made[case]

    return run


# --- the same as one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_several_processes_equal_one(program, jobs, alone, case, size):
    ours, theirs = program.path(f"{case}-{size}"), alone(case)
    expected = weights_of(theirs)
    for name, tensor in weights_of(ours).items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8)
    for line, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert line["kind"] == other["kind"] and line["phase"] == other["phase"]
        if line["kind"] == "phase":
            assert line["norm"] == pytest.approx(other["norm"], abs=1e-6)
            continue
        assert line["step"] == other["step"] and line["terms"].keys() == other["terms"].keys()
        for task, terms in line["terms"].items():
            assert terms == pytest.approx(other["terms"][task], abs=1e-8), (line["step"], task)


def test_each_method_does_something(program, alone):
    """So that its equality says something about it."""
    without = {}
    for case in CASES.keys() - {"plain"}:
        flags = WITHOUT.get(case, "")
        if flags not in without:
            without[flags] = weights_of(program.run(f"without-{len(without)}", 1, flags))
        weights = {name: tensor for name, tensor in weights_of(alone(case)).items() if name.startswith("bert.")}
        assert max((tensor - without[flags][name]).abs().max() for name, tensor in weights.items()) > 1e-3, case
    phases = [line["phase"] for line in log_of(alone("smart alternating")) if line["kind"] == "phase"]
    assert any("stage B" in phase for phase in phases)


@pytest.mark.parametrize("size", SIZES)
def test_predictions_and_scores_of_a_run_equal_those_of_one_process(program, jobs, alone, size):
    for case in CLOSED:
        ours, theirs = program.path(f"{case}-{size}"), alone(case)
        for path in (theirs / "predictions").glob("*-output.csv"):
            assert (ours / "predictions" / path.name).read_text() == path.read_text()
        scores, expected = (json.loads((run / "summary.json").read_text())["best"] for run in (ours, theirs))
        assert scores["norm"] == pytest.approx(expected["norm"], abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_a_shared_evaluation_is_that_of_one_process_to_the_last_bit(program, jobs, size):
    expected = json.loads(json.dumps(evaluate_everything(program)))
    assert 1 < expected[1]["sst"]["mean_layers"] < 3
    assert [told["evaluation"] for told in jobs[size]] == [expected] * size


@pytest.mark.parametrize("size", SIZES)
def test_every_example_comes_once_per_epoch_over_all_processes(program, jobs, size):
    shares = [Counter(map(tuple, told["seen"])) for told in jobs[size]]
    together = sum(shares, Counter())
    assert set(together.values()) == {1}
    assert Counter(name for name, _ in together) == {"sst": 16, "para": 16, "sts": 20}
    # rows are dealt out evenly: no process has more than one row more than another in any of the 10 batches
    assert max(map(len, shares)) - min(map(len, shares)) <= 10


@pytest.mark.parametrize("size", SIZES)
def test_gradients_that_some_processes_have_are_summed(jobs, size):
    total = float(sum(range(size)))
    assert [told["sums"] for told in jobs[size]] == [[[[1.0] * 3] * 2, [[total] * 2] * 3, None]] * size


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_partition_the_rows(monkeypatch, count, size):
    monkeypatch.setattr(parallel, "world_size", lambda: size)
    taken = []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        positions, weight = parallel.share(count)
        rows = list(range(count))[positions]
        assert rows and weight == (rank < count)
        taken += rows * int(weight)
    assert sorted(taken) == list(range(count))


@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
@pytest.mark.parametrize("max_length", [12, 40])
def test_a_share_of_a_batch_is_padded_like_the_whole(program, encoding, max_length):
    task = build_tasks(pairs={"para": encoding, "sts": encoding})["sts"]
    data, rows = (
        read_dataset(task, program.data / task.file("dev"), program.tokenizer, max_length),
        np.array([7, 2, 11, 5, 3]),
    )
    whole = data.batch(rows)
    longest = [max(len(segment[0]) for segment in column) for column in zip(*map(data.pack, rows), strict=True)]
    assert [ids.shape for ids, _, _ in whole.segments] == [(5, length) for length in longest]
    for positions in (slice(0, 5, 2), slice(1, 5, 2), slice(0, 1)):
        part = data.batch(rows, positions)
        assert part.ids == whole.ids[positions] and part.place == (positions, 5)
        assert torch.equal(part.labels, whole.labels[positions])
        for ours, theirs in zip(part.segments, whole.segments, strict=True):
            assert all(torch.equal(x, y[positions]) for x, y in zip(ours, theirs, strict=True))


# --- files, stopping, resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_only_the_first_process_writes(program, jobs, alone, size):
    first, *others = (told["written"] for told in jobs[size])
    assert any("log.jsonl" in path for path in first) and any("last.pt" in path for path in first)
    assert others == [[]] * (size - 1)
    assert {path.name for path in program.path(f"plain-{size}").rglob("*")} == {
        path.name for path in alone("plain").rglob("*")
    }


def test_processes_with_other_flags_are_refused(jobs):
    for told in (*jobs[2], *jobs[3]):
        assert told["differ"].startswith("flags differ between processes 0 and 1")


def test_another_number_of_processes_is_refused(program, jobs):
    for told in jobs[2]:
        assert "started with 1 processes, not 2" in told["refused"]
    before = (program.path("whole") / "last.pt").read_bytes()
    assert "started with 2 processes, not 1" in program.refused("whole", "--resume")
    assert (program.path("whole") / "last.pt").read_bytes() == before


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_resume(program, jobs):
    """With dropout, that is with random numbers that differ between the processes."""
    for told in jobs[2]:
        status, steps, end = told["interrupted"]
        assert (status, end) == (130, 0) and steps in (3, 4)
    whole, run = (program.path(name) for name in ("whole", "interrupted"))
    ours, theirs = state_of(run), state_of(whole)
    assert len(theirs["rng"]) == 2 and not torch.equal(*theirs["rng"])
    assert torch.equal(ours["rng"], theirs["rng"])
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())


def torchrun(program, *flags):
    """The command as a user gives it, for two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*command, str(ROOT / "tests" / "driver.py"), *program.with_dropout("torchrun", 2, *flags)]


def run_as_launched(argv, rank, size, port, output):
    """In a process of its own: run the program as torchrun starts it."""
    become_process(output)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    run_script(lambda: main(argv))


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_torchrun_with_a_killed_worker_and_a_resumed_run(program, jobs, forkserver):
    """A job that loses a process ends and says why; continued, it ends as the run of the two processes above did.

    The command is torchrun's own up to the death; the continued run starts in its place the processes that it would,
    since these find everything imported.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(capture_output=True, text=True, env=environment, timeout=180)
    process = subprocess.run(torchrun(program, "--dies", 1, 4), **how)
    out, err, saved = process.stdout, process.stderr, program.path("torchrun") / "last.pt"
    # the last step that was saved ended right before the death
    assert process.returncode != 0 and time.time() - saved.stat().st_mtime < 20
    assert "error: process 0 has lost another one" in err and "--resume" in err and "SIGKILL" in err
    assert out.count("run: ") == 1
    assert not (program.path("torchrun") / "summary.json").exists()
    command, port = program.with_dropout("torchrun", 2, "--resume"), free_port()
    printed = [program.folder / f"resumed-{rank}.txt" for rank in range(2)]
    finish(
        [forkserver.Process(target=run_as_launched, args=(command, rank, 2, port, printed[rank])) for rank in range(2)]
    )
    assert [path.read_text().count("best model: ") for path in printed] == [1, 0]
    ours, theirs = weights_of(program.path("torchrun")), weights_of(program.path("whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
