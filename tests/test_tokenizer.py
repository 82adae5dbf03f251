"""Tests of tokenizer.py against golden ids, which transformers made, and against transformers if it is installed."""

import csv
import doctest
import json
import random
import unicodedata
from pathlib import Path

import pytest
import torch

import tokenizer
from errors import InputError
from tokenizer import SPECIAL_TOKENS, BertTokenizer, pack, pad, truncate_pair

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights" / "all-MiniLM-L6-v2"
DATA = ROOT.parent / "shared" / "data"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))

needs_weights = pytest.mark.skipif(not (WEIGHTS / "vocab.txt").exists(), reason="the weights are absent")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the course's data is absent")


def write_folder(folder, lines, do_lower_case=None):
    """Write a vocabulary and, unless do_lower_case is None, a tokenizer configuration; return the folder."""
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if do_lower_case is not None:
        text = json.dumps({"do_lower_case": do_lower_case})
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(params=["uncased", "cased"])
def golden(request, tmp_path):
    """A tokenizer with a small vocabulary, and the results of transformers' tokenizer with the same vocabulary."""
    case = GOLDEN[request.param]
    folder = write_folder(tmp_path, case["vocabulary"], do_lower_case=request.param == "uncased")
    return BertTokenizer.from_pretrained(folder), case


@pytest.fixture
def small():
    """A tokenizer with the golden uncased vocabulary."""
    return BertTokenizer({token: i for i, token in enumerate(GOLDEN["uncased"]["vocabulary"])})


def test_the_example_in_the_docstring_is_right():
    results = doctest.testmod(tokenizer)
    assert results.failed == 0 and results.attempted > 0


def test_texts_have_the_golden_ids_with_and_without_the_cache(golden):
    ours, case = golden
    for text, ids in case["texts"]:
        assert [ours.vocab[token] for token in ours.tokenize(text)] == ids, ascii(text)
        assert ours.encode(text) == ids, ascii(text)
        assert ours.encode(text) == ids, ascii(text)


def test_pairs_have_the_golden_ids_and_segments_at_every_length(golden):
    ours, case = golden
    for first, second, length, ids, types in case["pairs"]:
        encoding = ours([first], [second], max_length=length, padding=False)
        assert encoding == {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "token_type_ids": [types]}


def test_ids_decode_to_the_golden_text(golden):
    ours, case = golden
    for ids, without_special, with_special in case["decodings"]:
        assert ours.decode(torch.tensor(ids)) == without_special
        assert ours.decode(ids, skip_special_tokens=False) == with_special


def test_steps_by_hand(small):
    assert tokenizer.clean_text("a\x00b\tc\u200bd\u3000e\ufffd") == "ab cd e"
    assert tokenizer.space_chinese_characters("a\u8336b\u3042") == "a \u8336 b\u3042"
    assert tokenizer.strip_accents("\u00e9\u00f1") == "en"
    assert tokenizer.lower_case("\u0391\u03a3") == "\u03b1\u03c3"
    assert tokenizer.split_punctuation("it's $5.") == ["it", "'", "s", "$", "5", "."]
    assert tokenizer.split_word_pieces("unaffed", small.vocab) == ["un", "##aff", "##ed"]
    assert tokenizer.split_word_pieces("tea\u00bf", small.vocab) == ["[UNK]"]


def test_padding_mask_and_segments_of_a_batch(small):
    """[CLS] the tea [SEP] tea [SEP] beside [CLS] tea [SEP] the [SEP]: the second row is padded by one."""
    the, tea = small.vocab["the"], small.vocab["tea"]
    encoding = small(["the tea", "tea"], ["tea", "the"])
    cls, sep, pad = small.cls_id, small.sep_id, small.pad_id
    assert encoding["input_ids"].tolist() == [[cls, the, tea, sep, tea, sep], [cls, tea, sep, the, sep, pad]]
    assert encoding["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert encoding["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert all(value.dtype == torch.long for value in encoding.values())
    assert small([])["input_ids"].shape == (0, 0)


def test_pack_by_hand(small):
    """One text: [CLS] A [SEP], all in segment 0. A pair: [CLS] A [SEP] is segment 0 and B [SEP] is segment 1."""
    assert pack([7, 8, 9], None, 1, 2) == ([1, 7, 8, 9, 2], [0] * 5)
    assert pack([7, 8, 9], None, 1, 2, limit=5) == ([1, 7, 8, 9, 2], [0] * 5)
    assert pack([7, 8, 9], None, 1, 2, limit=4) == ([1, 7, 8, 2], [0] * 4)
    assert pack([7, 8, 9], [5], 1, 2) == ([1, 7, 8, 9, 2, 5, 2], [0] * 5 + [1] * 2)
    assert pack([7, 8, 9], [5], 1, 2, limit=6) == ([1, 7, 8, 2, 5, 2], [0] * 4 + [1] * 2)
    assert pack([7, 8, 9], [5, 6], 1, 2, limit=6) == ([1, 7, 8, 2, 5, 2], [0] * 4 + [1] * 2)
    assert pack([], [], 1, 2, limit=3) == ([1, 2, 2], [0, 0, 1])
    cls, sep = small.cls_id, small.sep_id
    assert small.pack([7, 8], [9], limit=5) == ([cls, 7, sep, 9, sep], [0, 0, 0, 1, 1])


def test_pad_by_hand():
    rows = [([1, 7, 2], [0, 0, 0]), ([1, 2, 5, 8, 2], [0, 0, 1, 1, 1])]
    input_ids, mask, types = pad(rows, 3)
    assert input_ids.tolist() == [[1, 7, 2, 3, 3], [1, 2, 5, 8, 2]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert types.tolist() == [[0] * 5, [0, 0, 1, 1, 1]]
    assert all(x.dtype == torch.int64 for x in (input_ids, mask, types))
    wide = pad(rows, 3, width=7)
    assert wide[0].tolist() == [[1, 7, 2, 3, 3, 3, 3], [1, 2, 5, 8, 2, 3, 3]]
    assert wide[1].sum(1).tolist() == [3, 5] and wide[2].sum(1).tolist() == [0, 3]


def test_truncation_can_be_switched_off(small):
    assert small(["tea " * 600])["input_ids"].shape == (1, 512)
    assert small(["tea " * 600], truncation=False)["input_ids"].shape == (1, 602)
    assert small(["tea"], ["tea " * 600], truncation=False)["input_ids"].shape == (1, 604)


def test_truncate_pair_equals_cutting_the_longer_one_id_by_id():
    """The closed form equals a loop that drops ids; after a tie, the originally longer sequence keeps the odd id."""
    for first in range(9):
        for second in range(9):
            for room in range(20):
                a, b = first, second
                while a + b > room:
                    a, b = (a - 1, b) if a > b or (a == b and not first > second) else (a, b - 1)
                cut = truncate_pair(list(range(first)), list(range(second)), room)
                assert cut == (list(range(a)), list(range(b))), (first, second, room)


def test_ids_of_special_tokens_and_length(small):
    ids = [small.pad_id, small.unk_id, small.cls_id, small.sep_id, small.mask_id]
    assert ids == [GOLDEN["uncased"]["vocabulary"].index(token) for token in SPECIAL_TOKENS]
    assert len(small) == len(GOLDEN["uncased"]["vocabulary"])


def test_cache_is_bounded(small, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_CACHED_WORDS", 3)
    text = "the tea kettle sing not " + "a" * 101
    expected = small.encode(text)
    assert small.encode(text) == expected
    assert sorted(small._cache) == ["kettle", "tea", "the"]


def test_long_words_are_not_cached(small):
    small.encode("a" * 101)
    assert small._cache == {}


def test_misuse_says_what_to_do(small):
    with pytest.raises(TypeError, match=r"write \[text\]"):
        small("the tea")
    with pytest.raises(ValueError, match="2 texts cannot be paired with 1"):
        small(["the", "tea"], ["tea"])
    with pytest.raises(InputError, match="max_length is 2; use 3 or more"):
        small(["the"], ["tea"], max_length=2)
    for wrong in (-100, len(small)):
        with pytest.raises(ValueError, match=f"{wrong} is not an id"):
            small.decode([wrong])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([*SPECIAL_TOKENS, "tea", "", "the"], "line 7 is blank"),
        ([*SPECIAL_TOKENS, "tea", "the", "tea"], "line 8 repeats 'tea' of line 6"),
        ([t for t in SPECIAL_TOKENS if t != "[MASK]"], r"special token \[MASK\] is missing"),
    ],
)
def test_unusable_vocabulary_is_named(tmp_path, lines, message):
    with pytest.raises(InputError, match=message) as error:
        BertTokenizer.from_pretrained(write_folder(tmp_path, lines))
    assert str(tmp_path / "vocab.txt") in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_binary_vocabulary_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe[PAD]\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        BertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "not an object"),
        ('{"do_lower_case": "no"}', "do_lower_case is 'no'"),
        ('{"do_lower_case": true, "strip_accents": false}', "strip_accents differs"),
        ('{"tokenize_chinese_chars": false}', "tokenize_chinese_chars is false"),
    ],
)
def test_unusable_configuration_is_named(tmp_path, config, message):
    write_folder(tmp_path, SPECIAL_TOKENS)
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        BertTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_vocabulary_without_configuration_is_uncased(tmp_path):
    assert BertTokenizer.from_pretrained(write_folder(tmp_path, SPECIAL_TOKENS)).do_lower_case
    assert not BertTokenizer.from_pretrained(write_folder(tmp_path, SPECIAL_TOKENS, False)).do_lower_case


@pytest.mark.parametrize(
    ("words", "uncased"),
    [(("the", "##ing", "[ENT]", "é"), True), (("the", "##ing", "The"), False), (("##X", "Ä"), True)],
)
def test_capitals_in_a_vocabulary_without_configuration_make_it_cased(tmp_path, words, uncased):
    assert BertTokenizer.from_pretrained(write_folder(tmp_path, (*SPECIAL_TOKENS, *words))).do_lower_case is uncased


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def both(request, tmp_path_factory):
    """Our tokenizer and transformers' one with the MiniLM vocabulary, lower-casing or not."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vocabulary")
    write_folder(folder, BertTokenizer.from_pretrained(WEIGHTS).vocab, request.param)
    return BertTokenizer.from_pretrained(folder), transformers.BertTokenizerFast.from_pretrained(folder)


def draw_strings(seed, count, last):
    """Yield random strings: half of them are ASCII, half also have other assigned characters below `last`."""
    rng = random.Random(seed)
    ascii_characters = [chr(code_point) for code_point in range(128)]
    assigned = [c for c in map(chr, range(last)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    for _ in range(count):
        alphabets = rng.choice([[ascii_characters], [ascii_characters, assigned]])
        yield "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(40)))


@needs_weights
@pytest.mark.skipif(unicodedata.unidata_version > "14.0.0", reason="code points beyond Unicode 14")
def test_random_strings_equal_transformers(both):
    ours, reference = both
    # most characters that need care have low code points; among all code points they would be rare
    texts = [*draw_strings(1, 1500, 0x3000), *draw_strings(2, 1500, 0x20000)]
    for text, ids in zip(texts, reference(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ours.encode(text) == ids, ascii(text)


@needs_weights
@needs_data
def test_course_data_equals_transformers(both):
    ours, reference = both
    with open(DATA / "sts-dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    first, second = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    for length in (9, 20, 21, 512):
        settings = {"max_length": length, "truncation": True, "padding": True}
        expected = reference(first, second, return_tensors="pt", **settings)
        encoding = ours(first, second, **settings)
        assert encoding.keys() == set(expected.keys())
        assert all(torch.equal(encoding[name], expected[name]) for name in encoding)
    for row in encoding["input_ids"][:200]:
        assert ours.decode(row) == reference.decode(row, skip_special_tokens=True)
