"""results/FINDINGS.md: the claims of the three papers, what was measured here, and a verdict on each claim.

    python -m lab.findings                   # writes the page from the recorded rows; needs no data and no weights
    python -m lab.findings --record DIR      # first recomputes what needs the dev labels, from the data in DIR

The sentences stand in findings.toml, the numbers in the rows of results/. A sentence names its numbers, and a number
is a list:

    [group, key, row]              a number of one recipe: the mean over its seeds
    [group, key, row, "-", row]    the difference of two recipes
    [group, key, row, "/", row]    their quotient
    ["errors", key]                a number of the error analysis
    [[...], [...]]                 the first of these that is recorded

A key is `norm`, a task, or a path into the row ("exits/threshold", "phases/0/norm"). If a number is not recorded, the
sentence is left out, and a claim without any number is marked "not run".

A claim states in advance which numbers would confirm or refute it, as two conditions. The generator applies them. A
verdict that a person typed must be the one that the conditions give, otherwise no page is written. The program prints
the claims whose numbers are there and whose verdict nobody has typed yet.

± is half of a 95% interval. It covers other seeds and, where the predictions of both sides are recorded, other dev rows
(paired bootstrap); the two are independent, so their squares add up.
"""

import argparse
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from datasets import read_dataset
from errors import InputError, run_script
from files import write_whole
from lab.bootstrap import METRICS, paired_bootstrap
from lab.record import RESULTS, load_rows
from lab.rows import split_name
from lab.tables import markdown
from tasks import build_tasks

CLAIMS = Path(__file__).with_name("findings.toml")
CONFIRMED, REFUTED, UNDECIDED, NOT_RUN = "confirmed", "refuted", "not decided here", "not run"
# standard deviation of a score from seed to seed after a long run; a short run's is SHORT times as large
SEED_NOISE = {"norm": 0.005, "sst": 0.01, "para": 0.005, "sts": 0.005, "cfimdb": 0.02}
SHORT, SHORT_GROUPS = 2, ("methods", "defaults", "berter-figures", "smarter", "adaptations")
# half of a 95% interval, in standard deviations
NORMAL_95 = 1.96
RESAMPLES = 2000
# what a condition may call
FUNCTIONS = {"abs": abs, "min": min, "max": max}


@dataclass(frozen=True)
class Number:
    """A measured number, the group that it comes from, and half of its 95% interval (0: it has none)."""

    value: float
    group: str
    half: float = 0.0
    is_difference: bool = False

    @property
    def low(self):
        """The lower end of the interval."""
        return self.value - self.half

    @property
    def high(self):
        """The upper end of the interval."""
        return self.value + self.half

    def __format__(self, spec):
        """Format like a float. The default is three decimals, for a difference with its sign and interval."""
        text = format(self.value, spec or ("+.3f" if self.is_difference else ".3f"))
        text += f" ± {self.half:.3f}" if self.half and not spec else ""
        return re.sub(r"\b0\.", ".", text)


# --- numbers from rows --------------------------------------------------------------------------------------------


def follow(content, key):
    """The entry at a path like "phases/0/norm"; None if some part of the path is not there."""
    for part in key.split("/"):
        try:
            content = content[int(part) if isinstance(content, list) else part]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def value_of(row, key):
    """A number of one row: a score after its last epoch, a share of its confusion matrix, or what is at a path.

    A list counts with its mean.
    """
    if key in SEED_NOISE:
        return row["last"].get(key)
    name, _, task = key.partition(" of ")
    if name in OF_CONFUSION:
        confusion = follow(row, f"metrics/best/{task}/confusion")
        return None if confusion is None else OF_CONFUSION[name](np.array(confusion, float))
    value = follow(row, key)
    if isinstance(value, list):
        return float(np.mean([x for x in value if x is not None] or np.nan))
    return value


def neighbour_share(confusion):
    """The share of the mistakes that are one class off."""
    distance = np.abs(np.subtract.outer(*[np.arange(len(confusion))] * 2))  # [classes,classes]
    return confusion[distance == 1].sum() / confusion[distance > 0].sum()


def confused(label, predicted):
    """A function of a confusion matrix: the share of the rows of a label that get a prediction."""
    return lambda confusion: confusion[label, predicted] / confusion[label].sum()


OF_CONFUSION = {"neighbour share": neighbour_share}
OF_CONFUSION |= {f"{a} as {b}": confused(a, b) for a in range(5) for b in range(5)}


def recipe(rows, name):
    """The rows of one recipe, a row for each seed."""
    return [row for key, row in rows.items() if split_name(key)[:2] == split_name(name)[:2]]


def seed_half(rows, group, key):
    """Half of the 95% interval of a score of one seed: the stated one, or that of the group's own seeds if wider."""
    # imported here: scipy.stats takes a second
    from scipy.stats import t

    stated = NORMAL_95 * SEED_NOISE[key] * (SHORT if group in SHORT_GROUPS else 1)
    recipes = {split_name(name)[:2]: recipe(rows, name) for name in rows}
    values = [[value_of(row, key) for row in seeds if value_of(row, key) is not None] for seeds in recipes.values()]
    squares = sum(np.var(one) * len(one) for one in values if len(one) > 1)
    freedom = sum(len(one) - 1 for one in values if len(one) > 1)
    # few seeds estimate their standard deviation badly, so Student's t takes the place of the normal distribution
    return max(stated, t.ppf(0.975, freedom) * (squares / freedom) ** 0.5) if freedom else stated


def digest(*sides):
    """A short name for the predictions of some sides' runs; None if a side has no run or a run no predictions."""
    predictions = [follow(row, "measured/predictions") for rows in sides for row in rows]
    complete = all(sides) and all(predictions)
    return hashlib.sha256(json.dumps(predictions).encode()).hexdigest()[:12] if complete else None


@dataclass(frozen=True)
class Source:
    """Where numbers come from: `load(group)` returns {name: row}; `recorded` is findings.json."""

    load: object
    recorded: dict

    def number(self, words):
        """A Number as findings.toml describes it; None if it is not recorded.

        Raises: InputError for a description of another form.
        """
        if isinstance(words[0], list):
            return next(filter(None, map(self.number, words)), None)
        if words[0] == "errors" and len(words) == 2:
            value = follow(self.errors(), words[1])
            return None if value is None else Number(value, "errors")
        if len(words) not in (3, 5) or words[3:4] not in ([], ["-"], ["/"]):
            raise InputError(f"{CLAIMS.name}: {words}: give [group, key, row] or [group, key, row, '-' or '/', row]")
        group, key, *names = words
        rows = self.load(group)
        sides = [recipe(rows, name) for name in names[::2]]
        values = [[value_of(row, key) for row in side] for side in sides]
        if any(not side or None in side for side in values):
            return None
        means = [float(np.mean(side)) for side in values]
        if len(names) == 1:
            return Number(means[0], group)
        if names[1] == "/":
            return Number(means[0] / means[1], group)
        return Number(means[0] - means[1], group, self.half(words, rows, sides), True)

    def half(self, words, rows, sides):
        """Half of the 95% interval of a difference. The key's last part names the score."""
        score = words[1].rpartition("/")[2]
        if score not in SEED_NOISE:
            return 0.0
        one_seed = seed_half(rows, words[0], score)
        bootstrap = self.recorded.get("intervals", {}).get(" | ".join(words), {})
        known = bootstrap and bootstrap["digest"] == digest(*sides)
        of_seeds = one_seed * sum(1 / len(side) for side in sides) ** 0.5
        return float(np.hypot(of_seeds, bootstrap["half"] if known else 0.0))

    def errors(self):
        """The recorded error analysis, without the parts whose runs have other predictions today."""
        parts = self.recorded.get("errors", {})
        return {name: part for name, part in parts.items() if part["digest"] == digest(*self.sides(part["of"]))}

    def sides(self, names):
        """The rows of some recipes, a list [group, row, row, ...]."""
        rows = self.load(names[0])
        return [recipe(rows, name) for name in names[1:]]


# --- the page -----------------------------------------------------------------------------------------------------


def used_numbers(text, numbers):
    """The numbers that a condition uses, {name: Number or None}."""
    return {name: number for name, number in numbers.items() if re.search(rf"(?<!\.)\b{name}\b", text)}


def verdict_of(claim, numbers):
    """The verdict on a claim: what its conditions say, or the typed one if it has no conditions.

    Raises: InputError if the typed verdict is another one than the numbers give.
    """
    typed, conditions = claim.get("verdict"), {word: claim[word] for word in (CONFIRMED, REFUTED) if word in claim}
    needed = used_numbers(" ".join(conditions.values()), numbers) if conditions else numbers
    if None in needed.values() if conditions else numbers and not any(numbers.values()):
        return NOT_RUN
    if not conditions:
        return typed
    held = [word for word, text in conditions.items() if eval(text, {"__builtins__": {}} | FUNCTIONS, needed)]
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


def fill(sentences, numbers):
    """The sentences whose numbers are all recorded, with their numbers. Returns (list of texts, the used numbers)."""
    texts, used = [], {}
    for sentence in sentences:
        named = {name: numbers[name] for name in re.findall(r"{(\w+)", sentence)}
        if None not in named.values():
            texts.append(sentence.format(**named))
            used |= named
    return texts, used


def measured_text(claim, numbers):
    """What was measured of a claim, and the groups that it comes from."""
    texts, used = fill(claim["measured"], numbers)
    groups = sorted({number.group for number in used.values()})
    return " ".join(texts) + (f" ({', '.join(groups)})" if groups else "")


def first_group(words):
    """The group that a number is wanted from, whether it has rows or not."""
    return first_group(words[0]) if isinstance(words[0], list) else words[0]


def claim_cells(claim, source):
    """The cells of a claim's line in its table."""
    numbers = {name: source.number(words) for name, words in claim.get("numbers", {}).items()}
    verdict = verdict_of(claim, numbers)
    # what would decide it: more than was run, or the groups that were not run
    missing = sorted({first_group(claim["numbers"][name]) for name, number in numbers.items() if number is None})
    decides = {UNDECIDED: claim.get("decides"), NOT_RUN: ", ".join(missing)}.get(verdict)
    return [
        claim["where"],
        claim["claim"],
        measured_text(claim, numbers),
        f"**{verdict}**" + (f": {decides}" if decides else ""),
    ]


def render(source):
    """The text of FINDINGS.md."""
    content = tomllib.loads(CLAIMS.read_text())
    parts = [f"# {content['title']}", content["introduction"].strip()]
    for section in content["section"]:
        parts += [f"## {section['title']}"]
        if "text" in section:
            numbers = {name: source.number(words) for name, words in section.get("numbers", {}).items()}
            parts.append("\n".join(f"- {text}" for text in fill(section["text"], numbers)[0]) or NOT_RUN)
        if "claim" in section:
            cells = [claim_cells(claim, source) for claim in section["claim"]]
            parts.append("\n".join(markdown(["section", "claim", "measured here", "verdict"], cells)))
    return "\n\n".join(parts) + "\n"


def untyped_verdicts(source):
    """The claims whose conditions give a verdict that nobody has typed, as lines "verdict: claim"."""
    lines = []
    for claim in all_claims(tomllib.loads(CLAIMS.read_text())):
        numbers = {name: source.number(words) for name, words in claim.get("numbers", {}).items()}
        verdict = verdict_of(claim, numbers)
        if verdict != NOT_RUN and "verdict" not in claim:
            lines.append(f"verdict not typed: {verdict}: {claim['claim']}")
    return lines


def all_claims(content):
    """Every claim of findings.toml."""
    return [claim for section in content["section"] for claim in section.get("claim", ())]


def all_numbers(content):
    """Every description of a number in findings.toml, alternatives one by one."""
    entries = [*content["section"], *all_claims(content)]
    described = [words for entry in entries for words in entry.get("numbers", {}).values()]
    return [one for words in described for one in (words if isinstance(words[0], list) else [words])]


# --- what needs the dev labels ------------------------------------------------------------------------------------


class Words:
    """A tokenizer for counting: one token for each word."""

    def encode(self, text):
        """One number for each word of a text."""
        return range(len(text.split()))


@dataclass(frozen=True)
class DevRows:
    """What the error analysis uses of a task's usable dev rows. `overlap` is NaN for single sentences.

    Shapes: labels, words, overlap [n].
    Units: words counts the words of a row; overlap is the share of two texts' different words that both have.
    """

    labels: np.ndarray
    words: np.ndarray
    overlap: np.ndarray

    def describe(self, chosen):
        """The share of some rows among all, and their means. Shapes: chosen [n], booleans."""
        result = {"share": chosen.mean()}
        if chosen.any():
            result |= {"words": self.words[chosen].mean(), "overlap": self.overlap[chosen].mean()}
        return {name: round(float(value), 4) for name, value in result.items() if not np.isnan(value)}


def word_overlap(first, *others):
    """The share of the different words that all texts have; NaN for one text."""
    sets = [set(text.lower().split()) for text in (first, *others)]
    return len(set.intersection(*sets)) / len(set.union(*sets)) if others else float("nan")


def read_dev_rows(task, folder):
    """The usable dev rows of a task."""
    data = read_dataset(task, Path(folder) / task.file("dev"), Words())
    overlap = np.array([word_overlap(*data.text(row)) for row in data.usable])
    return DevRows(data.labels[data.usable], data.text_lengths()[data.usable], overlap)


def predicted(row, task, dev, kind="values"):
    """Recorded predictions of a task as numbers: a string has a digit for each dev row. Shapes: [n].

    Raises: InputError if the data have another number of dev rows.
    """
    values = np.array([float(value) for value in row["measured"]["predictions"][task.name][kind]])
    if len(values) != len(dev.labels):
        raise InputError(
            f"--record: {row['name']} has {len(values)} predictions of {task.name}, but there are {len(dev.labels)} "
            "usable dev rows: give the folder of the data that the runs were trained on"
        )
    return values


def is_wrong(task, values, labels):
    """Whether predictions are wrong; of a regression, whether they are off by more than one. Shapes: [n]."""
    return np.abs(values - labels) > 1 if task.is_regression else values != labels


def leaving_errors(task, dev, row):
    """Rows that leave in the first half of the layers and are wrong, and rows that leave last and are right."""
    depth = len(row["measured"]["exits"]["layer_scores"][task.name])
    left, values, last = (predicted(row, task, dev, kind) for kind in ("left", "left_values", "values"))
    wrong = is_wrong(task, values, dev.labels)
    early, late = (left <= depth / 2) & wrong, (left == depth) & ~wrong
    result = {"all": dev.describe(left > 0), "early": dev.describe(left <= depth / 2)}
    result |= {
        "early wrong": dev.describe(early),
        "late right": dev.describe(late),
        "late": dev.describe(left == depth),
    }
    # of the rows that leave early and are wrong: how many the last exit would have predicted right
    saved = ~is_wrong(task, last, dev.labels)[early]
    return result | {"saved at the end": float(saved.mean()) if early.any() else 0.0}


def encoding_errors(task, dev, rows):
    """Rows on which two models disagree, and how often the first one is then nearer to the label."""
    first, second = (predicted(row, task, dev) for row in rows)
    differ = is_wrong(task, first, second)
    nearer = (np.abs(first - dev.labels) < np.abs(second - dev.labels))[differ]
    result = {"all": dev.describe(differ | ~differ), "differ": dev.describe(differ)}
    return result | {"first nearer": float(nearer.mean()) if differ.any() else 0.0}


def interval_half(tasks, dev, score, sides):
    """Half of the 95% interval of a difference of two recipes' scores, by paired bootstrap over the dev rows."""
    parts = []
    for name, task in tasks.items():
        if score not in ("norm", name) or name not in sides[0][0]["measured"]["predictions"]:
            continue
        # two of [n,runs]
        arrays = [np.stack([predicted(row, task, dev[name]) for row in side], axis=1) for side in sides]

        def metric(values, labels, task=task):
            scores = METRICS[task.metric.name](values, labels)
            return (task.metric.normalise(scores) if score == "norm" else scores).mean()

        parts.append((*arrays, dev[name].labels, metric))
    _, (low, high), _ = paired_bootstrap(parts, RESAMPLES)
    return (high - low) / 2


def record(source, folder):
    """Compute what needs the dev labels: the content of findings.json."""
    content, tasks = tomllib.loads(CLAIMS.read_text()), build_tasks()
    dev = {name: read_dev_rows(task, folder) for name, task in tasks.items()}
    intervals, errors = {}, {}
    for words in all_numbers(content):
        if len(words) != 5 or words[3] != "-" or words[1] not in ("norm", *tasks):
            continue
        name, sides = " | ".join(words), source.sides([words[0], words[2], words[4]])
        old, of = source.recorded.get("intervals", {}).get(name), digest(*sides)
        if of and old and old["digest"] == of:
            intervals[name] = old
        elif of:
            intervals[name] = {"digest": of, "half": round(interval_half(tasks, dev, words[1], sides), 5)}
    for name, of in content["errors"].items():
        sides = source.sides(of)
        if not digest(*sides):
            continue
        rows = [side[0] for side in sides]
        by_task = {
            task.name: leaving_errors(task, dev[task.name], *rows)
            if len(rows) == 1
            else encoding_errors(task, dev[task.name], rows)
            for task in tasks.values()
            if all(task.name in row["measured"]["predictions"] for row in rows)
        }
        errors[name] = {"of": of, "digest": digest(*sides)} | by_task
    return {"intervals": intervals, "errors": errors}


# --- the program --------------------------------------------------------------------------------------------------


def read_source(results=RESULTS):
    """The recorded rows and findings.json of a results folder."""
    path = results / "findings.json"
    load = cache(lambda group: load_rows(group, results))
    return Source(load, json.loads(path.read_text()) if path.exists() else {})


def write_page(results=RESULTS):
    """Write FINDINGS.md."""
    write_whole(results / "FINDINGS.md", render(read_source(results)))


def main(argv=None):
    """Write the page; with --record, first compute what needs the dev labels."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.findings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", metavar="DIR", help="folder of the course's data, for what needs the dev labels")
    args = parser.parse_args(argv)
    if args.record:
        content = record(read_source(), args.record)
        write_whole(RESULTS / "findings.json", json.dumps(content, indent=1) + "\n")
    write_page()
    print("\n".join(untyped_verdicts(read_source())))


if __name__ == "__main__":
    run_script(main)
