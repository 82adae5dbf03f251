"""Comparing rows by paired bootstrap over the dev rows (bootstrap.py): with transformers, and with a table's baseline.

The labels are not in this repository. So a comparison is computed where the data are, and its result is recorded with
the row.
"""

import csv

import numpy as np

from datasets import find_data_dir, read_dataset
from lab.bootstrap import METRICS, paired_bootstrap
from lab.rows import GROUPS, slug, split_name
from tasks import build_tasks
from tokenizer import BertTokenizer
from weights import find_weights

# --- with transformers ----------------------------------------------------------------------------------------------


def read_predictions(folder, task):
    """A run's dev predictions of one task, from the file in the course's format: {id: value}."""
    lines = (folder / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
    return {key.strip(): float(value) for key, value in (line.split(",") for line in lines)}


def read_labels(folder, task):
    """The dev labels of one task, from the readable predictions: {id: label}."""
    with open(folder / "predictions" / f"{task.name}-dev-readable.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: float(row["gold"]) for row in csv.DictReader(file) if row["gold"]}


def compare_runs(ours, others):
    """Compare the mean norm of some runs with that of others, by paired bootstrap over the dev rows.

    Each run counts with the predictions of its best epoch.
    """
    parts = []
    for task in build_tasks().values():
        labels = read_labels(ours[0], task)
        predictions = [read_predictions(folder, task) for folder in (*ours, *others)]
        values = np.array([[of_run[key] for of_run in predictions] for key in labels])  # [rows, runs]

        def mean_norm(values, gold, task=task):
            return task.metric.normalise(METRICS[task.metric.name](values, gold)).mean()

        first, second = np.split(values, [len(ours)], axis=1)
        parts.append((first, second, np.array(list(labels.values())), mean_norm))
    difference, (low, high), not_better = paired_bootstrap(parts)
    return {"difference": difference, "low": low, "high": high, "not_better": not_better}


def compare_seeds(rows, runs):
    """Compare recipes that were run with several seeds with the mean of all seeds of transformers.

    Every seed is compared on its own, then the mean of a recipe's seeds. A recipe without its runs' predictions keeps
    the comparison that is recorded.
    """
    recipes = {}
    for row in rows:
        recipe, seed, _ = row["name"].partition(", seed ")
        if seed:
            recipes.setdefault(recipe, []).append(row)
    others = [runs / slug(row["name"]) for row in recipes.pop("transformers", ())]
    for mine in recipes.values() if others else ():
        folders = [runs / slug(row["name"]) for row in mine]
        if not all((folder / "predictions").is_dir() for folder in (*folders, *others)):
            continue
        for row, folder in zip(mine, folders, strict=True):
            row["against_peer"] = compare_runs([folder], others)
        if len(mine) > 1:
            mine[-1]["mean_against_peer"] = compare_runs(folders, others) | {"runs": len(mine)}


# --- with a table's baseline --------------------------------------------------------------------------------------


def dev_labels(data_dir):
    """The dev labels that are scored, in the order of the files: {task: [n]}."""
    tasks, tokenizer = build_tasks(), BertTokenizer.from_pretrained(find_weights("minilm"))
    folder, _ = find_data_dir(data_dir, [task.file("dev") for task in tasks.values()])
    data = {name: read_dataset(task, folder / task.file("dev"), tokenizer) for name, task in tasks.items()}
    return {name: one.labels[one.usable] for name, one in data.items()}


def predictions_of(row):
    """The recorded dev predictions of a row: {task: [n]}."""
    arrays = (row["measured"] or {}).get("predictions", {})
    return {name: np.array([float(value) for value in one["values"]]) for name, one in arrays.items()}


def baseline_of(group, name):
    """The recipe that a recipe is compared with, or None: its group's baseline, of its own block if it has one."""
    block, recipe, _ = split_name(name)
    if not GROUPS[group].baseline:
        return None
    in_block = f"{block}: {GROUPS[group].baseline}" if block else GROUPS[group].baseline
    base = in_block if in_block in GROUPS[group].rows else GROUPS[group].baseline
    return None if base == (f"{block}: {recipe}" if block else recipe) else base


def difference(ours, others, labels):
    """The mean norm of some rows minus that of other rows, on the tasks that all of them have; None without any."""
    sides, parts = [list(map(predictions_of, rows)) for rows in (ours, others)], []
    shared = set.intersection(*(set(one) for side in sides for one in side)) & set(labels)
    for name, task in build_tasks().items():
        lengths = {len(one[name]) for side in sides for one in side} if name in shared else set()
        if lengths != {len(labels.get(name, ()))}:
            continue

        def mean_norm(values, gold, task=task):
            return task.metric.normalise(METRICS[task.metric.name](values, gold)).mean()

        first, second = (np.stack([one[name] for one in side], axis=1) for side in sides)  # [n,runs]
        parts.append((first, second, labels[name], mean_norm))
    if not parts:
        return None
    gain, (low, high), not_better = paired_bootstrap(parts)
    return {"difference": gain, "low": low, "high": high, "not_better": not_better, "tasks": len(parts)}


def recipes_of(rows):
    """Rows that differ in the seed alone, under the name of the first: {recipe: [row, ...]}."""
    recipes = {}
    for row in rows:
        block, recipe, _ = split_name(row["name"])
        recipes.setdefault(f"{block}: {recipe}" if block else recipe, []).append(row)
    return recipes


def compare_with_baseline(group, rows, data_dir):
    """Record in the first row of each recipe how its seeds' mean norm compares with that of the baseline's seeds.

    A comparison is computed again only where other runs stand behind it.
    """
    recipes, labels = recipes_of(rows), None
    for name, mine in recipes.items():
        others = recipes.get(baseline_of(group, name))
        if not others or not all(map(predictions_of, [*mine, *others])):
            continue
        runs = [row["started"] for row in (*mine, *others)]
        if mine[0].get("against_baseline", {}).get("runs") != runs:
            labels = labels or dev_labels(data_dir)
            if result := difference(mine, others, labels):
                mine[0]["against_baseline"] = {"baseline": others[0]["name"], "runs": runs} | result
