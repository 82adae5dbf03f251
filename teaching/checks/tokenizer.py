"""Checks of part tokenizer: WordPiece and the truncation of pairs."""

from tokenizer import MAX_WORD_CHARACTERS, SPECIAL_TOKENS, BertTokenizer, split_word_pieces, truncate_pair


def draw_word(draw, letters, length):
    """Return a word of some of these letters."""
    return "".join(draw.choice(letters) for _ in range(length))


def draw_vocabulary(draw, letters):
    """Return {piece: id} with all single letters, and longer pieces of which some continue a word."""
    pieces = [mark + letter for letter in letters for mark in ("", "##")]
    # a longer piece whose first half is no piece: a search that starts with the shortest piece never meets it
    for length in (2, 2, 3, 3, 4):
        word = draw_word(draw, letters, length)
        pieces += [word, "##" + draw_word(draw, letters, length)]
    return {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *pieces]))}


def longest_match(draw):
    """Split words that have pieces."""
    letters = draw.choice(("abc", "xyz", "uvw"))
    vocab = draw_vocabulary(draw, letters)
    if draw.size == 0:
        pieces = ["[UNK]", "un", "unaff", "##able", "##aff", "##ab", "able", "aff", "##a", "incomprehensibilities"]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        words = ["unaffable", "incomprehensibilities", "incomprehensibilitiesa"]
    else:
        words = [draw_word(draw, letters, draw.number(3, 4 + 4 * draw.size)) for _ in range(4 * draw.size)]
        words += [piece for piece in vocab if piece.isalpha()]
    draw.show(words=" ".join(words), vocabulary=" ".join(vocab))
    return {"split_word_pieces": "\n".join(" ".join(split_word_pieces(word, vocab)) for word in words)}


def unknown_words(draw):
    """Split words that end or begin with a letter without a piece, and words at the limit of length."""
    letters = "abc"
    vocab = draw_vocabulary(draw, letters)
    vocab |= {"ab": 98, "##bc": 99}
    vocab.pop("abc", None)  # so that "abc" is [UNK]: the search never goes back to a + ##bc
    vocab.pop("##c")  # a "c" fits only at the start of a word or in a longer piece
    words = (
        ["abd", "dab", "adb", "abc"] if draw.size == 0 else [draw_word(draw, "abcd", 5 * draw.size) for _ in range(8)]
    )
    if draw.size == 2:
        words += ["a" * (MAX_WORD_CHARACTERS - 1), "a" * MAX_WORD_CHARACTERS, "a" * (MAX_WORD_CHARACTERS + 1)]
    vocab |= {"ä": 100, "##ä": 101, "A": 102, "##B": 103}
    words += ["ä" * (MAX_WORD_CHARACTERS - 10), "AB", "Ab"]
    draw.show(words=" ".join(words), vocabulary=" ".join(vocab))
    return {"split_word_pieces": "\n".join(" ".join(split_word_pieces(word, vocab)) for word in words)}


def sentences(draw):
    """Encode sentences with capitals, punctuation and special tokens."""
    letters = draw.choice(("abc", "xyz"))
    vocab = draw_vocabulary(draw, letters)
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(".,!")}
    words = [draw_word(draw, letters, draw.number(2, 7)) for _ in range(2 + 4 * draw.size)]
    text = " ".join(words).capitalize() + "!" + " [MASK], q" * draw.size
    draw.show(text=text, vocabulary=" ".join(vocab))
    return {"ids": BertTokenizer(vocab).encode(text)}


def truncation(draw):
    """Cut pairs of texts of all kinds of lengths."""
    pairs = [(5, 2, 4), (4, 4, 5), (6, 4, 7), (4, 6, 7)]
    if draw.size:
        pairs += [tuple(draw.number(0, 4 + 4 * draw.size) for _ in range(3)) for _ in range(30 * draw.size)]
    draw.show(lengths_and_room=str(pairs[:4]))
    results = []
    for long, short, room in pairs:
        a, b = list(range(100, 100 + long)), list(range(200, 200 + short))
        first, second = truncate_pair(a, b, room)
        results.append(f"{list(first)} {list(second)}")
    return {"truncate_pair": "\n".join(results)}
