"""What a finished run does not record itself: measured from the saved model, so that its folder may go afterwards.

    python -m lab.measure RUN --data_dir DIR      writes RUN/measured.json

    predictions    of the dev rows that can be scored, in the order of the file, as short arrays without texts or labels
    train_scores   the metrics on some rows to train on; a run of less than an epoch has not seen all of them
    compute        the layer passes of the training: forward counts 1, backward 2, per layer and token
    exits          what leaving early scores: for fixed thresholds, for chosen ones, and for an oracle

One full pass stores the prediction and the certainties of every exit for every dev row. All scores of early exit are
computed from that pass. They cost no further pass, and there is no noise between them.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import building
from early_exit import (
    UNREACHABLE,
    choose_policies,
    choose_thresholds,
    cross_fit,
    first_exit,
    layer_scores,
    scores_at,
)
from errors import run_script
from evaluation import evaluate, mean_norm, predict, predict_exits, score
from files import write_whole
from multitask_classifier import load_run, send, set_trainable
from runs import RunFolder

# the dev score of the training rows is measured on at most this many rows of each task
TRAIN_ROWS = 1000
# thresholds for the confidence; those for learning to exit are quantiles of its own certainties
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, *(round(0.9 + k / 100, 2) for k in range(10)), 0.999)
QUANTILES = np.linspace(0, 1, 21)
# shares of the norm that the chosen thresholds may lose on the rows that choose them
ALLOWED = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)


def digits(values, is_list):
    """Values as a short array: a list, or a string with a digit for each of the classes or layers."""
    return [round(float(v), 2) for v in values] if is_list else "".join(str(int(v)) for v in values)


# --- the cost of the training -------------------------------------------------------------------------------------


def layer_passes(model, phase, allowed):
    """Layer passes of a phase per example: (forward, backward).

    Forward runs to the deepest exit of the phase. Backward runs from there down to the lowest layer that trains.
    """
    deepest = np.mean([max(weights) for weights in phase.exit_weights])
    names = set_trainable(model, phase, allowed)
    layers = [int(name.split(".")[2]) for name in names if name.startswith(("bert.bert_layers.", "adapters.layers."))]
    if any(name.startswith("bert.") and "embedding" in name for name in names):
        layers.append(0)
    return deepest, max(0, deepest - min(layers)) if layers else 0


def training_cost(flags, model, norms):
    """The layer passes of a run per example of an epoch; forward counts 1, backward 2. `norms` are its dev scores.

    Units: passes over the full depth, forward and backward, in epochs: plain training for 2 epochs costs 2.
    Only the plan counts: a method's own passes (SMART) do not.
    """
    _, allowed = building.build_trainable(flags, model)
    plan = building.build_plan(flags, model.depth)()
    phase, total = next(plan), 0.0
    for norm in norms:
        forward, backward = layer_passes(model, phase, allowed)
        total += phase.fraction * (forward + 2 * backward)
        phase = send(plan, norm)
    return total / (3 * model.depth)


# --- early exit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllowedLoss:
    """Exit settings that choose all thresholds so that the norm loses at most a share of itself."""

    policies: dict
    allowed: float

    def complete(self, exits):
        """The chosen thresholds, {task: threshold}."""
        return choose_thresholds(exits, self.policies, self.allowed)


def describe(result):
    """What one setting of a task's threshold gives, as plain data."""
    shares = [round(float(share), 4) for share in result.shares]
    return {"score": round(result.score, 5), "layers": round(result.mean_layers, 4), "shares": shares}


def threshold_curve(exits, policy):
    """Score and layers of one task at many thresholds, lowest first."""
    levels = LEVELS
    if policy == "lte":
        levels = np.unique(np.quantile(exits.lte[:, :-1], QUANTILES))
    levels = (*levels, UNREACHABLE)
    return [{"threshold": round(float(t), 5)} | describe(scores_at(exits, policy, t)) for t in levels]


def oracle_layers(exits):
    """The first exit that no other exit beats, for each row. Shapes: [n].

    An exit is as good as its prediction is near the label; classes are right or wrong. If no exit is right, the row
    leaves at exit 1, because the deeper exits are no better.
    """
    labels = exits.labels[:, None]  # [n,1]
    error = np.abs(exits.values - labels) if exits.task.is_regression else exits.values != labels  # [n,L]
    return error.argmin(1) + 1  # argmin returns the first smallest


def score_oracle(exits):
    """The score of the oracle, and its layers."""
    layers = oracle_layers(exits)
    values = np.take_along_axis(exits.values, layers[:, None] - 1, axis=1)[:, 0]  # [n]
    shares = np.bincount(layers, minlength=exits.values.shape[1] + 1)[1:] / len(layers)
    result = {"score": round(exits.task.metric.function(values, exits.labels), 5), "layers": float(layers.mean())}
    return result | {"shares": [round(float(share), 4) for share in shares]}


def chosen_points(exits, tasks):
    """Score and layers with chosen thresholds, for several allowed losses; each row's part of dev had no say.

    Returns {kind of certainty: [{allowed, norm, layers, tasks: {task: {score, layers, shares}}}]}.
    """
    points = {}
    for policy in ("auto", "lte"):
        policies, points[policy] = choose_policies(tasks, policy), []
        for allowed in ALLOWED:
            thresholds = cross_fit(exits, AllowedLoss(policies, allowed))
            results = {name: scores_at(exits[name], policies[name], thresholds[name]) for name in tasks}
            norm = mean_norm(tasks, {name: result.score for name, result in results.items()})
            layers = float(np.mean([result.mean_layers for result in results.values()]))
            described = {name: describe(result) for name, result in results.items()}
            points[policy].append({"allowed": allowed, "norm": norm, "layers": layers, "tasks": described})
    return points


def measure_exits(exits, settings):
    """Everything about the exits of a run. `settings` are those of the run, or None where it cannot leave early."""
    tasks = {name: task_exits.task for name, task_exits in exits.items()}
    result = {"layer_scores": {name: layer_scores(one).round(5).tolist() for name, one in exits.items()}}
    result["oracle"] = {name: score_oracle(one) for name, one in exits.items()}
    if not settings:
        return result
    result["curves"] = {}
    for name, task in tasks.items():
        policies = ("lte",) if task.is_regression else ("confidence", "lte")
        result["curves"][name] = {policy: threshold_curve(exits[name], policy) for policy in policies}
    return result | {"chosen": chosen_points(exits, tasks)}


def leaving(exits, settings):
    """Where each dev row leaves with thresholds that its part of dev did not choose, and what is predicted there."""
    thresholds, result = cross_fit(exits, settings), {}
    for name, one in exits.items():
        layers = first_exit(one.certainty(settings.policies[name]), thresholds[name])  # [n]
        values = np.take_along_axis(one.values, layers[:, None] - 1, axis=1)[:, 0]
        result[name] = {"left": digits(layers, layers.max() > 9), "left_values": digits(values, one.task.is_regression)}
    return result


# --- the program --------------------------------------------------------------------------------------------------


def measure(path, data_dir):
    """Measure a saved run. Returns what measured.json holds."""
    changes = {"data_dir": data_dir} if data_dir else {}
    run, folder = load_run(path, torch.device("cpu"), changes), RunFolder(path)
    data, _, _ = building.read_data(run.flags, run.model.tasks, run.tokenizer)
    flags = run.flags | {"option": "finetune", "compile": False}
    parts = building.build(flags, run.model, data, torch.device("cpu"), {})
    options, settings = parts.inference(), parts.exit_settings
    _, trained = building.build_trainable(run.flags, run.model)
    sizes = {name: parameter.numel() for name, parameter in run.model.named_parameters()}
    result = {"parameters": sum(sizes.values()), "trained": sum(sizes[name] for name in trained)}
    if len(run.model.exits):
        exits = {name: predict_exits(run.model, dataset, **options) for name, dataset in parts.dev().items()}
        values = {name: one.values[:, -1] for name, one in exits.items()}
        result["exits"] = measure_exits(exits, settings)
    else:
        _, predictions = evaluate(run.model, parts.dev(), **options)
        values, settings = {name: one.values for name, one in predictions.items()}, None
    tasks = run.model.tasks
    result["predictions"] = {name: {"values": digits(v, tasks[name].is_regression)} for name, v in values.items()}
    for name, more in (leaving(exits, settings) if settings else {}).items():
        result["predictions"][name] |= more
    result["train_scores"] = {}
    for name, rows in parts.rows.items():
        seen = predict(run.model, data[name]["train"], rows[:: max(1, len(rows) // TRAIN_ROWS)][:TRAIN_ROWS], **options)
        result["train_scores"][name] = round(score(seen)[0][tasks[name].metric.name], 5)
    norms = folder.read_summary()["phase_norms"]
    return result | {"compute": training_cost(run.flags, run.model, norms)}


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the directory of a finished run")
    parser.add_argument("--data_dir", help="folder of the course's data; default: that of the run")
    return parser


def main(argv=None):
    """Measure a run and write measured.json into its directory."""
    args = make_parser().parse_args(argv)
    write_whole(args.run / "measured.json", json.dumps(measure(args.run, args.data_dir)))


if __name__ == "__main__":
    run_script(main)
