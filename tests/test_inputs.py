"""Bad inputs, in tables: what each one does to a command, and the words of the message.

    REFUSED    one line on standard error, exit status 2, and no file is made or changed
    WARNED     the command does its work, with one warning
    GOES_ON    the command does its work and prints no warning

A case is (a function that spoils a copy of a small world, the command, the outcome, words of the message). The world
has weights, data, a finished run and a stopped run. Every command runs in this process with a limit on its time and on
its memory. So a case also fails where the program waits for a pipe, or first uses up the memory and refuses then.
"""

import ctypes
import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import driver
import pytest
import safetensors.torch
import torch
from driver import main
from safetensors.torch import load_file
from tiny import Program, become_process, call_at, log_of, state_of

import multitask_classifier
import predict
import report
import runs
from errors import InputError, run_script
from files import write_whole
from tokenizer import BertTokenizer

REFUSED, WARNED, GOES_ON = "refused", "warned", "goes on"
DAMAGED = "run directory is damaged"
SECONDS, GIBIBYTES = 20, 3
MISSING = object()
DEEP = "[" * 200_000 + "]" * 200_000


class World(Program):
    """A copy of the weights, the data and two runs, to be spoilt: `finished`, and `stopped` in its second epoch."""

    def __init__(self, folder, source):
        self.folder = Path(shutil.copytree(source, folder))
        self.weights, self.data = folder / "weights", folder / "data"
        self.finished, self.stopped = folder / "finished", folder / "stopped"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of an unspoilt world."""
    program = Program(tmp_path_factory.mktemp("inputs") / "world")
    program.train("finished", "--early_exit")
    with pytest.MonkeyPatch.context() as patch:
        call_at(patch, multitask_classifier, "train_step", 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(program.command("stopped", "--early_exit")) == 130
    return program.folder


@pytest.fixture
def world(tmp_path, source, monkeypatch):
    """A world to be spoilt."""
    # its data are read again and again
    cached = BertTokenizer.from_pretrained(source / "weights")
    clean = {name: (source / "weights" / name).read_bytes() for name in ("vocab.txt",)}
    original = BertTokenizer.from_pretrained

    def from_pretrained(folder):
        same = (
            all((Path(folder) / name).is_file() for name in clean)
            and not (Path(folder) / "tokenizer_config.json").exists()
        )
        if same and all((Path(folder) / name).read_bytes() == content for name, content in clean.items()):
            return cached
        return original(folder)

    monkeypatch.setattr(BertTokenizer, "from_pretrained", from_pretrained)
    return World(tmp_path / "world", source)


# --- commands: functions of the world that return (main function, its arguments) -----------------------------------


def training(*flags):
    """Train a new run."""
    return lambda world: (main, world.command("new", "--epochs", 1, *flags))


def predicting(*words, task="sst", text="a film", run=None):
    """Predict from the finished run."""
    texts = [] if text is None else [text]
    return lambda world: (predict.main, [str(run or world.finished), task, *texts, *words])


def predict_text(world):
    """Predict one text from the finished run."""
    return predict.main, [str(world.finished), "sst", "a film"]


def predict_file(world):
    """Predict the file input.csv from the finished run."""
    return predict.main, [str(world.finished), "sst", "--file", str(world.folder / "input.csv")]


def evaluate(world):
    """Evaluate the finished run."""
    return main, ["--option", "evaluate", "--run_dir", str(world.finished), "--data_dir", str(world.data)]


def resume(world):
    """Resume the stopped run."""
    given = ["--data_dir", str(world.data), "--weights", str(world.weights)]
    return main, ["--resume", "--run_dir", str(world.stopped), *given]


READERS = {"predict": predict_text, "evaluate": evaluate, "resume": resume}


# --- how a world is spoilt -----------------------------------------------------------------------------------------


def nothing(world):
    """Leave the world as it is."""


def both(*functions):
    """Spoil in several ways."""
    return lambda world: [function(world) for function in functions]


def edit(name, key, value, folders=("finished", "stopped")):
    """Change one value of a JSON file; the key has dots between its parts."""

    def spoil(world):
        for folder in folders:
            path = world.folder / folder / name
            content = values = json.loads(path.read_text())
            *parents, last = key.split(".")
            for parent in parents:
                values = values[parent]
            if value is MISSING:
                del values[last]
            else:
                values[last] = value
            path.write_text(json.dumps(content))

    return spoil


def replace(name, content):
    """Replace files by a content: str, bytes, a function of the old bytes, or None to remove them."""

    def spoil(world):
        for path in [world.folder / name] if "/" in name else [world.finished / name, world.stopped / name]:
            if callable(content):
                path.write_bytes(content(path.read_bytes()))
            elif content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def swap(name, make):
    """Put something that is no ordinary file in the place of a file."""

    def spoil(world):
        for path in [world.folder / name] if "/" in name else [world.finished / name, world.stopped / name]:
            path.unlink(missing_ok=True)
            make(path)

    return spoil


def lock_away(name):
    """Take every permission from a file or a folder."""
    return lambda world: (world.folder / name).chmod(0)


def loop(path):
    """A link to itself, which nobody can read."""
    path.symlink_to(path)


def half(content):
    """The first half of a content."""
    return content[: len(content) // 2]


def table(*rows, header="\tid\tsentence\tsentiment", end="\n", path="data/ids-sst-train.csv"):
    """Replace a CSV file by these rows."""
    return replace(path, end.join([header, *rows]) + end)


def sst_rows(count, **others):
    """Rows of a file of SST; `others` are {"row number": row}."""
    return [others.get(f"row{i}", f"{i}\tid{i}\ta good film\t{i % 5}") for i in range(count)]


def input_file(*rows, **keywords):
    """A file to predict."""
    return table(*rows, path="./input.csv", **keywords)


def state(change):
    """Change the state of the stopped run, in place or by returning another one."""

    def spoil(world):
        saved = state_of(world.stopped)
        changed = change(saved)
        torch.save(saved if changed is None else changed, world.stopped / "last.pt")

    return spoil


def drop(values, key):
    """Remove an entry."""
    del values[key]


def best(change):
    """Change the tensors of the finished run's model."""

    def spoil(world):
        path = world.finished / "best.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return spoil


QUERY = "encoder.layer.0.attention.self.query.weight"


def weights(change, suffix="safetensors"):
    """Change the tensors of the weights, and save them in one of two formats."""

    def spoil(world):
        path = world.weights / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors[QUERY] = change(tensors[QUERY])
        if suffix == "safetensors":
            safetensors.torch.save_file(tensors, path)
        else:
            path.unlink()
            torch.save(tensors, world.weights / "pytorch_model.bin")

    return spoil


def raw_pickle(content, protocol):
    """Replace the weights by a pickle that torch did not write."""

    def spoil(world):
        (world.weights / "model.safetensors").unlink()
        (world.weights / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol))

    return spoil


def size(key, value):
    """Change a size in the config.json of the weights."""
    return edit("config.json", key, value, folders=("weights",))


# --- the tables: {name: (spoil, command, outcome, words)} ----------------------------------------------------------

FLAGS = {
    "two thresholds of a task": (("--early_exit", "--exit_threshold", "sst=.1", "sst=.9"), ("--exit_threshold", "sst")),
    "two thresholds of all": (("--early_exit", "--exit_threshold", ".1", ".9"), ("--exit_threshold",)),
    "two weights of a task": (("--task_weights", "sst=1", "sst=2"), ("--task_weights", "sst")),
    "epochs": (("--epochs", 10**400), ("--epochs",)),
    "epoch_size": (("--epoch_size", "1e12"), ("--epoch_size",)),
    "infinite epoch": (("--epoch_size", "1e308"), ("--epoch_size",)),
    "slf_epochs": (("--slf", "--slf_epochs", "1e12"), ("--slf_epochs",)),
    "gradual_unfreezing": (("--gradual_unfreezing", "1e12"), ("--gradual_unfreezing",)),
    "batch_size": (("--batch_size", 10**400), ("--batch_size",)),
    "a run_dir of 300 characters": (("--run_dir", "r" * 300), ("r" * 300, "too long")),
    "a run_dir that is not UTF-8": (("--run_dir", "run\udcff"), ("not UTF-8",)),
    "a data_dir that is not UTF-8": (("--data_dir", "data\udcff"), ("not UTF-8",)),
    "a file of 300 characters": (("--sst_dev", "r" * 300), ("r" * 300, "too long")),
    "weights of 300 characters": (("--weights", "r" * 300), ("r" * 300, "too long")),
}
CASES = {f"flags: {name}": (nothing, training(*flags), REFUSED, words) for name, (flags, words) in FLAGS.items()}

# the same check for all three commands that read a run: (file's content, words)
EVERYWHERE = {
    "config is empty": (replace("config.json", ""), ("JSON",)),
    "config is cut": (replace("config.json", half), ("JSON",)),
    "config is a list": (replace("config.json", "[1]"), ()),
    "config is not UTF-8": (replace("config.json", b"\xff\xfe{}"), ()),
    "config is deep": (replace("config.json", DEEP), ("JSON",)),
    "config is deep inside": (replace("config.json", f'{{"flags": {DEEP}}}'), ("JSON",)),
    "no flags": (edit("config.json", "flags", MISSING), ("flags",)),
    "flags are a list": (edit("config.json", "flags", []), ("flags",)),
    "epochs are text": (edit("config.json", "flags.epochs", "many"), ("--epochs", "many")),
    "epochs are negative": (edit("config.json", "flags.epochs", -1), ("--epochs", "-1")),
    "epochs are a fraction": (edit("config.json", "flags.epochs", 1.5), ("--epochs", "1.5")),
    "epochs are a list": (edit("config.json", "flags.epochs", [1, 2]), ("arguments: 2",)),
    "epochs are null": (edit("config.json", "flags.epochs", None), ("epochs",)),
    "a negative length": (edit("config.json", "flags.max_length", -5), ("--max_length", "-5")),
    "dropout of 7": (edit("config.json", "flags.hidden_dropout_prob", 7), ("--hidden_dropout_prob",)),
    "an unknown adapter": (edit("config.json", "flags.adapter", ["glue"]), ("--adapter", "glue")),
    "an unknown task": (edit("config.json", "flags.tasks", ["imdb"]), ("--tasks", "imdb")),
    "no task": (edit("config.json", "flags.tasks", []), ("--tasks",)),
    "an unknown encoding": (edit("config.json", "flags.pairs", ["glued"]), ("--pairs", "glued")),
    "a switch is text": (edit("config.json", "flags.early_exit", "yes"), ("early_exit",)),
    "an unknown pooling": (edit("config.json", "flags.pooling", "max"), ("--pooling", "max")),
    "an unknown precision": (edit("config.json", "flags.precision", "fp64"), ("--precision", "fp64")),
    "a seed is text": (edit("config.json", "flags.seed", "x"), ("--seed",)),
    "no sizes": (edit("config.json", "bert", MISSING), ("bert",)),
    "sizes are a number": (edit("config.json", "bert", 1), ("bert",)),
    "a size is unknown": (edit("config.json", "bert.height", 6), ("height",)),
    "a size is text": (edit("config.json", "bert.hidden_size", "16"), ("hidden_size", "16")),
    "a size is 0": (edit("config.json", "bert.hidden_size", 0), ("hidden_size",)),
    "no data": (edit("config.json", "data", MISSING), ("data",)),
    "no weights": (edit("config.json", "weights", MISSING), ("weights",)),
    "weights are a number": (edit("config.json", "weights", 5), ("weights",)),
    "format is text": (edit("config.json", "format", "two"), ("format",)),
}
CASES |= {
    f"{reader}: {name}": (spoil, command, REFUSED, (DAMAGED, "config.json", *words))
    for name, (spoil, words) in EVERYWHERE.items()
    for reader, command in READERS.items()
}
CASES |= {
    f"{reader}: an unknown flag": (
        edit("config.json", "flags.turbo", 1),
        command,
        REFUSED,
        ("config.json", "--turbo", "does not have now"),
    )
    for reader, command in READERS.items()
}
# the flags of a run say another model than its tensors
OTHER_MODEL = {
    "adapters": edit("config.json", "flags.adapter", ["lora"]),
    "fewer tasks": edit("config.json", "flags.tasks", ["sst"]),
    "siamese pairs": edit("config.json", "flags.pairs", ["siamese"]),
    "no exits": edit("config.json", "flags.early_exit", False),
}
CASES |= {
    f"{reader}: flags of another model, {name}": (spoil, command, REFUSED, (DAMAGED, file, "tensor"))
    for name, spoil in OTHER_MODEL.items()
    for reader, command, file in (
        ("predict", predict_text, "best.safetensors"),
        ("evaluate", evaluate, "best.safetensors"),
        ("resume", resume, "last.pt"),
    )
    if (reader, name) != ("resume", "fewer tasks")  # whose files are missed before
}
# the sizes of a run, for the commands that build BERT from them
SIZES = {
    "more layers": ("bert.num_hidden_layers", 3),
    "fewer layers": ("bert.num_hidden_layers", 1),
    "a thousand million layers": ("bert.num_hidden_layers", 10**9),
    "wider": ("bert.hidden_size", 32),
    "far wider": ("bert.hidden_size", 2 * 10**9),
    "a larger vocabulary": ("bert.vocab_size", 51),
    "a vast vocabulary": ("bert.vocab_size", 10**15),
}
CASES |= {
    f"{reader}: {name}": (edit("config.json", key, value), command, REFUSED, (DAMAGED,))
    for name, (key, value) in SIZES.items()
    for reader, command in (("predict", predict_text), ("evaluate", evaluate))
}

SUMMARIES = {
    "is cut": (replace("finished/summary.json", half), ("JSON",)),
    "is empty": (replace("finished/summary.json", ""), ("JSON",)),
    "is a list": (replace("finished/summary.json", "[]"), ()),
    "is deep": (replace("finished/summary.json", DEEP), ("JSON",)),
    "has no exits": (edit("summary.json", "exits", MISSING, ["finished"]), ("exits",)),
    "has exits that are null": (edit("summary.json", "exits", None, ["finished"]), ("exits",)),
    "has exits that are a number": (edit("summary.json", "exits", 5, ["finished"]), ("exits",)),
    "has no policies": (edit("summary.json", "exits.policies", MISSING, ["finished"]), ("policies",)),
    "has no thresholds": (edit("summary.json", "exits.thresholds", MISSING, ["finished"]), ("thresholds",)),
    "has a threshold too few": (edit("summary.json", "exits.thresholds.sst", MISSING, ["finished"]), ("sst",)),
    "has a policy too few": (edit("summary.json", "exits.policies.sts", MISSING, ["finished"]), ("sts",)),
    "has an unknown policy": (edit("summary.json", "exits.policies.sst", "luck", ["finished"]), ("luck",)),
    "has a threshold that is text": (edit("summary.json", "exits.thresholds.sst", "x", ["finished"]), ("sst", "'x'")),
    "has a threshold that is no number": (
        edit("summary.json", "exits.thresholds.sst", float("nan"), ["finished"]),
        ("sst", "nan"),
    ),
}
CASES |= {
    f"{reader}: the summary {name}": (spoil, command, REFUSED, (DAMAGED, "summary.json", *words))
    for name, (spoil, words) in SUMMARIES.items()
    for reader, command in (("predict", predict_text), ("evaluate", evaluate))
}
CASES["predict: no summary"] = (
    replace("finished/summary.json", None),
    predict_text,
    WARNED,
    ("summary.json", "threshold"),
)

VOCABULARIES = {
    "is cut in half": (half, ("sha256",)),
    "has other words": (lambda content: content.replace(b"\nthe\n", b"\nzzz\n"), ()),
    "is empty": (lambda content: b"", ()),
    "has a word twice": (lambda content: content.replace(b"\nthe\n", b"\n[SEP]\n"), ()),
}
CASES |= {
    f"{reader}: the vocabulary {name}": (
        replace("finished/vocab.txt", change),
        command,
        REFUSED,
        (DAMAGED, "vocab.txt", *words),
    )
    for name, (change, words) in VOCABULARIES.items()
    for reader, command in (("predict", predict_text), ("evaluate", evaluate))
}
CASES |= {
    "predict: no vocabulary": (replace("finished/vocab.txt", None), predict_text, REFUSED, ("vocab.txt",)),
    "predict: no model": (replace("finished/best.safetensors", None), predict_text, REFUSED, ("best.safetensors",)),
    "predict: a model cut short": (
        replace("finished/best.safetensors", half),
        predict_text,
        REFUSED,
        (DAMAGED, "best.safetensors"),
    ),
    "predict: an empty model": (
        replace("finished/best.safetensors", b""),
        predict_text,
        REFUSED,
        (DAMAGED, "best.safetensors"),
    ),
    "predict: a tensor too few": (
        best(lambda tensors: tensors.pop("heads.sst.bias")),
        predict_text,
        REFUSED,
        (DAMAGED, "best.safetensors", "heads.sst.bias"),
    ),
    "predict: a tensor too many": (
        best(lambda tensors: tensors.update(extra=torch.ones(1))),
        predict_text,
        REFUSED,
        (DAMAGED, "best.safetensors", "extra"),
    ),
    "predict: a tensor of another shape": (
        best(lambda tensors: tensors.update({"heads.sst.bias": torch.ones(7)})),
        predict_text,
        REFUSED,
        (DAMAGED, "best.safetensors", "heads.sst.bias", "[7]"),
    ),
    "predict: a tensor of another type": (
        best(lambda tensors: tensors.update({"heads.sst.bias": torch.ones(5, dtype=torch.int64)})),
        predict_text,
        REFUSED,
        (DAMAGED, "best.safetensors", "heads.sst.bias", "int64"),
    ),
    "predict: the model is a folder": (
        swap("finished/best.safetensors", Path.mkdir),
        predict_text,
        REFUSED,
        ("best.safetensors",),
    ),
    "predict: the config is a pipe": (
        swap("finished/config.json", os.mkfifo),
        predict_text,
        REFUSED,
        ("config.json", "not a file"),
    ),
    "predict: the config is a folder": (
        swap("finished/config.json", Path.mkdir),
        predict_text,
        REFUSED,
        ("config.json", "directory"),
    ),
    "predict: the config is a link to itself": (
        swap("finished/config.json", loop),
        predict_text,
        REFUSED,
        ("config.json", "symbolic links"),
    ),
}

STATES = {
    "a list": (state(lambda saved: [1]), ()),
    "an empty table": (state(lambda saved: {}), ()),
    "without progress": (state(lambda saved: drop(saved, "progress")), ("progress",)),
    "without a model": (state(lambda saved: drop(saved, "model")), ("model",)),
    "without an optimiser": (state(lambda saved: drop(saved, "optimizer")), ("optimizer",)),
    "without generators": (state(lambda saved: drop(saved, "rng")), ("rng",)),
    "without the log's length": (state(lambda saved: drop(saved, "log_position")), ("log_position",)),
    "a log of negative length": (state(lambda saved: saved.update(log_position=-1)), ("log_position",)),
    "progress in text": (state(lambda saved: saved.update(progress="half")), ("progress",)),
    "steps in text": (state(lambda saved: saved["progress"].update(step="two")), ("step", "two")),
    "negative steps": (state(lambda saved: saved["progress"].update(step=-1)), ("step", "-1")),
    "progress of another version": (state(lambda saved: saved["progress"].update(miles=3)), ("miles",)),
    "progress that lacks a number": (state(lambda saved: drop(saved["progress"], "step")), ("step",)),
    "a tensor too few": (state(lambda saved: drop(saved["model"], "heads.sst.bias")), ("heads.sst.bias",)),
    "a tensor of another shape": (
        state(lambda saved: saved["model"].update({"heads.sst.bias": torch.ones(7)})),
        ("heads.sst.bias", "[7]"),
    ),
    "a model in text": (state(lambda saved: saved.update(model="large")), ("model",)),
    "a generator of another length": (state(lambda saved: saved.update(rng=saved["rng"][:, :8])), ("rng",)),
    "an optimiser of other parameters": (
        state(lambda saved: drop(saved["optimizer"]["param_groups"], 0)),
        ("parameter groups",),
    ),
    "a moment of another shape": (
        state(lambda saved: saved["optimizer"]["state"][0].update(m=torch.ones(3))),
        ("m is", "[3]"),
    ),
    "terms of another run": (state(lambda saved: saved["terms"].update(bregman={})), ("bregman",)),
    "cut in half": (replace("stopped/last.pt", half), ()),
    "empty": (replace("stopped/last.pt", b""), ()),
    "a text": (replace("stopped/last.pt", "hello"), ()),
    "a pickle with code": (replace("stopped/last.pt", pickle.dumps({"f": print}, 2)), ()),
}
CASES |= {
    f"resume: the state is {name}": (spoil, resume, REFUSED, (DAMAGED, "last.pt", *words))
    for name, (spoil, words) in STATES.items()
}
CASES |= {
    "predict: the summary is a pipe": (
        swap("finished/summary.json", os.mkfifo),
        predict_text,
        REFUSED,
        ("summary.json", "not a file"),
    ),
    "predict: the summary is a folder": (
        swap("finished/summary.json", Path.mkdir),
        predict_text,
        REFUSED,
        ("summary.json", "directory"),
    ),
    "resume: the state is a pipe": (swap("stopped/last.pt", os.mkfifo), resume, REFUSED, ("last.pt", "not a file")),
    "resume: the state is a folder": (swap("stopped/last.pt", Path.mkdir), resume, REFUSED, ("last.pt", "directory")),
    "resume: another lr than the default": (
        edit("config.json", "flags.lr", None),
        lambda world: (main, [*resume(world)[1], "--lr", ".5"]),
        REFUSED,
        ("--lr 0.5", "default"),
    ),
    "resume: another lr": (
        nothing,
        lambda world: (main, [*resume(world)[1], "--lr", ".5"]),
        REFUSED,
        ("--lr 0.5", "0.003"),
    ),
}

WEIGHTS = {
    "float8": (weights(lambda tensor: tensor.to(torch.float8_e4m3fn)), ("float8", QUERY)),
    "float8 in a .bin": (weights(lambda tensor: tensor.to(torch.float8_e5m2), "bin"), ("float8", QUERY)),
    "sparse": (weights(lambda tensor: tensor.to_sparse(), "bin"), ("sparse", QUERY)),
    "without numbers": (weights(lambda tensor: tensor.to("meta"), "bin"), ("meta", QUERY)),
    "complex": (weights(lambda tensor: tensor.to(torch.complex64), "bin"), ("complex64", QUERY)),
    "a raw pickle of numbers": (raw_pickle({"a": 1}, 2), ("pytorch_model.bin", "code")),
    "a new pickle of numbers": (raw_pickle({"a": 1}, 5), ("pytorch_model.bin", "code")),
    "a raw pickle with code": (raw_pickle({"a": print}, 2), ("pytorch_model.bin", "code")),
    "a new pickle with code": (raw_pickle({"a": print}, 5), ("pytorch_model.bin", "code")),
    "a pickle of tensors": (raw_pickle({"a": torch.ones(2)}, 4), ("pytorch_model.bin", "code")),
    "with a deep config": (replace("weights/config.json", DEEP), ("weights/config.json", "JSON")),
    "with a deep tokenizer": (replace("weights/tokenizer_config.json", DEEP), ("tokenizer_config.json", "JSON")),
    "far too wide": (size("hidden_size", 2 * 10**9), ("hidden_size",)),
    "wider than any memory": (size("hidden_size", 10**6), ("model.safetensors", "shape")),
    "with too wide a network": (size("intermediate_size", 10**12), ("intermediate_size",)),
    "with too many words": (size("vocab_size", 10**15), ("vocab_size",)),
    "with too many positions": (size("max_position_embeddings", 10**15), ("max_position_embeddings",)),
    "with too many layers": (size("num_hidden_layers", 10**9), ("num_hidden_layers",)),
    "with many layers": (size("num_hidden_layers", 100_000), ("num_hidden_layers",)),
    "whose words have a byte-order mark": (
        replace("weights/vocab.txt", lambda content: b"\xef\xbb\xbf" + content),
        ("vocab.txt", "byte-order mark"),
    ),
    "whose words are a pipe": (swap("weights/vocab.txt", os.mkfifo), ("vocab.txt",)),
    "whose config is a pipe": (swap("weights/config.json", os.mkfifo), ("config.json",)),
    "whose tokenizer is a pipe": (swap("weights/tokenizer_config.json", os.mkfifo), ("tokenizer_config.json",)),
    "whose file is a folder": (swap("weights/model.safetensors", Path.mkdir), ("model.safetensors",)),
    "whose file is a pipe": (swap("weights/model.safetensors", os.mkfifo), ("model.safetensors",)),
    "that may not be read": (lock_away("weights/model.safetensors"), ("model.safetensors", "ermission denied")),
    "whose config may not be read": (lock_away("weights/config.json"), ("config.json", "ermission denied")),
    "whose words may not be read": (lock_away("weights/vocab.txt"), ("vocab.txt", "ermission denied")),
    "in a folder that may not be read": (lock_away("weights"), ("weights", "ermission denied")),
}
CASES |= {f"weights {name}": (spoil, training(), REFUSED, words) for name, (spoil, words) in WEIGHTS.items()}
CASES["a .bin that may not be read"] = (
    both(weights(lambda tensor: tensor, "bin"), lock_away("weights/pytorch_model.bin")),
    training(),
    REFUSED,
    ("pytorch_model.bin", "ermission denied"),
)

ROW = "0\tone\ta good film\t1"
FILES = {
    "has CR line ends": (table(*sst_rows(3), end="\r"), ("line 1", "CR")),
    "has a label column twice": (
        table("0\tone\ta\t1\t2", header="\tid\tsentence\tsentiment\tsentiment"),
        ("line 1", "sentiment", "twice"),
    ),
    "has a text column twice": (
        table("0\tone\ta\tb\t2", header="\tid\tsentence\tsentence\tsentiment"),
        ("line 1", "sentence", "twice"),
    ),
    "has an id column twice": (
        table("one\tone\ta\t2", header="id\tid\tsentence\tsentiment"),
        ("line 1", "id", "twice"),
    ),
    "is a pipe": (swap("data/ids-sst-train.csv", os.mkfifo), ("ids-sst-train.csv",)),
    "is a folder": (swap("data/ids-sst-train.csv", Path.mkdir), ("ids-sst-train.csv",)),
    "is a link to itself": (swap("data/ids-sst-train.csv", loop), ("ids-sst-train.csv",)),
    "may not be read": (lock_away("data/ids-sst-train.csv"), ("ids-sst-train.csv", "ermission denied")),
    "is in a folder that may not be read": (lock_away("data"), ("data", "ermission denied")),
    "has Arabic digits": (table(ROW, "1\ttwo\tb\t\u0663"), ("line 3", "\u0663")),
    "has wide digits": (table(ROW, "1\ttwo\tb\t\uff13"), ("line 3", "\uff13")),
    "has digits with an underscore": (table(ROW, "1\ttwo\tb\t0_1"), ("line 3", "0_1")),
    "has many blank labels": (table(*sst_rows(50, row3="3\tid3\ta\t", row7="7\tid7\ta\t")), ("2 of 50 rows", "1%")),
    "has many blank texts": (table(*sst_rows(50, row3="3\tid3\t\t1", row7="7\tid7\t \t1")), ("2 of 50 rows", "1%")),
}
CASES |= {f"a CSV {name}": (spoil, training(), REFUSED, words) for name, (spoil, words) in FILES.items()}
WARNINGS = {
    "one blank label": (table(*sst_rows(200, row3="3\tid3\ta\t")), ("ids-sst-train.csv", "1 row", "line 5")),
    "one blank text": (table(*sst_rows(200, row3="3\tid3\t\t1")), ("ids-sst-train.csv", "1 row", "line 5")),
    "blanks of both kinds": (
        table(*sst_rows(300, row3="3\tid3\t\t1", row9="9\tid9\ta\t")),
        ("ids-sst-train.csv", "2 rows", "line 5, 11"),
    ),
    "an id twice": (table(*sst_rows(50, row9="9\tid3\ta\t1")), ("ids-sst-train.csv", "id", "line 11")),
    "ids twice": (
        table(*sst_rows(50, row9="9\tid3\ta\t1", row10="10\tid3\ta\t1", row20="20\tid4\ta\t1", row30="30\tid4\ta\t1")),
        ("ids-sst-train.csv", "id", "line 11, 12, 22, ..."),
    ),
}
CASES |= {f"{name} in a CSV": (spoil, training(), WARNED, words) for name, (spoil, words) in WARNINGS.items()}
CASES |= {
    "a byte-order mark in a CSV": (
        replace("data/ids-sst-train.csv", lambda content: b"\xef\xbb\xbf" + content),
        training(),
        GOES_ON,
        (),
    ),
    "CRLF line ends in a CSV": (
        replace("data/ids-sst-train.csv", lambda content: content.replace(b"\n", b"\r\n")),
        training(),
        GOES_ON,
        (),
    ),
}

HEADER = "\tid\tsentence"
PREDICTIONS = {
    "an empty text": (nothing, predicting(text=""), REFUSED, ("TEXT", "empty")),
    "a blank text": (nothing, predicting(text=" \t"), REFUSED, ("TEXT", "empty")),
    "an empty name of a run": (nothing, lambda world: (predict.main, ["", "sst", "a film"]), REFUSED, ("run", "empty")),
    "a text that is not UTF-8": (nothing, predicting(text="a film\udce9"), REFUSED, ("not UTF-8",)),
    "a name of 300 characters": (nothing, predicting(run="r" * 300), REFUSED, ("r" * 300, "too long")),
    "a run that is a file": (
        nothing,
        lambda world: (predict.main, [str(world.finished / "vocab.txt"), "sst", "a"]),
        REFUSED,
        ("config.json",),
    ),
    "a folder that may not be read": (lock_away("finished"), predict_text, REFUSED, ("finished", "ermission denied")),
    "a config that may not be read": (
        lock_away("finished/config.json"),
        predict_text,
        REFUSED,
        ("config.json", "ermission denied"),
    ),
    "a model that may not be read": (
        lock_away("finished/best.safetensors"),
        predict_text,
        REFUSED,
        ("best.safetensors", "ermission denied"),
    ),
    "a summary that may not be read": (
        lock_away("finished/summary.json"),
        predict_text,
        REFUSED,
        ("summary.json", "ermission denied"),
    ),
    "a file that is a pipe": (swap("./input.csv", os.mkfifo), predict_file, REFUSED, ("input.csv", "not a file")),
    "a file that is a folder": (swap("./input.csv", Path.mkdir), predict_file, REFUSED, ("input.csv",)),
    "a file with a column twice": (
        input_file("0\ta\tb\tc", header=HEADER + "\tsentence"),
        predict_file,
        REFUSED,
        ("sentence", "twice"),
    ),
    "an id twice": (input_file("0\ta\tb", "1\ta\tc", header=HEADER), predict_file, WARNED, ("input.csv", "line 3")),
    "an output file of 300 characters": (nothing, predicting("--out", "r" * 300), REFUSED, ("r" * 300, "too long")),
}
CASES |= {f"predict: {name}": case for name, case in PREDICTIONS.items()}


# --- one test for all of them --------------------------------------------------------------------------------------


def content(folder):
    """{path: bytes} of every file below a folder, and {path: None} for all else that lies there."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def limits():
    """Limit the time and the memory, and let permissions count for root too."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    # capability 1 reads and writes any file, 2 reads any folder; the last thirds of the sets stay as they are
    system, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    system.capget(header, sets)
    effective = sets[0]
    sets[0] &= ~0b110
    system.capset(header, sets)
    handler = signal.signal(signal.SIGALRM, partial(pytest.fail, "takes too long"))
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sets[0] = effective
        system.capset(header, sets)


def attempt(command, argv, capsys):
    """Run a command as a script. Returns (exit status, the lines on standard error)."""
    capsys.readouterr()
    with limits(), pytest.raises(SystemExit) as end:
        run_script(lambda: command(list(map(str, argv))))
    return end.value.code or 0, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_has_its_outcome(world, capsys, monkeypatch, name):
    spoil, command, outcome, words = CASES[name]
    spoil(world)
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(multitask_classifier, "finish", lambda *_: None)
    before = content(world.folder)
    status, lines = attempt(*command(world), capsys)
    for path in (world.data, world.weights, world.finished):
        path.chmod(0o700)
    if outcome == REFUSED:
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert content(world.folder) == before
    else:
        lines = [line for line in lines if line.startswith("warning: ")]
        assert status == 0 and len(lines) == (outcome == WARNED), lines
    for word in words:
        assert word in lines[0]


def test_the_table_is_long_enough():
    assert len(CASES) >= 120
    assert {case[2] for case in CASES.values()} == {REFUSED, WARNED, GOES_ON}


# --- one process for a run -----------------------------------------------------------------------------------------


@pytest.fixture
def training_now(world, monkeypatch):
    """A run that stops in its third step, while the body of the test runs: training_now(name, body)."""

    def start(name, body, *flags):
        call_at(monkeypatch, multitask_classifier, "train_step", 3, body)
        return main(world.command(name, "--epochs", 1, *flags))

    return start


def run_apart(argv, output, prepare=None):
    """In a process of its own: run the program as a script."""
    become_process(output)
    if prepare:
        prepare()
    run_script(lambda: main(argv), lenient=True)


@pytest.fixture
def apart(world, forkserver):
    """Run a command in another process. Returns (exit status, what it printed)."""

    def start(argv, prepare=None):
        output = world.folder / "printed.txt"
        output.unlink(missing_ok=True)
        process = forkserver.Process(target=run_apart, args=(list(map(str, argv)), output, prepare))
        process.start()
        process.join(300)
        return process.exitcode, output.read_text(errors="replace")

    return start


def test_a_second_process_is_refused_whatever_it_wants(world, training_now, apart):
    """It prints one line, with the number of the process that holds the run, and changes nothing."""
    commands = {
        "overwrite": world.command("new", "--overwrite"),
        "resume": ["--resume", "--run_dir", world.path("new")],
        "evaluate": ["--option", "evaluate", "--run_dir", world.path("new")],
    }
    refused = {}

    def others():
        for name, command in commands.items():
            before = content(world.path("new"))
            refused[name] = apart(command), before == content(world.path("new"))

    assert not training_now("new", others)
    for name, ((status, printed), unchanged) in refused.items():
        assert status == 2 and printed.count("\n") == 1 and unchanged, (name, printed)
        assert f"process {os.getpid()} on" in printed and str(world.path("new")) in printed
    assert len(refused) == 3 and not (world.path("new") / runs.LOCK).exists()


def test_of_two_starts_at_the_same_moment_one_trains(world, forkserver):
    outputs = [world.folder / f"printed-{k}.txt" for k in range(2)]
    command = list(map(str, world.command("new", "--epochs", 1)))
    starts = [forkserver.Process(target=run_apart, args=(command, output)) for output in outputs]
    for start in starts:
        start.start()
    for start in starts:
        start.join(300)
    assert sorted(start.exitcode for start in starts) == [0, 2]
    loser = outputs[[start.exitcode for start in starts].index(2)].read_text()
    assert loser.count("error: ") == 1 and str(world.path("new")) in loser
    assert (world.path("new") / "summary.json").is_file()
    steps = [line["step"] for line in log_of(world.path("new")) if line["kind"] == "step"]
    assert steps == sorted(set(steps))


def test_the_lock_of_a_killed_process_is_no_obstacle(world, training_now):
    (world.stopped / runs.LOCK).write_text("process 1 on another machine")
    assert not main(list(map(str, resume(world)[1])))
    assert not (world.stopped / runs.LOCK).exists()


def test_without_locks_the_run_goes_on_with_a_warning(world, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    world.train("new", "--epochs", 1)
    assert "warning: " in (err := capsys.readouterr().err) and "No locks available" in err


def test_a_run_whose_directory_was_taken_writes_nothing_into_it(world, training_now):
    """A user removes the directory of a run that is training, and starts another run there."""
    new, found = world.path("new"), {}

    def replace_it():
        shutil.rmtree(new)
        shutil.copytree(world.finished, new)
        found.update(content(new))

    with pytest.raises(InputError, match="removed or replaced"):
        training_now("new", replace_it)
    assert content(new) == found


def test_overwrite_removes_what_a_run_writes_and_nothing_else(world, monkeypatch):
    """All files of a run with exits, of its evaluation and of its sweep go; a user's files stay."""
    run = world.finished
    monkeypatch.setattr(report, "plot_sweep", lambda path, rows: write_whole(path, b""))  # drawing takes seconds
    main(["--option", "evaluate", "--run_dir", str(run), "--data_dir", str(world.data)])
    sweep = ["--exit_threshold", "0,.9", "--data_dir", str(world.data)]
    main(["--option", "evaluate", "--run_dir", str(run), *sweep])
    (run / ".last.pt.123.part").write_text("half")
    written = {path for path in run.rglob("*") if path.is_file()}
    own = {run / name for name in ("thesis.tex", "predictions/mine.csv", ".own.part", "notes/summary.json")}
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("two years of work")
    world.train("finished", "--epochs", 1, "--overwrite")
    assert {path.read_text() for path in own} == {"two years of work"}
    usual = {path for path in world.train("usual", "--epochs", 1).rglob("*") if path.is_file()}
    left = {path.relative_to(run) for path in run.rglob("*") if path.is_file() and path not in own}
    assert left == {path.relative_to(world.path("usual")) for path in usual}
    assert len(written) > 30 and not (run / "evaluate").exists()


# --- output: the run is what counts --------------------------------------------------------------------------------


def close_output(*numbers):
    """Close standard streams as a shell does."""
    for number in numbers:
        os.close(number)
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)


def fill_output(*numbers):
    """Let standard streams lead to a disk that is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    for number in numbers:
        os.dup2(full, number)


def use_ascii():
    """Let standard output be a terminal without Unicode."""
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "ascii")


OUTPUTS = {
    "standard output closed": partial(close_output, 1),
    "standard error closed": partial(close_output, 2),
    "all streams closed": partial(close_output, 0, 1, 2),
    "standard output on a full disk": partial(fill_output, 1),
    "both on a full disk": partial(fill_output, 1, 2),
    "a terminal without Unicode": use_ascii,
}


@pytest.mark.parametrize("prepare", OUTPUTS.values(), ids=OUTPUTS)
def test_a_run_goes_on_without_its_output(world, apart, prepare):
    name = "new-\N{ROCKET}"
    status, printed = apart(world.command(name, "--epochs", 1), prepare)
    assert status == 0, printed
    files = {path.relative_to(world.path(name)) for path in world.path(name).rglob("*")}
    assert files == {path.relative_to(world.path("usual")) for path in world.train("usual", "--epochs", 1).rglob("*")}
    ours, theirs = (load_file(world.path(run) / "best.safetensors") for run in (name, "usual"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if prepare is use_ascii:
        assert "new-\\U0001f680" in printed


def test_a_prediction_that_cannot_be_printed_is_an_error(world, monkeypatch, capsys):
    """Its output is what counts."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            run_script(lambda: predict.main([str(world.finished), "sst", "a film"]))
        monkeypatch.undo()
    assert end.value.code == 2 and "standard output: No space left on device" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="torchrun is tried on Linux")
def test_a_mistake_under_torchrun_is_one_line(world):
    """Both processes notice it; torchrun ends the second one before it prints."""
    (world.data / "sts-dev.csv").write_text("id\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", driver.__file__]
    how = dict(capture_output=True, text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([*command, *world.command("new")], **how)
    assert done.returncode and done.stderr.count("error: ") == 1, done.stderr
    assert "sts-dev.csv: line 1: no column" in done.stderr and not world.path("new").exists()
