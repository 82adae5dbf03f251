"""results/FINDINGS.md: the claims of the three papers, what was measured here, and a verdict on each claim.

The sentences stand in findings.toml; numbers.py fills in what was measured. A claim states in advance which numbers
would confirm or refute it, as two conditions. The generator applies them. A verdict that a person typed must be the one
that the conditions give, otherwise no page is written. A claim is "not run" where a number is missing that its
conditions need.
"""

import math
import re
import tomllib
from pathlib import Path

import numpy as np

from errors import InputError
from files import write_whole
from lab.numbers import Number, all_descriptions, fill, read_numbers
from lab.tables import markdown

CLAIMS = Path(__file__).with_name("findings.toml")
CONFIRMED, REFUTED, UNDECIDED, NOT_RUN = "confirmed", "refuted", "not decided here", "not run"
# what a condition may call; unlike the built-in functions, these return NaN if a value is NaN
FUNCTIONS = {"abs": abs, "min": lambda *values: np.min(values), "max": lambda *values: np.max(values)}
# the first words of a typed sentence, in bold type: they stay where its numbers are missing
TITLE = r"\*\*.*?\*\*"
# a number that was not measured: every comparison with it is false
MISSING = Number(math.nan, "", math.nan)


def needed_numbers(claim, numbers):
    """The numbers that the conditions of a claim use, all if it has none: {name: Number or None}."""
    text = " ".join(claim.get(word, "") for word in (CONFIRMED, REFUTED))
    used = {name: number for name, number in numbers.items() if re.search(rf"(?<!\.)\b{name}\b", text)}
    return used or numbers


def verdict_of(claim, numbers):
    """The verdict on a claim: what its conditions say, or the typed one if it has no conditions.

    Raises: InputError if the typed verdict is another one than the numbers give.
    """
    typed, conditions = claim.get("verdict"), {word: claim[word] for word in (CONFIRMED, REFUTED) if word in claim}
    needed = needed_numbers(claim, numbers)
    if not conditions:
        return NOT_RUN if numbers and not any(numbers.values()) else typed
    known = {name: number or MISSING for name, number in needed.items()}
    held = [word for word, text in conditions.items() if eval(text, {"__builtins__": {}} | FUNCTIONS, known)]
    if not held and None in needed.values():
        return NOT_RUN
    if len(held) > 1:
        raise InputError(f"{CLAIMS.name}: {claim['claim']!r}: both conditions hold: make them exclude each other")
    measured = held[0] if held else UNDECIDED
    if typed and typed != measured:
        values = ", ".join(f"{name} {number}" for name, number in needed.items())
        raise InputError(
            f"{CLAIMS.name}: {claim['claim']!r}: the typed verdict is {typed!r}, but its numbers say {measured!r} "
            f"({values}): read them and type the verdict again"
        )
    return measured


def measured_text(claim, numbers):
    """What was measured of a claim, and the groups that it comes from."""
    texts, used = fill(claim["measured"], numbers)
    groups = dict.fromkeys(number.group for number in used.values())  # in the order of the sentences
    return " ".join(texts) + (f" ({', '.join(groups)})" if groups else "")


def first_group(words):
    """The group that a number is wanted from, whether it has rows or not."""
    return first_group(words[0]) if isinstance(words[0], list) else words[0]


def claim_cells(claim, source):
    """The cells of a claim's line in its table."""
    numbers = read_numbers(claim, source)
    verdict = verdict_of(claim, numbers)
    # what would decide it: more than was run, or the groups that were not run
    needed = needed_numbers(claim, numbers)
    missing = sorted({first_group(claim["numbers"][name]) for name, number in needed.items() if number is None})
    decides = {UNDECIDED: claim.get("decides"), NOT_RUN: f"rows of {', '.join(missing)}"}.get(verdict)
    return [
        claim["where"],
        claim["claim"],
        measured_text(claim, numbers),
        f"**{verdict}**" + (f": {decides}" if decides else ""),
    ]


def filled(text, numbers):
    """A typed sentence with its numbers, or its first words if one of them is not recorded."""
    return next(iter(fill([text], numbers)[0]), f"{re.match(TITLE, text)[0]}: {NOT_RUN}.")


def render(source):
    """The text of FINDINGS.md."""
    content = tomllib.loads(CLAIMS.read_text())
    parts = [f"# {content['title']}", content["introduction"].strip()]
    for section in content["section"]:
        parts += [f"## {section['title']}"]
        if "text" in section:
            numbers = read_numbers(section, source)
            parts.append("\n".join(f"- {filled(text, numbers)}" for text in section["text"]))
        if "claim" in section:
            cells = [claim_cells(claim, source) for claim in section["claim"]]
            parts.append("\n".join(markdown(["section", "claim", "measured here", "verdict"], cells)))
    return "\n\n".join(parts) + "\n"


def untyped_verdicts(source):
    """The claims whose conditions give a verdict that nobody has typed, as lines "verdict: claim"."""
    lines = []
    for claim in all_claims(tomllib.loads(CLAIMS.read_text())):
        verdict = verdict_of(claim, read_numbers(claim, source))
        if verdict != NOT_RUN and "verdict" not in claim:
            lines.append(f"verdict not typed: {verdict}: {claim['claim']}")
    return lines


def all_claims(content):
    """Every claim of findings.toml."""
    return [claim for section in content["section"] for claim in section.get("claim", ())]


def described_numbers():
    """What labels.py is to compute for the page: the descriptions of all numbers, and whose errors are described."""
    content = tomllib.loads(CLAIMS.read_text())
    return all_descriptions([*content["section"], *all_claims(content)]), content["errors"]


def write_findings(source, results):
    """Write FINDINGS.md, and print the claims whose numbers are there and whose verdict nobody has typed yet."""
    write_whole(results / "FINDINGS.md", render(source))
    for line in untyped_verdicts(source):
        print(line)
