#!/usr/bin/env python3
"""How fast this code is, beside transformers and torch.optim in turn.

Read first: timing.py, workloads.py.

    python benchmark.py                                  every part, on the CPU
    python benchmark.py step optimizer --use_gpu         two parts, on the GPU
    python benchmark.py exit --run_dir runs/NAME         early exit of a model that was trained with --early_exit

Every number is a ratio as much as a time: the variants take turns (A B, B A, A B, ...), each round gives one ratio
of a variant's cost to ours, and the table shows the median of the rounds with the lowest and the highest. Above 1 we
are ahead. A line below the table says for each goal of the project whether it is reached, computed from the rounds.

The peers, plain and best, are written out in peer.py. They have the same examples, heads, losses, schedule, clipping,
precision and number of threads as ours. Whoever pads less works on fewer numbers, so the share of the machine's matrix
peak counts multiplications and additions on real tokens only. The peak is measured too: the best of several square
matrix products. timing.py holds the clocks and the arithmetic, workloads.py what both sides do; here is a function for
each part.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

# first of ours: it says what to do where torch is not installed
import multitask_classifier  # isort: skip
import numpy as np
import torch
from torch import nn

import timing
from base_bert import BertConfig
from bert import BertModel
from datasets import SPLITS, Dataset, find_data_dir, read_dataset
from early_exit import ExitInference, choose_policies
from errors import InputError, run_script
from evaluation import evaluate, full_depth, predict, score, summarise
from flags import positive_int
from frozen import KeptStates
from gradients import Sum
from optimizer import AdamW, parameter_groups
from peer import MAX_LENGTH, WEIGHT_DECAY, cut, import_transformers
from runs import RunFolder, command_line, describe_environment
from tasks import build_tasks
from timing import Found, Goal, compare, goals_against, in_fresh_process, measure, timed
from tokenizer import BertTokenizer
from workloads import (
    EPOCHS,
    EVAL_BATCH,
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
    flag_words,
    launch,
    layer_flop,
    our_epoch,
    our_parts,
    our_step,
    peer_evaluate,
    peer_model,
    prepare_weights,
    read_peer,
    read_split,
    real_batch,
    step_variants,
    write_course_file,
    write_subset,
)

# --- the parts ----------------------------------------------------------------------------------------------------


def benchmark_tokenize(setup, folder):
    """Sentences per second: single sentences without special tokens, and padded batches."""
    data = read_split(setup, setup.data_dir, "train").values()
    texts = [text for dataset in data for row in dataset.usable for text in dataset.text(row)]
    texts = random.Random(SEED).sample(texts, min(len(texts), setup.sizes.sentences))
    ours = BertTokenizer.from_pretrained(setup.weights)
    fast = import_transformers().BertTokenizerFast.from_pretrained(setup.weights)
    batches, cpu = cut(texts, TRAIN_BATCH), torch.device("cpu")

    def encode_cold():
        cold = BertTokenizer(ours.vocab, ours.do_lower_case)
        return [cold.encode(text) for text in texts]

    def fast_batches():
        how = dict(padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return [fast(batch, **how) for batch in batches]

    def fast_at_once(parallel="false"):
        with patch.dict(os.environ, TOKENIZERS_PARALLELISM=parallel):
            return fast(texts, add_special_tokens=False)["input_ids"]

    if [ours.encode(text) for text in texts] != fast_at_once():
        raise RuntimeError("the tokenizers disagree: run tests/test_tokenizer.py")
    groups = {
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
    rows = []
    with patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):
        for setting, calls in groups.items():
            variants = {name: timed(cpu, {"call": lambda _, call=call: call()}) for name, call in calls.items()}
            rows += measure(setting, "sentences/s", variants, setup.sizes.rounds, amount=len(texts))
    warm = next(row for row in rows if row.variant == "ours")
    return Found(rows, [Goal("sentences a second on one core, ours, warm,", 15000, warm.values())])


def benchmark_step(setup, folder):
    """A training step on the very same padded batch."""
    rows, goals, config = [], [], BertConfig.from_json(setup.weights / "config.json")
    for precision in setup.precisions:
        for b, s in setup.sizes.steps:
            [batch], lengths = real_batch(setup, b, s)
            flop = layer_flop(config, lengths, passes=3)
            phases = ("forward", "backward", "clip", "optimizer")
            how = {"step": (flop, phases), "without optimizer": (flop, phases[:3])}
            setting = f"{precision}, {b} x {s}, {lengths.mean() / s:.0%} real"
            peak, variants = setup.peaks[precision], step_variants(setup, precision, batch)
            new = measure(setting, "ms", variants, setup.sizes.rounds, flop=how, peak=peak)
            rows += new
            goals += step_goals(setup.device.type, b, s, new)
    return Found(rows, goals)


def step_goals(device, b, s, rows):
    """What a step at b x s is to reach on a CPU or a GPU."""
    ours, with_sdpa = rows[0], rows[2]
    if device == "cuda":
        limit = 2.0 if b == 16 else 1.3
        goals = goals_against(rows, {"transformers best": limit, "transformers best, compiled": limit})
        wanted = {"step": 0.45} if b == 128 else {}
    else:
        goals = goals_against(rows, {"transformers best": 1.0})
        wanted = {"step": 0.45, "without optimizer": 0.60} if b == 32 else {}
    if s == 64:
        slower = [1 / ratio for ratio in with_sdpa.ratios()]
        goals.append(Goal(f"{ours.setting}: cost of ours / ours with sdpa", 1.1, slower, at_least=False))
    shares = ours.shares()
    return goals + [Goal(f"{ours.setting}: matrix peak, {x}", share, shares[x]) for x, share in wanted.items()]


PROFILED = {
    "collate": (Dataset, "batch"),
    "forward": (multitask_classifier.MultitaskBERT, "forward"),
    "backward": (Sum, "add"),
    "clip": (multitask_classifier, "clip_gradients"),
    "optimizer": (AdamW, "step"),
    "evaluate": (multitask_classifier, "evaluate_dev"),
    "save": (RunFolder, "save_best"),
    "save for resuming": (RunFolder, "save_last"),
}


def profile_epoch(setup, folder, precision):
    """A sentence that says where the time of our epoch goes; what no phase covers is called rest."""
    with timing.profiled(setup.device, PROFILED) as seconds:
        phases, _ = our_epoch(setup, folder, precision)
    whole = sum(phases.values())
    seconds = {"read and tokenise": phases["read"]} | seconds
    seconds["rest"] = whole - sum(seconds.values())
    shares = ", ".join(f"{phase} {cost / whole:.1%}" for phase, cost in seconds.items())
    return f"Where the time of our epoch goes ({precision}, {whole:.1f} s): {shares}."


EPOCH_GOALS = {
    "bf16": {"transformers plain": 2.0, "transformers best": 1.2},
    "fp32": {"transformers plain": 1.5, "transformers best": 1.1},
}


def benchmark_epoch(setup, folder):
    """A training epoch end to end, from the CSV files to the best checkpoint, on a part of the data.

    For the goals the phases are scaled to a whole epoch, of which saving takes the same time as of this one.
    """
    found, sizes = Found([]), setup.sizes
    lengths, whole = write_subset(setup, folder, train=sizes.train, dev=sizes.dev)
    train, dev = len(lengths["train"]), len(lengths["dev"])
    flop = layer_flop(BertConfig.from_json(setup.weights / "config.json"), lengths["train"], passes=3)
    factors = {"train": whole["train"] / train, "read": whole["train"] / train, "evaluate": whole["dev"] / dev}
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
        found.rows += rows
        scaled = {
            name: [{phase: factors.get(phase, 1.0) * cost for phase, cost in phases.items()} for phases in rounds]
            for name, rounds in measured.items()
        }
        setting = f"{precision}, scaled to a whole epoch ({whole['train']:,} train + {whole['dev']:,} dev examples)"
        found.goals += goals_against(compare(setting, "s", scaled), EPOCH_GOALS[precision])
        found.notes.append(profile_epoch(setup, folder, precision))
    return found


def benchmark_run(setup, folder):
    """A whole epoch of the main job by both programs, each in a fresh process: seconds, and peak memory."""
    if setup.device.type != "cpu":
        return Found([], notes=["peer.py trains on the CPU only."])
    data = setup.data_dir if setup.sizes.whole else HERE / "data" / "sample"
    usual = ["--weights", setup.weights, "--data_dir", data, "--epochs", 1, "--batch_size", TRAIN_BATCH, "--seed", 1]
    scripts, found = {"ours": "multitask_classifier.py", "transformers best": "peer.py"}, Found([])
    precision, peaks = setup.precisions[0], {name: [] for name in scripts}

    def variant(name):
        run = RunFolder(folder / f"{name}-{len(peaks[name])}")
        launch(HERE / scripts[name], *usual, "--precision", precision, "--run_dir", run.path)
        summary = run.read_summary()
        peaks[name].append({"peak": summary["peak_mib"]})
        return {"train": summary["train_seconds"], "evaluate": summary["eval_seconds"]}

    setting = f"{precision}, a whole epoch, batch {TRAIN_BATCH}"
    rows = compare(setting, "s", timing.alternate({name: partial(variant, name) for name in scripts}, 1, setting))
    memory = compare(f"{setting}, memory", "MiB", peaks)
    found.goals += goals_against(rows, {"transformers best": EPOCH_GOALS[precision]["transformers best"]})
    found.goals += goals_against(memory, {"transformers best": 1.0})
    found.rows += rows + memory
    return found


def benchmark_evaluate(setup, folder):
    """Evaluation at full depth, from the CSV files to the scores."""
    dev, found = write_subset(setup, folder, dev=setup.sizes.evaluated)[0]["dev"], Found([])
    for precision in setup.precisions:
        autocast, variants = partial(setup.precision, precision), {}
        for attention in ("plain", "sdpa"):
            model = our_parts(setup, precision, f"--attention {attention}").model
            score_ours = partial(evaluate, model, batch_size=EVAL_BATCH, precision=autocast)
            phases = {"read": lambda _: read_split(setup, folder, "dev"), "predict": score_ours}
            variants["ours" if attention == "plain" else "ours --attention sdpa"] = timed(setup.device, phases)
        for name, best in (("transformers plain", False), ("transformers best", True)):
            theirs = peer_model(setup, model.tasks, best)
            score_theirs = partial(peer_evaluate, theirs, autocast=autocast, device=setup.device, best=best)
            phases = {"read": lambda _, best=best: read_peer(setup, folder, "dev", best), "predict": score_theirs}
            variants[name] = timed(setup.device, phases)
        how = {"predict": (layer_flop(model.bert.config, dev, passes=1), ("predict",))}
        setting = f"{precision}, {len(dev)} examples, batch {EVAL_BATCH}"
        rows = measure(setting, "s", variants, setup.sizes.epoch_rounds, flop=how, peak=setup.peaks[precision])
        found.rows += rows
        found.goals += goals_against(rows, {"transformers plain": 1.3, "transformers best": 1.0})
    return found


# thresholds of a trained model's exits; of exits that are not, the share of rows that goes on after each
THRESHOLDS, STAYING = (0.5, 0.7, 0.9, 0.95, 0.99), (0.95, 0.85, 0.7, 0.5, 0.3)


class RandomExits(ExitInference):
    """Early exit by certainties drawn at random, after the true ones were computed: for exits that are untrained."""

    def certainty(self, model, state, logits, task):
        """Random numbers from 0 to 1. Shapes: state [b,w], logits [b,o] -> [b]."""
        return torch.rand_like(super().certainty(model, state, logits, task))


def exit_settings(setup, precision):
    """What to leave early with: (model, tokenizer, {label: inference}), of the saved run or with untrained exits."""
    if setup.run_dir is None:
        model = our_parts(setup, precision, "--early_exit").model
        policies = choose_policies(model.tasks, "auto")
        infer = {
            f"{1 - staying:.0%} leave at each": RandomExits(policies, dict.fromkeys(policies, staying), EVAL_BATCH)
            for staying in STAYING
        }
        return model, BertTokenizer.from_pretrained(setup.weights), infer
    run = multitask_classifier.load_run(setup.run_dir, setup.device)
    chosen = RunFolder(setup.run_dir).read_summary().get("exits")
    if not chosen:
        raise InputError(f"{setup.run_dir}: has no exits to leave by: train a run with --early_exit")
    every = {f"threshold {t:g}": dict.fromkeys(run.model.tasks, t) for t in THRESHOLDS}
    every["thresholds chosen"] = chosen["thresholds"]
    return run.model, run.tokenizer, {k: ExitInference(chosen["policies"], t, EVAL_BATCH) for k, t in every.items()}


def benchmark_exit(setup, folder):
    """Early-exit inference against full depth on dev examples: gain in time beside gain in layers.

    Without --run_dir the exits are untrained and rows leave at random: the speed is real, the norm means nothing.
    """
    precision = setup.precisions[0]
    model, tokenizer, inferences = exit_settings(setup, precision)
    files = {name: (task, setup.data_dir / task.file("dev")) for name, task in model.tasks.items()}
    data = {name: read_dataset(task, path, tokenizer, MAX_LENGTH) for name, (task, path) in files.items()}
    rows, _ = draw_rows(data, "dev", setup.sizes.evaluated)
    how, found = dict(batch_size=EVAL_BATCH, precision=partial(setup.precision, precision)), {}

    def variant(label, infer):
        def predict_all(_):
            found[label] = [predict(model, data[name], rows[name], infer=infer, **how) for name in data]

        return timed(setup.device, {"predict": predict_all}, prepare=lambda: torch.manual_seed(SEED))

    variants = {label: variant(label, infer) for label, infer in ({"full depth": full_depth} | inferences).items()}
    setting = f"{precision}, {sum(map(len, rows.values()))} dev examples, batch {EVAL_BATCH}"
    measured = measure(setting, "s", variants, setup.sizes.epoch_rounds)
    layers = {x: float(np.mean(np.concatenate([said.exits for said in found[x]]))) for x in found}
    scores = {x: {said.data.task.name: score(said)[0] for said in found[x]} for x in found}
    norms = {x: summarise(model.tasks, scores[x], []).norm for x in found}
    gain = {x: model.depth / layers[x] for x in found}
    for row in measured:
        x = row.variant
        row.note = f"{layers[x]:.2f} of {model.depth} layers, {gain[x]:.2f} times fewer; norm {norms[x]:.3f}"
    goals = [
        Goal(f"{row.variant}: gain in time / gain in layers", 0.85, [x / gain[row.variant] for x in row.gains()])
        for row in measured[1:]
    ]
    worst, notes = min(goals, key=lambda goal: statistics.median(goal.values)), []
    if setup.run_dir:
        fewest = min((x for x in found if norms[x] >= 0.99 * norms["full depth"]), key=layers.get)
        notes.append(f"99% of the norm of full depth is kept down to {layers[fewest]:.2f} layers ({fewest}).")
    x, y = zip(*sorted((gain[row.variant], statistics.median(row.gains())) for row in measured), strict=True)
    curves = {"measured": (x, y), "equal": (x, x), "goal: 85%": (x, [0.85 * value for value in x])}
    notes.append(setup.draw("exit", [("gain in layers", "gain in time", curves)], "Early exit: time against layers"))
    return Found(measured, [worst], notes)


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
        # as after a step: words that its batch lacks have no gradient, and the root of zeros has a price of its own
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
        goals.append(Goal(f"{name}: cost of ours / torch, fused", 1.4, new[1].gains(), at_least=False))
        rows += new
    return Found(rows, goals)


def kept_below(parts, batch, layer):
    """The start of stage 1's step for a layer with --slf_cache: kept states climb one layer, then they enter it."""
    if layer == 1:
        return lambda batch: None
    rows = np.arange(len(batch))
    data = SimpleNamespace(lengths=lambda: np.zeros(len(batch)), batch=lambda rows: batch)
    how = (parts.model, {batch.task.name: (data, rows)})
    lower = KeptStates()
    lower.climb(*how, layer - 2, len(batch), parts.precision)

    def start(batch):
        kept = KeptStates()
        kept.layer, kept.states = lower.layer, dict(lower.states)
        kept.climb(*how, layer - 1, len(batch), parts.precision)
        return kept.start(parts.model, batch, rows)

    return start


def benchmark_slf(setup, folder):
    """A step of Sequential Layer Focus's stage 1, layer by layer, without and with --slf_cache, against a full step."""
    precision, repeats = setup.precisions[0], setup.sizes.repeats
    [batch], _ = real_batch(setup, *setup.sizes.steps[0])
    parts = our_parts(setup, precision, "--slf --tasks sst")
    depth, plan = parts.model.depth, parts.plan()
    phases = [next(plan) for _ in range(depth)]
    variants = {"ours": our_step(parts, [batch], repeats)}
    variants |= {f"stage 1, layer {i}": our_step(parts, [batch], repeats, phases[i - 1]) for i in range(1, depth + 1)}
    variants |= {
        f"layer {i}, states kept": our_step(parts, [batch], repeats, phases[i - 1], kept_below(parts, batch, i))
        for i in range(1, depth + 1)
    }
    rows = measure(f"{precision}, {len(batch)} x {batch.segments[0][0].shape[1]}", "ms", variants, setup.sizes.rounds)
    stages = (rows[1 : depth + 1], rows[depth + 1 :])
    sums = [np.mean([row.ratios() for row in stage], axis=0).tolist() for stage in stages]
    told = ("sum over stage 1 / as many full steps", "the same with --slf_cache")
    return Found(rows, [Goal(text, 0.5, mean, at_least=False) for text, mean in zip(told, sums, strict=True)])


def benchmark_pretrain(setup, folder):
    """--option pretrain, BERT frozen: ten epochs against one, from the CSV files to the best checkpoint."""
    precision = setup.precisions[0]
    # an epoch of heads is shorter than writing the model, so that a few rows would only measure the disk
    lengths, _ = write_subset(setup, folder, train=4 * setup.sizes.train, dev=setup.sizes.dev)
    names = {1: "ours", 10: "ours, 10 epochs"}
    variants = {
        name: lambda n=n: our_epoch(setup, folder, precision, f"--option pretrain --epochs {n}")[0]
        for n, name in names.items()
    }
    rows = measure(f"{precision}, {len(lengths['train'])} examples", "s", variants, setup.sizes.epoch_rounds)
    return Found(rows, [Goal("ten epochs / one", 1.5, rows[1].ratios(), at_least=False)])


def benchmark_methods(setup, folder):
    """What SMART (one task) and gradient surgery (three tasks) add to a step in fp32."""
    (b, s), rows = setup.sizes.steps[0], []
    smart = {"ours": "", "adversarial": "--smart", "gaussian": "--smart --smart_form gaussian"}
    surgery = {"ours": "--step all_tasks", "pcgrad": "--gradients pcgrad", "gradvac": "--gradients gradvac"}
    for setting, tasks, given in (("SMART", ("sst",), smart), ("surgery", ("sst", "para", "sts"), surgery)):
        batches, _ = real_batch(setup, b, s, tasks)
        every = {name: our_parts(setup, "fp32", f"--tasks {' '.join(tasks)} {flags}") for name, flags in given.items()}
        variants = {name: our_step(parts, batches, setup.sizes.repeats) for name, parts in every.items()}
        rows += measure(f"{setting}, fp32, {b} x {s}", "ms", variants, setup.sizes.rounds)
    found = {row.variant: row for row in rows}
    backward = found["pcgrad"].ratios("backward")
    goals = [
        Goal("a SMART step / a plain one", 2.8, found["adversarial"].ratios(), at_least=False),
        Goal("backward passes with PCGrad / three plain ones", 1.3, backward, at_least=False),
    ]
    return Found(rows, goals)


# ends the program after its first training step
FIRST_STEP = """
import os, sys, multitask_classifier
take = multitask_classifier.train_step
def train_step(*given):
    take(*given)
    os._exit(0)
multitask_classifier.train_step = train_step
multitask_classifier.main(sys.argv[1:])
sys.exit("no training step was taken")
"""


def benchmark_startup(setup, folder):
    """Starting in a fresh process: imports, the sample run up to its first training step; and writing a checkpoint."""
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
    goal = Goal("from start to first step, seconds", 6.0, rows[-1].values(), at_least=False)
    parts, run = our_parts(setup, setup.precisions[0]), RunFolder(folder / "saved")
    optimizer = parts.make_optimizer(dict(parts.model.named_parameters()))
    [batch], _ = real_batch(setup, 2, 8)
    parts.model(batch).logits[parts.model.depth].sum().backward()
    optimizer.step()
    progress = multitask_classifier.Progress()
    calls = {
        "ours": lambda _: run.save_best(parts.model),
        "ours, all that resuming needs": lambda _: run.save_last(
            multitask_classifier.snapshot(parts, optimizer, progress)
        ),
        "torch.save, the model": lambda _: torch.save(parts.model.state_dict(), folder / "saved" / "model.pt"),
    }
    variants = {name: timed(setup.device, {"save": call}) for name, call in calls.items()}
    return Found(rows + measure("writing a checkpoint", "ms", variants, setup.sizes.epoch_rounds), [goal])


def benchmark_memory(setup, folder):
    """Peak memory of a short epoch, each variant in a fresh process."""
    lengths, _ = write_subset(setup, folder, train=setup.sizes.remembered, dev=setup.sizes.remembered // 4)
    found = Found([])
    for precision in setup.precisions:
        measured = {}
        for name in ("ours", "transformers plain", "transformers best"):
            memory = in_fresh_process(setup.device, partial(EPOCHS[name], setup, folder, precision))
            measured[name] = [{"start": memory["start"], "epoch": memory["added"]}]
        rows = compare(f"{precision}, {len(lengths['train'])} examples, batch {TRAIN_BATCH}", "MiB", measured)
        found.rows += rows
        found.goals += goals_against(rows, {"transformers plain": 1.0, "transformers best": 1.0})
    return found


def benchmark_data(setup, folder):
    """Reading a Quora file of the full size: memory added to a fresh process, and seconds."""
    write_subset(setup, folder, train=24)
    quora, path = read_split(setup, setup.data_dir, "train")["para"], folder / build_tasks()["para"].file("train")
    # the same pairs again and again: as many tokens as in as many other pairs, though fewer different words
    write_course_file(path, quora, np.resize(quora.usable, setup.sizes.pairs))
    calls = {
        "ours": partial(read_split, setup, folder, "train"),
        "transformers plain, texts only": partial(read_peer, setup, folder, "train", tokenize_once=False),
    }
    found = {name: in_fresh_process(torch.device("cpu"), call) for name, call in calls.items()}
    setting, rows = f"{setup.sizes.pairs:,} pairs, {path.stat().st_size / 1e6:.0f} MB", []
    for unit, key in (("MiB", "added"), ("s", "seconds")):
        rows += compare(f"{setting}, {key}", unit, {name: [{key: told[key]}] for name, told in found.items()})
    added = found["ours"]["added"] * timing.MIB / 1e6
    return Found(rows, [Goal(f"MB added by {setup.sizes.pairs:,} pairs", 300, [added], at_least=False)])


def power(points):
    """The power of n with which cost grows between the last two of {n: cost}: 1 is linear."""
    (n, cost), (more, higher) = list(points.items())[-2:]
    return np.log(higher / cost) / np.log(more / n)


def benchmark_growth(setup, folder):
    """Cost against the number of examples (an epoch) and against the tokens per example (a training step)."""
    precision, sizes, rows = setup.precisions[0], setup.sizes, []
    by_examples, by_tokens = {}, {"ours": {}, "transformers best": {}}
    for count in sizes.growth:
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
    note += f"to the power {powers} (1 is linear; between the last two points)."
    return Found(rows, notes=[note, setup.draw("growth", panels, "Cost against size")])


def run_processes(setup, folder, precision, count):
    """An epoch of our program by `count` processes of one thread, of the same batch together: {"train": seconds}."""
    with tempfile.TemporaryDirectory() as run:
        words = flag_words(precision, f"--batch_size {TRAIN_BATCH // count} --overwrite")
        words += ["--data_dir", folder, "--weights", setup.weights, "--run_dir", run]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count > 1 else []
        launch(*launcher, "multitask_classifier.py", *words, OMP_NUM_THREADS="1")
        *_, last = (Path(run) / "log.jsonl").read_text().splitlines()
    return {"train": json.loads(last)["train_seconds"]}


def benchmark_distributed(setup, folder):
    """Training on the CPU by one process and by two, one thread each, with the same batch in all."""
    precision = setup.precisions[0]
    lengths, _ = write_subset(setup, folder, train=setup.sizes.remembered, dev=24)
    for task in build_tasks().values():
        shutil.copy(folder / task.file("dev"), folder / task.file("test"))
    names = {1: "ours, 1 process", 2: "ours, 2 processes"}
    variants = {name: partial(run_processes, setup, folder, precision, n) for n, name in names.items()}
    measured = timing.alternate(variants, setup.sizes.epoch_rounds, "distributed")
    setting = f"{precision}, batch {TRAIN_BATCH} in all, 1 thread each"
    return Found(compare(setting, "examples/s", measured, amount=len(lengths["train"])))


def benchmark_compile(setup, folder):
    """--compile, for batches of any shape: the first step from a cold start, then the others (all of one shape)."""
    precision, (b, s) = setup.precisions[0], setup.sizes.steps[0]
    [batch], _ = real_batch(setup, b, s)
    eager, compiled = (our_parts(setup, precision, "--tasks sst") for _ in range(2))
    torch._dynamo.reset()
    try:
        multitask_classifier.compile_layers(compiled.model.bert, setup.device, setup.sizes.compiler)
    except InputError as error:
        return Found([], notes=[f"Not measured: {error}."])
    every = {"ours": eager, "ours, compiled": compiled}
    # an empty cache: what an earlier compilation left there would hide the cold start
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled")):
        first = {name: [our_step(parts, [batch], repeats=1)()] for name, parts in every.items()}
        variants = {name: our_step(parts, [batch], setup.sizes.repeats) for name, parts in every.items()}
        rows = measure(f"{precision}, {b} x {s}, warm", "ms", variants, setup.sizes.rounds)
    cold = compare(f"{precision}, {b} x {s}, first step", "s", first)
    lost = sum(first["ours, compiled"][0].values()) - sum(first["ours"][0].values())
    saved = (statistics.median(rows[0].values()) - statistics.median(rows[1].values())) / 1e3
    if saved > 0:
        told = f"saves {1e3 * saved:.1f} ms a step, so it pays after {lost / saved:,.0f} steps"
    else:
        told = f"makes a step {-1e3 * saved:.1f} ms slower, so it never pays here"
    return Found(cold + rows, notes=[f"Compiling took {lost:.1f} s and {told}."])


# in the order of this file
PARTS = {name.removeprefix("benchmark_"): part for name, part in globals().items() if name.startswith("benchmark_")}


# --- the program --------------------------------------------------------------------------------------------------


def run_part(name, setup):
    """Measure one part and print its section of the report. Returns its record."""
    started = time.monotonic()
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        found = PARTS[name](setup, Path(folder))
    record = {
        "about": PARTS[name].__doc__.split("\n")[0],
        "command": command_line(),
        **describe_environment(setup.device),
        "transformers": import_transformers().__version__,
        "seconds": round(time.monotonic() - started, 1),
        "weights": setup.weights.name,
        "data": setup.data_dir.name,
        "sizes": asdict(setup.sizes),
        "matrix_peak": setup.peaks,
        "table": timing.table(found.rows) if found.rows else [],
        "goals": [goal.line() for goal in found.goals],
        "notes": found.notes,
        "rows": [row.record() for row in found.rows],
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
    """Where the report goes, without its suffix: the device is in the name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path(folder) / f"benchmark-{name.replace(' ', '-')}{'-quick' if quick else ''}"


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Time this code beside transformers and torch.optim.",
        epilog="Needs a quiet machine. Parts that are not named keep their numbers in the report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--use_gpu", action="store_true", help="measure on CUDA or Apple's MPS")
    parser.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample")
    parser.add_argument("--weights", default="minilm", help=f"a name, a folder, or {', '.join(RANDOM_WEIGHTS)}")
    parser.add_argument("--run_dir", help="a run trained with --early_exit, for the part exit; default untrained exits")
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), help="default both; with --quick bf16")
    parser.add_argument("--rounds", type=positive_int, help="turns of every variant")
    parser.add_argument("--quick", action="store_true", help="a few dozen examples: does it work, not how fast")
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the report")
    return parser


def main(argv=None):
    """Run the parts and write the report."""
    args = make_parser().parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"{name}: no such part; choose from {', '.join(PARTS)}")
    import_transformers()
    # as our program does; the peers are in the same process and have it too, except where memory is measured
    multitask_classifier.keep_freed_memory()
    device = multitask_classifier.choose_device(args.use_gpu)
    folder, _ = find_data_dir(args.data_dir, [task.file(split) for task in build_tasks().values() for split in SPLITS])
    sizes, path = choose_sizes(args, device), report_path(args.results, device, args.quick)
    precisions = tuple(args.precision or PRECISIONS)[: 1 if args.quick else None]
    with tempfile.TemporaryDirectory() as drawn:
        # absolute: some parts start processes in this program's folder
        weights = prepare_weights(args.weights, drawn).resolve()
        setup = Setup(weights, Path(folder).resolve(), device, precisions, sizes, path, args.run_dir)
        for part in args.parts or PARTS:
            setup.peaks = {x: timing.measure_matrix_peak(device, PRECISIONS[x], sizes.matrices) for x in precisions}
            timing.write_report(path, {part: run_part(part, setup)}, PARTS)
    print(f"report: {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_script(main)
