"""The flags of multitask_classifier.py: their names, types, groups, and which of them exclude each other.

Read first: README.md (what the methods are). What they do is decided in multitask_classifier.py, after its loop.
"""

import argparse

from adapters import KINDS
from datasets import SPLITS
from errors import InputError, Parser
from optimizer import SCHEDULES
from samplers import DATA_SPLITS, SAMPLERS
from tasks import ENCODINGS, PARA_LOSSES, STS_LOSSES, TASK_NAMES

OPTIMIZERS = ("adamw", "rmsprop", "sgd")
PRECISIONS = ("fp32", "bf16", "fp16")
EXIT_LOSSES = ("joint", "weighted", "two_stage", "alternating")
GRADIENTS = ("sum", "pcgrad", "gradvac")


def positive_int(text):
    """An argparse type: a whole number above 0."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def seed(text):
    """An argparse type: a whole number from 0 that every generator takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 2**63")
    return value


def at_least_zero(text):
    """An argparse type: a number that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive(text):
    """An argparse type: a number above 0."""
    value = at_least_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text):
    """An argparse type: a number from 0 to below 1."""
    value = at_least_zero(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def per_task(entries, flag, names, convert):
    """Read `value` or `task=value ...` entries into {task: value}; what names a task wins, in whatever order."""
    chosen = {}
    for entry in sorted(entries or (), key=lambda entry: "=" in entry):
        name, equals, value = entry.rpartition("=")
        try:
            value = convert(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{flag} {entry}: {error}") from None
        for task in [name] if equals else names:
            if task not in names:
                raise InputError(f"{flag} {entry}: no such task here; tasks are {', '.join(names)}")
            chosen[task] = value
    return chosen


def threshold(text):
    """An exit threshold, for per_task: a number, or None for auto."""
    return None if text == "auto" else at_least_zero(text)


def sweep_levels(entries):
    """The thresholds of a comma-separated list, as --option evaluate sweeps them; none for anything else."""
    if len(entries) != 1 or "," not in entries[0]:
        return []
    try:
        return [at_least_zero(level) for level in entries[0].split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"--exit_threshold {entries[0]}: {error}") from None


def encoding(text):
    """A pair encoding, for per_task."""
    if text not in ENCODINGS:
        raise ValueError(f"{text!r} is not one of {', '.join(ENCODINGS)}")
    return text


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of every flag that has one."""

    def _get_help_string(self, action):
        has_one = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_one else action.help


def make_parser():
    """All flags, in groups. Every extension is off by default."""
    parser = Parser(
        description="Fine-tune one hand-written BERT on sentiment (SST), paraphrase (Quora) and similarity (STS).",
        epilog="A run directory holds everything a run leaves behind; predict.py answers from it.",
        formatter_class=Help,
    )
    course = parser.add_argument_group("what to do")
    course.add_argument(
        "--option",
        choices=("pretrain", "finetune", "evaluate"),
        default="finetune",
        help="pretrain: BERT frozen, heads trained; finetune: everything; evaluate: score a saved run (--run_dir)",
    )
    course.add_argument("--use_gpu", action="store_true", help="train on CUDA or Apple's MPS where there is one")
    course.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=["sst", "para", "sts"], help="what to learn")
    course.add_argument("--epochs", type=positive_int, default=5, help="passes over each task's share of the data")
    course.add_argument("--epoch_size", type=positive, default=1.0,
                        help="share of an epoch between two evaluations: what --epochs counts")
    course.add_argument("--batch_size", type=positive_int, default=16, help="examples per batch of a process")
    course.add_argument("--lr", type=positive,
                        help="peak learning rate; default by optimiser, by what is trained and by the size of BERT")
    course.add_argument("--hidden_dropout_prob", type=share, default=0.3, help="dropout before the heads")
    course.add_argument("--seed", type=seed, default=11711, help="seed of everything random")

    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", help="folder of the course's CSV files; default data/, if bare data/sample")
    for name in TASK_NAMES:
        for split in SPLITS:
            data.add_argument(f"--{name}_{split}", metavar="CSV", help=f"the {name} {split} file, if not in --data_dir")
    data.add_argument("--split", choices=DATA_SPLITS, default="equal", help="how much of each task an epoch takes")
    data.add_argument("--train_rows", nargs="+", metavar="TASK=N",
                      help="train on N rows of a task, drawn by --seed; default all")
    data.add_argument("--sampler", choices=SAMPLERS, default="random",
                      help="which task comes next; proportional, sqrt, annealed differ with --split full")
    data.add_argument("--max_length", type=positive_int,
                      help="tokens per text or packed pair; default 512, or the weights' positions if they are fewer")
    data.add_argument("--pairs", nargs="+", metavar="ENC", default=["concat"],
                      help=f"how a pair enters BERT: {', '.join(ENCODINGS)}; also per task, para=siamese")
    data.add_argument("--siamese_features", choices=("uv", "uvd"), default="uvd", help="[u; v] or [u; v; |u - v|]")

    model = parser.add_argument_group("model")
    model.add_argument("--weights", default="auto",
                       help="auto (bert-base-uncased if it is there, else the small default), a name, or a folder")
    model.add_argument("--pooling", choices=("cls", "mean"), default="cls",
                       help="sentence vector: BERT's pooler or a mean")
    model.add_argument("--attention", choices=("plain", "sdpa"), default="plain", help="written out, or torch's kernel")
    model.add_argument("--compile", action="store_true", help="torch.compile the layers: slow to start; README, Speed")
    model.add_argument("--precision", choices=PRECISIONS, default="fp32", help="autocast precision")
    model.add_argument("--para_loss", choices=tuple(PARA_LOSSES), default="bce", help="loss of the paraphrase task")
    model.add_argument("--sts_loss", choices=tuple(STS_LOSSES), default="mse", help="loss of the similarity task")
    model.add_argument("--cosine_margin", type=float, default=0.0, help="margin of the cosine embedding loss")

    plan = parser.add_argument_group("optimisation")
    plan.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="update rule")
    plan.add_argument("--momentum", type=share, default=0.0, help="momentum of --optimizer sgd")
    plan.add_argument("--nesterov", action="store_true", help="sgd: the gradient after the momentum's own step")
    plan.add_argument("--weight_decay", type=at_least_zero, default=0.01, help="decoupled weight decay")
    plan.add_argument("--schedule", choices=tuple(SCHEDULES), default="linear", help="course of the learning rate")
    plan.add_argument("--warmup", type=share, default=0.1, help="share of the training that warms up")
    plan.add_argument("--clip", type=at_least_zero, default=1.0, help="largest global gradient norm; 0: no clipping")
    plan.add_argument("--accumulate", type=positive_int, default=1, help="batches per optimiser step")
    plan.add_argument("--task_weights", nargs="+", metavar="TASK=W", help="weights of the tasks' losses (1 each)")
    plan.add_argument("--step", choices=("one_task", "all_tasks"),
                      help="tasks in one optimiser step; default one_task, with pcgrad and gradvac all_tasks")
    plan.add_argument("--gradients", choices=GRADIENTS, default="sum", help="how the tasks' gradients are combined")

    exits = parser.add_argument_group("early exit and training plans (BERTer 3.3)")
    exits.add_argument("--early_exit", action="store_true", help="an exit after every layer, used at inference")
    exits.add_argument("--exit_policy", choices=("auto", "confidence", "lte"), default="auto",
                       help="what decides to leave; auto: confidence for classification, LTE for regression")
    exits.add_argument("--exit_threshold", nargs="+", metavar="T", default=["auto"],
                       help="leave at this certainty: a number, task=number, or auto (chosen on half of dev); "
                       "with --option evaluate also a list to sweep, .5,.9,.99")
    exits.add_argument("--lte_threshold", type=at_least_zero, help="threshold of the tasks that leave by LTE")
    exits.add_argument("--exit_quality", type=share, default=0.005, metavar="LOSS",
                       help="share of the mean score that auto thresholds may lose on the rows they are chosen on")
    exits.add_argument("--exit_loss", choices=EXIT_LOSSES, default="joint", help="how the exits are trained")
    exits.add_argument("--slf", action="store_true", help="Sequential Layer Focus: layer by layer, then all together")
    exits.add_argument("--slf_epochs", type=positive, default=0.25, help="epochs per layer in stage 1 of --slf")
    exits.add_argument("--slf_cache", action="store_true",
                       help="stage 1 of --slf on the same examples for all layers, frozen layers' states kept")
    exits.add_argument("--smart_alternating", action="store_true",
                       help="alternate between the last exit and all exits by the dev score")

    smooth = parser.add_argument_group("regularisation (BERTer 3.2, SMARTer BERT 4.3, layer-level adaptations 3.1)")
    smooth.add_argument("--smart", nargs="*", metavar="TASK", help="SMART for the named tasks; none named: all")
    smooth.add_argument("--smart_form", choices=("adversarial", "gaussian"), default="adversarial",
                        help="worst perturbation within a radius, or Gaussian noise")
    smooth.add_argument("--smart_weight", type=at_least_zero, help="lambda; default 1, gaussian 10")
    smooth.add_argument("--smart_radius", type=positive,
                        help="radius of the perturbation over the embeddings' RMS; default .03")
    smooth.add_argument("--smart_step", type=positive, help="ascent step over the embeddings' RMS; default 3")
    smooth.add_argument("--smart_noise", type=positive,
                        help="start noise over the embeddings' RMS, default .03; gaussian: its standard deviation, .05")
    smooth.add_argument("--bregman", type=at_least_zero, metavar="W", default=0.0,
                        help="weight of the Bregman proximal term")
    smooth.add_argument("--bregman_tasks", nargs="+", metavar="TASK", help="the tasks that it is for; default all")
    smooth.add_argument("--lnsr", type=at_least_zero, metavar="W", default=0.0,
                        help="weight of layer-wise noise stability, a mean over the hidden units: 1 hardly counts")
    smooth.add_argument("--lnsr_noise", type=positive, default=0.05,
                        help="its noise's standard deviation over the embeddings' RMS")

    layers = parser.add_argument_group("adapters (layer-level adaptations 2.1, 3.2)")
    layers.add_argument("--adapter", nargs="+", choices=("none", *KINDS), default=["none"],
                        help="task-specific parts in every layer; lhuc may be added to another one")
    layers.add_argument("--adapter_size", type=positive_int, help="bottleneck size; default the literature's")
    layers.add_argument("--train_backbone", action="store_true", help="train BERT along with the adapters")

    output = parser.add_argument_group("output")
    output.add_argument("--run_dir", help="where the run goes; default runs/ and a name made of the flags")
    output.add_argument("--resume", action="store_true", help="continue the run in --run_dir")
    output.add_argument("--overwrite", action="store_true", help="replace the run in --run_dir")
    output.add_argument("--keep_last", action="store_true", help="keep last.pt when the run is complete")
    output.add_argument("--log_every", type=positive_int, default=50, help="steps per line of log.jsonl")
    output.add_argument("--save_every", type=positive, default=10.0, help="minutes between saved states within a phase")
    output.add_argument("--eval_batch_size", type=positive_int, default=32, help="examples per batch of an evaluation")
    return parser


def parse_flags(argv=None):
    """Read the command line. Returns ({flag: value}, names of the flags that were given, {flag: default})."""
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    defaults = vars(parser.parse_args([]))
    bare = make_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return flags, set(vars(bare.parse_args(argv))), defaults


EXIT_FLAGS = ("exit_policy", "exit_threshold", "lte_threshold", "exit_quality")
SMART_FLAGS = ("smart_form", "smart_weight", "smart_radius", "smart_step", "smart_noise")


def has_exits(flags):
    """Whether the run builds an exit after every layer."""
    return flags["early_exit"] or flags["slf"] or flags["smart_alternating"] or flags["exit_loss"] != "joint"


def check_flags(flags, given):
    """Refuse combinations that make no sense, with a sentence that says so.

    Raises: InputError.
    """
    frozen, adapted = flags["option"] == "pretrain", flags["adapter"] != ["none"]
    cosine = [name for name in ("para", "sts") if name in flags["tasks"] and flags[f"{name}_loss"] == "cosine"]
    conflicts = [
        (
            frozen and cosine,
            f"--{''.join(cosine[:1])}_loss cosine has no head to train, and --option pretrain freezes BERT",
        ),
        (
            flags["exit_loss"] == "two_stage" and flags["pooling"] == "mean" and cosine,
            f"--{''.join(cosine[:1])}_loss cosine with --pooling mean has exits without parameters: nothing for the "
            "second stage of --exit_loss two_stage",
        ),
        (frozen and flags["slf"], "--slf trains BERT layer by layer, --option pretrain freezes it"),
        (frozen and flags["lnsr"], "--lnsr steadies BERT's layers, --option pretrain freezes them"),
        (frozen and adapted, "--adapter freezes BERT by itself (without --train_backbone): use --option finetune"),
        (
            flags["exit_loss"] == "two_stage" and flags["slf"],
            "--exit_loss two_stage and --slf are both plans with a first stage: choose one",
        ),
        (
            flags["exit_loss"] in ("two_stage", "alternating") and flags["smart_alternating"],
            f"--exit_loss {flags['exit_loss']} and --smart_alternating both choose the exits: choose one",
        ),
        ("none" in flags["adapter"] and len(flags["adapter"]) > 1, "--adapter none excludes the other adapters"),
        (
            len(set(flags["adapter"]) - {"lhuc"}) > 1,
            f"--adapter {' '.join(flags['adapter'])}: only lhuc may be combined with another adapter",
        ),
        (flags["train_backbone"] and not adapted, "--train_backbone belongs to --adapter: BERT is trained anyway"),
        ("adapter_size" in given and not adapted, "--adapter_size belongs to --adapter"),
        (
            flags["option"] != "evaluate" and sweep_levels(flags["exit_threshold"]),
            "--exit_threshold with a list sweeps a saved run: use it with --option evaluate",
        ),
        *(
            (name in given and not flags["slf"], f"--{name} belongs to --slf")
            for name in ("slf_epochs", "slf_cache")
        ),
        (
            flags["slf_cache"] and flags["slf_epochs"] > 1,
            f"--slf_cache keeps the states of one epoch at most: --slf_epochs {flags['slf_epochs']:g} is too long",
        ),
        *(
            (
                flags["slf_cache"] and flags[name] not in (0.0, None),
                f"--slf_cache keeps what --{name} would change: leave one of them out",
            )
            for name in ("smart", "bregman", "lnsr")
        ),
        (
            flags["gradients"] != "sum" and flags["step"] == "one_task",
            f"--gradients {flags['gradients']} compares the tasks of one step: leave out --step one_task",
        ),
        ("momentum" in given and flags["optimizer"] != "sgd", "--momentum belongs to --optimizer sgd"),
        (flags["nesterov"] and not flags["momentum"], "--nesterov looks ahead along the momentum: give --momentum"),
        (
            "sampler" in given and (flags["step"] == "all_tasks" or flags["gradients"] != "sum"),
            f"--sampler {flags['sampler']} chooses one task per step: here every step takes all tasks",
        ),
        ("cosine_margin" in given and flags["para_loss"] != "cosine", "--cosine_margin belongs to --para_loss cosine"),
        (
            "siamese_features" in given and not any("siamese" in entry for entry in flags["pairs"]),
            "--siamese_features belongs to --pairs siamese",
        ),
        (
            flags["gradients"] != "sum" and len(flags["tasks"]) < 2,
            f"--gradients {flags['gradients']} needs at least two --tasks",
        ),
    ]
    exits = flags["early_exit"] or flags["option"] == "evaluate"
    conflicts += [(name in given and not exits, f"--{name} belongs to --early_exit") for name in EXIT_FLAGS]
    conflicts += [(name in given and flags["smart"] is None, f"--{name} belongs to --smart") for name in SMART_FLAGS]
    gaussian = flags["smart_form"] == "gaussian"
    conflicts += [
        (gaussian and name in given, f"--{name} belongs to --smart_form adversarial")
        for name in ("smart_radius", "smart_step")
    ]
    conflicts += [("lnsr_noise" in given and not flags["lnsr"], "--lnsr_noise belongs to --lnsr")]
    conflicts += [(flags["bregman_tasks"] and not flags["bregman"], "--bregman_tasks belongs to --bregman")]
    conflicts += [
        (name not in flags["tasks"], f"--{flag} {name}: not among --tasks {' '.join(flags['tasks'])}")
        for flag in ("smart", "bregman_tasks")
        for name in flags[flag] or ()
    ]
    if flags["resume"]:
        # the other flags are the saved run's: whether those given now are the same, check_same_run says
        conflicts = [(flags["overwrite"], "--resume continues a run, --overwrite replaces it: choose one")]
    for applies, sentence in conflicts:
        if applies:
            raise InputError(sentence)
