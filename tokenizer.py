"""BERT's tokenizer: it turns a text into the ids of word pieces, and ids back into a text.

BERT's vocabulary has about 30,000 word pieces. A frequent word is one piece. A rare word is split into several pieces,
and every piece but the first starts with "##". The vocabulary contains single letters too, so few words are unknown.

A text goes through these steps, and each step but the first is one function below:
    1. Cut out the special tokens that are written in the text, such as [MASK]. They stay as they are.
    2. normalize: clean the white space, put spaces around Chinese characters, remove accents and capitals.
    3. split_punctuation: split the text into words. Every punctuation mark is a word of its own.
    4. split_word_pieces: split each word into pieces. Always take the longest piece that the vocabulary contains.
    5. pack: add the special tokens [CLS] and [SEP], and join the two texts of a pair.
    6. pad: add [PAD] until all rows of a batch have the same length.

Example (the tests run it). "Unaffable" is not in the vocabulary, but three of its pieces are:
    >>> pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able tea !".split()
    >>> tokenizer = BertTokenizer({piece: i for i, piece in enumerate(pieces)})
    >>> split_punctuation(tokenizer.normalize("Unaffable!"))
    ['unaffable', '!']
    >>> tokenizer.tokenize("Unaffable!")
    ['un', '##aff', '##able', '!']
    >>> tokenizer.encode("Unaffable!")
    [5, 6, 7, 9]
    >>> tokenizer.pack(tokenizer.encode("Unaffable!"), tokenizer.encode("tea"))
    ([2, 5, 6, 7, 9, 3, 8, 3], [0, 0, 0, 0, 0, 0, 1, 1])
    >>> tokenizer.decode([2, 5, 6, 7, 9, 3])
    'unaffable!'

Source: Devlin et al. 2019, "BERT", section 3; the pieces are those of Wu et al. 2016, "Google's Neural Machine
Translation System", section 4.1. The ids equal those of transformers' BertTokenizerFast, the reference below.
"""

import io
import re
import unicodedata

import numpy as np
import torch

from errors import InputError
from files import opened, read_json
from weights import named_folder

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL_PATTERN = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")
# the start of every piece that continues a word
CONTINUATION = "##"
# a longer word becomes [UNK], as in the reference
MAX_WORD_CHARACTERS = 100
MAX_CACHED_WORDS = 2**17


# --- from a text to pieces ----------------------------------------------------------------------------------------


def split_word_pieces(word, vocab):
    """Split a word into the longest pieces of the vocabulary, from left to right.

    If no piece fits at some place, or the word has more than MAX_WORD_CHARACTERS letters, it becomes [UNK] as a whole.
    Source: Wu et al. 2016, section 4.1.
    """
    if len(word) > MAX_WORD_CHARACTERS:
        return [UNK]
    pieces, start = [], 0
    while start < len(word):
        # try the longest piece first: "unaffable", "unaffabl", ..., "un"
        for end in range(len(word), start, -1):
            piece = (CONTINUATION if start else "") + word[start:end]
            if piece in vocab:
                break
        else:
            # not even one letter fits
            return [UNK]
        pieces.append(piece)
        # the next piece starts behind this one: "##affable", "##affabl", ...
        start = end
    return pieces


def split_punctuation(text):
    """Split a clean text into words, at the spaces and around each punctuation mark."""
    spaced = "".join(f" {character} " if is_punctuation(character) else character for character in text)
    return spaced.split()


def clean_text(text):
    """Replace all white space by plain spaces, and remove control characters and U+FFFD (the sign for a bad byte)."""
    kept = []
    for character in text:
        # tabs and line ends are control characters too, so this test comes before is_control
        if character in "\t\n\r":
            kept.append(" ")
        elif character == "\ufffd" or is_control(character):
            continue
        else:
            kept.append(" " if character.isspace() else character)
    return "".join(kept)


def space_chinese_characters(text):
    """Put spaces around every Chinese character, because Chinese is written without spaces between the words."""
    return "".join(f" {character} " if is_chinese(character) else character for character in text)


def strip_accents(text):
    """Remove accents: NFD splits "é" into "e" and a mark of category Mn, and the mark is dropped."""
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(character for character in decomposed if unicode_category(character) != "Mn")


def lower_case(text):
    """Convert each character to lower case.

    Differs: str.lower() of an entire text would turn a Greek sigma at a word's end into its final form; the reference
    converts one character at a time.
    """
    return "".join(character.lower() for character in text)


# --- from ids to the model's input --------------------------------------------------------------------------------


def truncate_pair(a, b, room):
    """Cut the longer of two sequences down to the shorter one, then both in turn, to `room` tokens in total.

    The result is that of dropping tokens one by one from the end of the longer sequence. If both are cut and the room
    is odd, the originally longer one keeps the odd token, or b if both had the same length.
    """
    # a may always have half of the room, and more if b leaves some of its half free
    half = room // 2 + room % 2 * (len(a) > len(b))
    return a[: max(half, room - len(b))], b[: max(room - half, room - len(a))]


def pack(first, second, cls_id, sep_id, limit=None):
    """Add the special tokens: [CLS] A [SEP] for one text (second is None), [CLS] A [SEP] B [SEP] for a pair.

    `first` and `second` are lists of ids without special tokens. A limit cuts one text at its end, and a pair
    with truncate_pair, to at most `limit` ids in all. Without a limit no token is lost.
    Returns (ids, segment ids); a segment id is 0 for [CLS] A [SEP] and 1 for B [SEP].
    """
    if second is None:
        # a text has two special tokens
        if limit is not None:
            first = first[: limit - 2]
        return [cls_id, *first, sep_id], [0] * (len(first) + 2)
    # a pair has three special tokens
    if limit is not None:
        first, second = truncate_pair(first, second, limit - 3)
    ids = [cls_id, *first, sep_id, *second, sep_id]
    return ids, [0] * (len(first) + 2) + [1] * (len(second) + 1)


def pad(sequences, pad_id, width=None):
    """Make tensors of packed sequences; `width` is the number of columns, by default the longest sequence's length.

    Shapes: b pairs (ids, segment ids) -> input_ids, mask, segment_ids, each [b,s] and int64. The mask is 1 for real
        tokens and 0 for padding; segment_ids are 0 for padding.
    """
    if width is None:
        width = max((len(ids) for ids, _ in sequences), default=0)
    shape = (len(sequences), width)  # [b,s]
    # numpy, because assigning a list to a part of a tensor is slow
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    mask, segment_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, (ids, segments) in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        segment_ids[row, : len(ids)] = segments
    return torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(segment_ids)


# --- the tokenizer ------------------------------------------------------------------------------------------------


class BertTokenizer:
    """The tokenizer for one vocabulary, a dict {piece: id}.

    The ids equal those of transformers' BertTokenizerFast for every character of Unicode 14. For newer characters, both
    depend on the version of their Unicode tables.
    Differs: NFD may sort two combining marks that are newer than Unicode 8. The reference leaves them as they are. The
    ids differ only if the vocabulary contains such marks.
    """

    def __init__(self, vocab, do_lower_case=True):
        self.vocab = vocab
        self.do_lower_case = do_lower_case
        self.tokens = {token_id: token for token, token_id in vocab.items()}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIAL_TOKENS)
        self.special_ids = frozenset(vocab[token] for token in SPECIAL_TOKENS)
        # {word: tuple of ids}
        self._cache = {}

    @classmethod
    def from_pretrained(cls, name):
        """Make a tokenizer from a folder with vocab.txt and, optionally, tokenizer_config.json, or from a known name.

        Raises: InputError if one of the two files is unusable.
        """
        folder = named_folder(name)
        vocab = read_vocabulary(folder / "vocab.txt")
        return cls(vocab, read_lower_case_setting(folder / "tokenizer_config.json", vocab))

    def __len__(self):
        return len(self.vocab)

    def normalize(self, text):
        """Clean a text; for an uncased vocabulary, also remove accents and capitals."""
        text = space_chinese_characters(clean_text(text))
        return lower_case(strip_accents(text)) if self.do_lower_case else text

    def tokenize(self, text):
        """Split a text into word pieces, step by step and without the cache."""
        tokens = []
        # the pattern has a group, so split() also returns the special tokens between the parts
        for part in SPECIAL_PATTERN.split(text):
            if part in SPECIAL_TOKENS:
                tokens.append(part)
                continue
            for word in split_punctuation(self.normalize(part)):
                tokens.extend(split_word_pieces(word, self.vocab))
        return tokens

    def _encode_new_word(self, word):
        ids = tuple(self.vocab[token] for token in self.tokenize(word))
        # two bounds limit the memory: the number of cached words and the length of each
        if len(self._cache) < MAX_CACHED_WORDS and len(word) <= MAX_WORD_CHARACTERS:
            self._cache[word] = ids
        return ids

    def encode(self, text):
        """Return the ids of a text as a list, without [CLS] and [SEP] and without truncation.

        No step combines characters across a plain space. Therefore a word between two spaces has the same ids in every
        text, and a cache stores them: most words of a corpus are tokenized only once.
        """
        ids = []
        cache = self._cache
        for word in text.split(" "):
            cached = cache.get(word)
            ids += self._encode_new_word(word) if cached is None else cached
        return ids

    def pack(self, first, second=None, limit=None):
        """Pack one text or a pair of texts with this vocabulary's [CLS] and [SEP]; see the function pack."""
        return pack(first, second, self.cls_id, self.sep_id, limit)

    def __call__(self, texts, pairs=None, max_length=512, padding=True, truncation=True, return_tensors="pt"):
        """Encode, pack and pad a list of texts, or of pairs of texts.

        Shapes: input_ids, attention_mask, token_type_ids, each [b,s] with s the longest of the batch; without padding
            lists of lists.
        Raises: TypeError for a str in place of a list; ValueError if the lists have different lengths; InputError
            if `max_length` has no room for the special tokens, or if `return_tensors` is not "pt".
        """
        if return_tensors != "pt":
            raise InputError(f"return_tensors is {return_tensors!r}; only 'pt' is possible, PyTorch tensors")
        if isinstance(texts, str) or isinstance(pairs, str):
            raise TypeError("texts and pairs must be lists of strings; for a single text write [text]")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts cannot be paired with {len(pairs)} texts")
        special = 2 if pairs is None else 3
        if truncation and max_length < special:
            raise InputError(f"max_length is {max_length}; use {special} or more, for the special tokens")
        limit = max_length if truncation else None
        seconds = [None] * len(texts) if pairs is None else map(self.encode, pairs)
        rows = [self.pack(self.encode(text), second, limit) for text, second in zip(texts, seconds, strict=True)]
        if padding:
            input_ids, mask, segment_ids = pad(rows, self.pad_id)
        else:
            input_ids, segment_ids = [ids for ids, _ in rows], [segments for _, segments in rows]
            mask = [[1] * len(ids) for ids in input_ids]
        return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": segment_ids}

    def decode(self, ids, skip_special_tokens=True):
        """Join ids into a text, with a space before every word but not before a full stop, comma, ? or !.

        Raises: ValueError for an id outside the vocabulary.
        Differs: transformers skips such an id without an error.
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


# --- Unicode ------------------------------------------------------------------------------------------------------

ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
# the blocks of CJK ideographs; those from 2B820 to 2B91F are missing here because they are missing in the reference
CHINESE_RANGES = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip

# The marks, punctuation and format characters that are newer than Unicode 8, as hexadecimal ranges. The reference uses
# the tables of Unicode 8, so it leaves these characters in the text. Python's unicodedata is newer and would act on
# them. To keep the list short, a range also covers characters between two of them that are none of these three kinds.
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
# characters that Unicode 8 puts in another category than Python does
CHANGED_AFTER_UNICODE_8 = {"\u166d": "Po", "\u1734": "Mn", "\U000111c9": "Po"}


def unicode_category(character):
    """Return the general category of a character in Unicode 8, and "Cn" (not assigned) for newer characters."""
    if character in NEWER_THAN_UNICODE_8:
        return "Cn"
    return CHANGED_AFTER_UNICODE_8.get(character) or unicodedata.category(character)


def is_control(character):
    """Return whether clean_text removes this character: control, format, private use and surrogate characters."""
    return unicode_category(character) in ("Cc", "Cf", "Co", "Cs")


def is_punctuation(character):
    """Return whether this character is a word of its own: Unicode punctuation, and all ASCII symbols such as $."""
    return character in ASCII_PUNCTUATION or unicode_category(character).startswith("P")


def is_chinese(character):
    """Return whether this character is a Chinese one (CJK ideograph); Japanese kana and Korean Hangul are not."""
    return any(first <= ord(character) <= last for first, last in CHINESE_RANGES)


# --- reading and checking the files -------------------------------------------------------------------------------


def read_vocabulary(path):
    """Read a vocab.txt with one token on each line; the first line's id is 0. Returns {token: id}.

    Raises: InputError if the file cannot be read or is empty, if a line is blank or repeats an earlier one, or if a
        special token is missing.
    """
    try:
        with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
            tokens = [line.rstrip("\n") for line in text]
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; use the vocab.txt that came with the weights") from None
    if tokens and tokens[0].startswith("\ufeff"):
        raise InputError(f"{path}: starts with a byte-order mark; save the file as UTF-8 without it")
    if not tokens:
        raise InputError(f"{path}: is empty; use the vocab.txt that came with the weights")
    vocab = {}
    for line, token in enumerate(tokens, start=1):
        if not token:
            raise InputError(f"{path}: line {line} is blank; every line must contain one token")
        if token in vocab:
            earlier = vocab[token] + 1
            raise InputError(f"{path}: line {line} repeats {token!r} of line {earlier}; remove one of them")
        vocab[token] = line - 1
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise InputError(f"{path}: the special token {token} is missing; add it on its line")
    return vocab


def read_lower_case_setting(path, vocab):
    """Read do_lower_case from a tokenizer_config.json. Without the file, a vocabulary with capitals is a cased one.

    Raises: InputError if the file is not a JSON object, or describes a tokenizer other than BERT's usual two.
    Differs: without the file, the reference treats every vocabulary as uncased.
    """
    if not path.exists():
        # special tokens such as [CLS] have capitals too, but also brackets, so isalpha() excludes them
        return not any(token.isascii() and token.isalpha() and token != lower_case(token) for token in vocab)
    config = read_json(path)
    do_lower_case = config.get("do_lower_case", True)
    if not isinstance(do_lower_case, bool):
        raise InputError(f"{path}: do_lower_case is {do_lower_case!r}; set it to true or false")
    # an uncased BERT removes accents too, a cased one keeps them; null means "as do_lower_case"
    if config.get("strip_accents") not in (None, do_lower_case):
        raise InputError(f"{path}: strip_accents differs from do_lower_case; set it to null")
    if not config.get("tokenize_chinese_chars", True):
        raise InputError(f"{path}: tokenize_chinese_chars is false; set it to true")
    return do_lower_case
