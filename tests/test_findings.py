"""FINDINGS.md: every number in a sentence is defined, a verdict agrees with its numbers, missing rows are no error."""

import csv
import json
import re
import tomllib

import numpy as np
import pytest
from scipy.stats import chi2

from errors import InputError
from lab import findings, labels, numbers, pages
from lab.findings import NOT_RUN
from lab.labels import DevRows
from lab.numbers import Number, Source
from lab.record import RESULTS, load_rows, recipes
from lab.rows import GROUPS, recipe_of
from tasks import build_tasks

CONTENT = tomllib.loads(findings.CLAIMS.read_text())
CLAIMS = findings.all_claims(CONTENT)
VERDICTS = {findings.CONFIRMED, findings.REFUTED, findings.UNDECIDED, "answered", "open"}
# about two pages; the bars of the tables do not count
WORDS = 2200


def source_of(rows, recorded=None):
    """A Source of hand-made rows, {group: {name: row}}."""
    return Source(lambda group: rows.get(group, {}), recorded or {})


def scored(predictions=None, command="", **scores):
    """A row with these scores, and with predictions if some are given."""
    return {"last": scores, "command": command} | ({"measured": {"predictions": predictions}} if predictions else {})


def claims_file(monkeypatch, tmp_path, claim):
    """Let the page have one claim."""
    path = tmp_path / "findings.toml"
    path.write_text(f'title = "T"\nintroduction = "I"\n[[section]]\ntitle = "S"\n[[section.claim]]\n{claim}')
    monkeypatch.setattr(findings, "CLAIMS", path)


# --- the sentences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [*CONTENT["section"], *CLAIMS, *pages.ANSWERS.values()])
def test_every_number_is_defined_and_used(entry):
    entry = {key: value for key, value in entry.items() if not (key == "claim" and isinstance(value, list))}
    sentences = [*entry.get("text", ()), *entry.get("measured", ())]
    named = {name for sentence in sentences for name in re.findall(r"{(\w+)", sentence)}
    conditions = " ".join(entry.get(word, "") for word in (findings.CONFIRMED, findings.REFUTED))
    named |= {name for name in re.findall(r"([a-z]\w*)\.[a-z]", conditions)}
    assert named == set(entry.get("numbers", {}))


@pytest.mark.parametrize("words", [*findings.described_numbers()[0], *pages.described_numbers()], ids=" | ".join)
def test_every_number_names_rows_that_exist(words):
    if words[0] == "errors":
        assert words[1].split("/")[0] in CONTENT["errors"]
        return
    assert set(words[2::2]) <= set(map(recipe_of, GROUPS[words[0]].rows))


def test_the_rows_of_the_error_analysis_exist():
    for group, *names in CONTENT["errors"].values():
        assert set(names) <= set(map(recipe_of, GROUPS[group].rows))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["claim"][:40])
def test_a_claim_has_a_place_and_a_verdict_or_conditions(claim):
    assert {"where", "claim", "measured"} <= set(claim)
    assert claim.get("verdict", findings.UNDECIDED) in VERDICTS
    assert {"verdict", findings.CONFIRMED, findings.REFUTED} & set(claim)


def test_conditions_can_be_computed():
    """With made-up numbers every condition is true or false, and never both of a claim."""
    rng = np.random.default_rng(0)
    for claim in CLAIMS:
        claim = claim | {"verdict": ""}
        for _ in range(300):
            # differences of scores, and now and then large numbers (layers, quotients)
            scales = np.where(rng.random(len(claim.get("numbers", ()))) < 0.8, 0.02, 2)
            numbers = {
                name: Number(rng.normal(0, scale), "g", scale * rng.random())
                for name, scale in zip(claim.get("numbers", ()), scales, strict=True)
            }
            assert findings.verdict_of(claim, numbers) in {*VERDICTS, ""}


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_committed_page_is_made_from_the_committed_rows():
    text = findings.render(numbers.read_source())
    assert (RESULTS / "FINDINGS.md").read_text() == text == findings.render(numbers.read_source())


def test_the_page_is_short_when_every_row_is_there(monkeypatch):
    monkeypatch.setattr(Source, "number", lambda source, words: Number(0.1234, "core", 0.01, True))
    monkeypatch.setattr(findings, "verdict_of", lambda claim, numbers: claim.get("verdict", findings.CONFIRMED))
    text = findings.render(source_of({}))
    assert "{" not in text and NOT_RUN not in text.partition("## BERTer")[2].lower()
    assert len([word for word in text.split() if word != "|"]) < WORDS


def test_the_page_needs_no_row():
    text = findings.render(source_of({}))
    assert text.count(f"**{NOT_RUN}**") == sum("numbers" in claim for claim in CLAIMS)
    assert re.findall(r"[{}]|None|nan", text) == []


CLAIM = """
where = "1"
claim = "A beats B."
numbers.gain = ["core", "norm", "A", "-", "B"]
numbers.time = ["core", "train_seconds", "A", "/", "B"]
measured = ["A minus B {gain}.", "{time:.2f} times the seconds."]
confirmed = "gain.low > 0"
refuted = "gain.high < 0"
decides = "seeds"
"""


@pytest.mark.parametrize(
    ("a", "verdict"), [(0.7, "confirmed"), (0.3, "refuted"), (0.505, "not decided here"), (None, "not run")]
)
def test_a_typed_verdict_that_the_numbers_contradict_is_refused(monkeypatch, tmp_path, a, verdict):
    """One seed a side in a long group: half of the interval is 1.96 x .005 x sqrt 2 = .014."""
    rows = {"core": {"B": scored(norm=0.5)} | ({"A": scored(norm=a)} if a else {})}
    claims_file(monkeypatch, tmp_path, CLAIM)
    line = findings.render(source_of(rows)).splitlines()[-1]
    decides = ": seeds" if verdict == "not decided here" else ""
    decides = ": rows of core" if not a else decides
    measured = f"A minus B {a - 0.5:+.3f} ± .014. (core)".replace("0.", ".") if a else ""
    assert line == f"| 1 | A beats B. | {measured} | **{verdict}**{decides} |"
    lines = findings.untyped_verdicts(source_of(rows))
    assert lines == ([f"verdict not typed: {verdict}: A beats B."] if a else [])
    for typed in ("confirmed", "refuted", "not decided here"):
        claims_file(monkeypatch, tmp_path, f'{CLAIM}verdict = "{typed}"')
        if typed == verdict or not a:
            assert findings.render(source_of(rows)).splitlines()[-1] == line
            assert findings.untyped_verdicts(source_of(rows)) == []
        else:
            with pytest.raises(InputError, match=f"typed verdict is '{typed}', but its numbers say '{verdict}'"):
                findings.render(source_of(rows))


@pytest.mark.parametrize(
    ("refuted", "verdict"),
    [
        ("gain.high < 0 or missing.high < 0", "refuted"),
        ("gain.high < 0 and missing.high < 0", "not run"),
        ("gain.high < max(0, missing.high)", "not run"),
    ],
)
def test_a_condition_that_holds_without_a_missing_number_decides(refuted, verdict):
    claim = {"claim": "A beats B.", "confirmed": "gain.low > 0", "refuted": refuted}
    numbers = {"gain": Number(-0.1, "core", 0.01), "missing": None}
    assert findings.verdict_of(claim, numbers) == verdict


def test_conditions_that_both_hold_are_refused(monkeypatch, tmp_path):
    claims_file(monkeypatch, tmp_path, CLAIM.replace("gain.high < 0", "gain.high > 0"))
    with pytest.raises(InputError, match="both conditions hold"):
        findings.render(source_of({"core": {"A": scored(norm=0.7), "B": scored(norm=0.5)}}))


# --- the numbers --------------------------------------------------------------------------------------------------


def test_a_number_is_the_mean_over_seeds():
    rows = {"core": {"A, seed 1": scored(norm=0.7), "A, seed 2": scored(norm=0.8), "A, long": scored(norm=0.1)}}
    assert Source(rows.get, {}).number(["core", "norm", "A"]).value == pytest.approx(0.75)


def test_the_means_of_several_seeds_have_less_noise():
    rows = {f"{name}, seed {seed}": scored(norm=norm) for name in "AB" for seed, norm in ((1, 0.6), (2, 0.8))}
    number = source_of({"core": rows}).number(["core", "norm", "A", "-", "B"])
    assert (number.value, number.half) == (pytest.approx(0), pytest.approx(1.96 * 0.005))


def test_one_task_after_another_has_more_noise():
    """Variances of .02 and .005, one seed a side; the last --sampler counts."""
    sequential = "multitask_classifier.py --sampler random --sampler sequential"
    rows = {"A": scored(command=sequential, norm=0.6), "B": scored(command="--sampler random", norm=0.6)}
    half = source_of({"core": rows}).number(["core", "norm", "A", "-", "B"]).half
    assert half == pytest.approx(1.96 * (0.02**2 + 0.005**2) ** 0.5)


@pytest.mark.parametrize("score", ["norm", "sst", "para", "sts"])
def test_the_recorded_seeds_do_not_vary_more_than_stated(score):
    """By a chi-squared test of each kind of row: squared deviations over the stated variances."""
    squares, freedom = {}, {}
    for group in GROUPS:
        for seeds in recipes(load_rows(group)).values():
            values = [row["last"].get(score) for row in seeds]
            if len(seeds) > 1 and None not in values:
                noise = numbers.seed_noise(group, score, seeds[0])
                squares[noise] = squares.get(noise, 0) + len(values) * np.var(values) / noise**2
                freedom[noise] = freedom.get(noise, 0) + len(values) - 1
    assert len(squares) > 1 and all(squares[noise] < chi2.ppf(0.99, freedom[noise]) for noise in squares)


def test_a_short_group_has_more_noise():
    rows = {name: scored(norm=0.5) for name in "AB"}
    words = ["norm", "A", "-", "B"]
    half = [source_of({group: rows}).number([group, *words]).half for group in ("core", "methods")]
    assert half[1] == pytest.approx(2 * half[0]) == pytest.approx(1.96 * 0.01 * 2**0.5)


def test_the_bootstrap_counts_as_long_as_the_predictions_are_the_same():
    """Two independent halves of .2 and 1.96 x .005 x sqrt 2 = .01386 add up like the sides of a right triangle."""
    rows = {"A": scored({"sst": {"values": "01"}}, norm=0.6), "B": scored({"sst": {"values": "11"}}, norm=0.5)}
    words = ["core", "norm", "A", "-", "B"]
    sides = [[rows["A"]], [rows["B"]]]
    recorded = {"intervals": {" | ".join(words): {"digest": numbers.digest(*sides), "half": 0.2}}}
    assert source_of({"core": rows}, recorded).number(words).half == pytest.approx(
        (0.2**2 + 0.01386**2) ** 0.5, rel=1e-4
    )
    rows["A"]["measured"]["predictions"]["sst"]["values"] = "00"
    assert source_of({"core": rows}, recorded).number(words).half == pytest.approx(1.96 * 0.005 * 2**0.5)


def test_the_first_recorded_alternative_counts():
    rows = {"core": {"A": scored(norm=0.7)}}
    words = [["splits", "norm", "A"], ["core", "norm", "A"]]
    assert source_of(rows).number(words) == Number(0.7, "core")
    assert source_of(rows | {"splits": {"A": scored(norm=0.6)}}).number(words) == Number(0.6, "splits")
    assert source_of({}).number(words) is None


def test_numbers_of_a_confusion_matrix():
    """Of ten rows of label 4, six are read as 3 and two as 2: eight mistakes, six of them one class off."""
    confusion = np.zeros((5, 5), int)
    confusion[4] = [0, 0, 2, 6, 2]
    confusion[3, 3] = 5
    row = scored() | {"metrics": {"best": {"sst": {"confusion": confusion.tolist()}}}}
    assert numbers.value_of(row, "4 as 3 of sst") == 0.6
    assert numbers.value_of(row, "3 as 3 of sst") == 1
    assert numbers.value_of(row, "neighbour share of sst") == 0.75
    assert numbers.value_of(scored(), "4 as 3 of sst") is None


def test_a_path_leads_into_lists_and_a_list_counts_with_its_mean():
    row = scored() | {"phases": [{"sst": 0.1}, {"sst": 0.2}], "losses": {"cosine": [0.1, None, 0.3]}}
    assert numbers.value_of(row, "phases/-1/sst") == 0.2
    assert numbers.value_of(row, "losses/cosine") == pytest.approx(0.2)
    assert numbers.value_of(row, "phases/7/sst") is None


@pytest.mark.parametrize("words", [["core", "norm"], ["core", "norm", "A", "+", "B"], ["core", "norm", "A", "-"]])
def test_a_number_of_another_form_is_refused(words):
    with pytest.raises(InputError, match="give"):
        source_of({}).number(words)


def test_numbers_are_printed_without_a_leading_zero():
    assert f"{Number(0.75, 'g')} {Number(-0.02, 'g', 0.01, True)}" == ".750 -.020 ± .010"
    assert f"{Number(0.75, 'g'):.0%} {Number(10.5, 'g'):.1f}" == "75% 10.5"


# --- what needs the labels ----------------------------------------------------------------------------------------


def exits_row(values, left, left_values):
    """A row of a run with six exits."""
    predictions = {"values": values, "left": left, "left_values": left_values}
    return {
        "name": "A",
        "last": {"norm": 0.5},
        "measured": {"predictions": {"para": predictions}, "exits": {"layer_scores": {"para": [0.5] * 6}}},
    }


def test_rows_that_leave_early_and_are_wrong():
    """Rows 0 and 1 leave early, row 0 wrong, and the last exit is right on it. Rows 2 and 3 leave last, row 2 right."""
    dev = DevRows(np.array([1.0, 0, 1, 0]), np.array([10, 20, 30, 40]), np.array([0.1, 0.2, 0.3, 0.4]))
    result = labels.leaving_errors(build_tasks()["para"], dev, exits_row("1011", "1366", "0011"))
    assert result["early wrong"] == {"share": 0.25, "words": 10, "overlap": 0.1}
    assert result["late right"] == {"share": 0.25, "words": 30, "overlap": 0.3}
    assert (result["early"]["share"], result["late"]["share"], result["saved at the end"]) == (0.5, 0.5, 1)


def test_pairs_on_which_two_encodings_disagree():
    """They disagree on rows 1 and 2; the first is right on row 1 only."""
    dev = DevRows(np.array([1.0, 0, 1, 0]), np.array([10, 20, 30, 40]), np.array([0.1, 0.2, 0.4, 0.4]))
    rows = [exits_row(values, "", "") for values in ("1000", "1110")]
    result = labels.encoding_errors(build_tasks()["para"], dev, rows)
    assert result["differ"] == {"share": 0.5, "words": 25, "overlap": pytest.approx(0.3)}
    assert result["first nearer"] == 0.5
    dev = DevRows(np.array([3.0, 4]), np.array([1, 1]), np.array([0.5, 0.5]))
    rows = [{"measured": {"predictions": {"sts": {"values": values}}}} for values in ([1.5, 4.5], [2.75, 4.0])]
    result = labels.encoding_errors(build_tasks()["sts"], dev, rows)
    assert (result["differ"]["share"], result["first nearer"]) == (0.5, 0)


def test_predictions_of_other_data_are_refused():
    dev = DevRows(np.array([1.0, 0]), np.array([10, 20]), np.array([0.1, 0.2]))
    with pytest.raises(InputError, match="A has 3 predictions of para, but there are 2 usable dev rows"):
        labels.predicted(exits_row("101", "", ""), build_tasks()["para"], dev)


def test_word_overlap():
    assert labels.word_overlap("How is it ?", "how was it ?") == 3 / 5
    assert np.isnan(labels.word_overlap("one text"))


def test_what_is_recorded_from_the_sample(monkeypatch, tmp_path):
    """Intervals and errors of two runs on the project's own sample, then nothing is computed twice, and no text."""
    folder = RESULTS.parent / "data" / "sample"
    tasks, rng = build_tasks(), np.random.default_rng(0)
    dev = labels.read_dev_rows(folder)
    rows = {}
    for name, noise in (("A", 0.1), ("B", 0.4)):
        predictions = {}
        for task in tasks.values():
            gold = dev[task.name].labels
            swapped = np.where(rng.random(len(gold)) < noise, rng.permutation(gold), gold)
            values = swapped.tolist() if task.is_regression else "".join(f"{label:.0f}" for label in swapped)
            left = "".join(rng.choice(list("16"), len(gold)))
            worse = values[::-1]
            predictions[task.name] = {"values": values, "left": left, "left_values": worse}
        rows[name] = scored(predictions, norm=0.5 - noise)
        rows[name]["measured"]["exits"] = {"layer_scores": {task: [0] * 6 for task in tasks}}
    claims_file(monkeypatch, tmp_path, CLAIM + '[errors]\nleaving = ["core", "A"]\nencodings = ["core", "A", "B"]')
    result = labels.record(source_of({"core": rows}), *findings.described_numbers(), folder)
    interval = result["intervals"]["core | norm | A | - | B"]
    assert 0 < interval["half"] < 0.3 and interval["digest"] == numbers.digest([rows["A"]], [rows["B"]])
    assert set(result["errors"]) == {"leaving", "encodings"}
    assert set(result["errors"]["leaving"]) == {"of", "digest", "cost", *tasks}
    cost = source_of({"core": rows}, result).number(["errors", "leaving/cost"])
    assert cost.is_difference and cost.group == "core" and cost.high < 0 < cost.half
    assert 0.2 < result["errors"]["encodings"]["sst"]["differ"]["share"] < 0.6
    monkeypatch.setattr(labels, "compare", None)
    again = labels.record(source_of({"core": rows}, result), *findings.described_numbers(), folder)
    assert json.dumps(again) == json.dumps(result)
    assert source_of({"core": rows}, result).number(["errors", "encodings/sts/differ/share"]).value > 0
    rows["B"]["measured"]["predictions"]["sst"]["values"] = "0"
    assert source_of({"core": rows}, result).number(["errors", "encodings/sts/differ/share"]) is None


def test_the_words_of_sst_are_counted_right():
    """The one measured number of FINDINGS.md that is typed: rows of the training file that contain a word."""
    path = RESULTS.parent.parent / "shared" / "data" / "ids-sst-train.csv"
    if not path.exists():
        pytest.skip("needs the course's data")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    texts = [row["sentence"].lower().split() for row in rows if float(row["sentiment"]) == 3]
    claim = next(claim for claim in CLAIMS if '"great"' in claim["claim"])
    assert f"of {len(texts):,} rows" in claim["claim"]
    assert claim["measured"][0].startswith(f"{sum('great' in words for words in texts)} do. ")
    # the paper's other counts: words in rows labelled 3, then in rows labelled 1
    threes = [sum(word in words for words in texts) for word in ("awesome", "fantastic")]
    texts = [row["sentence"].lower().split() for row in rows if float(row["sentiment"]) == 1]
    ones = [sum(word in words for words in texts) for word in ("horrible", "awful")]
    ones.append(sum(" very bad " in f" {' '.join(words)} " for words in texts))
    assert (threes, ones) == ([0, 1], [2, 7, 0])  # the paper has [0, 0] and [2, 8, 0]
