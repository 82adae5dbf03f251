"""Our side of the benchmark: a training step, an epoch, a saved run and a checkpoint, made of the program's own parts.

Everything in lab/ that calls the inner functions of multitask_classifier.py stands here, so that a change of the
training loop changes this file only.
"""

import tempfile
import time
from contextlib import redirect_stdout
from functools import partial

# first: it prints what to do if torch is not installed
import multitask_classifier  # isort: skip
import torch

from bert import BertModel
from building import build, build_table, choose_device, compile_layers, keep_freed_memory
from datasets import Dataset
from early_exit import ExitInference, choose_policies
from errors import InputError
from evaluation import AtExit, evaluate, predict
from flags import parse_flags
from gradients import Sum
from lab.peer import CLIP, EVAL_BATCH, WARMUP, WEIGHT_DECAY
from lab.timing import Stopwatch, synchronize, timed
from lab.workloads import HEAD_DROPOUT, LEARNING_RATE, SEED, TRAIN_BATCH, read_train_and_dev
from multitask_classifier import TaskLoss, load_run, make_model, set_trainable, train
from optimizer import AdamW, clip_gradients
from runs import History, Recorder, RunFolder, snapshot
from slf import Phase
from tokenizer import BertTokenizer

# functions whose time profile_epoch reports: {phase: (owner, name)}
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
# a program that runs multitask_classifier.py and ends after its first training step
FIRST_STEP = """
import os, sys, multitask_classifier
real_step = multitask_classifier.train_step
def train_step(*arguments):
    real_step(*arguments)
    os._exit(0)
multitask_classifier.train_step = train_step
multitask_classifier.main(sys.argv[1:])
sys.exit("no training step was taken")
"""


def prepare_process(use_gpu):
    """Set this process up as the program does, and choose the device.

    The peers run in the same process, so they keep freed memory too. Only the part memory starts fresh processes.
    """
    keep_freed_memory()
    return choose_device(use_gpu)


def flag_words(precision, more=""):
    """The flags of our runs as words of a command line; flags in `more` win."""
    words = f"--option finetune --epochs 1 --split full --precision {precision} --batch_size {TRAIN_BATCH}"
    words += f" --eval_batch_size {EVAL_BATCH} --lr {LEARNING_RATE} --clip {CLIP} --weight_decay {WEIGHT_DECAY}"
    words += f" --warmup {WARMUP} --hidden_dropout_prob {HEAD_DROPOUT} --seed {SEED} --pooling cls {more}"
    return words.split()


def our_model(setup, flags):
    """Our multitask model on the device."""
    bert = BertModel.from_pretrained(setup.weights, attention=flags["attention"])
    return make_model(flags, build_table(flags), bert).to(setup.device)


def fill_parts(setup, flags, model, data):
    """The parts of our training loop with {task: {split: Dataset}}."""
    return build(flags, model, data, setup.device, {"loss": TaskLoss()})


def our_parts(setup, precision, more="", data=None):
    """The parts of our training loop with a new model, by default without data."""
    flags = parse_flags(flag_words(precision, more))[0]
    return fill_parts(setup, flags, our_model(setup, flags), data or {})


def our_step(parts, batches, repeats, phase=None):
    """Make a variant that takes our training step on the same batches, in the four phases of the loop's train_step."""
    model, device = parts.model, parts.precision.device
    phase = phase or Phase("full", 1.0, ({model.depth: 1.0},))
    terms, weights = (
        [term for term in parts.terms.values() if not isinstance(term, phase.without)],
        phase.exit_weights[0],
    )

    def prepare():
        set_trainable(model, phase, parts.trainable)

    def forward(_):
        losses = {}
        for batch in batches:
            with parts.precision.autocast():
                outputs = model(batch, exits=tuple(weights))
            losses[batch.task.name] = sum(term(model, batch, outputs, weights) for term in terms).mean()
        return losses

    def backward(losses):
        for name, loss in losses.items():
            parts.gradients.add(name, loss)
        parts.gradients.combine()

    def update(_):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameters = set_trainable(model, phase, parts.trainable)
    optimizer = parts.make_optimizer(parameters)
    clip = partial(clip_gradients, list(parameters.values()), CLIP)
    phases = {"forward": forward, "backward": backward, "clip": lambda _: clip(), "optimizer": update}
    return timed(device, phases, repeats, prepare)


def stage_one_phases(parts):
    """The phases of Sequential Layer Focus's stage 1, one per layer."""
    plan = parts.plan()
    return [next(plan) for _ in range(parts.model.depth)]


def our_epoch(setup, folder, precision, more=""):
    """Read, train, evaluate and save with our program. Returns ({phase: seconds}, dev norm)."""
    torch.manual_seed(SEED)
    flags = parse_flags(flag_words(precision, more))[0]
    model = our_model(setup, flags)
    with tempfile.TemporaryDirectory() as run, redirect_stdout(None):
        watch = Stopwatch(setup.device)
        parts = fill_parts(setup, flags, model, read_train_and_dev(setup, folder))
        watch.mark("read")
        started = time.perf_counter()
        with Recorder(RunFolder(run), parts) as recorder:
            train(parts, recorder)
        synchronize(setup.device)
        total = time.perf_counter() - started
    progress = recorder.history
    phases = {**watch.phases(), "train": progress.train_seconds, "evaluate": progress.eval_seconds}
    phases["save"] = max(0.0, total - progress.train_seconds - progress.eval_seconds)
    return phases, progress.last_scores["norm"]


def our_evaluate(setup, model, data, precision):
    """Score {task: Dataset} at full depth. Returns (Scores, {task: Predictions})."""
    return evaluate(model, data, batch_size=EVAL_BATCH, precision=partial(setup.precision, precision))


def our_predict(setup, model, data, rows, infer, precision):
    """Predict rows of a Dataset with `infer`; None means full depth."""
    autocast = partial(setup.precision, precision)
    return predict(model, data, rows, infer=infer or AtExit(), batch_size=EVAL_BATCH, precision=autocast)


def compile_model(parts, backend):
    """Let torch.compile translate the layers, as --compile does. Raises: InputError where it cannot."""
    compile_layers(parts.model.bert, parts.precision.device, backend)


# --- early exit ---------------------------------------------------------------------------------------------------

# thresholds to measure for a trained model's exits
THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99)
# for untrained exits: the share of rows that continue after each exit
STAYING = (0.95, 0.85, 0.7, 0.5, 0.3)


class RandomExits(ExitInference):
    """Early exit at random, for untrained exits: the certainties are computed, then replaced by random numbers."""

    def certainty(self, model, state, logits, task):
        """Random numbers from 0 to 1. Shapes: state [b,w], logits [b,o] -> [b]."""
        return torch.rand_like(super().certainty(model, state, logits, task))


def untrained_exits(setup, precision):
    """A model with untrained exits. Returns (model, tokenizer, {label: inference})."""
    model = our_parts(setup, precision, "--early_exit").model
    policies = choose_policies(model.tasks, "auto")
    inferences = {
        f"{1 - staying:.0%} leave at each": RandomExits(policies, dict.fromkeys(policies, staying))
        for staying in STAYING
    }
    return model, BertTokenizer.from_pretrained(setup.weights), inferences


def trained_exits(setup):
    """The model of the saved run in `setup.run_dir`. Returns (model, tokenizer, {label: inference})."""
    run = load_run(setup.run_dir, setup.device)
    chosen = RunFolder(setup.run_dir).read_summary().get("exits")
    if not chosen:
        raise InputError(f"{setup.run_dir}: this run has no exits: train a run with --early_exit")
    settings = {f"threshold {t:g}": dict.fromkeys(run.model.tasks, t) for t in THRESHOLDS}
    settings["thresholds chosen"] = chosen["thresholds"]
    inferences = {label: ExitInference(chosen["policies"], t) for label, t in settings.items()}
    return run.model, run.tokenizer, inferences


# --- checkpoints --------------------------------------------------------------------------------------------------


def saving_calls(parts, batch, folder):
    """Take a step on a batch, then make functions that save what the loop saves: {label: function}."""
    run = RunFolder(folder)
    optimizer = parts.make_optimizer(dict(parts.model.named_parameters()))
    parts.model(batch).logits[parts.model.depth].sum().backward()
    optimizer.step()

    def save_last(_):
        run.save_last(snapshot(parts, optimizer, History()))

    return {
        "ours": lambda _: run.save_best(parts.model),
        "ours, all that resuming needs": save_last,
        "torch.save, the model": lambda _: torch.save(parts.model.state_dict(), run.path / "model.pt"),
    }
