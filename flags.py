"""The flags of multitask_classifier.py: those of the course and of the loop, and those of the methods' records.

A method's own flags stand in its file, in its record; METHODS lists the records. To add a method to the program, add
its record to that list (METHODS.md).
"""

import argparse
import sys
from pathlib import Path

import torch

import adapters
import early_exit
import gradients
import optimizer
import slf
import smart
from datasets import SPLITS
from errors import InputError, Parser
from methods import at_least_zero, below_one, phase_epochs, positive, positive_int, seed
from optimizer import OPTIMIZERS, SCHEDULES
from runs import damaged
from samplers import DATA_SPLITS, SAMPLERS
from tasks import ENCODINGS, TASKS, headless_losses

# In this order loss terms are added, plans wrapped and conflicts reported.
METHODS = [
    early_exit.EXITS,
    slf.TWO_STAGE,
    slf.SMART_ALTERNATING,
    slf.SLF,
    slf.GRADUAL_UNFREEZING,
    optimizer.LAYER_DECAY,
    smart.SMART,
    smart.BREGMAN,
    smart.NOISE_STABILITY,
    gradients.SURGERY,
    adapters.ADAPTERS,
]
PRECISION_HELP = "autocast precision; bf16 needs a GPU, or a CPU with AVX-512 or AMX, to be faster"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Defaults of --slf for data/sample, whose epochs have 75 steps: with fewer or smaller steps an exit ends stage 1 at the
# majority class. The learning rate was chosen for AdamW and a small BERT.
SAMPLE_DEFAULTS = {"slf_epochs": 2.5, "lr": 2.5e-4, "epochs": 3}
# The flags that a --preset stands for. "best" is the recipe of results/score.md.
PRESETS = {"best": "--epochs 3 --batch_size 16 --pooling mean --bregman sst sts"}
# flags that --option evaluate may change, with the files' flags; it takes all other flags from the run
EVALUATE_FLAGS = {"use_gpu", "data_dir", "eval_batch_size", "precision", "attention", "exit_policy", "exit_threshold"}


def file_flags():
    """The names of the flags that name one CSV file each: sst_train, para_dev, ..., and the output files."""
    return {f"{name}_{split}" for name in TASKS for split in SPLITS} | {"outputs"}


def pair_encoding(text):
    """An entry of --pairs: an encoding, or task=encoding."""
    if text.rpartition("=")[2] not in ENCODINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(ENCODINGS)}")
    return text


# --- the parser ---------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of every flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def make_parser():
    """All flags, in groups. Every method is off by default."""
    parser = Parser(
        description="Fine-tune one hand-written BERT on sentiment (SST), paraphrase (Quora) and similarity (STS).",
        epilog="A run directory holds everything that a run leaves behind; predict.py predicts from it.",
        formatter_class=Help,
    )
    add_course_flags(parser.add_argument_group("what to do"))
    files = "Each of the CSV files may also be named alone: --sst_train FILE, --para_dev FILE, --sts_test FILE, ..."
    add_data_flags(parser.add_argument_group("data", files))
    add_model_flags(parser.add_argument_group("model"))
    add_loop_flags(parser.add_argument_group("optimisation"))
    groups = {}
    for method in METHODS:
        if method.title not in groups:
            groups[method.title] = parser.add_argument_group(method.title)
        method.add_flags(groups[method.title])
    copies = "--sst_dev_out FILE, --para_test_out FILE, ... also copy that prediction file to FILE."
    add_output_flags(parser.add_argument_group("output", copies))
    return parser


def add_course_flags(group):
    """The course's flags."""
    group.add_argument(
        "--option",
        choices=("pretrain", "finetune", "evaluate"),
        default="finetune",
        help="pretrain: heads trained, BERT and the exits' poolers frozen, BERT without dropout; "
        "finetune: everything; evaluate: score a saved run",
    )
    stands_for = "; ".join(f"{name} stands for {words}" for name, words in PRESETS.items())
    group.add_argument("--preset", choices=tuple(PRESETS), help=stands_for)
    group.add_argument("--use_gpu", action="store_true", help="train on CUDA or Apple's MPS where there is one")
    group.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=["sst", "para", "sts"], help="what to learn")
    group.add_argument("--epochs", type=positive_int, default=5, help="number of epochs, each of --epoch_size")
    group.add_argument(
        "--epoch_size", type=phase_epochs, default=1.0, help="passes over each task's part of the data in one epoch"
    )
    group.add_argument("--batch_size", type=positive_int, default=16, help="examples per batch of a process")
    group.add_argument(
        "--lr", type=positive, help="peak learning rate; default by optimiser, training, and size of BERT"
    )
    group.add_argument("--hidden_dropout_prob", type=below_one, default=0.3, help="dropout of the heads alone")
    group.add_argument("--seed", type=seed, default=11711, help="seed of everything random")


def add_data_flags(group):
    """What is read, and how much of it an epoch takes."""
    group.add_argument("--data_dir", help="folder of the CSV files; default: data/, or data/sample if data/ has none")
    for name in TASKS:
        for split in SPLITS:
            group.add_argument(f"--{name}_{split}", metavar="CSV", help=argparse.SUPPRESS)
    text = "rows in an epoch. full: all; equal: Quora cut to SST's number; proportional: also 1/17 of STS"
    group.add_argument("--split", choices=DATA_SPLITS, default="equal", help=text)
    group.add_argument(
        "--train_rows", nargs="+", metavar="TASK=N", help="train on N rows of a task, drawn by --seed; default all"
    )
    group.add_argument(
        "--sampler",
        choices=tuple(SAMPLERS),
        default="random",
        help="which task comes next; proportional, sqrt, annealed are meant for --split full",
    )
    group.add_argument(
        "--max_length", type=positive_int, help="tokens per text or packed pair; default 512, or the weights' positions"
    )
    group.add_argument(
        "--pairs",
        type=pair_encoding,
        nargs="+",
        metavar="ENC",
        default=["concat"],
        help=f"how a pair enters BERT: {', '.join(ENCODINGS)}; also per task, para=siamese",
    )
    group.add_argument("--siamese_features", choices=("uv", "uvd"), default="uvd", help="[u; v] or [u; v; |u - v|]")


def add_model_flags(group):
    """The model, its losses and its arithmetic."""
    group.add_argument(
        "--weights",
        default="auto",
        help="auto (bert-base-uncased if it is there, else the small default), a name, or a folder",
    )
    group.add_argument(
        "--pooling",
        choices=("auto", "cls", "mean"),
        default="auto",
        help="sentence vector: BERT's pooler or a mean; auto: what the weights were tuned with",
    )
    group.add_argument("--attention", choices=("plain", "sdpa"), default="plain", help="written out, or torch's kernel")
    group.add_argument("--compile", action="store_true", help="torch.compile the layers: slow to start")
    group.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help=PRECISION_HELP)
    for task in TASKS.values():
        if len(task.objectives) > 1:
            names, default = tuple(task.objectives), task.default_loss
            group.add_argument(f"--{task.name}_loss", choices=names, default=default, help=f"loss of {task.title}")


def add_loop_flags(group):
    """The optimiser and its steps."""
    group.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="update rule")
    group.add_argument("--weight_decay", type=at_least_zero, default=0.01, help="decoupled weight decay")
    group.add_argument("--schedule", choices=tuple(SCHEDULES), default="linear", help="how the learning rate falls")
    group.add_argument("--warmup", type=below_one, default=0.1, help="part of the training in which it rises first")
    group.add_argument("--clip", type=at_least_zero, default=1.0, help="largest global gradient norm; 0: no clipping")
    group.add_argument("--accumulate", type=positive_int, default=1, help="batches of a task per optimiser step")
    group.add_argument("--task_weights", nargs="+", metavar="TASK=W", help="weights of the tasks' losses (1 each)")
    group.add_argument(
        "--step",
        choices=("one_task", "all_tasks"),
        help="tasks in one optimiser step; default one_task, with pcgrad and gradvac all_tasks",
    )


def add_output_flags(group):
    """Where a run goes."""
    group.add_argument("--run_dir", help="where the run goes; default runs/ and a name made of the flags")
    group.add_argument("--resume", action="store_true", help="continue the run in --run_dir")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --run_dir")
    group.add_argument("--eval_batch_size", type=positive_int, default=32, help="examples per batch of an evaluation")
    # the course's flags, kept as "sst-dev=FILE"
    for key in (f"{name}-{split}" for name in TASKS for split in ("dev", "test")):
        option, named = f"--{key.replace('-', '_')}_out", f"{key}={{}}".format
        group.add_argument(option, metavar="CSV", dest="outputs", action="append", type=named, help=argparse.SUPPRESS)


def parse_flags(argv=None):
    """Read the command line. Returns ({flag: value}, names of the flags that were typed, {flag: default})."""
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    if preset := parser.parse_args(argv).preset:
        print(f"--preset {preset}: {PRESETS[preset]}")
        # in front, so that what the user typed wins
        argv = [*PRESETS[preset].split(), *argv]
    flags, defaults = vars(parser.parse_args(argv)), vars(parser.parse_args([]))
    # without defaults, what the parser reads was typed
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return flags, set(vars(parser.parse_args(argv))), defaults


def check_flags(flags, typed):
    """Refuse combinations that make no sense, with a sentence that says so.

    Raises: InputError.
    """
    if flags["resume"]:
        # the other flags are the saved run's; runs.check_same_run compares them with those typed now
        conflicts = [(flags["overwrite"], "--resume continues a run, --overwrite replaces it: choose one")]
    else:
        which = flags["option"] == "evaluate" and not flags["run_dir"]
        conflicts = [(which, "--option evaluate: which run? give --run_dir"), *loop_conflicts(flags, typed)]
        for method in METHODS:
            conflicts += method.conflicts(flags, typed)
    hint = f" (--preset {flags['preset']} stands for {PRESETS[flags['preset']]})" if flags["preset"] else ""
    for applies, sentence in conflicts:
        if applies:
            raise InputError(sentence + hint)


def loop_conflicts(flags, typed):
    """Conflicts between flags that belong to no method: pairs (applies, sentence)."""
    for loss in headless_losses(flags):
        yield flags["option"] == "pretrain", f"{loss} has no head to train, and --option pretrain freezes BERT"
    takes_all = flags["step"] == "all_tasks" or flags["gradients"] != "sum"
    chosen = f"--sampler {flags['sampler']} chooses one task per step: here every step takes all tasks"
    yield "sampler" in typed and takes_all, chosen
    for key, _, path in (entry.partition("=") for entry in flags["outputs"] or ()):
        name, split = key.split("-")
        missing = name not in flags["tasks"] and flags["option"] != "evaluate"  # a saved run has tasks of its own
        yield missing, f"--{name}_{split}_out: this run has no task {name}: add it to --tasks"
        yield not path or Path(path).is_dir(), f"--{name}_{split}_out {path}: is no file: give the path of a CSV file"
    siamese = any("siamese" in entry for entry in flags["pairs"])
    yield "siamese_features" in typed and not siamese, "--siamese_features belongs to --pairs siamese"


# --- the flags of a saved run -------------------------------------------------------------------------------------


def recorded_flags(config, folder):
    """A saved run's flags, which the parser reads as if they were typed; a newer flag has its default.

    Raises: InputError for a flag that the program does not have, or a value that its parser refuses.
    """
    parser, path = make_parser(), Path(folder) / "config.json"
    actions, flags = {action.dest: action for action in parser._actions}, vars(parser.parse_args([]))
    for name, value in config["flags"].items():
        if name not in flags:
            raise InputError(f"{path}: this run was started with --{name}, which the program does not have now")
        with damaged(path):
            flags[name] = reread(parser, actions[name], value)
    return flags


def reread(parser, action, value):
    """The value of a flag, after the parser has read it as text: its types and choices apply to a file too.

    Raises: ValueError or InputError.
    """
    option, values = action.option_strings[0], value if isinstance(value, list) else []
    # a switch takes no value
    is_alone = not isinstance(value, list) and action.nargs != 0
    words = [f"{option}={value}"] if is_alone else [option, *map(str, values)]
    if action.dest == "outputs":  # entries such as sst-dev=FILE, of --sst_dev_out
        words = [f"--{'_out='.join(str(entry).replace('-', '_', 1).split('=', 1))}" for entry in values]
    read = action.default if value == action.default else getattr(parser.parse_args(words), action.dest)
    if read != value:
        raise ValueError(f"--{action.dest} is {value!r}, but would be read as {read!r}")
    return read
