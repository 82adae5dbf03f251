"""What a run prints and writes at its end, and `--option evaluate` again: scores, exits, predictions, a page.

    close_run      dev scores, early exit with cross-fitted thresholds, prediction files; collects a page's content
    close_sweep    early exit at several thresholds: score against layers and time
    write_page     report.html: the content as JSON inside report_page.html, whose script draws tables and charts

A sweep is written as a CSV and drawn as a PNG.
"""

import base64
import csv
import io
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from bert import attend_plain
from early_exit import FOLDS, UNREACHABLE, ExitInference, candidates, cross_fit, layer_scores, scores_at
from errors import InputError
from evaluation import AtExit, evaluate, mean_norm, predict, predict_exits, write_predictions
from files import write_whole
from parallel import progress_bars, rank
from runs import command_line, damaged, memory_mib

# colours of the tasks, by their position in the run: well apart for colour-blind readers (Okabe and Ito)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ALL_TASKS, FULL_DEPTH, AUTO = "#333333", "#888888", "#b8860b"
# points nearer to each other than these shares of the axes share one label
NEAR_X, NEAR_Y = 0.09, 0.12
TEMPLATE = Path(__file__).with_name("report_page.html")
# a page has this many mistakes of each task, texts in all, and tokens in an attention map
MISTAKES, TEXTS, MAP_TOKENS = 20, 6, 40


# --- the table and the picture of a sweep -------------------------------------------------------------------------


def write_csv(path, rows):
    """Write dicts with the same keys as a CSV; real numbers with six significant digits."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    write_whole(path, table.getvalue())


def label_points(axes, x, y, labels):
    """Write a label below and right of every point, where a rising curve leaves room; neighbours share one label."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    groups = []
    for i in np.argsort(x, kind="stable"):
        for group in groups:
            if abs(x[i] - x[group[0]]) < NEAR_X * (right - left) and abs(y[i] - y[group[0]]) < NEAR_Y * (high - low):
                group.append(i)
                break
        else:
            groups.append([i])
    for group in groups:
        names = [labels[i] for i in group]
        text = ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"
        axes.annotate(text, (x[group[0]], y[group[0]]), (3, -10), textcoords="offset points", fontsize=7.5)


def plot_sweep(path, rows):
    """Draw the rows of `sweep`, a panel row per task: score against mean layers, and against time. Writes a PNG."""
    # imported here, because it would delay the first training step
    from matplotlib.figure import Figure

    rows = [row | {"milliseconds": 1000 / row["examples_per_second"]} for row in rows]
    names = list(dict.fromkeys(row["task"] for row in rows))
    colors = {name: ALL_TASKS if name == "all" else COLORS[k % len(COLORS)] for k, name in enumerate(names)}
    figure = Figure(figsize=(9.5, 2.5 * len(names) + 0.6), layout="constrained")  # inches
    x_labels = {"mean_layers": "mean number of layers", "milliseconds": "milliseconds per example"}
    for name, panels in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        full, *curve, auto = [row for row in rows if row["task"] == name]
        for axes, (key, x_label) in zip(panels, x_labels.items(), strict=True):
            line = axes.axhline(full["score"], color=FULL_DEPTH, linestyle="--", linewidth=1)
            axes.plot(full[key], full["score"], "x", color=FULL_DEPTH)
            x, y = [row[key] for row in curve], [row["score"] for row in curve]
            axes.plot(x, y, "-o", color=colors[name], markersize=4)
            [star] = axes.plot(auto[key], auto["score"], "*", color=AUTO, linestyle="", markersize=9)
            axes.margins(x=0.15, y=0.25)
            axes.autoscale_view()
            axes.set_xlim(left=0)
            label_points(axes, x, y, [row["setting"] for row in curve])
            axes.set_xlabel(x_label)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{name}\n{full['metric']}" if name != "all" else "all tasks\nnorm")
    figure.suptitle("Early exit: dev score against layers and time\npoints: exit thresholds", fontsize=11)
    figure.legend([line, star], ["full depth", "auto"], loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    write_whole(path, lambda out: figure.savefig(out, format="png", dpi=130))


# --- tables -------------------------------------------------------------------------------------------------------


def score_table(tasks, metrics):
    """The lines of a table of dev scores; `metrics` is {task: {metric: number}}."""
    lines = [f"{'task':<18}{'metric':<10}{'dev':>7}{'majority':>10}{'positive':>10}{'macro F1':>10}{'layers':>8}"]
    for name, task in tasks.items():
        columns = [metrics[name].get(key) for key in ("majority", "positive_rate", "macro_f1")]
        cells = "".join(f"{'':>10}" if value is None else f"{value:>10.3f}" for value in columns)
        main, layers = metrics[name][task.metric.name], metrics[name]["mean_layers"]
        lines.append(f"{task.title:<18}{task.metric.name:<10}{main:>7.3f}{cells}{layers:>8.2f}")
    return lines


def exit_table(all_exits, record):
    """The lines of a table of early exit, from the `exits` record of summary.json."""
    depth = len(next(iter(record["shares"].values())))
    row = "{:<18}{:<12}{:>10}{:>12}{:>12}{:>8}{:>8}"
    heading = f"early exit on dev, in {FOLDS} parts: the rows of a part leave by thresholds chosen on the other parts"
    lines = [heading, row.format("task", "leaves by", "threshold", "full depth", "with exits", "layers", "saved")]

    def add(title, policy, threshold, full, left, layers):
        saved = f"{1 - layers / depth:.0%}"
        lines.append(row.format(title, policy, threshold, f"{full:.3f}", f"{left:.3f}", f"{layers:.2f}", saved))

    full, left, layers = (record["cross_fitted"][key] for key in ("full", "exit", "mean_layers"))
    for name, task_exits in all_exits.items():
        threshold = record["thresholds"][name]
        threshold = "never" if threshold == UNREACHABLE else f"{threshold:.4f}"
        add(task_exits.task.title, record["policies"][name], threshold, full[name], left[name], layers[name])
    norm = record["cross_fitted_norm"]
    add("norm, all tasks", "", "", norm["full"], norm["exit"], record["cross_fitted_layers"])
    return lines


# --- the page: each function returns plain data for report_page.html ----------------------------------------------


def describe_run(folder):
    """What was run, and its learning curves: the files of a run folder."""
    with damaged(folder.log_path):
        lines = folder.log_path.read_text().splitlines(keepends=True) if folder.log_path.exists() else []
        # a killed run may leave half a line
        log = [json.loads(line) for line in lines if line.endswith("\n")]
    about = {"title": f"Run {folder.path}", "written_by": command_line()}
    return about | {"run": folder.config(), "summary": folder.read_summary(), "log": log}


def describe_task(data):
    """A task's name, number of usable rows, labels and metric. The labels of a regression have no names."""
    task, metric = data.task, data.task.metric
    about = {"title": task.title, "rows": len(data.usable), "labels": task.label_names}
    return about | {"metric": metric.name, "low": metric.low, "high": metric.high}


def constant_score(predictions):
    """The score if every row had the same prediction: the most frequent class, or the mean of a regression."""
    task, labels = predictions.data.task, predictions.data.labels[predictions.rows]
    constant = labels.mean() if task.is_regression else np.bincount(labels.astype(int)).argmax()
    return task.metric.function(np.full_like(labels, constant), labels)


def threshold_curves(all_exits, record):
    """What leaving at each threshold gives, for the page's sliders: {task: a list of dicts, lowest threshold first}."""
    curves = {}
    for name, task_exits in all_exits.items():
        policy = record["policies"][name]
        thresholds = np.union1d(candidates(task_exits, policy)[0], record["thresholds"][name])
        results = [scores_at(task_exits, policy, threshold) for threshold in thresholds]
        curves[name] = [
            {"threshold": threshold, "score": x.score, "layers": x.mean_layers, "shares": x.shares.tolist()}
            for threshold, x in zip(thresholds.tolist(), results, strict=True)
        ]
    return curves


def rank_mistakes(predictions):
    """How bad each prediction is, and the positions from the worst to the best. Shapes: [n], [n].

    A mistake of a classification is as bad as its probability, one of a regression as its error; a right class is 0.
    """
    badness = np.abs(predictions.values - predictions.data.labels[predictions.rows])
    if predictions.probabilities is not None:
        # of the predicted class, which a decision threshold may have chosen
        chosen = predictions.probabilities[np.arange(len(badness)), predictions.values.astype(int)]
        badness = np.where(badness > 0, chosen, 0.0)
    return badness, np.argsort(-badness, kind="stable")


def describe_row(predictions, i):
    """Prediction i with its texts. A text without a label has None."""
    data, row = predictions.data, predictions.rows[i]
    return {
        "id": data.identifier(row),
        "texts": data.text(row),
        "label": None if np.isnan(data.labels[row]) else float(data.labels[row]),
        "prediction": float(predictions.values[i]),
        "layers": int(predictions.layers[i]),
    }


def read_attention(model, batch, exits):
    """Run the model on one row and keep the attention's weights.

    A fused kernel does not show its weights, so the layers run attend_plain. Layers that --compile translated run as
    they are written, because to translate them again would take longer than the rest of the page. Without --compile
    torch._dynamo is not loaded, and to load it takes seconds.
    Shapes: returns Outputs and, for each layer and in it for each encoder pass, [h,s,s].
    """
    maps, layers = [], [layer.self_attention for layer in model.bert.bert_layers]
    usual, was_training = layers[0].attend, model.training

    def keep(weights):
        maps.append(weights[0].float().cpu())  # [b,h,s,s] to [h,s,s]
        return weights

    def attend(query, key, value, extended_mask, dropout):
        # `keep` stands in the place of dropout, which changes nothing in evaluation
        return attend_plain(query, key, value, extended_mask, keep)

    model.eval()
    try:
        for layer in layers:
            layer.attend = attend
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            return model(batch, exits=exits), maps
    finally:
        for layer in layers:
            layer.attend = usual
        model.train(was_training)


@torch.no_grad()
def explain(model, predictions, i, autocast):
    """Prediction i, what every exit predicts for it, and the attention weights of every layer, head and encoder pass.

    The weights are bytes in base64, [L,h,s,s] for the first MAP_TOKENS tokens, and 255 stands for a weight of 1.
    """
    data, task = predictions.data.with_features(None), predictions.data.task
    batch = data.batch(predictions.rows[[i]]).to(next(model.parameters()).device)
    exits = tuple(range(1, model.depth + 1)) if len(model.lte) else (model.depth,)
    with autocast():
        outputs, maps = read_attention(model, batch, exits)
        lte = {j: float(model.lte[task.name].certainty(outputs.states[j])) for j in exits if len(model.lte)}
    rows, passes, count = [], [], len(maps) // model.depth
    for j in exits:
        values, probabilities = task.objective.decode(outputs.logits[j].float(), model.decision_threshold(task.name))
        probabilities = None if probabilities is None else probabilities[0].tolist()
        rows.append({"layer": j, "prediction": float(values), "probabilities": probabilities, "lte": lte.get(j)})
    # siamese pairs have a pass for each text; the segments of other rows are one sequence
    ids = [segment[0][0].tolist() for segment in batch.segments]
    for k, tokens in enumerate(ids if count > 1 else [sum(ids, [])]):
        weights = torch.stack(maps[k::count])[..., :MAP_TOKENS, :MAP_TOKENS]  # [L,h,s,s]
        encoded = base64.b64encode((255 * weights).round().to(torch.uint8).numpy()).decode()
        shown = [data.tokenizer.tokens[token] for token in tokens[:MAP_TOKENS]]
        sizes = {"layers": model.depth, "heads": weights.shape[1], "total": len(tokens)}
        passes.append({"tokens": shown, **sizes, "weights": encoded})
    return describe_row(predictions, i) | {"task": task.name, "exits": rows, "passes": passes}


def describe_predictions(model, predictions, autocast):
    """The tasks and their mistakes, and a few rows explained, from the worst prediction to the best."""
    mistakes, sentences, count = {}, [], max(1, TEXTS // len(predictions))
    for name, predicted in predictions.items():
        badness, order = rank_mistakes(predicted)
        wrong = [i for i in order[:MISTAKES] if badness[i] > 0]
        mistakes[name] = [describe_row(predicted, i) | {"badness": float(badness[i])} for i in wrong]
        picked = order[np.unique(np.linspace(0, len(order) - 1, count).astype(int))]
        sentences += [explain(model, predicted, i, autocast) for i in picked]
    tasks = {name: describe_task(predicted.data) for name, predicted in predictions.items()}
    constant = {name: constant_score(predicted) for name, predicted in predictions.items()}
    return {"tasks": tasks, "constant": constant, "mistakes": mistakes, "sentences": sentences}


def describe_texts(model, predictions, autocast):
    """The page of predict.py: the first texts explained."""
    explained = [explain(model, predictions, i, autocast) for i in range(len(predictions.rows))[:TEXTS]]
    tasks = {predictions.data.task.name: describe_task(predictions.data)}
    title = {"title": f"Predictions: {predictions.data.task.title}", "written_by": command_line()}
    return title | {"tasks": tasks, "texts": len(predictions.rows), "sentences": explained}


def write_page(path, page):
    """Write a page that a browser shows without a network. `page` is plain data."""
    # JSON has no NaN: it becomes null
    page = json.loads(json.dumps(page), parse_constant=lambda name: None)
    # no text can end the script element, because a "<" of a text becomes \\u003c
    content = json.dumps(page, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")
    write_whole(path, TEMPLATE.read_text(encoding="utf-8").replace("{{page}}", content))


# --- the end of a run ---------------------------------------------------------------------------------------------


def score_exits(tasks, all_exits, settings):
    """Choose the thresholds that a run keeps, and score early exit with cross-fitted ones: for summary.json.

    `all_exits` is {task: AllExits} of dev.
    """
    thresholds, held_out = settings.complete(all_exits), cross_fit(all_exits, settings)
    policies = settings.policies
    results = {name: scores_at(task_exits, policies[name], held_out[name]) for name, task_exits in all_exits.items()}
    kept = {name: scores_at(task_exits, policies[name], thresholds[name]) for name, task_exits in all_exits.items()}
    by_layer = {name: layer_scores(task_exits).tolist() for name, task_exits in all_exits.items()}
    full = {name: scores[-1] for name, scores in by_layer.items()}
    left = {name: result.score for name, result in results.items()}
    layers = {name: result.mean_layers for name, result in results.items()}
    return {
        "policies": policies,
        "thresholds": thresholds,
        "cross_fitted": {"full": full, "exit": left, "mean_layers": layers},
        "cross_fitted_norm": {"full": mean_norm(tasks, full), "exit": mean_norm(tasks, left)},
        "cross_fitted_layers": sum(layers.values()) / len(layers),
        "shares": {name: result.shares.tolist() for name, result in kept.items()},
        "layer_scores": by_layer,
    }


def close_run(parts, folder, known=None):
    """Score the model on dev, with exits too where there are settings; write predictions into `folder`.

    `parts` are building.Parts. `known` is the result of `evaluate` for this model, if there is one. A run with exits
    evaluates again, in order to measure the time.
    Returns the content of a page, in it `scores` and `exits` (None without settings) as summary.json holds them.
    """
    model, dev, settings, options = parts.model, parts.dev(), parts.exit_settings, parts.inference()
    started = time.perf_counter()
    scores, predictions = known if known and not settings else evaluate(model, dev, **options)
    seconds, infer, exit_record, curves = time.perf_counter() - started, AtExit(), None, None
    for warning in scores.warnings:
        print(f"warning: {warning}")
    print("\n".join(score_table(model.tasks, scores.tasks)))
    print(f"raw {scores.raw:.4f}   norm {scores.norm:.4f}")
    if settings:
        all_exits = {name: predict_exits(model, data, **options) for name, data in dev.items()}
        exit_record = score_exits(model.tasks, all_exits, settings)
        print("\n".join(exit_table(all_exits, exit_record)))
        curves = threshold_curves(all_exits, exit_record)
        infer = ExitInference(settings.policies, exit_record["thresholds"])
        started = time.perf_counter()
        left, predictions = evaluate(model, dev, infer=infer, **options)
        exit_record |= {"dev": left.record(), "seconds": {"full": seconds, "exit": time.perf_counter() - started}}
        print(f"seconds for dev: {seconds:.1f} at full depth, {exit_record['seconds']['exit']:.1f} with exits")
    for name, splits in parts.data.items():
        for split in ("dev", "test"):
            predicted = predictions[name] if split == "dev" else None
            # rows without a label or with an empty text are predicted, but not scored
            if predicted is None or len(predicted.rows) < len(splits[split]):
                predicted = predict(model, splits[split], infer=infer, show_bar=progress_bars(), **options)
            write_predictions(folder / "predictions", predicted, split)
    print(f"predictions: {folder / 'predictions'}")
    page = describe_predictions(model, predictions, options["autocast"])
    return page | {"scores": scores.record(), "exits": exit_record, "curves": curves}


def copy_predictions(folder, outputs):
    """Copy prediction files of a run; `outputs` has entries such as "sst-dev=FILE", from the flag --sst_dev_out."""
    for key, _, path in (entry.partition("=") for entry in outputs or ()):
        source = Path(folder) / "predictions" / f"{key}-output.csv"
        if not (source.exists() or rank()):
            raise InputError(f"--{key.replace('-', '_')}_out: there is no {source}: the run has no such task or data")
        # a function, since only the first process has the file
        write_whole(path, lambda out, source=source: out.write(source.read_bytes()))


def finish(parts, recorder):
    """Evaluate the best model, write its predictions, the summary and report.html."""
    folder, history = recorder.folder, recorder.history
    folder.load_best(parts.model)
    print(f"\nbest model: {history.best_phase} (last phase: norm {history.last_scores['norm']:.4f})")
    started = time.monotonic()
    page = close_run(parts, folder.path, recorder.best_evaluation)
    exit_record = page["exits"]
    counted = exit_record["dev"] if exit_record else page["scores"]
    summary = {
        "best": {"phase": history.best_phase, **page["scores"]},
        "last": history.last_scores,
        "phase_norms": history.scores,
        "steps": history.total_steps,
        "train_seconds": round(history.train_seconds, 3),
        "eval_seconds": round(history.eval_seconds, 3),
        "finish_seconds": round(time.monotonic() - started, 1),
        "mean_layers": float(np.mean([metrics["mean_layers"] for metrics in counted["tasks"].values()])),
        "peak_mib": round(memory_mib(parts.precision.device)),
        "exits": exit_record,
    }
    folder.summary(summary)
    write_page(folder.path / "report.html", describe_run(folder) | page)
    print(f"minutes: training {history.train_seconds / 60:.1f}, evaluation {history.eval_seconds / 60:.1f}")
    print(f"page: {folder.path / 'report.html'}")
    folder.remove_last()


# --- the sweep ----------------------------------------------------------------------------------------------------


def sweep_rows(label, thresholds, all_exits, policies, seconds):
    """The rows of one setting of the thresholds: a dict per task, and one for all tasks.

    `thresholds` is {task: number, or [n]}; `seconds` is {task: time that the real run took}.
    """
    rows = []
    for name, task_exits in all_exits.items():
        result = scores_at(task_exits, policies[name], thresholds[name])
        threshold = float(np.mean(thresholds[name]))
        row = {"setting": label, "task": name, "policy": policies[name], "threshold": threshold}
        row |= {"metric": task_exits.task.metric.name, "score": result.score, "mean_layers": result.mean_layers}
        row |= {"examples_per_second": len(task_exits.rows) / seconds[name]}
        rows.append(row | {f"exit_{i}": float(share) for i, share in enumerate(result.shares, start=1)})
    total = {"setting": label, "task": "all", "policy": "", "threshold": "", "metric": "norm"}
    tasks = {name: task_exits.task for name, task_exits in all_exits.items()}
    total |= {"score": mean_norm(tasks, {row["task"]: row["score"] for row in rows})}
    count = sum(len(task_exits.rows) for task_exits in all_exits.values())
    total |= {"examples_per_second": count / sum(seconds.values())}
    # the other columns are averaged over the tasks
    total |= {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in total}
    return [*rows, total]


def sweep(model, datasets, settings, levels, options):
    """Score and time early exit at several thresholds: full depth, then each level for all tasks, then `auto`.

    `auto` is the choice of the settings: cross-fitted for the scores, chosen on all of dev for the time.
    Scores and layers come from one full pass, the time from a real run of the same rows. Returns a list of dicts.
    """
    all_exits = {name: predict_exits(model, data, **options) for name, data in datasets.items()}
    points = {"full depth": dict.fromkeys(datasets, UNREACHABLE)}
    points |= {f"{level:g}": dict.fromkeys(datasets, level) for level in levels}
    points["auto"] = settings.complete(all_exits)
    rows = []
    for label, thresholds in points.items():
        infer = AtExit() if label == "full depth" else ExitInference(settings.policies, thresholds)
        seconds = {}
        for name, data in datasets.items():
            started = time.perf_counter()
            predict(model, data, all_exits[name].rows, infer=infer, **options)
            seconds[name] = time.perf_counter() - started
        scored = cross_fit(all_exits, settings) if label == "auto" else thresholds
        rows += sweep_rows(label, scored, all_exits, settings.policies, seconds)
    return rows


def close_sweep(parts, folder, levels):
    """Sweep the exit threshold of all tasks over `levels`; write the CSV and the picture, and print the table."""
    rows = sweep(parts.model, parts.dev(), parts.exit_settings, levels, parts.inference())
    write_csv(folder / "sweep.csv", rows)
    plot_sweep(folder / "sweep.png", rows)
    print(f"{'threshold':<12}{'norm':>8}{'layers':>8}{'ex/s':>8}")
    for row in rows:
        if row["task"] == "all":
            norm, layers, speed = row["score"], row["mean_layers"], row["examples_per_second"]
            print(f"{row['setting']:<12}{norm:>8.4f}{layers:>8.2f}{speed:>8.0f}")
    print(f"sweep: {folder / 'sweep.csv'}, {folder / 'sweep.png'}")
