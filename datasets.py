"""Datasets: read a task's CSV files, tokenize the texts once, and cut padded batches from them.

A file is read once. Every text is tokenized once, and its token ids are a slice of one flat array. So 400,000 pairs
of questions are a few arrays instead of millions of Python objects. A task's encoding says how a row becomes the input
of BERT. A segment of a Batch is one padded sequence with its mask and segment ids. (Segment ids are BERT's own: they
number the two texts of a pair, also inside one sequence.)

    encoding      input of BERT                        segment ids        segments
    single        [CLS] A [SEP]                        0                  one
    concat        [CLS] A [SEP] B [SEP]                0...0 1...1        one, BERT's usual form of a pair
    embed_concat  [CLS] A [SEP]  and  [CLS] B [SEP]    0...0 and 1...1    two, which the model joins after the embedding
    siamese       [CLS] A [SEP]  and  [CLS] B [SEP]    0...0 and 0...0    two, which BERT encodes one by one

A pair is packed before it is padded. If padding stood between A and B, then the positions of B, and with them the
prediction, would depend on the longest A of the batch. Labels stay real numbers: a similarity of 4.2 must not become 4.
"""

import csv
import math
from array import array
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from errors import InputError, warn
from files import opened
from tasks import TASKS
from tokenizer import BertTokenizer, pad, truncate_pair

SPLITS = ("train", "dev", "test")
SAMPLE = Path(__file__).parent / "data" / "sample"
# {encoding: number of [CLS] and [SEP] among the tokens that one attention sees}
SPECIALS = {"single": 2, "concat": 3, "embed_concat": 4, "siamese": 2}
# A file may have a few rows that are not usable. If it has a larger share of them, something is wrong with the file.
MAX_UNUSABLE = 0.01
# A warning about rows names this many of their lines.
LINES_NAMED = 3


@dataclass(frozen=True)
class Batch:
    """Some rows of one task, padded to the longest of them.

    Shapes: each segment is (input_ids, mask, segment_ids), each [b,s]; labels [b] or None; features [b,w] or None.
    Features are the cached states of a frozen BERT, the input of the head. A batch with features has no segments.
    Where several processes split a batch, `place` is (positions in the entire batch, its number of rows).
    """

    task: object
    segments: tuple
    labels: torch.Tensor | None
    ids: tuple
    features: torch.Tensor | None = None
    place: tuple | None = None

    def __len__(self):
        return len(self.ids)

    def to(self, device):
        """Return the same batch on another device."""
        if device.type == "cpu":
            return self

        def move(x):
            if x is None:
                return None
            # CUDA copies from pinned memory while the GPU computes; other devices cannot do this
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        segments = tuple(tuple(move(x) for x in segment) for segment in self.segments)
        return replace(self, segments=segments, labels=move(self.labels), features=move(self.features))


class Ragged:
    """Sequences of unequal length in one flat array: sequence i is flat[offsets[i]:offsets[i + 1]]."""

    def __init__(self, typecode):
        self.flat, self.offsets = array(typecode), array("q", [0])

    def append(self, values):
        """Append one sequence of numbers; bytes are numbers too."""
        self.flat.extend(values)
        self.offsets.append(len(self.flat))

    def freeze(self):
        """Turn the growing arrays into numpy arrays, which use the same memory."""
        self.flat, self.offsets = np.asarray(self.flat), np.asarray(self.offsets)

    def __getitem__(self, i):
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self):
        """Return the length of every sequence. Shapes: [n]."""
        return np.diff(self.offsets)


class Dataset:
    """The rows of one file: ids, texts, token ids and labels.

    `labels` is NaN for a row without a label. `usable` lists the rows for training and scoring: they have a label and
    no empty text. `tokens` has all tokens of every text, also of a long one; only `Dataset.pack` truncates.
    """

    def __init__(self, task, path, tokenizer, max_length):
        self.task, self.path, self.tokenizer, self.max_length = task, path, tokenizer, max_length
        # ids and texts as UTF-8 bytes; for texts and tokens one Ragged for each text column of the task
        self.ids, self.texts = Ragged("B"), [Ragged("B") for _ in task.columns]
        self.tokens = [Ragged("i") for _ in task.columns]
        # freeze sets usable, with_features sets features
        self.labels, self.features, self.usable = array("d"), None, None

    def add(self, identifier, texts, label):
        """Append one row and tokenize its texts."""
        self.ids.append(identifier.encode())
        for i, text in enumerate(texts):
            self.texts[i].append(text.encode())
            self.tokens[i].append(self.tokenizer.encode(text))
        self.labels.append(label)

    def freeze(self):
        """Finish reading: the growing arrays become numpy arrays. Returns the dataset."""
        for ragged in (self.ids, *self.texts, *self.tokens):
            ragged.freeze()
        self.labels = np.asarray(self.labels)
        # [n], true if one of the texts has no tokens
        empty = np.any([tokens.lengths() == 0 for tokens in self.tokens], axis=0)
        self.usable = np.flatnonzero(~np.isnan(self.labels) & ~empty)
        return self

    def with_features(self, states):
        """Return a copy of this dataset whose batches have these states as features, instead of segments.

        A frozen BERT computes the same state of a row in every epoch, so its states are computed once and cached.
        Shapes: [n,w], one state for each row of the dataset.
        """
        # the copy shares all arrays with the original
        other = copy(self)
        other.features = states
        return other

    def __len__(self):
        return len(self.labels)

    def identifier(self, row):
        """Return a row's id."""
        return self.ids[row].tobytes().decode()

    def text(self, row):
        """Return a row's texts as a tuple: one text, or the two of a pair."""
        return tuple(column[row].tobytes().decode() for column in self.texts)

    @property
    def room(self):
        """The number of tokens that remain for texts when the special tokens have their places."""
        return self.max_length - SPECIALS[self.task.encoding]

    def text_lengths(self):
        """Return the number of tokens of every row's texts before truncation.

        The two texts of a pair count in total; for a siamese pair only the longer one counts. Shapes: [n].
        """
        # BERT sees the texts of a siamese pair one by one, and those of other pairs at once
        total = np.max if self.task.encoding == "siamese" else np.sum
        return total([tokens.lengths() for tokens in self.tokens], axis=0)

    def lengths(self):
        """Return the number of tokens of every row as it enters BERT (of a siamese pair: of its longer text).

        These are the lengths after truncation and with the special tokens. Shapes: [n].
        """
        return np.minimum(self.text_lengths(), self.room) + SPECIALS[self.task.encoding]

    @property
    def truncated(self):
        """The number of rows that are too long and lose tokens."""
        return int((self.text_lengths() > self.room).sum())

    def pack(self, row):
        """Add the special tokens of one row and truncate it. Returns a list with (ids, segment ids) of each segment."""
        texts, limit = [tokens[row].tolist() for tokens in self.tokens], self.max_length
        if self.task.encoding == "embed_concat":
            # one attention sees both segments, so the two texts share the room
            first, second = (self.tokenizer.pack(text)[0] for text in truncate_pair(*texts, self.room))
            return [(first, [0] * len(first)), (second, [1] * len(second))]
        if self.task.encoding == "siamese":
            # each text has all the room, and segment id 0
            return [self.tokenizer.pack(text, limit=limit) for text in texts]
        # single has one text here, concat two
        return [self.tokenizer.pack(*texts, limit=limit)]

    def batch(self, rows, positions=slice(None)):
        """Make a Batch of these rows, in their order.

        If several processes share a batch, each process passes the rows of the entire batch, and the positions of its
        own rows among them (a slice). Every process pads to the longest row of the entire batch, so that all have equal
        widths.
        """
        all_rows = np.asarray(rows, dtype=np.int64)
        rows = all_rows[positions]
        segments, features = (), None
        if self.features is not None:
            # [n,w] -> [b,w]
            features = self.features[torch.from_numpy(rows)]
        else:
            # turn a list of segments for each row into a list of rows for each segment
            for column in zip(*map(self.pack, all_rows), strict=True):
                # of the entire batch; pad gets only this process's rows
                width = max(len(ids) for ids, _ in column)
                segments += (pad(column[positions], self.tokenizer.pad_id, width),)
        # [b]; the loss compares in float32
        labels = torch.from_numpy(self.labels[rows].astype(np.float32))
        ids = tuple(self.identifier(row) for row in rows)
        return Batch(self.task, segments, labels, ids, features, (positions, len(all_rows)))


def bucketed_batches(lengths, batch_size, rng, pool=32):
    """Divide the positions 0..n-1 into batches of similar length, in random order.

    The positions are shuffled and divided into pools of `pool` batches; each pool is sorted by length and cut into
    batches. This halves BERT's input, and the order stays random: rng determines which rows share a pool, the order of
    rows of equal length, and the order of the batches.
    Shapes: lengths [n] -> a list of int arrays, which contain every position once.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * pool):
        chunk = order[start : start + batch_size * pool]
        # a stable sort keeps the random order of rows of equal length
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# --- reading a file -----------------------------------------------------------------------------------------------


def decoded_lines(path):
    """Yield the lines of a text file one by one, because the entire decoded text would need several times its size."""
    try:
        with opened(path) as file:
            for line, raw in enumerate(file, start=1):
                if b"\0" in raw:
                    raise InputError(f"{path}: line {line}: NUL byte, so not text: get it again or remove the byte")
                if line == 1 and b"\r" in raw.rstrip(b"\r\n"):
                    raise InputError(f"{path}: line 1: CR line ends: save the file with LF or CRLF line ends")
                # only the first line may start with a byte order mark
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        value = error.object[error.start : error.start + 1]
        raise InputError(f"{path}: line {line}: byte {value!r} is not UTF-8: save the file as UTF-8") from None


def read_label(task, value, where):
    """Return a label as a float, or NaN for an empty field.

    Raises: InputError for text, for a number outside the task's range, and for a class that is not a whole number.
    """
    if value is None or not value.strip():
        return math.nan
    low, high = task.label_range
    try:
        # float would take the digits of other scripts, and 1_0
        label = float(value) if value.isascii() and "_" not in value else math.nan
    except ValueError:
        label = math.nan
    # comparisons with NaN are false, so a NaN is refused here too
    if not (low <= label <= high and (task.is_regression or label == math.floor(label))):
        kind = "a number" if task.is_regression else "a whole number"
        raise InputError(
            f"{where}: {task.label_column} {value!r} is not {kind} from {low:g} to {high:g}: correct or remove the row"
        )
    return label


def check_columns(task, path, columns, labelled):
    """Raise an InputError if the header lacks a column that the task needs."""
    needed = ["id", *task.columns] + [task.label_column] * labelled
    missing = [name for name in needed if name not in columns]
    if not any(map(str.strip, columns)):
        raise InputError(f"{path}: line 1: empty file or blank first line: check it or get it again")
    twice = [name for name in needed if columns.count(name) > 1]
    if twice:
        raise InputError(f"{path}: line 1: column {twice[0]} is there twice: remove or rename one")
    if missing:
        # a header that is one column was probably separated by commas
        hint = "the columns must be separated by tabs" if len(columns) == 1 else "check the header line"
        raise InputError(
            f"{path}: line 1: no column {', '.join(missing)} among {', '.join(map(repr, columns))}: {hint}"
        )


def numbered_rows(path):
    """Yield (line, fields) for every row of a file with tab-separated columns; a row starts on this line.

    Raises: InputError for wrong quotes.
    """
    # the csv module refuses fields above 131,072 characters, but here a long text is only truncated
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(decoded_lines(path), delimiter="\t", strict=True)
    line = 1
    try:
        for fields in reader:
            # a blank line has no fields; only in place of the header it is an error
            if fields or line == 1:
                yield line, fields
            # a row has several lines if a quoted text contains line ends
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {line}: {error}: check the quotes from this line on") from None


def warn_rows(path, lines, problem):
    """Print a warning for rows with a problem, which are accepted. `lines` are their lines in the file."""
    if len(lines):
        which = ", ".join(map(str, lines[:LINES_NAMED])) + ", ..." * (len(lines) > LINES_NAMED)
        warn(f"{path}: {len(lines)} rows {problem}: line {which}")


def read_dataset(task, path, tokenizer, max_length=512, labelled=True):
    """Read a CSV file in the course's format: separated by tabs, with a header line that names the columns.

    The task needs the columns of its id, texts and label; other columns are ignored. A row without a label or with an
    empty text gets a prediction, but it is not usable for training and scoring. `labelled=False` reads a test file,
    which has no labels.
    Raises: InputError with file and line for any other format.
    """
    rows = numbered_rows(path)
    _, columns = next(rows, (1, []))
    check_columns(task, path, columns, labelled)
    # columns are identified by name, because test files have them in other places
    id_at, text_at = columns.index("id"), [columns.index(name) for name in task.columns]
    label_at = columns.index(task.label_column) if labelled else None
    dataset, lines = Dataset(task, Path(path), tokenizer, max_length), array("q")
    for line, fields in rows:
        where = f"{path}: line {line}"
        lines.append(line)
        if len(fields) != len(columns):
            raise InputError(
                f"{where}: {len(fields)} fields, but the header has {len(columns)}: check tabs and quotes in "
                f"{' '.join(fields)[:60]!r}"
            )
        label = math.nan if label_at is None else read_label(task, fields[label_at], where)
        dataset.add(fields[id_at].strip(), [fields[i].strip() for i in text_at], label)
    if not len(dataset):
        raise InputError(f"{path}: only a header, no rows: get the file again with ./setup.sh --data")
    dataset.freeze()
    left_out = len(dataset) - len(dataset.usable)
    if labelled and left_out > MAX_UNUSABLE * len(dataset):
        raise InputError(
            f"{path}: {left_out} of {len(dataset)} rows have no label or an empty text, "
            f"above {MAX_UNUSABLE:.0%}: correct the file"
        )
    ids = np.fromiter((hash(dataset.ids[row].tobytes()) for row in range(len(dataset))), np.int64, len(dataset))
    # np.unique finds the first row of each id, np.delete leaves the other rows
    warn_rows(path, np.delete(lines, np.unique(ids, return_index=True)[1]), "have the id of an earlier row")
    if labelled:
        warn_rows(path, np.delete(lines, dataset.usable), "have no label or an empty text and are left out")
    return dataset


def find_data_dir(data_dir, wanted, may_be_sample=True, default="data"):
    """Return the folder of the wanted files, and whether it is the sample.

    Without a data_dir this is the default folder, or the sample if the default folder has no data file at all.
    Raises: InputError if a folder has only some of the files, because course files and sample files must not be mixed.
    """
    folder = Path(data_dir) if data_dir else Path(__file__).parent / default
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give --data_dir, or get the data with ./setup.sh --data")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not missing:
        return folder, False
    # the sample has a file for each file of the course, with the same name
    in_sample = {path.name for path in SAMPLE.glob("*.csv")}
    is_empty = not any((folder / name).is_file() for name in in_sample | set(wanted))
    if data_dir is None and may_be_sample and is_empty and in_sample.issuperset(wanted):
        return SAMPLE, True
    raise InputError(f"{folder}: missing {', '.join(missing)}: get them with ./setup.sh --data, or give --data_dir")


# --- a description ------------------------------------------------------------------------------------------------


def fingerprints(dataset):
    """Return a hash of every row's texts, to find rows that occur twice. Shapes: [n]."""
    return np.fromiter((hash(dataset.text(row)) for row in range(len(dataset))), np.int64, len(dataset))


def describe_datasets(datasets):
    """Describe {task name: {split: Dataset}} in lines of text.

    The lines contain the numbers of rows, their lengths in tokens, the shares of the labels, the numbers of truncated
    rows, and the number of dev rows that also occur in train.
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
            # a test file has no labels
            if data.task.is_regression and len(labels):
                line += f"  labels mean {labels.mean():.2f}, sd {labels.std():.2f}"
            elif len(labels):
                shares = np.bincount(labels.astype(int), minlength=len(data.task.label_names)) / len(labels)
                line += "  labels " + " ".join(f"{share:.1%}" for share in shares)
            lines.append(line)
            if data.truncated:
                lines.append(f"{'':<13}{data.truncated} rows are cut to {data.max_length} tokens")
        if {"train", "dev"} <= splits.keys():
            repeated = np.isin(fingerprints(splits["dev"]), fingerprints(splits["train"])).sum()
            if repeated:
                lines.append(f"{'':<13}{repeated} dev examples occur in train word for word")
    return lines


# --- the names of the CS224N skeleton -----------------------------------------------------------------------------


class SkeletonRows(list):
    """Rows of the CS224N skeleton with their `collate_fn`: (text, label, id), (text, text, label, id), or no label.

    Source: the course's dataset classes, whose four names stand below.
    Differs: one class, because a row shows by itself whether it is a pair and has a label. The tokenizer is that of
        the weights that setup.sh has fetched; bert-base and MiniLM have the same vocabulary.
    """

    def __init__(self, dataset, args, isRegression=False):
        super().__init__(dataset)
        self.dtype, self.tokenizer = torch.double if isRegression else torch.long, BertTokenizer.from_pretrained("auto")

    def collate_fn(self, rows):
        """Pad rows to a batch, a dict. Shapes: token_ids and attention_mask [b,s], of a pair with _1 and _2."""
        # texts and ids are strings, labels are numbers: (text, label, id) has a number before the id
        columns, labelled = list(zip(*rows, strict=True)), not isinstance(rows[0][-2], str)
        batch = {"sents": list(columns[0]), "sent_ids": list(columns[-1])}
        texts = columns[: -2 if labelled else -1]
        for k, text in enumerate(texts, start=1):
            for name, tensor in self.tokenizer(text).items():
                batch[name.replace("input", "token") + f"_{k}" * (len(texts) > 1)] = tensor
        return batch | ({"labels": torch.tensor(columns[-2], dtype=self.dtype)} if labelled else {})


SentenceClassificationDataset = SentenceClassificationTestDataset = SkeletonRows
SentencePairDataset = SentencePairTestDataset = SkeletonRows


def read_rows(name, path, split):
    """Read a task's file as rows of the skeleton."""
    data = read_dataset(TASKS[name], path, BertTokenizer.from_pretrained("auto"), labelled=split != "test")
    if split == "test":
        return [(*data.text(i), data.identifier(i)) for i in range(len(data))]
    number = float if data.task.is_regression else int
    return [(*data.text(i), number(data.labels[i]), data.identifier(i)) for i in data.usable]


def load_multitask_data(sentiment_filename, paraphrase_filename, similarity_filename, split="train"):
    """Read the files of a split: (SST rows, {SST label: label}, Quora rows, STS rows); the rows are tuples.

    Source: the course's datasets.py.
    Differs: texts stay as they are in the file, which changes no token of an uncased tokenizer.
    """
    sst = read_rows("sst", sentiment_filename, split)
    labels = {row[1]: row[1] for row in sst} if split != "test" else {}
    return sst, labels, read_rows("para", paraphrase_filename, split), read_rows("sts", similarity_filename, split)
