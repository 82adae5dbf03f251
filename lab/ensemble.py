"""An ensemble of finished runs: the mean of their probabilities, scored and compared with its members.

    python -m lab.ensemble best-recipe-seed-1 best-recipe-seed-2 --run_dir runs/experiments/score/ensemble

The members are folders beside --run_dir. Each model predicts on its own. The ensemble's probability of a class is the
mean of the models' probabilities, and its value of a regression the mean of their values. It writes the files of an
ordinary run: config.json, predictions/ of dev and of the held-out test rows, summary.json, and measured.json, where a
paired bootstrap over the dev rows compares it with each member and with their mean.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import building
from errors import InputError, run_script
from evaluation import predict, score, summarise, write_predictions
from files import write_whole
from lab.compare import compare
from lab.measure import digits
from multitask_classifier import load_run
from runs import RunFolder, describe_environment, memory_mib


def predict_member(path, data_dir):
    """The predictions of one run: {(task, split): Predictions} of dev's usable rows and of all test rows."""
    run = load_run(path, torch.device("cpu"), {"data_dir": data_dir} if data_dir else {})
    data, _, _ = building.read_data(run.flags, run.model.tasks, run.tokenizer, ("dev", "test"))
    autocast = building.make_autocast(run.flags["precision"], torch.device("cpu"))
    options = {"batch_size": run.flags["eval_batch_size"], "autocast": autocast}
    predictions = {}
    for name, splits in data.items():
        predictions[name, "dev"] = predict(run.model, splits["dev"], splits["dev"].usable, **options)
        predictions[name, "test"] = predict(run.model, splits["test"], **options)
    return predictions


def average(members):
    """The ensemble's Predictions from those of its members, for the same rows."""
    first = members[0]
    if first.probabilities is None:
        return replace(first, values=np.mean([member.values for member in members], axis=0))
    probabilities = np.mean([member.probabilities for member in members], axis=0)  # [n,classes]
    return replace(first, probabilities=probabilities, values=probabilities.argmax(1))


def write_ensemble(names, folder, data_dir):
    """Predict with all members, and write the files of a run."""
    paths, started = [folder.parent / name for name in names], time.monotonic()
    for path in paths:
        if not (path / "summary.json").exists():
            raise InputError(f"{path}: no finished run: train the ensemble's members first")
    config = RunFolder(paths[0]).config()
    members = [predict_member(path, data_dir) for path in paths]
    ensemble = {key: average([member[key] for member in members]) for key in members[0]}
    dev = {name: predictions for (name, split), predictions in ensemble.items() if split == "dev"}
    tasks = {name: predictions.data.task for name, predictions in dev.items()}
    scores = summarise(tasks, {name: score(predictions)[0] for name, predictions in dev.items()}, [])
    for (_, split), predictions in ensemble.items():
        write_predictions(folder / "predictions", predictions, split)
    record = {key: config[key] for key in ("weights", "data")} | describe_environment(torch.device("cpu"))
    write_whole(folder / "config.json", json.dumps(record | {"flags": {"members": names, "seed": None}}))
    arrays = {name: {"values": digits(one.values, tasks[name].is_regression)} for name, one in dev.items()}
    labels = {name: one.data.labels[one.rows] for name, one in dev.items()}
    ours = {name: one.values[:, None] for name, one in dev.items()}
    # [n,runs]
    others = {name: np.stack([member[name, "dev"].values for member in members], axis=1) for name in dev}
    against = {
        member: compare(ours, {name: values[:, [k]] for name, values in others.items()}, labels)
        for k, member in enumerate(names)
    }
    measured = {"predictions": arrays, "against": against | {"their mean": compare(ours, others, labels)}}
    write_whole(folder / "measured.json", json.dumps(measured))
    both, seconds = scores.record(), round(time.monotonic() - started, 1)
    numbers = {"train_seconds": 0.0, "eval_seconds": seconds, "peak_mib": round(memory_mib(torch.device("cpu")))}
    RunFolder(folder).summary({"best": both, "last": both, "phase_norms": [scores.norm], "steps": 0} | numbers)


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.ensemble", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("members", nargs="+", help="names of the folders of finished runs, beside --run_dir")
    parser.add_argument("--run_dir", type=Path, required=True, help="where the ensemble's files go")
    parser.add_argument("--data_dir", help="folder of the course's data; default: that of each run")
    return parser


def main(argv=None):
    """Write an ensemble's files."""
    args = make_parser().parse_args(argv)
    write_ensemble(args.members, args.run_dir, args.data_dir)


if __name__ == "__main__":
    run_script(main)
