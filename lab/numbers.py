"""Numbers in typed sentences: the answers of the pages and the findings are typed, report fills in what was measured.

The sentences stand in answers.toml and findings.toml, the numbers in the rows of results/. A sentence names its
numbers, and a number is a list:

    [group, key, recipe]                 a number of one recipe: the mean over its seeds
    [group, key, recipe, "-", recipe]    the difference of two recipes
    [group, key, recipe, "/", recipe]    their quotient
    ["errors", key]                      a number of the error analysis, or a difference in it (labels.py)
    [[...], [...]]                       the first of these that is recorded

A key is `norm`, a task, or a path into the row ("exits/threshold", "phases/0/norm"). If a number is not recorded, its
sentence is left out.

± is half of a 95% interval. It covers other seeds, by a stated noise (few rows have several seeds), and, as soon as
labels.py has recorded it, other dev rows (paired bootstrap); the two are independent, so their squares add up.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from errors import InputError
from lab.record import RESULTS, load_rows, recipes
from lab.rows import ENSEMBLE, GROUPS, recipe_of, split_name

# standard deviation of a score from seed to seed after a long run with mixed tasks; core and splits have such seeds
SEED_NOISE = {"norm": 0.005, "sst": 0.01, "para": 0.005, "sts": 0.005, "cfimdb": 0.02}
# that of other runs is so many times as large: short ones (assumed; six recipes of slf-ablation have two seeds, whose
# norms vary by .004), and those that train one task after another (the two seeds of splits: .671 and .702)
SHORT, SEQUENTIAL = 2, 4
SHORT_GROUPS = ("methods", "defaults", "berter-figures", "smarter", "adaptations", "slf-ablation", "embedding-order")
# half of a 95% interval, in standard deviations
NORMAL_95 = 1.96


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

    @property
    def direction(self):
        """A difference in words; it is clear if its interval excludes 0."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not clearly different"

    def __format__(self, spec):
        """Format like a float. The default is three decimals, for a difference with its sign and interval.

        `is` puts a difference into words.
        """
        if spec == "is":
            return f"{self.direction} ({self})"
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


def seed_noise(group, key, row):
    """The stated standard deviation of a row's score from seed to seed; 0 for an ensemble of the seeds themselves."""
    if ENSEMBLE in row["command"]:
        return 0.0
    orders = [after for word, after in pairwise(row["command"].split()) if word == "--sampler"]
    if orders[-1:] == ["sequential"]:  # a later flag wins
        return SEQUENTIAL * SEED_NOISE[key]
    return SEED_NOISE[key] * (SHORT if group in SHORT_GROUPS else 1)


def digest(*sides):
    """A short name for the predictions of some sides' runs; None if a side has no run or a run no predictions."""
    predictions = [follow(row, "measured/predictions") for rows in sides for row in rows]
    complete = all(sides) and all(predictions)
    return hashlib.sha256(json.dumps(predictions).encode()).hexdigest()[:12] if complete else None


@dataclass(frozen=True)
class Source:
    """Where numbers come from: `load(group)` returns {name: row}; `recorded` is what labels.py computed."""

    load: object
    recorded: dict

    def number(self, words):
        """A Number from its description, a list; None if it is not recorded.

        Raises: InputError for a description of another form.
        """
        if isinstance(words[0], list):
            return next(filter(None, map(self.number, words)), None)
        if words[0] == "errors" and len(words) == 2:
            value = follow(self.errors(), words[1])
            if isinstance(value, dict):
                group = self.recorded["errors"][words[1].partition("/")[0]]["of"][0]
                return Number(value["difference"], group, value["half"], True)
            return None if value is None else Number(value, "errors")
        if len(words) not in (3, 5) or words[3:4] not in ([], ["-"], ["/"]):
            raise InputError(f"{words}: give [group, key, row] or [group, key, row, '-' or '/', row]")
        group, key, *names = words
        rows = self.load(group)
        sides = [recipes(rows).get(name, []) for name in names[::2]]
        values = [[value_of(row, key) for row in side] for side in sides]
        if any(not side or None in side for side in values):
            return None
        # a run of other tasks has another norm
        if key.endswith("norm") and len({frozenset(row["last"]) for side in sides for row in side}) > 1:
            return None
        means = [float(np.mean(side)) for side in values]
        if len(names) == 1:
            return Number(means[0], group)
        if names[1] == "/":
            return Number(means[0] / means[1], group)
        return Number(means[0] - means[1], group, self.half(words, sides), True)

    def half(self, words, sides):
        """Half of the 95% interval of a difference. The key's last part names the score."""
        score = words[1].rpartition("/")[2]
        if score not in SEED_NOISE:
            return 0.0
        # each side is the mean of its seeds
        variances = [np.mean([seed_noise(words[0], score, row) ** 2 for row in side]) / len(side) for side in sides]
        bootstrap = self.recorded.get("intervals", {}).get(" | ".join(words), {})
        known = bootstrap and bootstrap["digest"] == digest(*sides)
        return float(np.hypot(NORMAL_95 * sum(variances) ** 0.5, bootstrap["half"] if known else 0.0))

    def errors(self):
        """The recorded error analysis, without the parts whose runs have other predictions today."""
        parts = self.recorded.get("errors", {})
        return {name: part for name, part in parts.items() if part["digest"] == digest(*self.sides(part["of"]))}

    def sides(self, names):
        """The rows of some recipes, a list [group, row, row, ...]."""
        by_recipe = recipes(self.load(names[0]))
        return [by_recipe.get(name, []) for name in names[1:]]


def read_source(results=RESULTS):
    """The recorded rows of a results folder, and what labels.py recorded in it."""
    path = results / "findings.json"
    load = cache(lambda group: load_rows(group, results))
    return Source(load, json.loads(path.read_text()) if path.exists() else {})


# --- sentences ----------------------------------------------------------------------------------------------------


def fill(sentences, numbers):
    """The sentences whose numbers are all recorded, with their numbers. Returns (list of texts, the used numbers)."""
    texts, used = [], {}
    for sentence in sentences:
        named = {name: numbers[name] for name in re.findall(r"{(\w+)", sentence)}
        if None not in named.values():
            texts.append(sentence.format(**named))
            used |= named
    return texts, used


def read_numbers(entry, source):
    """The numbers that an entry of a TOML file names: {name: Number or None}."""
    return {name: source.number(words) for name, words in entry.get("numbers", {}).items()}


def all_descriptions(entries):
    """Every description of a number in some entries of a TOML file, alternatives one by one."""
    described = [words for entry in entries for words in entry.get("numbers", {}).values()]
    return [one for words in described for one in (words if isinstance(words[0], list) else [words])]


# --- the baseline of a table --------------------------------------------------------------------------------------


def against_baseline(group):
    """The norm of each recipe minus its baseline's, {recipe: description of the number}.

    The baseline of a recipe in a block is that of its block, if the block has one.
    """
    baseline, result = GROUPS[group].baseline, {}
    names = dict.fromkeys(map(recipe_of, GROUPS[group].rows))
    for name in names if baseline else ():
        in_block = f"{split_name(name)[0]}: {baseline}"
        base = in_block if in_block in names else baseline
        if name != base:
            result[name] = [group, "norm", name, "-", base]
    return result
