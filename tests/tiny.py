"""A tiny seeded multitask model, batches, and the whole program on such a model: quick enough to train in process."""

import csv
import json
import os
import re
import runpy
import signal
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from driver import main

import multitask_classifier
from base_bert import BertConfig
from bert import BertModel
from datasets import Batch
from errors import InputError, run_script
from multitask_classifier import MultitaskBERT
from tasks import build_tasks
from tokenizer import BertTokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
# unequal, so that splits and samplers matter, and no multiples of the batch size
ROWS = {"ids-sst": 16, "ids-cfimdb": 12, "quora": 30, "sts": 20}
EPOCHS = 2


def make_config(layers=3, hidden=16, dropout=0.0):
    """A BERT of a few thousand parameters."""
    return BertConfig(
        vocab_size=50,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=40,
        initializer_range=0.2,
    )


def make_model(tasks=None, layers=3, dropout=0.0, dtype=torch.float64, seed=0, attention="plain", **kw):
    """A MultitaskBERT with seeded random weights; keyword arguments go to its constructor."""
    tasks = tasks or build_tasks()
    bert = BertModel(make_config(layers, dropout=dropout), attention, torch.Generator().manual_seed(seed))
    init = torch.Generator().manual_seed(seed + 1)
    return MultitaskBERT(bert, tasks, hidden_dropout_prob=dropout, init=init, **kw).to(dtype)


def make_batch(task, b=4, s=9, seed=0):
    """A random batch of a task with padding: row i has s - i real tokens (at least 3) in every segment."""
    rng = np.random.default_rng(seed)
    segments = []
    for k in range(2 if task.encoding in ("embed_concat", "siamese") else 1):
        ids = torch.from_numpy(rng.integers(5, 50, (b, s)))
        lengths = torch.tensor([max(3, s - i - k) for i in range(b)])
        mask = (torch.arange(s) < lengths[:, None]).long()
        types = torch.full_like(ids, k if task.encoding == "embed_concat" else 0)
        if task.encoding == "concat":
            types = (torch.arange(s) >= s // 2).long().expand(b, s) * mask
        segments.append((ids * mask, mask, types))
    low, high = task.label_range
    labels = rng.uniform(low, high, b) if task.is_regression else rng.integers(low, high + 1, b)
    ids = tuple(f"id{i}" for i in range(b))
    return Batch(task, tuple(segments), torch.tensor(labels, dtype=torch.float32), ids)


def write_data(folder):
    """A data folder with the first rows of every sample file."""
    folder.mkdir()
    for path in SAMPLE.glob("*.csv"):
        count = next(rows for name, rows in ROWS.items() if path.name.startswith(name))
        lines = path.read_text().splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[: 1 + count]))
    return folder


def write_weights(folder, layers=2, dropout=0.1, seed=0):
    """A weights folder with a tiny BERT and the most frequent words of the sample as its vocabulary."""
    config = make_config(layers, dropout=dropout)
    words = Counter(re.findall(r"[a-z]+", "".join(path.read_text().lower() for path in sorted(SAMPLE.glob("*.csv")))))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = special + [word for word, _ in words.most_common(config.vocab_size - len(special))]
    BertModel(config, generator=torch.Generator().manual_seed(seed)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def read_csv(path, delimiter=","):
    """The rows of a CSV as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


class Program:
    """A weights folder, a data folder, and runs beside them."""

    def __init__(self, folder):
        self.folder = folder
        self.weights, self.data = write_weights(folder / "weights"), write_data(folder / "data")
        self.tokenizer = BertTokenizer.from_pretrained(self.weights)

    def path(self, name):
        """The run directory of a name."""
        return self.folder / name

    def command(self, name, *flags):
        """The command line of a run: the given flags win over the usual ones."""
        usual = f"--epochs {EPOCHS} --batch_size 8 --lr 0.003 --max_length 40 --pooling cls --weights {self.weights}"
        return [*usual.split(), "--data_dir", str(self.data), "--run_dir", str(self.path(name)), *map(str, flags)]

    def train(self, name, *flags):
        """Run the program here; it must end well. Returns the run directory."""
        assert not main(self.command(name, *flags))
        return self.path(name)

    def train_quickly(self, name, *flags, finish=False):
        """The same with a tokenizer that remembers the words and, unless told to, without the closing evaluation."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BertTokenizer, "from_pretrained", lambda folder: self.tokenizer)
            if not finish:
                patch.setattr(multitask_classifier, "finish", lambda *_: None)
            return self.train(name, *flags)

    def refused(self, name, *flags):
        """The one line with which a command is refused."""
        return refusal(main, self.command(name, *flags))


def refusal(call, *arguments):
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


def script_refusal(monkeypatch, capsys, script, *arguments):
    """The one line with which a script is refused, with status 2. It runs in this process, which takes less time."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err


class PageParser(HTMLParser):
    """Collects what a browser would run or load: the scripts by id, and every address."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.addresses, self.current = {}, [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self.current = attributes.get("id", tag) if tag == "script" else None
        if tag == "script":
            assert self.current not in self.scripts
            self.scripts[self.current] = ""

    def handle_endtag(self, tag):
        self.current = None

    def handle_data(self, data):
        if self.current:
            self.scripts[self.current] += data


def page_of(path):
    """The content of a page."""
    parsed = PageParser(path.read_text(encoding="utf-8"))
    assert parsed.scripts.keys() == {"page", "script"} and parsed.addresses == []
    return json.loads(parsed.scripts["page"])


def log_of(run):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state_of(run):
    """A run's last state."""
    return torch.load(run / "last.pt", weights_only=True)


def weights_of(run):
    """The weights of a run's last state."""
    return state_of(run)["model"]


def call_at(monkeypatch, owner, name, at, action):
    """Do something right before a function is called for the `at`-th time."""
    original, calls = getattr(owner, name), count(1)

    def counted(*args, **kwargs):
        if next(calls) == at:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def become_process(output):
    """In a process of its own: one thread, and what is printed goes into a file."""
    torch.set_num_threads(1)
    with open(output, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def run_and_kill(argv, owner, name, at, output):
    """In a process of its own: run the program and kill it, hard, at the `at`-th call of a function."""
    become_process(output)
    with pytest.MonkeyPatch.context() as patch:
        call_at(patch, sys.modules[owner], name, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run_script(lambda: main(argv))
