"""From a course CSV to padded batches: strict reading, compact storage, pair encodings.

Read first: tokenizer.py, tasks.py.

A file is read once. Each text is tokenised once and kept as a slice of one flat array of token ids, so that 400,000
question pairs are a handful of arrays and not millions of Python objects. A batch is cut from those slices:

    single        [CLS] A [SEP]                        segment ids 0            one segment
    concat        [CLS] A [SEP] B [SEP]                0...0 1...1              one segment (ordinary BERT packing)
    embed_concat  [CLS] A [SEP]  and  [CLS] B [SEP]    0...0 and 1...1          two segments, joined after embedding
    siamese       [CLS] A [SEP]  and  [CLS] B [SEP]    0...0 and 0...0          two segments, encoded apart

A pair is joined before it is padded: joined after padding, the positions of B (and so the prediction) would depend
on the longest A of the batch. Labels stay real numbers: an STS score of 4.2 must not become 4.
"""

import csv
import math
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from errors import InputError
from tasks import TASK_NAMES, build_tasks
from tokenizer import truncate_pair

SPLITS = ("train", "dev", "test")
# more unusable rows than this share of a file is a broken file, not a quirk
TOLERATED = 0.01


@dataclass(frozen=True)
class Batch:
    """Examples of one task, padded to the longest of them.

    Shapes: each segment is (input_ids [b,s], mask [b,s], types [b,s]); labels [b] or None;
        features [b,w], where the state that the head sees is known beforehand (a frozen BERT), else None.
    `share` is (positions, n) where these are some of the n rows of a batch that several processes share.
    """

    task: object
    encoding: str
    segments: tuple
    labels: torch.Tensor | None
    ids: tuple
    features: torch.Tensor | None = None
    share: tuple | None = None

    def __len__(self):
        return len(self.ids)

    def to(self, device):
        """The same batch on another device."""
        if device.type == "cpu":
            return self

        def move(x):
            return None if x is None else x.pin_memory().to(device, non_blocking=True) if pin else x.to(device)

        pin = device.type == "cuda"
        segments = tuple(tuple(move(x) for x in segment) for segment in self.segments)
        return replace(self, segments=segments, labels=move(self.labels), features=move(self.features))


class Ragged:
    """Sequences of unequal length in one flat array: item i is flat[offsets[i]:offsets[i + 1]]."""

    def __init__(self, typecode):
        self.flat, self.offsets = array(typecode), array("q", [0])

    def append(self, values):
        """Add one sequence (an iterable of numbers, or bytes)."""
        if isinstance(values, bytes):
            self.flat.frombytes(values)
        else:
            self.flat.extend(values)
        self.offsets.append(len(self.flat))

    def freeze(self):
        """Turn the growing arrays into numpy views."""
        self.flat, self.offsets = np.asarray(self.flat), np.asarray(self.offsets)
        return self

    def __getitem__(self, i):
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self):
        """Length of every sequence. Shapes: [n]."""
        return np.diff(self.offsets)


class Dataset:
    """The examples of one file, with their texts, token ids and labels.

    `labels` is NaN where a row has none; `usable` marks the rows to train and score on (a label and no empty text);
    `features`, where set, is one state vector per row (a frozen BERT computes it once).
    """

    def __init__(self, task, path, tokenizer, max_length):
        self.task, self.path, self.tokenizer, self.max_length = task, path, tokenizer, max_length
        self.ids, self.texts = Ragged("B"), [Ragged("B") for _ in task.columns]
        self.tokens = [Ragged("i") for _ in task.columns]
        self.labels, self.features, self.truncated = array("d"), None, 0

    def add(self, identifier, texts, label):
        """Append one row; texts are tokenised and, beyond the model's length, cut."""
        self.ids.append(identifier.encode())
        tokens = [self.tokenizer.encode(text) for text in texts]
        for i, text in enumerate(texts):
            self.texts[i].append(text.encode())
            self.tokens[i].append(tokens[i][: self.max_length])
        self.truncated += self.is_cut([len(part) for part in tokens])
        self.labels.append(label)

    def is_cut(self, lengths):
        """Whether texts of these lengths do not fit as a whole."""
        together = max if self.task.encoding == "siamese" else sum
        return together(lengths) > self.room

    @property
    def specials(self):
        """[CLS] and [SEP] among the tokens that attention sees at once."""
        return {"siamese": 2, "embed_concat": 4}.get(self.task.encoding, 1 + len(self.tokens))

    @property
    def room(self):
        """Tokens left for texts beside them."""
        return self.max_length - self.specials

    def freeze(self):
        """Finish reading: growing arrays become numpy arrays."""
        for ragged in (self.ids, *self.texts, *self.tokens):
            ragged.freeze()
        self.labels = np.asarray(self.labels)
        self.empty = np.any([tokens.lengths() == 0 for tokens in self.tokens], axis=0)
        self.usable = np.flatnonzero(~np.isnan(self.labels) & ~self.empty)
        return self

    def __len__(self):
        return len(self.labels)

    def identifier(self, row):
        """The id column of a row."""
        return self.ids[row].tobytes().decode()

    def text(self, row):
        """The texts of a row, one per column."""
        return tuple(column[row].tobytes().decode() for column in self.texts)

    def lengths(self):
        """Length of every example as it enters BERT (the longer pass of a siamese pair). Shapes: [n]."""
        together = np.max if self.task.encoding == "siamese" else np.sum
        return np.minimum(together([tokens.lengths() for tokens in self.tokens], axis=0), self.room) + self.specials

    def sequences(self, row):
        """Token ids and segment ids of one row: a list with one (ids, types) per segment."""
        cls, sep = [self.tokenizer.cls_id], [self.tokenizer.sep_id]
        parts = [tokens[row].tolist() for tokens in self.tokens]
        if self.task.encoding == "concat":
            a, b = truncate_pair(*parts, self.room)
            return [(cls + a + sep + b + sep, [0] * (len(a) + 2) + [1] * (len(b) + 1))]
        if self.task.encoding == "embed_concat":
            # attention sees both halves at once: together they may not be longer than one packed pair
            parts = truncate_pair(*parts, self.room)
        else:
            parts = [part[: self.room] for part in parts]
        second = 1 if self.task.encoding == "embed_concat" else 0
        return [(cls + part + sep, [i * second] * (len(part) + 2)) for i, part in enumerate(parts)]

    def widths(self, rows):
        """Length of the longest of the given rows in every segment."""
        columns = [tokens.offsets[rows + 1] - tokens.offsets[rows] for tokens in self.tokens]
        if self.task.encoding == "concat":
            return [min(sum(columns).max(), self.room) + self.specials]
        if self.task.encoding == "embed_concat":
            # ranges stand in for the tokens: only their lengths are wanted
            pairs = [truncate_pair(range(a), range(b), self.room) for a, b in zip(*columns, strict=True)]
            columns = [np.array([len(part) for part in column]) for column in zip(*pairs, strict=True)]
        return [min(column.max(), self.room) + 2 for column in columns]

    def batch(self, rows, positions=slice(None)):
        """Cut a Batch from the given rows, in their order, or from some positions of them, padded like all of them."""
        rows = np.asarray(rows, dtype=np.int64)
        whole, rows = rows, rows[positions]
        segments, features = (), None
        if self.features is not None:
            features = self.features[torch.from_numpy(rows)]
        else:
            examples = [self.sequences(row) for row in rows]
            segments = tuple(
                pad(segment, width, self.tokenizer.pad_id)
                for segment, width in zip(zip(*examples, strict=True), self.widths(whole), strict=True)
            )
        labels = torch.from_numpy(self.labels[rows].astype(np.float32))
        ids = tuple(self.identifier(row) for row in rows)
        return Batch(self.task, self.task.encoding, segments, labels, ids, features, (positions, len(whole)))


def pad(sequences, width, pad_id):
    """Pad (ids, types) sequences to a width.

    Shapes: three int64 tensors [b,s]: input_ids, mask, types.
    """
    lengths = [len(ids) for ids, _ in sequences]
    shape = (len(sequences), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, (ids, segment) in enumerate(sequences):
        input_ids[i, : lengths[i]], types[i, : lengths[i]], mask[i, : lengths[i]] = ids, segment, 1
    return tuple(torch.from_numpy(x) for x in (input_ids, mask, types))


def bucketed_batches(lengths, batch_size, rng, pool=32):
    """Cut shuffled positions 0..n-1 into batches of similar length, in random order.

    Sorting by length within pools of `pool` batches halves the padding and keeps the order random: which rows
    share a pool, the order of rows of one length, and the order of the batches all come from rng.
    Shapes: lengths [n] -> list of int arrays that together hold every position once.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * pool):
        chunk = order[start : start + batch_size * pool]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# --- reading ------------------------------------------------------------------------------------------------------


def decoded_lines(path):
    """Yield the lines of a text file, one by one: a decoded copy of the whole would be several times its size."""
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if b"\0" in raw:
                    raise InputError(f"{path}: line {line}: NUL byte, so not text: get it again or remove the byte")
                # a byte order mark may only come first
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: check --data_dir, or get the data with ./setup.sh --data") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from None
    except UnicodeDecodeError as error:
        value = error.object[error.start : error.start + 1]
        raise InputError(f"{path}: line {line}: byte {value!r} is not UTF-8: save the file as UTF-8") from None


def read_label(task, value, where):
    """A label as a float, or NaN for an empty field."""
    if value is None or not value.strip():
        return math.nan
    low, high = task.label_range
    kind = "a number" if task.is_regression else "a whole number"
    try:
        label = float(value)
    except ValueError:
        label = math.nan
    whole = task.is_regression or label == math.floor(label) if math.isfinite(label) else False
    if not whole or not low <= label <= high:
        raise InputError(
            f"{where}: {task.label_column} {value!r} is not {kind} from {low:g} to {high:g}: correct or remove the row"
        )
    return label


def check_columns(task, path, columns, labelled):
    """Fail where the header lacks a column that the task needs."""
    needed = ["id", *task.columns] + [task.label_column] * labelled
    missing = [name for name in needed if name not in columns]
    if not any(map(str.strip, columns)):
        raise InputError(f"{path}: line 1: empty file or blank first line: check it or get it again")
    if missing:
        hint = "the columns must be separated by tabs" if len(columns) == 1 else "check the header line"
        raise InputError(
            f"{path}: line 1: no column {', '.join(missing)} among {', '.join(map(repr, columns))}: {hint}"
        )


def read_dataset(task, path, tokenizer, max_length=512, labelled=True):
    """Read one course CSV: tab separated, a header line, an unnamed index column, `id`, texts and label.

    Rows without a label or with an empty text stay in the dataset (every row gets a prediction) but are not usable
    for training or scoring; `labelled=False` reads a test file, which has no labels.
    Raises: InputError naming file and line for anything that is not such a file.
    """
    # a text of any length is cut to the model's length, not refused
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(decoded_lines(path), delimiter="\t", strict=True)
    dataset = Dataset(task, Path(path), tokenizer, max_length)
    line = 1
    try:
        columns = next(reader, [])
        check_columns(task, path, columns, labelled)
        id_at, text_at = columns.index("id"), [columns.index(name) for name in task.columns]
        label_at = columns.index(task.label_column) if labelled else None
        line = reader.line_num + 1
        for row in reader:
            where = f"{path}: line {line}"
            if row:
                if len(row) != len(columns):
                    raise InputError(
                        f"{where}: {len(row)} fields where the header has {len(columns)}: check tabs and quotes in "
                        f"{' '.join(row)[:60]!r}"
                    )
                texts = [row[i].strip() for i in text_at]
                label = math.nan if label_at is None else read_label(task, row[label_at], where)
                dataset.add(row[id_at].strip(), texts, label)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {line}: {error}: check the quotes from this line on") from None
    if not len(dataset):
        raise InputError(f"{path}: only a header, no rows: get the file again with ./setup.sh --data")
    dataset.freeze()
    left_out = len(dataset) - len(dataset.usable)
    if labelled and left_out > TOLERATED * len(dataset):
        raise InputError(
            f"{path}: {left_out} of {len(dataset)} rows have no label or an empty text, "
            f"above {TOLERATED:.0%}: correct the file"
        )
    return dataset


def find_data_dir(data_dir, wanted, may_be_sample=True, default="data"):
    """The folder to read files from, or data/sample (second value True) where the default holds no course file at all.

    Raises: InputError naming what is missing where a folder holds some of the files: never a mixture.
    """
    folder = Path(data_dir) if data_dir else Path(__file__).parent / default
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give --data_dir, or get the data with ./setup.sh --data")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not missing:
        return folder, False
    course = {task.file(split) for task in build_tasks(TASK_NAMES).values() for split in SPLITS}
    if data_dir is None and may_be_sample and not any((folder / name).is_file() for name in course):
        return folder / "sample", True
    raise InputError(f"{folder}: missing {', '.join(missing)}: get them with ./setup.sh --data, or give --data_dir")


# --- the data report ----------------------------------------------------------------------------------------------


def fingerprints(dataset):
    """A hash of the texts of every row, to find repeated examples. Shapes: [n]."""
    return np.fromiter((hash(dataset.text(row)) for row in range(len(dataset))), np.int64, len(dataset))


def report(datasets):
    """Lines that say what was read: rows, label shares, token lengths, duplicates between train and dev.

    `datasets` is {task name: {split: Dataset}}.
    """
    lines = []
    for splits in datasets.values():
        for split, data in splits.items():
            lengths = data.lengths()
            line = (
                f"{data.task.name:<7}{split:<6}{len(data):>7} rows  tokens median {np.median(lengths):.0f}, "
                f"95% {np.percentile(lengths, 95):.0f}, max {lengths.max()}"
            )
            labels = data.labels[data.usable]
            if data.task.is_regression and len(labels):
                line += f"  labels mean {labels.mean():.2f}, sd {labels.std():.2f}"
            elif len(labels):
                shares = np.bincount(labels.astype(int), minlength=len(data.task.label_names)) / len(labels)
                line += "  labels " + " ".join(f"{share:.1%}" for share in shares)
            lines.append(line)
            left_out = len(data) - len(data.usable)
            if left_out and split != "test":
                lines.append(f"{'':<13}{left_out} rows without a label or with an empty text are left out")
            if data.truncated:
                lines.append(f"{'':<13}{data.truncated} rows are cut to {data.max_length} tokens")
        if {"train", "dev"} <= splits.keys():
            shared = np.isin(fingerprints(splits["dev"]), fingerprints(splits["train"])).sum()
            if shared:
                lines.append(f"{'':<13}{shared} dev examples occur in train word for word")
    return lines
