"""Write golden/tokenizer.json, the expected values of test_tokenizer.py; transformers' tokenizer computes them."""

import json
import random
import string
import tempfile
from pathlib import Path

SEED = 20
GOLDEN = Path(__file__).parent / "golden" / "tokenizer.json"

LETTERS = {
    "uncased": string.ascii_lowercase + string.digits + "ßøñœοσςφвид\u1112\u1161\u11ab\u3042\u30a4",
    "cased": string.ascii_letters + string.digits + "ßøéÉñÅœσςΣВвидİ\ud55c\u3042\u30a4",
}
WORDS = {
    "uncased": "the tea kettle sing ##ing ##ed naive cafe istanbul un ##aff do not",
    "cased": "The the tea Kettle sing ##ing ##ed na ##ïve Café İstanbul Do not",
}
ALONE = list(string.punctuation + "…–«»¿。、茶水\uf900\U00020000€©\u166d")

TEXTS = [
    "",
    "   ",
    "The tea kettle singing , not boiled .",
    "THE TEA Kettle's sing-ing!?...",
    "Do n't stop (ever), do not; it 's 5:30 ~ $4 ^_^ `x` a|b {c} <d> e=f+g",
    "naïve café na\u00efve nai\u0308ve cafe\u0301 \u0301 İstanbul ISTANBUL ﬁ",
    "Straße STRASSE Ångström smørrebrød señor œuvre Œuvre",
    "ΣΟΦΟΣ σοφος σς ΑΣ Вид вид",
    "茶 and水茶tea豈\U00020000x\U0002b820y\U0002b920z\uf900",
    "\ud55c\uad6d \u3042\u30a4\u3042\u30ab\u3099",
    "tab\tnew\nline\r\nno\u00a0break\u2003em\u3000wide\u2028sep\u1680ogham\u202fnarrow",
    "nul\x00a repl\ufffdaced bell\x07 file\x1cgroup\x1d vertical\x0btab form\x0cfeed next\x85line del\x7f",
    "zero\u200bwidth soft\u00adhyphen \ufeffbom joi\u200dner private\ue000use \u180emongol \u061cmark",
    "a" * 100 + " " + "a" * 101 + " " + "a" * 99 + "\u0301\u0301" + " " + "a" * 101 + ".",
    "[SEP] [sep] [MASK]the[MASK]tea [CLS][PAD] x[UNK]y [ SEP ] [[SEP]] [SEP",
    "[MASK]ing un[MASK]aff ## ##ing # #ing unaffed unaff",
    "€5 ©tea «the» ¿the? … – the–tea 。、 \u037e \u0387 \u1fef",
    "emoji \U0001f375 tea\U0001f375tea \U0001f469\u200d\U0001f373",
    # characters whose category differs between Unicode 8 and later versions
    "a\u061db a\u07fdb a\u08e2b a\u09feb a\u0a76b a\u0c04b a\u166db",
    "a\u1734b a\u1885b a\u1dfbb a\u2e43b a\u2e52b",
    "a\U00010d24b a\U000110cdb a\U000111c9b a\U00011660b a\U00011938b",
    "a\U00011a46b a\U00011ef7b a\U00013430b a\U0001e944b",
]
PAIRS = [
    ["the tea kettle", "the tea not the kettle"],
    ["the tea not the kettle sing", "the tea"],
    ["tea tea tea tea", "the the the the"],
    ["", "the tea"],
    ["the [SEP] tea", "[CLS]"],
    ["tea", ""],
]
LENGTHS = [3, 4, 5, 6, 7, 8, 9, 12, 512]


def make_vocabulary(case):
    """Return the tokens of a small vocabulary that contains most characters of the texts."""
    letters = list(dict.fromkeys(LETTERS[case]))
    pieces = ["[PAD]", "the_unused_line", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += ALONE + letters + [f"##{letter}" for letter in letters] + WORDS[case].split()
    return list(dict.fromkeys(pieces))


def draw_texts(rng, count):
    """Return random texts of letters and of fragments that need different steps of the tokenizer."""
    fragments = sorted({character for text in TEXTS for character in text})
    fragments += " ".join(WORDS.values()).replace("##", "").split() + ["[MASK]", "[SEP]"]
    usual = list(string.ascii_letters + "  .,'-")
    return [
        "".join(rng.choice(usual if rng.random() < 0.5 else fragments) for _ in range(rng.randrange(1, 25)))
        for _ in range(count)
    ]


def make_case(case, rng):
    """Return a vocabulary, and texts, pairs and ids with the results of transformers' tokenizer."""
    from transformers import BertTokenizerFast

    vocabulary = make_vocabulary(case)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        config = {"do_lower_case": case == "uncased"}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        oracle = BertTokenizerFast.from_pretrained(folder)
    texts = TEXTS + draw_texts(rng, 150)
    pairs = []
    for first, second in PAIRS:
        for length in LENGTHS:
            encoding = oracle([first], [second], truncation=True, max_length=length)
            ids, types = encoding["input_ids"][0], encoding["token_type_ids"][0]
            pairs.append([first, second, length, ids, types])
    decodings = []
    for _ in range(60):
        ids = [rng.randrange(len(vocabulary)) for _ in range(rng.randrange(9))]
        decodings.append([ids, oracle.decode(ids, skip_special_tokens=True), oracle.decode(ids)])
    return {
        "vocabulary": vocabulary,
        "texts": [[text, oracle(text, add_special_tokens=False)["input_ids"]] for text in texts],
        "pairs": pairs,
        "decodings": decodings,
    }


def main():
    """Write the golden file, with one line for each text, pair and list of ids."""
    rng = random.Random(SEED)
    lines = []
    for case in ("uncased", "cased"):
        parts = []
        for name, value in make_case(case, rng).items():
            rows = json.dumps(value) if name == "vocabulary" else ",\n".join(json.dumps(row) for row in value)
            parts.append(f'"{name}": {rows}' if name == "vocabulary" else f'"{name}": [\n{rows}\n]')
        lines.append(f'"{case}": {{\n' + ",\n".join(parts) + "\n}")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
