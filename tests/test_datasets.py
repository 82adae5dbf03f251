"""Tests of datasets.py: strict reading of CSV files, truncation, the pair encodings by hand, and random batches."""

import csv
import itertools
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import SAMPLE, bucketed_batches, describe_datasets, find_data_dir, read_dataset
from errors import InputError
from tasks import build_tasks
from tokenizer import BertTokenizer

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g", "'", ".", '"', "?"]
PAD, UNK, CLS, SEP = range(4)
A, B, C, D, E, F, G = range(5, 12)
QUOTE = WORDS.index('"')

needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared course data are not beside the repository"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return BertTokenizer.from_pretrained(folder)


@pytest.fixture
def read(tmp_path, tokenizer):
    """A function that writes bytes or text to a file and reads it as a dataset of the named task."""

    def read(content, name="sst", max_length=512, labelled=True, pairs=None):
        path = tmp_path / "file.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_dataset(build_tasks((name,), pairs)[name], path, tokenizer, max_length, labelled)

    return read


def sst(*rows):
    """A sentiment file with these (sentence, label) rows."""
    lines = [f"{i}\tid{i}\t{sentence}\t{label}" for i, (sentence, label) in enumerate(rows)]
    return "\n".join(["\tid\tsentence\tsentiment", *lines]) + "\n"


def pair_file(*rows, column="similarity"):
    """A file of pairs with these (sentence1, sentence2, label) rows."""
    lines = [f"{i}\tid{i}\t{a}\t{b}\t{label}" for i, (a, b, label) in enumerate(rows)]
    return "\n".join([f"\tid\tsentence1\tsentence2\t{column}", *lines]) + "\n"


# --- the course's files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(tokenizer):
    tasks = build_tasks(("sst", "cfimdb", "para", "sts"))
    return {
        (name, split): read_dataset(task, SHARED / task.file(split), tokenizer, labelled=split != "test")
        for name, task in tasks.items()
        for split in ("train", "dev", "test")
    }


@needs_shared_data
def test_course_files_have_their_row_counts(course):
    assert {key: len(data) for key, data in course.items()} == {
        ("sst", "train"): 8544, ("sst", "dev"): 1101, ("sst", "test"): 2210,
        ("cfimdb", "train"): 1707, ("cfimdb", "dev"): 245, ("cfimdb", "test"): 488,
        ("para", "train"): 14_169, ("para", "dev"): 4044, ("para", "test"): 2001,
        ("sts", "train"): 6040, ("sts", "dev"): 863, ("sts", "test"): 1725,
    }  # fmt: skip


@needs_shared_data
def test_course_files_agree_with_a_plain_csv_reader(course):
    """Ids, texts (doubled quotes undone) and labels, field by field; the columns are identified by name."""
    for (_, split), data in course.items():
        with open(data.path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        task = data.task
        assert [data.identifier(i) for i in range(len(data))] == [row["id"] for row in rows]
        assert [data.text(i) for i in range(len(data))] == [
            tuple(row[column].strip() for column in task.columns) for row in rows
        ]
        labels = [float(row.get(task.label_column) or "nan") for row in rows]
        np.testing.assert_array_equal(data.labels, labels)
        assert {len(data.identifier(i)) for i in range(len(data))} == {25}
        if split == "test":
            assert np.isnan(data.labels).all()
            assert len(data.usable) == 0


@needs_shared_data
def test_quora_rows_without_label_or_second_sentence_are_kept_but_not_used(course):
    """Both unlabelled rows of the original Quora files, one of them without sentence2, are in train."""
    train = course["para", "train"]
    unlabelled = np.flatnonzero(np.isnan(train.labels))
    assert unlabelled.tolist() == [1810, 9934]
    assert [bool(train.text(i)[1]) for i in unlabelled] == [True, False]
    assert set(range(len(train))) - set(train.usable.tolist()) == set(unlabelled.tolist())
    for key in [
        ("para", "dev"),
        ("sst", "train"),
        ("sst", "dev"),
        ("sts", "train"),
        ("sts", "dev"),
        ("cfimdb", "dev"),
    ]:
        assert len(course[key].usable) == len(course[key])


@needs_shared_data
def test_similarity_labels_of_the_course_keep_their_decimals(course):
    labels = course["sts", "train"].labels
    assert ((labels >= 0) & (labels <= 5)).all()
    assert (labels != np.floor(labels)).mean() > 0.2
    assert set(course["para", "dev"].labels.tolist()) == {0.0, 1.0}
    assert course["para", "dev"].labels.mean() == pytest.approx(1 - 0.622, abs=5e-4)


@needs_shared_data
def test_report_counts_dev_examples_that_occur_in_train(course):
    splits = {split: course["sts", split] for split in ("train", "dev", "test")}
    lines = describe_datasets({"sts": splits, "para": {"train": course["para", "train"]}})
    assert any("6040 rows" in line for line in lines)
    assert any(line.strip() == "13 dev examples occur in train word for word" for line in lines)


# --- the shape of a file ------------------------------------------------------------------------------------


def test_columns_are_identified_by_name_in_any_order_beside_others(read):
    data = read("sentiment\tother\tsentence\tid\n3\tx\ta b\tone\n0\ty\tc\ttwo\n")
    assert [data.identifier(i) for i in range(2)] == ["one", "two"]
    assert [data.text(i) for i in range(2)] == [("a b",), ("c",)]
    assert data.labels.tolist() == [3.0, 0.0]
    assert [data.tokens[0][i].tolist() for i in range(2)] == [[A, B], [C]]


def test_test_files_have_an_extra_column_and_no_labels(read):
    data = read("0\t\tid\tsentence\n1\t0.0\tone\ta\n2\t1.0\ttwo\tb c\n", labelled=False)
    assert [data.identifier(i) for i in range(2)] == ["one", "two"]
    assert data.text(1) == ("b c",)
    assert np.isnan(data.labels).all()
    assert torch.isnan(data.batch(np.array([0, 1])).labels).all()


def test_doubled_quotes_tabs_and_line_ends_inside_quotes(read):
    data = read('\tid\tsentence\tsentiment\n0\tone\t"a ""b"" c"\t1\n1\ttwo\t"a\tb\nc"\t2\n2\tthree\td "e\t3\n')
    assert [data.text(i)[0] for i in range(3)] == ['a "b" c', "a\tb\nc", 'd "e']
    assert data.tokens[0][0].tolist() == [A, QUOTE, B, QUOTE, C]
    assert data.labels.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: b"\xef\xbb\xbf" + s, id="byte order mark"),
        pytest.param(lambda s: s.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(lambda s: s + b"\n\n\n", id="blank last lines"),
        pytest.param(lambda s: s.replace(b"\n", b"\r\n") + b"\r\n\r\n", id="CRLF and blank last lines"),
        pytest.param(lambda s: s.rstrip(b"\n"), id="no line end at the end"),
    ],
)
def test_harmless_differences_change_nothing(read, change):
    plain = sst(("a b", 1), ("c é 中", 4)).encode()
    first, second = read(plain), read(change(plain))
    assert [second.text(i) for i in range(len(second))] == [("a b",), ("c é 中",)]
    assert [second.identifier(i) for i in range(2)] == [first.identifier(i) for i in range(2)]
    assert second.labels.tolist() == [1.0, 4.0]
    assert second.tokens[0].flat.tolist() == first.tokens[0].flat.tolist()


def test_a_byte_order_mark_is_no_part_of_the_first_column(read):
    assert read(b"\xef\xbb\xbfid\tsentence\tsentiment\none\ta\t1\n").identifier(0) == "one"


def test_similarity_labels_keep_their_decimals_into_the_batch(read):
    data = read(pair_file(("a", "b", 4.2), ("a", "b", 0.25), ("a", "c", "5")), "sts")
    assert data.labels.tolist() == [4.2, 0.25, 5.0]
    labels = data.batch(np.array([0, 1, 2])).labels
    assert labels.dtype == torch.float32
    assert labels.tolist() == pytest.approx([4.2, 0.25, 5.0], rel=1e-6)


def test_a_few_rows_without_label_or_text_stay_but_are_not_used(read, capsys):
    rows = [("a", 1)] * 300
    rows[10], rows[20], rows[30] = ("a", ""), ("", 2), (" ", 3)
    data = read(sst(*rows))
    assert len(data) == 300
    assert sorted(set(range(300)) - set(data.usable.tolist())) == [10, 20, 30]
    warning = "3 rows have no label or an empty text and are left out: line 12, 22, 32"
    assert warning in capsys.readouterr().err
    # they still get a prediction
    assert data.batch(np.array([20])).segments[0][0].tolist() == [[CLS, SEP]]


def test_an_empty_second_sentence_is_not_used(read):
    data = read(pair_file(*[("a", "b", 1)] * 100, ("a", "", 1)), "sts")
    assert data.usable.tolist() == list(range(100))


# --- every bad input names its line and value ---------------------------------------------------------------


GOOD = "\tid\tsentence\tsentiment\n0\tone\ta\t1\n"


@pytest.mark.parametrize(
    "content, words",
    [
        pytest.param(
            "\tid\tsentence\n0\tone\ta\n",
            ["line 1", "no column sentiment", "'sentence'"],
            id="no label column",
        ),
        pytest.param("\tid\ttext\tsentiment\n0\tone\ta\t1\n", ["line 1", "no column sentence", "'text'"], id="no text"),
        pytest.param("\tsentence\tsentiment\n0\ta\t1\n", ["line 1", "no column id"], id="no id column"),
        pytest.param(GOOD.replace("\t", ","), ["line 1", "separated by tabs", "',id,sentence,sentiment'"], id="commas"),
        pytest.param(GOOD + "1\ttwo\tb\t5\n", ["line 3", "sentiment '5'", "whole number from 0 to 4"], id="too high"),
        pytest.param(GOOD + "1\ttwo\tb\t-1\n", ["line 3", "sentiment '-1'", "from 0 to 4"], id="too low"),
        pytest.param(GOOD + "1\ttwo\tb\tgood\n", ["line 3", "sentiment 'good'", "whole number"], id="not a number"),
        pytest.param(GOOD + "1\ttwo\tb\t2.5\n", ["line 3", "sentiment '2.5'", "whole number"], id="a fraction"),
        pytest.param(GOOD + "1\ttwo\tb\tnan\n", ["line 3", "sentiment 'nan'"], id="nan"),
        pytest.param(GOOD + "1\ttwo\tb\tinf\n", ["line 3", "sentiment 'inf'"], id="infinity"),
        pytest.param("", ["empty"], id="empty"),
        pytest.param("\n \n", ["line 1", "empty"], id="blank lines only"),
        pytest.param(b"\xef\xbb\xbf", ["empty"], id="byte order mark only"),
        pytest.param("\n" + GOOD, ["line 1", "blank first line"], id="blank first line"),
        pytest.param("\tid\tsentence\tsentiment\n", ["only a header"], id="header only"),
        pytest.param(GOOD + "1\ttwo\tb\0c\t2\n", ["line 3", "NUL byte"], id="NUL byte"),
        pytest.param(GOOD.encode("utf-16"), ["line 1", "NUL byte"], id="UTF-16"),
        pytest.param(GOOD.encode() + b"1\ttwo\tb\xe9\t2\n", ["line 3", r"b'\xe9'", "UTF-8"], id="Latin-1"),
        pytest.param(
            b"\xef\xbb\xbf" + GOOD.encode() + b"\xff1\ttwo\tb\t2\n",
            ["line 3", r"b'\xff'"],
            id="UTF-8 after a mark",
        ),
        pytest.param(GOOD + "1\ttwo\tb\n", ["line 3", "3 fields", "header has 4", "two b"], id="a field too few"),
        pytest.param(GOOD + "1\ttwo\tb\tc\t2\n", ["line 3", "5 fields", "header has 4"], id="a field too many"),
        pytest.param(GOOD + '1\ttwo\t"b\t2\n2\tthree\tc\t2\n', ["line 3", "quotes"], id="quote left open"),
        pytest.param(GOOD + '1\ttwo\t"b" c\t2\n', ["line 3", "quotes"], id="text after a closing quote"),
        pytest.param(
            '\t"id\tsentence\tsentiment\n0\tone\ta\t1\n', ["line 1", "quotes"], id="quote left open in header"
        ),
        pytest.param(
            GOOD + '1\ttwo\t"b\nc"\t2\n2\tthree\td\t9\n',
            ["line 5", "sentiment '9'"],
            id="lines in quotes count",
        ),
        pytest.param(GOOD + "1\ttwo\tb\rc\t2\n", ["line 3", "new-line"], id="carriage return in a field"),
        pytest.param(GOOD + "\n\n1\ttwo\tb\t9\n", ["line 5", "sentiment '9'"], id="blank lines count"),
        pytest.param(
            sst(*[("a", 1)] * 97, *[("a", "")] * 3),
            ["3 of 100 rows", "1%"],
            id="more than 1% without a label",
        ),
        pytest.param(sst(*[("a", 1)] * 15, ("", 1)), ["1 of 16 rows", "1%"], id="one empty text of few"),
        pytest.param(sst(("a", "")), ["1 of 1 rows"], id="no usable row at all"),
    ],
)
def test_bad_files_are_refused_in_one_line(read, content, words):
    with pytest.raises(InputError) as error:
        read(content)
    message = str(error.value)
    assert "\n" not in message
    for word in ["file.csv", *words]:
        assert word in message


def test_similarity_labels_out_of_range_are_refused(read):
    for value in ("5.1", "-0.2", "high"):
        with pytest.raises(InputError, match=rf"line 3: similarity '{value}' is not a number from 0 to 5"):
            read(pair_file(("a", "b", 1.5), ("a", "b", value)), "sts")


def test_paraphrase_labels_are_zero_or_one(read):
    assert read(pair_file(("a", "b", "0.0"), ("a", "b", "1"), column="is_duplicate"), "para").labels.tolist() == [0, 1]
    for value in ("0.5", "2.0"):
        with pytest.raises(InputError, match=rf"line 2: is_duplicate '{value}' is not a whole number from 0 to 1"):
            read(pair_file(("a", "b", value), column="is_duplicate"), "para")


def test_missing_and_unreadable_files(tmp_path, tokenizer):
    task = build_tasks(("sst",))["sst"]
    with pytest.raises(InputError, match="nowhere.csv: cannot be read .No such file"):
        read_dataset(task, tmp_path / "nowhere.csv", tokenizer)
    with pytest.raises(InputError, match="cannot be read"):
        read_dataset(task, tmp_path, tokenizer)


def test_a_partly_filled_data_folder_is_refused_and_names_what_is_missing(tmp_path):
    tasks = build_tasks(("sst", "sts"))
    names = [task.file(split) for task in tasks.values() for split in ("train", "dev", "test")]
    for name in names[:-2]:
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError) as error:
        find_data_dir(str(tmp_path), names)
    assert "sts-dev.csv, sts-test-student.csv" in str(error.value)
    assert "sst" not in str(error.value).split("missing")[1]
    # the default folder may not be mixed with the sample either
    with pytest.raises(InputError, match="missing sts-dev.csv"):
        find_data_dir(None, names, default=str(tmp_path))
    for name in names[-2:]:
        (tmp_path / name).write_text("x")
    assert find_data_dir(str(tmp_path), names) == (tmp_path, False)
    (tmp_path / names[0]).unlink()
    assert find_data_dir(str(tmp_path), names[1:]) == (tmp_path, False)


def test_an_empty_default_folder_means_the_sample_and_an_empty_given_one_does_not(tmp_path):
    wanted = ["ids-sst-train.csv"]
    # a CSV of the user's own is no course file
    (tmp_path / "notes.csv").write_text("x")
    assert find_data_dir(None, wanted, default=str(tmp_path)) == (SAMPLE, True)
    with pytest.raises(InputError, match="missing ids-sst-train.csv"):
        find_data_dir(str(tmp_path), wanted)
    with pytest.raises(InputError, match="missing ids-sst-train.csv"):
        find_data_dir(None, wanted, may_be_sample=False, default=str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        find_data_dir(str(tmp_path / "nowhere"), wanted)
    # the sample has no file of a task from outside the course
    with pytest.raises(InputError, match="missing rte-train.csv"):
        find_data_dir(None, ["rte-train.csv"], default=str(tmp_path))
    (tmp_path / "quora-dev.csv").write_text("x")
    with pytest.raises(InputError, match="missing ids-sst-train.csv"):
        find_data_dir(None, wanted, default=str(tmp_path))


# --- truncation ---------------------------------------------------------------------------------------------


def test_a_sentence_of_100_000_words_is_cut_and_counted_once(read):
    data = read(sst(("a b " * 50_000, 1), ("c", 2)), max_length=16)
    assert data.truncated == 1
    ids = data.batch(np.array([0])).segments[0][0]
    assert ids.tolist() == [[CLS] + [A, B] * 7 + [SEP]]
    assert data.lengths().tolist() == [16, 3]
    # pack truncates, not reading: of a pair, the length before truncation decides which text gets an odd token
    assert data.tokens[0].lengths().tolist() == [100_000, 1]
    assert any(line.strip() == "1 rows are cut to 16 tokens" for line in describe_datasets({"sst": {"train": data}}))


@pytest.mark.parametrize(
    "encoding, lengths, cut",
    [
        ("concat", (4, 3), False), ("concat", (4, 4), True),
        ("embed_concat", (3, 3), False), ("embed_concat", (4, 3), True),
        ("siamese", (8, 8), False), ("siamese", (9, 1), True), ("siamese", (9, 9), True),
    ],
)  # fmt: skip
def test_cut_rows_are_counted_by_what_the_encoding_has_room_for(read, encoding, lengths, cut):
    """Ten tokens: concat has 3 special ones, embed_concat 4, and each pass of a siamese pair 2."""
    content = pair_file(tuple("a " * n for n in lengths) + (1,))
    data = read(content, "sts", max_length=10, pairs={"sts": encoding})
    assert data.truncated == int(cut)
    kept = sum(int(mask.sum()) for _, mask, _ in data.batch(np.array([0])).segments)
    specials = 3 if encoding == "concat" else 4
    assert (kept < sum(lengths) + specials) == cut


def test_the_longer_text_keeps_the_odd_token_also_if_both_are_longer_than_the_model_allows(read):
    """Ten tokens leave seven for both texts: four for the longer one (of 12 tokens) and three for the other (of 11)."""
    long, short = "a " * 12, "b " * 11
    data = read(pair_file((long, short, 1), (short, long, 1)), "sts", max_length=10)
    ids = data.batch(np.array([0, 1])).segments[0][0].tolist()
    assert ids == [[CLS, A, A, A, A, SEP, B, B, B, SEP], [CLS, B, B, B, SEP, A, A, A, A, SEP]]


@pytest.fixture(scope="module", params=[pytest.param("sample"), pytest.param("course", marks=needs_shared_data)])
def corpus(request, tmp_path_factory):
    """A folder of data, and a folder with a vocabulary: some words and all letters of that data."""
    folder = {"sample": SAMPLE, "course": SHARED}[request.param]
    text = "".join(path.read_text().lower() for path in sorted(folder.glob("*-dev.csv")))
    letters = sorted({character for character in text if not character.isspace()})
    words = [word for word in sorted(set(re.findall("[a-z]{2,}", text))) if len(word) < 8]
    vocabulary = tmp_path_factory.mktemp("corpus")
    lines = [*WORDS[:5], *letters, *(f"##{letter}" for letter in letters), *words]
    (vocabulary / "vocab.txt").write_text("\n".join(lines) + "\n")
    return folder, vocabulary


def make_ours(vocabulary):
    return BertTokenizer.from_pretrained(vocabulary)


def make_reference(vocabulary):
    """The tokenizer of transformers, which truncates the longer text of a pair first."""
    fast = pytest.importorskip("transformers").BertTokenizerFast.from_pretrained(vocabulary)

    def call(*texts, max_length):
        return fast(*texts, max_length=max_length, truncation="longest_first", padding=True, return_tensors="pt")

    return call


@pytest.mark.parametrize("make", [make_ours, make_reference])
@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_a_batch_equals_a_call_of_the_tokenizer_and_of_transformers(corpus, make, name):
    """Every row, for odd and even rooms."""
    folder, vocabulary = corpus
    task, call = build_tasks((name,))[name], make(vocabulary)
    for max_length in (13, 20):
        data = read_dataset(task, folder / task.file("dev"), BertTokenizer.from_pretrained(vocabulary), max_length)
        assert data.truncated > 0.05 * len(data)
        texts = [list(column) for column in zip(*map(data.text, range(len(data))), strict=True)]
        expected = call(*texts, max_length=max_length)
        [segment] = data.batch(np.arange(len(data))).segments
        for ours, key in zip(segment, ("input_ids", "attention_mask", "token_type_ids"), strict=True):
            assert torch.equal(ours, expected[key])


def test_a_pair_is_cut_longest_first(read):
    """Nine tokens leave six for both: 2 and 6 become 2 and 4; 6 and 6 become 3 and 3."""
    content = pair_file(("a b", "c d e f g a", 1), ("a b c d e f", "g f e d c b", 1))
    data = read(content, "sts", max_length=9)
    ids = data.batch(np.array([0, 1])).segments[0][0]
    assert ids.tolist() == [[CLS, A, B, SEP, C, D, E, F, SEP], [CLS, A, B, C, SEP, G, F, E, SEP]]


# --- encodings ----------------------------------------------------------------------------------------------


PAIRS = pair_file(("a", "b c", 1), ("a b c d", "e", 2))


def batch(read, encoding):
    return read(PAIRS, "sts", pairs={"sts": encoding}).batch(np.array([0, 1]))


def segments(result):
    return [tuple(x.tolist() for x in segment) for segment in result.segments]


def test_single_sentences_by_hand(read):
    result = read(sst(("a b", 3), ("c", 0))).batch(np.array([1, 0]))
    assert segments(result) == [
        ([[CLS, C, SEP, PAD], [CLS, A, B, SEP]], [[1, 1, 1, 0], [1, 1, 1, 1]], [[0] * 4, [0] * 4])
    ]
    assert result.labels.tolist() == [0.0, 3.0]
    assert result.ids == ("id1", "id0")
    assert len(result) == 2
    assert all(x.dtype == torch.int64 for x in result.segments[0])


def test_concat_by_hand(read):
    result = batch(read, "concat")
    assert segments(result) == [
        (
            [[CLS, A, SEP, B, C, SEP, PAD, PAD], [CLS, A, B, C, D, SEP, E, SEP]],
            [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8],
            [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]],
        )
    ]


def test_embed_concat_by_hand(read):
    assert segments(batch(read, "embed_concat")) == [
        (
            [[CLS, A, SEP, PAD, PAD, PAD], [CLS, A, B, C, D, SEP]],
            [[1, 1, 1, 0, 0, 0], [1] * 6],
            [[0] * 6, [0] * 6],
        ),
        (
            [[CLS, B, C, SEP], [CLS, E, SEP, PAD]],
            [[1, 1, 1, 1], [1, 1, 1, 0]],
            [[1, 1, 1, 1], [1, 1, 1, 0]],
        ),
    ]


def test_siamese_by_hand(read):
    first, second = segments(batch(read, "siamese"))
    joined_first, joined_second = segments(batch(read, "embed_concat"))
    assert (first[:2], second[:2]) == (joined_first[:2], joined_second[:2])
    assert first[2] == [[0] * 6] * 2
    assert second[2] == [[0] * 4] * 2


def test_packed_pairs_equal_the_tokenizer_s_own(read, tokenizer):
    data = read(PAIRS, "sts")
    expected = tokenizer(["a", "a b c d"], ["b c", "e"])
    for result, key in zip(data.batch(np.array([0, 1])).segments[0], expected, strict=True):
        assert torch.equal(result, expected[key])


@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_an_example_does_not_depend_on_its_batch(read, encoding):
    """Joined after padding, the second sentence would begin behind the longest first one of the batch."""
    data = read(PAIRS, "sts", pairs={"sts": encoding})
    both = data.batch(np.array([0, 1]))
    for i in range(2):
        alone = data.batch(np.array([i]))
        for ours, theirs in zip(alone.segments, both.segments, strict=True):
            length = ours[0].shape[1]
            for x, y in zip(ours, theirs, strict=True):
                assert torch.equal(x[0], y[i, :length])
            assert not theirs[1][i, length:].any()
            assert (theirs[0][i, length:] == PAD).all()


@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_processes_that_share_a_batch_have_equal_widths(read, encoding):
    """Each takes some positions of the entire batch and pads to its longest row, also one without that row."""
    rows = [("a " * i, "b " * j, 1) for i, j in itertools.product((1, 4, 9, 20), repeat=2)]
    data = read(pair_file(*rows), "sts", max_length=14, pairs={"sts": encoding})
    order = rng().permutation(len(data))
    entire = data.batch(order)
    for positions in (slice(0, None, 2), slice(1, None, 2), slice(3, 4)):
        part = data.batch(order, positions)
        assert part.ids == entire.ids[positions] and torch.equal(part.labels, entire.labels[positions])
        assert part.place == (positions, len(data))
        for ours, theirs in zip(part.segments, entire.segments, strict=True):
            assert all(torch.equal(x, y[positions]) for x, y in zip(ours, theirs, strict=True))


def test_features_take_the_place_of_segments_in_a_new_dataset(read):
    data = read(sst(("a b", 3), ("c", 0), ("d", 1)))
    states = torch.arange(6.0).view(3, 2)
    cached = data.with_features(states)
    batch = cached.batch(np.array([2, 0, 1]), slice(0, 2))
    assert batch.segments == () and batch.features.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert batch.ids == ("id2", "id0") and batch.labels.tolist() == [1.0, 3.0] and len(batch) == 2
    assert len(cached) == 3 and cached.usable.tolist() == [0, 1, 2] and cached.lengths().tolist() == [4, 3, 3]
    # the original stays as it is
    assert data.features is None and data.batch(np.array([0])).features is None
    assert data.batch(np.array([0])).segments[0][0].tolist() == [[CLS, A, B, SEP]]


@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_lengths_foretell_what_enters_bert(read, encoding):
    rows = [("a " * i, "b " * j, 1) for i, j in itertools.product((1, 4, 9, 20), repeat=2)]
    data = read(pair_file(*rows), "sts", max_length=14, pairs={"sts": encoding})
    result = []
    for i in range(len(data)):
        widths = [segment[0].shape[1] for segment in data.batch(np.array([i])).segments]
        result.append(max(widths) if encoding == "siamese" else sum(widths))
    assert data.lengths().tolist() == result
    assert max(result) == 14


# --- batches ------------------------------------------------------------------------------------------------


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n, batch_size, pool", [(1000, 8, 32), (1003, 8, 4), (5, 8, 32), (64, 8, 1), (1, 1, 1)])
def test_bucketed_batches_hold_every_position_once_and_one_is_short(n, batch_size, pool):
    batches = bucketed_batches(rng(1).integers(3, 60, n), batch_size, rng(), pool)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    sizes = sorted(map(len, batches), reverse=True)
    assert sizes == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)


def test_bucketed_batches_are_seeded():
    lengths = rng(1).integers(3, 60, 500)
    first, again, other = (bucketed_batches(lengths, 8, rng(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_bucketed_batches_need_far_less_padding_than_shuffled_ones():
    lengths = rng(1).integers(3, 60, 2000)

    def padding(batches):
        return sum(lengths[b].max() * len(b) - lengths[b].sum() for b in batches)

    plain = np.split(rng(2).permutation(2000), range(16, 2000, 16))
    assert padding(bucketed_batches(lengths, 16, rng())) < 0.15 * padding(plain)


def test_batches_of_a_sorted_file_are_not_sorted():
    """Labels sorted in the file, all sentences of one length: the order must be as good as a shuffle."""
    n = 2000
    order = np.concatenate(bucketed_batches(np.full(n, 20), 10, rng()))
    # Spearman's rho of a random order has the standard deviation 1 / sqrt(n - 1) = .022
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.1
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
    positive = (order >= n // 2).reshape(-1, 10).mean(1)
    assert positive.mean() == pytest.approx(0.5)
    assert positive.std() == pytest.approx(np.sqrt(0.25 / 10), rel=0.25)


def test_batches_do_not_come_from_short_to_long():
    lengths = np.sort(rng(1).integers(3, 60, 2000))
    means = np.array([lengths[b].mean() for b in bucketed_batches(lengths, 10, rng())])
    # 200 batches: standard deviation .071; the second also sees batches that are sorted within each pool
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.25


# --- memory -------------------------------------------------------------------------------------------------


def test_a_pair_costs_bytes_and_not_objects(tmp_path, tokenizer):
    """20,000 pairs in under 15 MB, at the peak too: what allows 400,000 pairs in under 300 MB."""
    words = np.array(list("abcdefg"))[rng(0).integers(0, 7, (20_000, 22))]
    path = tmp_path / "quora.csv"
    with open(path, "w") as file:
        file.write("\tid\tsentence1\tsentence2\tis_duplicate\n")
        for i, row in enumerate(words):
            file.write(f"{i}\t{i:025x}\t{' '.join(row[:11])}\t{' '.join(row[11:])}\t{i % 2}.0\n")
    task = build_tasks(("para",))["para"]
    tracemalloc.start()
    data = read_dataset(task, path, tokenizer)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == len(data.usable) == 20_000
    assert kept <= peak < 15e6
