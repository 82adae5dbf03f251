"""A tiny seeded multitask model and batches for tests: quick enough to train in process."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from base_bert import BertConfig
from bert import BertModel
from datasets import Batch
from multitask_classifier import MultitaskBERT
from tasks import build_tasks

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
# unequal, so that splits and samplers matter, and no multiples of the batch size
ROWS = {"ids-sst": 16, "ids-cfimdb": 12, "quora": 30, "sts": 20}


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
    return Batch(task, task.encoding, tuple(segments), torch.tensor(labels, dtype=torch.float32), ids)


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
