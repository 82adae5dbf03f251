"""BERT's tokenizer, text to WordPiece ids and back: read nothing before it, it needs no other part of BERT.

A text goes through these steps, in this order; each is one function below.
    1. special tokens written in the text, such as [MASK], are cut out and kept whole;
    2. clean_text, space_chinese_characters, strip_accents, lower_case (the last two only if uncased);
    3. split_punctuation: white space and punctuation separate words;
    4. split_word_pieces: the longest vocabulary entry first, from left to right, or [UNK] for the whole word.
"""

import json
import re
import unicodedata
from pathlib import Path

import torch

from errors import InputError

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL_PATTERN = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")
CONTINUATION = "##"
MAX_WORD_CHARACTERS = 100
MAX_CACHED_WORDS = 2**17

ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
# 2B820 to 2B91F are ideographs too, but the reference has this gap
CHINESE_RANGES = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip

# Marks, punctuation and format characters that came after Unicode 8, as hexadecimal ranges. The reference has
# the tables of Unicode 8 and leaves these in the text; Python's unicodedata is newer and would act on them. A
# range also spans what lies between two such characters, if that is neither mark, punctuation nor control.
NEWER_RANGES = """
    61D-61D 7FD-7FD 890-8E2 9FD-9FE A76-A76 AFA-AFF B55-B55 C04-C3C C77-C77 C84-C84 D00-D00 D3B-D3C D81-D81
    EBA-EBA 180F-1886 1ABF-1ACE 1B7D-1B7E 1DF6-1DFB 2E43-2E5D A82C-A82C A8C5-A8C5 A8FF-A8FF A9BD-A9BD
    10D24-10F89 11070-11074 110C2-110CD 111CF-111CF 1123E-1123E 1133B-1133B 11438-1145E 11660-1166C
    116B9-116B9 1182F-11FFF 12FF1-13438 16E97-16F4F 16FE2-16FE4 1CF00-1CF46 1E000-1E2EF 1E944-1E95F
"""
NEWER_THAN_UNICODE_8 = frozenset(
    chr(code_point)
    for first, last in (span.split("-") for span in NEWER_RANGES.split())
    for code_point in range(int(first, 16), int(last, 16) + 1)
)
CHANGED_AFTER_UNICODE_8 = {"\u166d": "Po", "\u1734": "Mn", "\U000111c9": "Po"}


def unicode_category(character):
    """Return the general category of a character as Unicode 8 had it, "Cn" (not assigned) for newer ones."""
    if character in NEWER_THAN_UNICODE_8:
        return "Cn"
    return CHANGED_AFTER_UNICODE_8.get(character) or unicodedata.category(character)


def is_control(character):
    """Say whether cleaning removes this character: control, format, private use and surrogate code points."""
    return unicode_category(character) in ("Cc", "Cf", "Co", "Cs")


def is_punctuation(character):
    """Say whether this character is a word of its own: Unicode punctuation, and every ASCII symbol."""
    return character in ASCII_PUNCTUATION or unicode_category(character).startswith("P")


def is_chinese(character):
    """Say whether this character is a CJK ideograph; kana and Hangul are not, they are written in words."""
    return any(first <= ord(character) <= last for first, last in CHINESE_RANGES)


def clean_text(text):
    """Make every kind of white space a plain space and drop control characters and U+FFFD."""
    kept = []
    for character in text:
        if character in "\t\n\r":
            kept.append(" ")
        elif character == "\ufffd" or is_control(character):
            continue
        else:
            kept.append(" " if character.isspace() else character)
    return "".join(kept)


def space_chinese_characters(text):
    """Put spaces around every CJK ideograph, so that each becomes a word."""
    return "".join(f" {character} " if is_chinese(character) else character for character in text)


def strip_accents(text):
    """Decompose accented letters (NFD) and drop the non-spacing marks."""
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(character for character in decomposed if unicode_category(character) != "Mn")


def lower_case(text):
    """Lower each character by itself.

    Differs: str.lower() on the whole text would turn a Greek sigma at a word's end into its final form.
    """
    return "".join(character.lower() for character in text)


def split_punctuation(text):
    """Split cleaned text at spaces and around each punctuation character into a list of words."""
    spaced = "".join(f" {character} " if is_punctuation(character) else character for character in text)
    return spaced.split()


def split_word_pieces(word, vocab):
    """Split a word into the longest vocabulary entries, from left to right; [UNK] where that fails.

    Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 4.1; Devlin et al. 2019.
    """
    if len(word) > MAX_WORD_CHARACTERS:
        return [UNK]
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = (CONTINUATION if start else "") + word[start:end]
            if piece in vocab:
                break
        else:
            return [UNK]
        pieces.append(piece)
        start = end
    return pieces


def truncate_pair(a, b, room):
    """Cut the longer of two sequences until both fit into `room` ids together, then both alike.

    Where both are cut and the room is odd, the longer one gets the odd id, and the second one where they tie.
    """
    shorter, longer = sorted((len(a), len(b)))
    longer = min(longer, max(shorter, room - shorter))
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    if len(a) > len(b):
        return a[:longer], b[:shorter]
    return a[:shorter], b[:longer]


def read_vocabulary(path):
    """Read a vocab.txt, one token a line, into a dict from token to id.

    Raises: InputError where the file cannot be read or is empty, a line is blank or comes twice, or a special
    token is missing.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tokens = [line.rstrip("\n") for line in file]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a folder with one") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; take the vocab.txt that came with the weights") from None
    if not tokens:
        raise InputError(f"{path}: is empty; take the vocab.txt that came with the weights")
    vocab = {}
    for line, token in enumerate(tokens, start=1):
        if not token:
            raise InputError(f"{path}: line {line} is blank; every line must hold one token")
        if token in vocab:
            earlier = vocab[token] + 1
            raise InputError(f"{path}: line {line} repeats {token!r} of line {earlier}; remove one of them")
        vocab[token] = line - 1
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise InputError(f"{path}: the special token {token} is missing; add it on its line")
    return vocab


def read_lower_case_setting(path, vocab):
    """Read do_lower_case from a tokenizer_config.json; without the file, a vocabulary with capitals is a cased one.

    Differs: without the file the reference takes every vocabulary for an uncased one.

    Raises: InputError where the file is no JSON object, or asks for a tokenizer other than BERT's usual two.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return not any(token.isascii() and token.isalpha() and token != lower_case(token) for token in vocab)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); repair or remove it") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); repair or remove it") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(config).__name__}; repair or remove it")
    do_lower_case = config.get("do_lower_case", True)
    if not isinstance(do_lower_case, bool):
        raise InputError(f"{path}: do_lower_case is {do_lower_case!r}; make it true or false")
    if config.get("strip_accents") not in (None, do_lower_case):
        raise InputError(f"{path}: strip_accents differs from do_lower_case; set it to null")
    if not config.get("tokenize_chinese_chars", True):
        raise InputError(f"{path}: tokenize_chinese_chars is false; set it to true")
    return do_lower_case


class BertTokenizer:
    """Turn texts into WordPiece ids with [CLS] and [SEP], and ids into text, for one vocabulary.

    The ids equal those of transformers' BertTokenizerFast for every code point assigned in Unicode 14; for
    newer ones both sides depend on their version of the Unicode tables.
    Differs: where the vocabulary itself holds combining marks newer than Unicode 8, two marks in a row may
    come out of NFD in another order, since the reference does not know the combining classes of new marks.
    """

    def __init__(self, vocab, do_lower_case=True):
        self.vocab = vocab
        self.do_lower_case = do_lower_case
        self.tokens = {token_id: token for token, token_id in vocab.items()}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIAL_TOKENS)
        self.special_ids = frozenset(vocab[token] for token in SPECIAL_TOKENS)
        self._cache = {}

    @classmethod
    def from_pretrained(cls, folder):
        """Make a tokenizer from a folder with vocab.txt and, if it is there, tokenizer_config.json.

        Raises: InputError where either file is unusable.
        """
        vocab = read_vocabulary(Path(folder) / "vocab.txt")
        return cls(vocab, read_lower_case_setting(Path(folder) / "tokenizer_config.json", vocab))

    def __len__(self):
        return len(self.vocab)

    def normalize(self, text):
        """Clean a text, space its ideographs and, for an uncased vocabulary, strip accents and lower it."""
        text = space_chinese_characters(clean_text(text))
        return lower_case(strip_accents(text)) if self.do_lower_case else text

    def tokenize(self, text):
        """Split a text into WordPiece tokens, step by step and without the cache."""
        tokens = []
        for part in SPECIAL_PATTERN.split(text):
            if part in SPECIAL_TOKENS:
                tokens.append(part)
                continue
            for word in split_punctuation(self.normalize(part)):
                tokens.extend(split_word_pieces(word, self.vocab))
        return tokens

    def _encode_new_word(self, word):
        ids = tuple(self.vocab[token] for token in self.tokenize(word))
        # both bounds together keep the memory bounded: the cache stops growing when it is full
        if len(self._cache) < MAX_CACHED_WORDS and len(word) <= MAX_WORD_CHARACTERS:
            self._cache[word] = ids
        return ids

    def encode(self, text):
        """Return the ids of one text as a list, without [CLS] and [SEP] and at full length.

        No step looks across a plain space, so what stands between two of them has the same ids in every text
        and is looked up in a cache.
        """
        ids = []
        cache = self._cache
        for word in text.split(" "):
            known = cache.get(word)
            ids += self._encode_new_word(word) if known is None else known
        return ids

    def _add_special_tokens(self, first, second, limit):
        """Return the ids and segment ids of one text, or of a pair, with at most `limit` ids in all."""
        if second is None:
            first = first if limit is None else first[: limit - 2]
            ids = [self.cls_id, *first, self.sep_id]
            return ids, [0] * len(ids)
        if limit is not None:
            first, second = truncate_pair(first, second, limit - 3)
        ids = [self.cls_id, *first, self.sep_id, *second, self.sep_id]
        return ids, [0] * (len(first) + 2) + [1] * (len(second) + 1)

    def __call__(self, texts, pairs=None, max_length=512, padding=True, truncation=True):
        """Encode a list of texts, or of pairs of texts, for the model.

        Shapes: input_ids, attention_mask, token_type_ids [b,s], s the longest of the batch; lists of lists
        without padding.
        Raises: TypeError for a str in place of a list; ValueError where the lists differ in length;
        InputError where `max_length` has no room for the special tokens.
        """
        if isinstance(texts, str) or isinstance(pairs, str):
            raise TypeError("texts and pairs must be lists of strings; for a single text give [text]")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts cannot be paired with {len(pairs)} texts")
        special = 2 if pairs is None else 3
        if truncation and max_length < special:
            raise InputError(f"max_length is {max_length}; give {special} or more, for the special tokens")
        limit = max_length if truncation else None
        seconds = [None] * len(texts) if pairs is None else map(self.encode, pairs)
        rows = [
            self._add_special_tokens(self.encode(text), second, limit)
            for text, second in zip(texts, seconds, strict=True)
        ]
        width = max((len(ids) for ids, _ in rows), default=0) if padding else 0
        columns = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
        for ids, types in rows:
            fill = max(0, width - len(ids))
            columns["input_ids"].append(ids + [self.pad_id] * fill)
            columns["attention_mask"].append([1] * len(ids) + [0] * fill)
            columns["token_type_ids"].append(types + [0] * fill)
        if not padding:
            return columns
        return {name: torch.tensor(values, dtype=torch.long).view(len(rows), width) for name, values in columns.items()}

    def decode(self, ids, skip_special_tokens=True):
        """Join ids into text: pieces to their word, words by spaces, none before a full stop, comma, ? or !.

        Raises: ValueError for an id outside the vocabulary.
        Differs: transformers drops such an id in silence.
        """
        text = ""
        for token_id in map(int, ids):
            if token_id not in self.tokens:
                raise ValueError(f"{token_id} is not an id of this vocabulary of {len(self)} tokens")
            if skip_special_tokens and token_id in self.special_ids:
                continue
            token = self.tokens[token_id]
            if not text:
                text = token
            elif token.startswith(CONTINUATION):
                text += token.removeprefix(CONTINUATION)
            else:
                text += token if token[0] in ".?!," else f" {token}"
        return text
