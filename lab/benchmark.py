"""How fast this code is, beside transformers and torch.optim.

    python -m lab.benchmark                                  every part, on the CPU
    python -m lab.benchmark step optimizer --use_gpu         two parts, on the GPU
    python -m lab.benchmark exit --run_dir runs/NAME         early exit of a model trained with --early_exit

Each function `benchmark_NAME` below measures one part and returns Measurements: a table, goals and notes. The variants
of a table take turns, so each round gives one ratio of a variant's cost to ours; the table shows the median of the
rounds with the lowest and the highest. A line below the table compares each goal of the project with these rounds.

Both sides have the same examples, heads, losses, schedule, clipping, precision and number of threads: workloads.py
makes the examples, ours.py and variants.py the steps and epochs, peer.py is the recipe with transformers, timing.py has
the clocks and the arithmetic. The share of the matrix peak counts multiplications and additions on real tokens only,
because whoever pads less works on fewer numbers. The peak itself is measured: the best of several matrix products.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

# first: it prints what to do if torch is not installed
import multitask_classifier  # isort: skip  # noqa: F401
import numpy as np
import torch
from torch import nn

from base_bert import BertConfig
from bert import BertModel
from datasets import SPLITS, find_data_dir, read_dataset
from errors import InputError, run_script
from evaluation import score, summarise
from lab import timing
from lab.ours import (
    FIRST_STEP,
    PROFILED,
    compile_model,
    flag_words,
    our_epoch,
    our_evaluate,
    our_parts,
    our_predict,
    our_step,
    prepare_process,
    saving_calls,
    stage_one_phases,
    trained_exits,
    untrained_exits,
)
from lab.peer import EVAL_BATCH, MAX_LENGTH, WEIGHT_DECAY, cut, import_transformers
from lab.timing import Goal, Measurements, compare, goals_against, in_fresh_process, measure, timed
from lab.variants import EPOCHS, peer_evaluate, peer_model, step_variants
from lab.workloads import (
    GPU_SIZES,
    HERE,
    LEARNING_RATE,
    PRECISIONS,
    QUICK_SIZES,
    RANDOM_WEIGHTS,
    SEED,
    TRAIN_BATCH,
    Setup,
    Sizes,
    draw_rows,
    launch,
    layer_flop,
    prepare_weights,
    read_peer,
    read_split,
    real_batch,
    write_course_file,
    write_subset,
)
from methods import positive_int
from optimizer import AdamW, parameter_groups
from runs import RunFolder, describe_environment
from tasks import build_tasks
from tokenizer import BertTokenizer

# --- the parts ----------------------------------------------------------------------------------------------------


def tokenizer_calls(ours, fast, texts):
    """The ways to tokenise texts that are compared: {setting: {variant: function}}."""
    batches = cut(texts, TRAIN_BATCH)

    def encode_cold():
        cold = BertTokenizer(ours.vocab, ours.do_lower_case)
        return [cold.encode(text) for text in texts]

    def fast_batches():
        options = dict(padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return [fast(batch, **options) for batch in batches]

    def fast_at_once(parallel="false"):
        with patch.dict(os.environ, TOKENIZERS_PARALLELISM=parallel):
            return fast(texts, add_special_tokens=False)["input_ids"]

    if [ours.encode(text) for text in texts] != fast_at_once():
        raise RuntimeError("the tokenizers disagree: run tests/test_tokenizer.py")
    return {
        "texts to ids": {
            "ours": lambda: [ours.encode(text) for text in texts],
            "ours, empty cache": encode_cold,
            "transformers, one by one": lambda: [fast.encode(text, add_special_tokens=False) for text in texts],
            "transformers, one call": fast_at_once,
            "transformers, one call, all cores": lambda: fast_at_once("true"),
        },
        f"padded batches of {TRAIN_BATCH}": {
            "ours": lambda: [ours(batch) for batch in batches],
            "transformers": fast_batches,
        },
    }


def benchmark_tokenize(setup, folder):
    """Sentences per second: texts to ids without special tokens, then texts to padded batches."""
    data = read_split(setup, setup.data_dir, "train").values()
    texts = [text for dataset in data for row in dataset.usable for text in dataset.text(row)]
    texts = random.Random(SEED).sample(texts, min(len(texts), setup.sizes.examples.sentences))
    ours = BertTokenizer.from_pretrained(setup.weights)
    fast = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    rows, cpu = [], torch.device("cpu")
    with patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):
        for setting, calls in tokenizer_calls(ours, fast, texts).items():
            variants = {name: timed(cpu, {"call": lambda _, call=call: call()}) for name, call in calls.items()}
            rows += measure(setting, "sentences/s", variants, setup.sizes.rounds, amount=len(texts))
    warm = next(row for row in rows if row.variant == "ours")
    return Measurements(rows, [Goal("sentences a second on one core, ours with a warm cache", 15000, warm.values())])


def benchmark_step(setup, folder):
    """A training step on the very same padded batch."""
    rows, goals, config = [], [], BertConfig.from_json(setup.weights / "config.json")
    for precision in setup.precisions:
        for b, s in setup.sizes.steps:
            [batch], lengths = real_batch(setup, b, s)
            flop = layer_flop(config, lengths, passes=3)
            phases = ("forward", "backward", "clip", "optimizer")
            work = {"step": (flop, phases), "without optimizer": (flop, phases[:3])}
            setting = f"{precision}, {b} x {s}, {lengths.mean() / s:.0%} real"
            peak, variants = setup.peaks[precision], step_variants(setup, precision, batch)
            new = measure(setting, "ms", variants, setup.sizes.rounds, flop=work, peak=peak)
            rows += new
            goals += step_goals(setup.device.type, b, s, new)
    return Measurements(rows, goals)


def step_goals(device, b, s, rows):
    """The goals of a step at b x s on a CPU or a GPU, compared with the measured rows."""
    ours, with_sdpa = rows[0], rows[2]
    if device == "cuda":
        limit = 2.0 if b == 16 else 1.3
        goals = goals_against(rows, {"transformers best": limit, "transformers best, compiled": limit})
        share_goals = {"step": 0.45} if b == 128 else {}
    else:
        goals = goals_against(rows, {"transformers best": 1.0})
        share_goals = {"step": 0.45, "without optimizer": 0.60} if b == 32 else {}
    if s == 64:
        slower = [1 / ratio for ratio in with_sdpa.ratios()]
        goals.append(Goal(f"{ours.setting}: cost of ours / cost of ours with sdpa", 1.1, slower, at_least=False))
    shares = ours.shares()
    return goals + [
        Goal(f"{ours.setting}: share of the matrix peak, {x}", share, shares[x]) for x, share in share_goals.items()
    ]


def profile_epoch(setup, folder, precision):
    """Describe in a sentence where the time of our epoch goes; "rest" is what no other phase covers."""
    with timing.profiled(setup.device, PROFILED) as seconds:
        phases, _ = our_epoch(setup, folder, precision)
    total = sum(phases.values())
    seconds = {"read and tokenise": phases["read"]} | seconds
    seconds["rest"] = total - sum(seconds.values())
    shares = ", ".join(f"{phase} {cost / total:.1%}" for phase, cost in seconds.items())
    return f"Where the time of our epoch goes ({precision}, {total:.1f} s): {shares}."


EPOCH_GOALS = {
    "bf16": {"transformers plain": 2.0, "transformers best": 1.2},
    "fp32": {"transformers plain": 1.5, "transformers best": 1.1},
}


def benchmark_epoch(setup, folder):
    """A training epoch on a part of the data, from the CSV files to the best checkpoint.

    For the goals the phases are scaled to a full epoch, but for saving, which takes as long in a short one.
    """
    result, sizes = Measurements([]), setup.sizes
    lengths, totals = write_subset(setup, folder, train=sizes.examples.train, dev=sizes.examples.dev)
    train, dev = len(lengths["train"]), len(lengths["dev"])
    flop = layer_flop(BertConfig.from_json(setup.weights / "config.json"), lengths["train"], passes=3)
    factors = {"train": totals["train"] / train, "read": totals["train"] / train, "evaluate": totals["dev"] / dev}
    for precision in setup.precisions:
        norms = {}

        def variant(name, precision=precision, norms=norms):
            phases, norms[name] = EPOCHS[name](setup, folder, precision)
            return phases

        setting = f"{precision}, {train} train + {dev} dev examples, batch {TRAIN_BATCH}"
        measured = timing.alternate({name: partial(variant, name) for name in EPOCHS}, sizes.epoch_rounds, setting)
        rows = compare(setting, "s", measured, flop={"train": (flop, ("train",))}, peak=setup.peaks[precision])
        for row in rows:
            row.note = f"norm {norms[row.variant]:.3f}"
        result.rows += rows
        scaled = {
            name: [{phase: factors.get(phase, 1.0) * cost for phase, cost in phases.items()} for phases in rounds]
            for name, rounds in measured.items()
        }
        setting = f"{precision}, scaled to a full epoch ({totals['train']:,} train + {totals['dev']:,} dev examples)"
        result.goals += goals_against(compare(setting, "s", scaled), EPOCH_GOALS[precision])
        result.notes.append(profile_epoch(setup, folder, precision))
    return result


# what benchmark_run starts: {variant: words after python}
PROGRAMS = {
    "ours": ("multitask_classifier.py", "--pooling", "cls"),
    "transformers best": ("-m", "lab.peer"),
}


def benchmark_run(setup, folder):
    """A full epoch of the main job by both programs, each in a process of its own: seconds, and peak memory."""
    if setup.device.type != "cpu":
        return Measurements([], notes=["lab/peer.py trains on the CPU only."])
    data = setup.data_dir if setup.sizes.full_epoch else HERE / "data" / "sample"
    usual = ["--weights", setup.weights, "--data_dir", data, "--epochs", 1, "--batch_size", TRAIN_BATCH, "--seed", 1]
    precision, peaks, result = setup.precisions[0], {name: [] for name in PROGRAMS}, Measurements([])

    def variant(name):
        run = RunFolder(folder / f"{name}-{len(peaks[name])}")
        launch(*PROGRAMS[name], *usual, "--precision", precision, "--run_dir", run.path)
        summary = run.read_summary()
        peaks[name].append({"peak": summary["peak_mib"]})
        return {"train": summary["train_seconds"], "evaluate": summary["eval_seconds"]}

    setting = f"{precision}, a full epoch, batch {TRAIN_BATCH}"
    rows = compare(setting, "s", timing.alternate({name: partial(variant, name) for name in PROGRAMS}, 1, setting))
    memory = compare(f"{setting}, memory", "MiB", peaks)
    result.goals += goals_against(rows, {"transformers best": EPOCH_GOALS[precision]["transformers best"]})
    result.goals += goals_against(memory, {"transformers best": 1.0})
    result.rows += rows + memory
    return result


def benchmark_evaluate(setup, folder):
    """Evaluation at full depth, from the CSV files to the scores."""
    dev, result = write_subset(setup, folder, dev=setup.sizes.examples.evaluated)[0]["dev"], Measurements([])
    for precision in setup.precisions:
        autocast, variants = partial(setup.precision, precision), {}
        for attention in ("plain", "sdpa"):
            model = our_parts(setup, precision, f"--attention {attention}").model
            score_ours = partial(our_evaluate, setup, model, precision=precision)
            phases = {"read": lambda _: read_split(setup, folder, "dev"), "predict": score_ours}
            variants["ours" if attention == "plain" else "ours --attention sdpa"] = timed(setup.device, phases)
        for name, best in (("transformers plain", False), ("transformers best", True)):
            theirs = peer_model(setup, model.tasks, best)
            score_theirs = partial(peer_evaluate, theirs, autocast=autocast, best=best)
            phases = {"read": lambda _, best=best: read_peer(setup, folder, "dev", best), "predict": score_theirs}
            variants[name] = timed(setup.device, phases)
        work = {"predict": (layer_flop(model.bert.config, dev, passes=1), ("predict",))}
        setting = f"{precision}, {len(dev)} examples, batch {EVAL_BATCH}"
        rows = measure(setting, "s", variants, setup.sizes.epoch_rounds, flop=work, peak=setup.peaks[precision])
        result.rows += rows
        result.goals += goals_against(rows, {"transformers plain": 1.3, "transformers best": 1.0})
    return result


def benchmark_exit(setup, folder):
    """Early-exit inference against full depth on dev examples: gain in time beside gain in layers.

    Without --run_dir the exits are untrained and rows leave at random: the speed is real, the norm means nothing.
    """
    precision = setup.precisions[0]
    model, tokenizer, inferences = trained_exits(setup) if setup.run_dir else untrained_exits(setup, precision)
    files = {name: (task, setup.data_dir / task.file("dev")) for name, task in model.tasks.items()}
    data = {name: read_dataset(task, path, tokenizer, MAX_LENGTH) for name, (task, path) in files.items()}
    rows, _ = draw_rows(data, "dev", setup.sizes.examples.evaluated)
    predictions = {}  # {variant: Predictions of each task}

    def variant(label, infer):
        def predict_all(_):
            predictions[label] = [our_predict(setup, model, data[x], rows[x], infer, precision) for x in data]

        return timed(setup.device, {"predict": predict_all}, prepare=lambda: torch.manual_seed(SEED))

    variants = {label: variant(label, infer) for label, infer in ({"full depth": None} | inferences).items()}
    setting = f"{precision}, {sum(map(len, rows.values()))} dev examples, batch {EVAL_BATCH}"
    measured = measure(setting, "s", variants, setup.sizes.epoch_rounds)
    return exit_results(setup, model, measured, predictions)


def exit_results(setup, model, measured, predictions):
    """Compare the variants' gains in time and in layers, from their rows and {variant: Predictions of each task}."""
    layers, norms = {}, {}
    for x, of_tasks in predictions.items():
        layers[x] = float(np.mean(np.concatenate([task.layers for task in of_tasks])))
        norms[x] = summarise(model.tasks, {task.data.task.name: score(task)[0] for task in of_tasks}, []).norm
    gain = {x: model.depth / layers[x] for x in layers}
    for row in measured:
        x = row.variant
        row.note = f"{layers[x]:.2f} of {model.depth} layers, {gain[x]:.2f} times fewer; norm {norms[x]:.3f}"
    goals = [
        Goal(f"{row.variant}: gain in time / gain in layers", 0.85, [x / gain[row.variant] for x in row.gains()])
        for row in measured[1:]
    ]
    worst, notes = min(goals, key=lambda goal: statistics.median(goal.values)), []
    if setup.run_dir:
        fewest = min((x for x in layers if norms[x] >= 0.99 * norms["full depth"]), key=layers.get)
        notes.append(f"99% of the norm of full depth is kept down to {layers[fewest]:.2f} layers ({fewest}).")
    x, y = zip(*sorted((gain[row.variant], statistics.median(row.gains())) for row in measured), strict=True)
    curves = {"measured": (x, y), "equal": (x, x), "goal: 85%": (x, [0.85 * value for value in x])}
    notes.append(setup.draw("exit", [("gain in layers", "gain in time", curves)], "Early exit: time against layers"))
    return Measurements(measured, [worst], notes)


# a batch contains about so many different words; the others' embeddings have no gradient
WORDS_IN_BATCH = 300


def benchmark_optimizer(setup, folder):
    """AdamW.step on the parameters of whole models; all variants update the same ones with the same gradients."""
    rows, goals = [], []
    for name, sizes in setup.sizes.optimized:
        with torch.device("meta"):
            model = BertModel(BertConfig(**sizes))
        model.to_empty(device=setup.device)
        draw = torch.Generator(setup.device).manual_seed(SEED)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02, generator=draw)
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3, generator=draw)
        # as after a real step, most words have a gradient of zero: the square root of zero takes longer on a CPU
        model.word_embedding.weight.grad[WORDS_IN_BATCH:] = 0

        def stepped(make, model=model, **options):
            optimizer = make(parameter_groups(model.named_parameters(), WEIGHT_DECAY), lr=LEARNING_RATE, **options)
            return timed(setup.device, {"step": lambda _: optimizer.step()}, setup.sizes.repeats)

        variants = {
            "ours": stepped(AdamW),
            "torch, fused": stepped(torch.optim.AdamW, fused=True),
            "torch, foreach": stepped(torch.optim.AdamW, foreach=True),
            "torch, one by one": stepped(torch.optim.AdamW, foreach=False),
        }
        count = sum(parameter.numel() for parameter in model.parameters())
        new = measure(f"{name}, {count / 1e6:.1f} M parameters", "ms", variants, setup.sizes.rounds)
        goals.append(Goal(f"{name}: cost of ours / cost of torch, fused", 1.4, new[1].gains(), at_least=False))
        rows += new
    return Measurements(rows, goals)


def benchmark_slf(setup, folder):
    """A step of Sequential Layer Focus's stage 1, layer by layer, against a full training step."""
    precision, repeats = setup.precisions[0], setup.sizes.repeats
    [batch], _ = real_batch(setup, *setup.sizes.steps[0])
    parts = our_parts(setup, precision, "--slf --tasks sst")
    variants = {"ours": our_step(parts, [batch], repeats)}
    for i, phase in enumerate(stage_one_phases(parts), start=1):
        variants[f"stage 1, layer {i}"] = our_step(parts, [batch], repeats, phase)
    rows = measure(f"{precision}, {len(batch)} x {batch.segments[0][0].shape[1]}", "ms", variants, setup.sizes.rounds)
    mean = np.mean([row.ratios() for row in rows[1:]], axis=0).tolist()
    goal = Goal("cost of a step per layer in stage 1 / cost of as many full steps", 0.5, mean, at_least=False)
    return Measurements(rows, [goal])


def benchmark_pretrain(setup, folder):
    """Ten epochs of --option pretrain (BERT frozen) against one, from the CSV files to the best checkpoint."""
    precision = setup.precisions[0]
    # with few rows an epoch of the heads would take less time than writing the model, and the disk would be measured
    examples = setup.sizes.examples
    lengths, _ = write_subset(setup, folder, train=4 * examples.train, dev=examples.dev)
    names = {1: "ours", 10: "ours, 10 epochs"}
    variants = {
        name: lambda n=n: our_epoch(setup, folder, precision, f"--option pretrain --epochs {n}")[0]
        for n, name in names.items()
    }
    rows = measure(f"{precision}, {len(lengths['train'])} examples", "s", variants, setup.sizes.epoch_rounds)
    return Measurements(rows, [Goal("cost of ten epochs / cost of one", 1.5, rows[1].ratios(), at_least=False)])


def benchmark_methods(setup, folder):
    """The cost of SMART (one task) and of gradient surgery (three tasks) beside a plain step in fp32."""
    (b, s), rows = setup.sizes.steps[0], []
    smart = {"ours": "", "adversarial": "--smart", "gaussian": "--smart --smart_form gaussian"}
    surgery = {"ours": "--step all_tasks", "pcgrad": "--gradients pcgrad", "gradvac": "--gradients gradvac"}
    for setting, tasks, flags in (("SMART", ("sst",), smart), ("surgery", ("sst", "para", "sts"), surgery)):
        batches, _ = real_batch(setup, b, s, tasks)
        parts = {name: our_parts(setup, "fp32", f"--tasks {' '.join(tasks)} {more}") for name, more in flags.items()}
        variants = {name: our_step(part, batches, setup.sizes.repeats) for name, part in parts.items()}
        rows += measure(f"{setting}, fp32, {b} x {s}", "ms", variants, setup.sizes.rounds)
    by_name = {row.variant: row for row in rows}
    backward = by_name["pcgrad"].ratios("backward")
    goals = [
        Goal("cost of a SMART step / cost of a plain step", 2.8, by_name["adversarial"].ratios(), at_least=False),
        Goal("cost of PCGrad's backward passes / cost of three plain ones", 1.3, backward, at_least=False),
    ]
    return Measurements(rows, goals)


def benchmark_startup(setup, folder):
    """Start-up in a fresh process (imports; the sample run up to its first training step), and writing a checkpoint."""
    sample = ["--slf", "--early_exit", "--data_dir", HERE / "data" / "sample", "--weights", setup.weights]
    sample += ["--run_dir", folder / "run", "--overwrite"]
    groups = {
        "import": {
            "ours": ("-c", "import multitask_classifier"),
            "torch alone": ("-c", "import torch"),
            "transformers": ("-c", "from transformers import AutoModel, BertTokenizerFast"),
        },
        "sample run to its first step": {"ours": ("-c", FIRST_STEP, *sample)},
    }
    rows = []
    for setting, commands in groups.items():
        variants = {name: lambda command=command: {"": launch(*command)} for name, command in commands.items()}
        rows += measure(setting, "s", variants, setup.sizes.epoch_rounds)
    goal = Goal("seconds from start to first step", 6.0, rows[-1].values(), at_least=False)
    parts, ([batch], _) = our_parts(setup, setup.precisions[0]), real_batch(setup, 2, 8)
    calls = saving_calls(parts, batch, folder / "saved")
    variants = {name: timed(setup.device, {"save": call}) for name, call in calls.items()}
    return Measurements(rows + measure("writing a checkpoint", "ms", variants, setup.sizes.epoch_rounds), [goal])


def benchmark_memory(setup, folder):
    """Peak memory of a short epoch, each variant in a fresh process."""
    count = setup.sizes.examples.remembered
    lengths, _ = write_subset(setup, folder, train=count, dev=count // 4)
    result = Measurements([])
    for precision in setup.precisions:
        measured = {}
        for name in ("ours", "transformers plain", "transformers best"):
            memory = in_fresh_process(setup.device, partial(EPOCHS[name], setup, folder, precision))
            measured[name] = [{"start": memory["start"], "epoch": memory["added"]}]
        rows = compare(f"{precision}, {len(lengths['train'])} examples, batch {TRAIN_BATCH}", "MiB", measured)
        result.rows += rows
        result.goals += goals_against(rows, {"transformers plain": 1.0, "transformers best": 1.0})
    return result


def benchmark_data(setup, folder):
    """Reading a Quora file of the full size: memory added to a fresh process, and seconds."""
    write_subset(setup, folder, train=24)
    quora, path = read_split(setup, setup.data_dir, "train")["para"], folder / build_tasks()["para"].file("train")
    pairs, unit_of = setup.sizes.examples.pairs, {"added": "MiB", "seconds": "s"}
    # repeat the pairs at hand: as many tokens as a full file has, though fewer different words
    write_course_file(path, quora, np.resize(quora.usable, pairs))
    calls = {
        "ours": partial(read_split, setup, folder, "train"),
        "transformers plain, texts only": partial(read_peer, setup, folder, "train", tokenize_once=False),
    }
    memory = {name: in_fresh_process(torch.device("cpu"), call) for name, call in calls.items()}
    setting, rows = f"{pairs:,} pairs, {path.stat().st_size / 1e6:.0f} MB", []
    for key, unit in unit_of.items():
        measured = {name: [{key: costs[key]}] for name, costs in memory.items()}
        rows += compare(f"{setting}, {key}", unit, measured)
    added = memory["ours"]["added"] * timing.MIB / 1e6
    return Measurements(rows, [Goal(f"MB added by {pairs:,} pairs", 300, [added], at_least=False)])


def power(points):
    """The exponent with which cost grows between the last two of {n: cost}: 1 is linear."""
    (n, cost), (more, higher) = list(points.items())[-2:]
    return np.log(higher / cost) / np.log(more / n)


def benchmark_growth(setup, folder):
    """Cost against the number of examples (an epoch) and against the tokens per example (a training step)."""
    precision, sizes, rows = setup.precisions[0], setup.sizes, []
    by_examples, by_tokens = {}, {"ours": {}, "transformers best": {}}
    for count in sizes.examples.growth:
        n = len(write_subset(setup, folder, train=count, dev=24)[0]["train"])
        epoch = {"ours": lambda: {"train": our_epoch(setup, folder, precision)[0]["train"]}}
        measured = timing.alternate(epoch, sizes.epoch_rounds, f"{n} examples")
        new = compare(f"{precision}, epoch of {n} examples", "s", measured)
        by_examples[n] = statistics.median(new[0].values())
        rows += new
    for s in sizes.lengths:
        [batch], _ = real_batch(setup, TRAIN_BATCH, s)
        variants = {k: v for k, v in step_variants(setup, precision, batch).items() if k in by_tokens}
        new = measure(f"{precision}, step at {TRAIN_BATCH} x {s}", "ms", variants, sizes.epoch_rounds)
        for row in new:
            by_tokens[row.variant][s] = statistics.median(row.values())
        rows += new
    panels = [
        ("examples", "seconds", {"ours": tuple(zip(*by_examples.items(), strict=True))}),
        ("tokens", "ms a step", {k: tuple(zip(*points.items(), strict=True)) for k, points in by_tokens.items()}),
    ]
    powers = ", ".join(f"{k} {power(points):.2f}" for k, points in by_tokens.items())
    note = f"Cost grows with the number of examples to the power {power(by_examples):.2f}, with the tokens per example "
    note += f"to the power {powers} (between the last two points; 1 is linear)."
    return Measurements(rows, notes=[note, setup.draw("growth", panels, "Cost against size")])


def run_processes(setup, folder, precision, count):
    """Train an epoch with `count` processes of one thread, which share the usual batch. Returns {"train": seconds}."""
    with tempfile.TemporaryDirectory() as run:
        words = flag_words(precision, f"--batch_size {TRAIN_BATCH // count} --overwrite")
        words += ["--data_dir", folder, "--weights", setup.weights, "--run_dir", run]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count > 1 else []
        launch(*launcher, "multitask_classifier.py", *words, OMP_NUM_THREADS="1")
        *_, last = (Path(run) / "log.jsonl").read_text().splitlines()
    return {"train": json.loads(last)["train_seconds"]}


def benchmark_distributed(setup, folder):
    """Training on the CPU by one process and by two, one thread each; the batch of a step is the same."""
    precision = setup.precisions[0]
    lengths, _ = write_subset(setup, folder, train=setup.sizes.examples.remembered, dev=24)
    for task in build_tasks().values():
        shutil.copy(folder / task.file("dev"), folder / task.file("test"))
    names = {1: "ours, 1 process", 2: "ours, 2 processes"}
    variants = {name: partial(run_processes, setup, folder, precision, n) for n, name in names.items()}
    measured = timing.alternate(variants, setup.sizes.epoch_rounds, "distributed")
    setting = f"{precision}, batch {TRAIN_BATCH}, 1 thread per process"
    return Measurements(compare(setting, "examples/s", measured, amount=len(lengths["train"])))


def benchmark_compile(setup, folder):
    """--compile for batches of any shape: the first step from an empty cache, then later steps (all of one shape)."""
    precision, (b, s) = setup.precisions[0], setup.sizes.steps[0]
    [batch], _ = real_batch(setup, b, s)
    eager, compiled = (our_parts(setup, precision, "--tasks sst") for _ in range(2))
    torch._dynamo.reset()
    try:
        compile_model(compiled, setup.sizes.compiler)
    except InputError as error:
        return Measurements([], notes=[f"Not measured: {error}."])
    parts = {"ours": eager, "ours, compiled": compiled}
    # an empty cache: otherwise the result of an earlier compilation would be loaded instead
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled")):
        first = {name: [our_step(part, [batch], repeats=1)()] for name, part in parts.items()}
        variants = {name: our_step(part, [batch], setup.sizes.repeats) for name, part in parts.items()}
        rows = measure(f"{precision}, {b} x {s}, warm", "ms", variants, setup.sizes.rounds)
    cold = compare(f"{precision}, {b} x {s}, first step", "s", first)
    lost = sum(first["ours, compiled"][0].values()) - sum(first["ours"][0].values())
    saved = (statistics.median(rows[0].values()) - statistics.median(rows[1].values())) / 1e3
    if saved > 0:
        note = f"saves {1e3 * saved:.1f} ms a step: it pays after {lost / saved:,.0f} steps"
    else:
        note = f"makes a step {-1e3 * saved:.1f} ms slower: it never pays here"
    return Measurements(cold + rows, notes=[f"Compilation costs {lost:.1f} s and {note}."])


# {name: function}, in the order of this file
PARTS = {name.removeprefix("benchmark_"): part for name, part in globals().items() if name.startswith("benchmark_")}


# --- the program --------------------------------------------------------------------------------------------------


def run_part(name, setup):
    """Measure one part and print its section of the report. Returns its record."""
    started = time.monotonic()
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        result = PARTS[name](setup, Path(folder))
    record = {
        "about": PARTS[name].__doc__.split("\n")[0],
        "command": f"python -m lab.benchmark {' '.join(sys.argv[1:])}",
        **describe_environment(setup.device),
        "transformers": import_transformers().__version__,
        "seconds": round(time.monotonic() - started, 1),
        "weights": setup.weights.name,
        "data": setup.data_dir.name,
        "sizes": asdict(setup.sizes),
        "matrix_peak": setup.peaks,
        "rows": [row.record() for row in result.rows],
        "goals": [goal.line() for goal in result.goals],
        "notes": result.notes,
    }
    print("\n".join(timing.report_lines(name, record)), flush=True)
    return record


def choose_sizes(args, device):
    """Sizes for the device and the flags."""
    sizes = Sizes(**(GPU_SIZES if device.type != "cpu" else {}))
    if args.quick:
        sizes = replace(sizes, **QUICK_SIZES)
    return replace(sizes, rounds=args.rounds, epoch_rounds=args.rounds) if args.rounds else sizes


def report_path(folder, device, quick):
    """The report's path without its suffix, named after the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path(folder) / f"benchmark-{name.replace(' ', '-')}{'-quick' if quick else ''}"


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmark",
        description="Time this code beside transformers and torch.optim.",
        epilog="Use a quiet machine. Parts that are not named keep their old numbers in the report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; none named: all of them")
    parser.add_argument("--use_gpu", action="store_true", help="measure on CUDA or Apple's MPS")
    parser.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample")
    parser.add_argument("--weights", default="minilm", help=f"a name, a folder, or one of {', '.join(RANDOM_WEIGHTS)}")
    parser.add_argument("--run_dir", help="a run with --early_exit, for the part exit; default: untrained exits")
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), help="default both; with --quick bf16")
    parser.add_argument("--rounds", type=positive_int, help="number of turns of every variant")
    parser.add_argument(
        "--quick", action="store_true", help="few examples, to see that every part works; not for timing"
    )
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the report")
    return parser


def main(argv=None):
    """Run the parts and write the report."""
    args = make_parser().parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"{name}: no such part; choose from {', '.join(PARTS)}")
    import_transformers()
    device = prepare_process(args.use_gpu)
    folder, _ = find_data_dir(args.data_dir, [task.file(split) for task in build_tasks().values() for split in SPLITS])
    sizes, path = choose_sizes(args, device), report_path(args.results, device, args.quick)
    precisions = tuple(args.precision or PRECISIONS)[: 1 if args.quick else None]
    with tempfile.TemporaryDirectory() as random_weights:
        # absolute paths: some parts start processes in the repository's folder
        weights = prepare_weights(args.weights, random_weights).resolve()
        setup = Setup(weights, Path(folder).resolve(), device, precisions, sizes, path, args.run_dir)
        for part in args.parts or PARTS:
            setup.peaks = {x: timing.measure_matrix_peak(device, PRECISIONS[x], sizes.matrices) for x in precisions}
            timing.write_report(path, {part: run_part(part, setup)}, PARTS)
    print(f"report: {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_script(main)
