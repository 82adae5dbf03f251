"""The rows of the tables in results/: every row is the flags of one training run, as data.

A group is a table. The command of a row is COMMON, the flags of its group, the flags of its block, and the row's own
flags. A later flag replaces an earlier one. Rows are trained in the order in which they stand here; further seeds of a
row come last.
"""

import re
import shlex
from dataclasses import dataclass, field

PEER, ENSEMBLE = "lab.peer", "lab.ensemble"
# the flags of every run: the small weights, which every reader can download
COMMON = "--weights minilm"
# for a CPU with instructions for bf16; without them a run takes many times as long as in fp32, the default
BF16 = "--precision bf16"
# columns of most tables
SCORES, COST = ("sst", "para", "sts", "norm"), ("train s", "eval s", "MiB")
# the flags that a group's scale multiplies: they are all that is measured in epochs, and can be a fraction
SCALED = ("--epoch_size", "--slf_epochs", "--gradual_unfreezing")


@dataclass(frozen=True)
class Group:
    """The runs of one table.

    `flags` are the flags of all its runs; `rows` is {name: flags of that run, which win}, or the whole command of
    another program of lab/;
    `removed` is {name: flags} of runs that today's program cannot repeat: their recorded numbers stay in the table.
    `blocks` is {title: flags}: they count for the rows whose names start with the title and a colon. `scale`
    multiplies the length of every run alike, so that a table fits into the time that there is. `scored_after` is
    {row: phase} of runs whose scores are those after a phase other than the last. `baseline` is the recipe that the
    others are compared with; `columns` are names of tables.COLUMNS; `paper` is {row: {column: number}} of the paper's
    table; `note` are sentences below the table.
    """

    flags: str
    rows: dict
    removed: dict = field(default_factory=dict)
    question: str = ""
    blocks: dict = field(default_factory=dict)
    scale: float = 1.0
    scored_after: dict = field(default_factory=dict)
    baseline: str = ""
    columns: tuple = ("sst", "cfimdb", "para", "sts", "norm", "raw", "best norm", "Quora positive", *COST)
    paper: dict = field(default_factory=dict)
    note: str = ""


def slug(name):
    """The directory name of a row."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def recipe_of(name):
    """A row's name without its seed. Rows of one recipe differ in the seed alone."""
    return name.partition(", seed ")[0]


def split_name(name):
    """A row's block (empty if it has none), recipe and seed number: "a: b, seed 2" is ("a", "b", 2)."""
    recipe, seed = recipe_of(name), name.partition(", seed ")[2]
    block, colon, rest = recipe.partition(": ")
    return block if colon else "", rest if colon else recipe, int(seed or 1)


def scaled(words, scale):
    """The words of a command with the lengths in epochs multiplied."""
    words = list(words)
    for k, flag in enumerate(words[:-1]):
        if flag in SCALED and scale != 1:
            words[k + 1] = f"{float(words[k + 1]) * scale:g}"
    return words


def own_words(group, name):
    """The flags of a row's block and the row's own, or another program's whole command."""
    content = GROUPS[group]
    block = content.blocks.get(split_name(name)[0], "")
    return scaled(shlex.split(f"{block} {content.rows[name]}"), content.scale)


def command_of(group, name):
    """The words of one row's command after `python`; without a name, what the rows of the group have in common."""
    words = own_words(group, name) if name else []
    if words[:1] == ["-m"]:
        return words
    return [
        "multitask_classifier.py",
        *scaled(shlex.split(f"{COMMON} {GROUPS[group].flags}"), GROUPS[group].scale),
        *words,
    ]


def more_seeds(rows, names, seeds=(2, 3)):
    """Some rows again with other seeds: {"name, seed 2": flags}."""
    return {f"{name}, seed {seed}": f"{rows[name]} --seed {seed}".strip() for seed in seeds for name in names}


# --- the project's own tables -------------------------------------------------------------------------------------

PEER_FLAGS = "-m lab.peer --epochs 4 --lr 5e-5 --batch_size 16 --precision bf16"
CORE = Group(
    f"{BF16} --epochs 3 --batch_size 16",
    {
        "mean pooling, seed 1": "--pooling mean --seed 1",
        "mean pooling, seed 2": "--pooling mean --seed 2",
        "mean pooling, seed 3": "--pooling mean --seed 3",
        "[CLS], seed 1": "--pooling cls --seed 1 --lr 1e-4 --step one_task",
        "[CLS], seed 2": "--pooling cls --seed 2",
        "[CLS], seed 3": "--pooling cls --seed 3",
        "mean pooling, heads' dropout 0.1": "--pooling mean --hidden_dropout_prob 0.1 --seed 1",
        "Bregman for SST and STS, seed 1": "--pooling mean --bregman sst sts --seed 1",
        "Bregman for SST and STS, seed 2": "--pooling mean --bregman sst sts --seed 2",
        "Bregman for SST and STS, seed 3": "--pooling mean --bregman sst sts --seed 3",
        "mean pooling, Bregman": "--pooling mean --bregman --bregman_weight 1 --seed 1",
        "transformers, seed 1": f"{PEER_FLAGS} --seed 1",
        "transformers, seed 2": f"{PEER_FLAGS} --seed 2",
        "transformers, seed 3": f"{PEER_FLAGS} --seed 3",
        "pretrain (BERT frozen)": "--pooling cls --option pretrain --seed 1 --epochs 10",
        "SST alone, last linear layer": "--pooling cls --tasks sst --option pretrain --seed 1 --epochs 10",
        "SST alone, full model": "--pooling cls --tasks sst --seed 1",
        "CFIMDB alone, last linear layer": "--pooling cls --tasks cfimdb --option pretrain --seed 1 --epochs 10 "
        "--max_length 128",
        "CFIMDB alone, full model": "--pooling cls --tasks cfimdb --seed 1 --epochs 2 --max_length 128",
    },
    note="`paper` is BERTer's table 1, with bert-base.",
    paper={
        "SST alone, last linear layer": {"sst": 0.390},
        "SST alone, full model": {"sst": 0.519},
        "CFIMDB alone, last linear layer": {"cfimdb": 0.780},
        "CFIMDB alone, full model": {"cfimdb": 0.967},
    },
)
# short runs with mean pooling: with it the small weights learn something of every task in a tenth of an epoch
SHORT = f"{BF16} --epochs 1 --epoch_size 0.1 --batch_size 16 --seed 1 --pooling mean"
METHODS = Group(
    SHORT,
    {
        "baseline": "",
        "SMART on Quora": "--smart para",
        "SMART, Gaussian form": "--smart --smart_form gaussian",
        "Bregman": "--bregman --bregman_weight 1",
        "SLF": "--slf --slf_epochs 0.02",
        "SLF, longer": "--slf --slf_epochs 0.25 --epoch_size 0.25",
        "Smart Alternating": "--smart_alternating --epochs 3 --epoch_size 0.05",
        "embed_concat": "--pairs embed_concat",
        "siamese": "--pairs siamese",
        "cosine losses": "--pairs siamese --para_loss cosine --sts_loss cosine",
        "PCGrad": "--gradients pcgrad",
        "GradVac": "--gradients gradvac",
        "adapter before": "--adapter before --lr 2e-3",
        "adapter after": "--adapter after --lr 2e-3",
        "adapter Houlsby": "--adapter houlsby --lr 2e-3",
        "adapter LHUC": "--adapter lhuc --lr 2e-3",
        "adapter PAL": "--adapter pal --lr 2e-3",
        "RMSprop": "--optimizer rmsprop --lr 1e-4",
        "SGD": "--optimizer sgd",
        "Full SMART": "--smart",
        "early exit, joint": "--early_exit",
        "LNSR": "--lnsr --lnsr_weight 1",
        "LNSR, weight 100": "--lnsr --lnsr_weight 100",
        "LNSR, weight 1000": "--lnsr --lnsr_weight 1000",
        "SMART, literal radius": "--smart --smart_radius 2e-5",
        "all tasks a step": "--step all_tasks",
        "early exit, weighted": "--early_exit --exit_loss weighted",
        "early exit, alternating": "--early_exit --exit_loss alternating",
        "early exit, two stage": "--early_exit --exit_loss two_stage",
        "cls pooling": "--pooling cls",
    },
    removed={"SLF, longer, states cached": "--slf --slf_epochs 0.25 --epoch_size 0.25 --slf_cache"},
)
# one default at a time against other values, in runs as short as those of the methods
DEFAULTS = Group(
    SHORT,
    {
        "AdamW, lr 1e-4": "--lr 1e-4",
        "AdamW, lr 5e-5": "--lr 5e-5",
        "AdamW, lr 2e-4": "--lr 2e-4",
        "AdamW, lr 4e-4": "--lr 4e-4",
        "SGD, lr 0.02": "--optimizer sgd --lr 0.02",
        "SGD, lr 0.1": "--optimizer sgd --lr 0.1",
        "SGD, lr 0.3": "--optimizer sgd --lr 0.3",
        "RMSprop, lr 5e-5": "--optimizer rmsprop --lr 5e-5",
        "RMSprop, lr 1e-4": "--optimizer rmsprop --lr 1e-4",
        "RMSprop, lr 2e-4": "--optimizer rmsprop --lr 2e-4",
        "Houlsby adapter, lr 1e-3": "--adapter houlsby --lr 1e-3",
        "Houlsby adapter, lr 4e-3": "--adapter houlsby --lr 4e-3",
        "no warm-up": "--warmup 0",
        "no clipping": "--clip 0",
        "constant learning rate": "--schedule constant",
        "cosine schedule": "--schedule cosine",
        "no weight decay": "--weight_decay 0",
    },
)
# SST and STS cut to SMARTer BERT's share of Quora (one to 16.6); every split trains on about as many examples
SPLITS = Group(
    f"{BF16} --epochs 4 --batch_size 16 --pooling mean --train_rows sst=854 sts=604",
    {
        f"{name}, seed {seed}": f"{flags} --seed {seed}"
        for seed in (1, 2)
        for name, flags in {
            "equal": "--split equal --epoch_size 3.375",
            "proportional": "--split proportional --epoch_size 4.5",
            "full": "--split full --epoch_size 0.5",
            "full, one task after another": "--split full --sampler sequential --epoch_size 0.5",
            "full, square root": "--split full --sampler sqrt --epoch_size 0.5",
            "full, annealed": "--split full --sampler annealed --epoch_size 0.5",
        }.items()
    },
    note="`paper` is SMARTer BERT's table 1: 10 epochs of bert-base on all of the data. After 40 epochs it has "
    ".519, .883, .880 (equal) and .510, .886, .870 (proportional); no row here trains so long.",
    paper={
        "equal": {"sst": 0.530, "para": 0.854, "sts": 0.874},
        "proportional": {"sst": 0.505, "para": 0.844, "sts": 0.863},
        "full, one task after another": {"sst": 0.465, "para": 0.883, "sts": 0.879},
    },
)
EXITS = Group(
    f"{BF16} --batch_size 16 --seed 1",
    {
        "SLF + early exit": "--pooling cls --slf --early_exit --epochs 2 --slf_epochs 0.1",
        "early exit, siamese, mean pooling": "--early_exit --pairs siamese --pooling mean --epochs 1",
        "early exit, mean pooling": "--early_exit --pooling mean --epochs 3",
    },
)

# --- BERTer's Table 2 ---------------------------------------------------------------------------------------------

SIAMESE, CONCAT = "--pairs siamese --siamese_features uv", "--pairs concat"
# Every row of the table trains on equally many examples. SLF spends half of them on stage 1, one sixth of that half on
# each of the six layers. Smart Alternating cuts its part into twelve phases, because it switches only between phases.
STAGE_1 = "--slf --slf_epochs 0.125 --epoch_size 0.25"
ALTERNATE = "--slf --slf_epochs 0.125 --smart_alternating --epochs 12 --epoch_size 0.0625"
FP32 = "--precision fp32"
TABLE_2 = {
    "Baseline": SIAMESE,
    "Full SMART": f"{SIAMESE} --smart {FP32}",
    "Early Exiting": f"{SIAMESE} --early_exit",
    "Full SMART + Early Exiting": f"{SIAMESE} --smart --early_exit {FP32}",
    "Conc Before Embed + Early Exit": f"{CONCAT} --early_exit",
    "Cos Loss + Early Exiting": f"{SIAMESE} --para_loss cosine --early_exit",
    "SLF": f"{SIAMESE} {STAGE_1}",
    "SLF + Early Exiting": f"{SIAMESE} {STAGE_1} --early_exit",
    "SLF + Conc Before Embed": f"{CONCAT} {STAGE_1} {FP32}",
    "SLF + Smart Alt": f"{SIAMESE} {ALTERNATE} {FP32}",
    "SLF + Smart Alt + Early Exit": f"{SIAMESE} {ALTERNATE} --early_exit {FP32}",
    "SLF + Smart Alt + Early Exit + Cos Loss": f"{SIAMESE} {ALTERNATE} --para_loss cosine --early_exit {FP32}",
}
TABLE_2_BEST = {
    "best recipe: Baseline": "",
    "best recipe: Early Exiting": "--early_exit",
    "best recipe: SLF": STAGE_1,
    "best recipe: SLF + Smart Alt + Early Exit": f"{ALTERNATE} --early_exit",
}
# sst, Quora, STS, dev score and training time as printed; most printed dev scores do not follow from the three others
PRINTED = {
    "Baseline": (0.314, 0.369, 0.199, 0.428, "15:36"),
    "Full SMART": (0.253, 0.485, 0.123, 0.433, "15:57"),
    "Early Exiting": (0.313, 0.768, 0.184, 0.476, "13:36"),
    "Full SMART + Early Exiting": (0.253, 0.632, 0.123, 0.482, "13:47"),
    "Conc Before Embed + Early Exit": (0.520, 0.625, 0.792, 0.595, "13:49"),
    "Cos Loss + Early Exiting": (0.501, 0.368, 0.771, 0.585, "4:20"),
    "SLF": (0.505, 0.640, 0.721, 0.592, "12:53"),
    "SLF + Early Exiting": (0.544, 0.658, 0.740, 0.650, "11:47"),
    "SLF + Conc Before Embed": (0.523, 0.651, 0.801, 0.671, "12:14"),
    "SLF + Smart Alt": (0.545, 0.614, 0.790, 0.676, "13:54"),
    "SLF + Smart Alt + Early Exit": (0.510, 0.632, 0.818, 0.683, "10:41"),
    "SLF + Smart Alt + Early Exit + Cos Loss": (0.510, 0.604, 0.818, 0.679, "5:43"),
}
BERTER_PAPER = {
    name: {
        "sst": sst,
        "para": para,
        "sts": sts,
        "norm": (sst + para + (sts + 1) / 2) / 3,
        "printed": dev,
        "h:min": time,
    }
    for name, (sst, para, sts, dev, time) in PRINTED.items()
}
BERTER_TABLE_2 = Group(
    f"{BF16} --epochs 3 --epoch_size 0.5 --split full --sampler sequential --batch_size 16 --lr 1e-4 "
    "--hidden_dropout_prob 0.3 --pooling cls --para_loss mse --seed 1",
    TABLE_2
    | TABLE_2_BEST
    | more_seeds(TABLE_2 | {"Baseline": f"{SIAMESE} {FP32}"}, ("Baseline", "SLF + Conc Before Embed")),
    question="Do the methods of BERTer's Table 2 help, each on equally many examples?",
    blocks={"best recipe": f"--pooling mean {CONCAT} --para_loss bce --sampler random {FP32}"},
    paper=BERTER_PAPER,
    baseline="Baseline",
    columns=(*SCORES, "best norm", "Quora positive", "norm with exits", "layers", "stages", "compute", *COST),
    note="All rows train on equally many examples: SLF spends half of them on stage 1, and Smart Alternating cuts its "
    "part into twelve phases, so that the tasks follow each other more often. The rows of SLF and of the cosine loss "
    "encode pairs apart, as the baseline; the paper's STS scores of these rows are almost those of packed pairs. "
    "`paper: norm` is computed from the paper's three scores, because most printed dev "
    "scores (`paper: printed`) do not follow from them. `paper: h:min` is its training time, for bert-base on a "
    "T4 GPU. Rows with `--precision fp32` are for a CPU without bf16: their seconds do not compare with the others'; "
    "an evaluation of more than 1,000 seconds ran in bf16 on such a CPU.",
)

# --- open questions -----------------------------------------------------------------------------------------------

EXIT_TRAINING = {
    "joint": "",
    "weighted": "--exit_loss weighted",
    "alternating": "--exit_loss alternating",
    "two stage": "--exit_loss two_stage --epochs 1",
    "self-distilled": "--exit_loss distilled",
}
EXIT_THRESHOLDS = Group(
    "--early_exit --pooling mean --epochs 2 --epoch_size 1 --batch_size 16 --seed 1",
    EXIT_TRAINING | more_seeds(EXIT_TRAINING, ("joint",), (2,)),
    question="How many layers does early exit save at which loss of score, and does the balance differ by task?",
    baseline="joint",
    columns=(*SCORES, "best norm", "norm with exits", "layers", "oracle's layers", *COST),
    note="The confusion matrix below is SMARTer BERT's figure 2, which shows that of its best model.",
)
# Equal compute: at scale 1 a run costs as many layer passes as two epochs of plain training (forward 1, backward 2, per
# layer and token; measure.training_cost counts them). Stage 1 of SLF trains layer i with i passes forward and 2
# backward, 33 for all six layers of 18 for one epoch of plain training.
SLF_ABLATION_ROWS = {
    "both stages": "--early_exit --slf --slf_epochs 0.36 --epoch_size 0.67",
    # --slf has a stage 2: here one batch a task, which is not scored
    "stage 1 only": "--early_exit --slf --slf_epochs 1.09 --epochs 1 --epoch_size 0.002",
    "stage 2 only": "--early_exit --epoch_size 1",
    "last exit alone": "--epoch_size 1",
    "gradual unfreezing": "--gradual_unfreezing 0.18 --epoch_size 0.67",
    "layer-wise decay": "--layer_decay 0.9 --epoch_size 1",
}
SLF_ABLATION = Group(
    "--epochs 2 --batch_size 16 --pooling mean --seed 1",
    SLF_ABLATION_ROWS | more_seeds(SLF_ABLATION_ROWS, SLF_ABLATION_ROWS, (2,)),
    # a quarter of the intended two epochs, which take a CPU without bf16 about half an hour a row
    scale=0.25,
    scored_after={"stage 1 only": "stage 1, layer 6/6"},
    question="Is Sequential Layer Focus better than other ways to train layer by layer, at equal compute?",
    baseline="last exit alone",
    columns=(*SCORES, "best norm", "norm with exits", "layers", "compute", *COST),
    note="All rows cost as many layer passes as half an epoch of plain training. `stage 1 only` is "
    "scored after stage 1, at the last exit; its stage 2 has one batch a task.",
)
ENCODINGS = {
    "concat": "--pairs concat",
    "embed_concat": "--pairs embed_concat",
    "siamese, uv": "--pairs siamese --siamese_features uv",
    "siamese, uvd": "--pairs siamese --siamese_features uvd",
}
EMBEDDING_ORDER_ROWS = {
    f"{pooling}: {name}": f"--pooling {pooling} {flags}"
    for pooling in ("mean", "cls")
    for name, flags in ENCODINGS.items()
}
EMBEDDING_ORDER = Group(
    "--tasks para sts --split full --epochs 2 --epoch_size 1 --batch_size 16 --seed 1",
    EMBEDDING_ORDER_ROWS | more_seeds(EMBEDDING_ORDER_ROWS, EMBEDDING_ORDER_ROWS, (2,)),
    # a quarter of the intended two epochs, which take a CPU without bf16 about 40 minutes a row
    scale=0.25,
    question="Does it help to embed the two texts of a pair apart, before they are joined?",
    blocks={"mean": "", "cls": ""},
    baseline="concat",
    columns=("para", "sts", "norm", "best norm", "Quora positive", *COST),
    note="`concat` joins the texts before the embedding, as BERT does; `embed_concat` is what BERTer's section 3.4 "
    "proposes; `siamese` encodes each text alone. MiniLM was tuned on pairs with siamese mean pooling.",
)
TENTH = "--train_rows sst=854 para=1417 sts=604"
SMART_WHEN_ROWS = {
    "no SMART": "",
    "SMART on Quora": "--smart para",
    "SMART on SST": "--smart sst",
    "SMART on STS": "--smart sts",
    "SMART on all tasks": "--smart",
    "SMART on Quora, a tenth of the radius": "--smart para --smart_radius 0.003",
    "SMART on Quora, three times the radius": "--smart para --smart_radius 0.09",
    "a tenth of the rows: no SMART": f"{TENTH} --epoch_size 1",
    "a tenth of the rows: SMART on Quora": f"{TENTH} --epoch_size 1 --smart para",
}
SMART_WHEN = Group(
    "--epochs 10 --epoch_size 0.1 --batch_size 16 --pooling mean --seed 1",
    SMART_WHEN_ROWS | more_seeds(SMART_WHEN_ROWS, ("no SMART", "SMART on Quora"), (2,)),
    question="Does SMART help at first and stop to help later, and on which task?",
    blocks={"a tenth of the rows": ""},
    baseline="no SMART",
    columns=(*SCORES, "best norm", "Quora positive", *COST),
)

# --- the figures of the papers ------------------------------------------------------------------------------------

QUARTER = "--epochs 1 --epoch_size 0.25 --batch_size 16 --pooling mean --seed 1"
BERTER_FIGURES = Group(
    QUARTER,
    {
        "lr 1e-4, batch 16, dropout 0.3": "--lr 1e-4",
        **{f"lr {rate}": f"--lr {rate}" for rate in ("1.3e-5", "3e-5", "3e-4", "1e-3")},
        **{f"batch {size}": f"--lr 1e-4 --batch_size {size}" for size in (8, 32, 64)},
        **{f"dropout {p}": f"--lr 1e-4 --hidden_dropout_prob {p}" for p in (0, 0.1, 0.2)},
        "SST over epochs": "--lr 1e-4 --tasks sst --epochs 8",
    },
    question="Which learning rate, batch size, dropout and number of epochs are good (BERTer, figures 1 to 4)?",
    baseline="lr 1e-4, batch 16, dropout 0.3",
    columns=(*SCORES, "best norm", "Quora positive", *COST),
    note="SMARTer BERT's table 2 compares the same four values of dropout (its text copy has lost the numbers).",
)
# equally many examples under every split; full has 28,753 in an epoch, equal 23,128, proportional 17,444
SMARTER = Group(
    QUARTER,
    {
        "learning curves: no SMART": f"{TENTH} --epochs 8 --epoch_size 1",
        "learning curves: Gaussian SMART": f"{TENTH} --epochs 8 --epoch_size 1 --smart --smart_form gaussian",
        "splits: full": "--split full --epochs 4 --epoch_size 0.0625",
        "splits: equal": "--split equal --epochs 4 --epoch_size 0.0777",
        "splits: proportional": "--split proportional --epochs 4 --epoch_size 0.103",
        "surgery: all tasks a step": "--step all_tasks",
        "surgery: PCGrad": "--gradients pcgrad",
        "surgery: GradVac": "--gradients gradvac",
        "surgery: PCGrad, full split": "--gradients pcgrad --split full",
        "surgery: PCGrad, proportional split": "--gradients pcgrad --split proportional",
    },
    question="Does Gaussian SMART regularise, and do the gradients of the tasks conflict (SMARTer BERT)?",
    blocks={"learning curves": "", "splits": "", "surgery": ""},
    columns=(*SCORES, "best norm", "train sst", "Quora positive", *COST),
    note="The learning curves (SMARTer BERT's figure 1) train on a tenth of the rows, eight times. The splits (its "
    "figure 3) train on equally many examples. Gradient surgery takes one batch of every task in each step, so it "
    "takes fewer steps than the splits' rows. The memory of `all tasks a step` is that before a repair "
    "(LOG.md); it takes as much as PCGrad now.",
)
ADAPTATIONS = Group(
    "--epochs 4 --epoch_size 0.0625 --batch_size 16 --pooling mean --seed 1",
    {
        "plain (SST only)": "--tasks sst",
        "baseline": "",
        "SMART with Bregman": "--smart --bregman",
        "adapter before": "--adapter before",
        "adapter after": "--adapter after",
        "Houlsby": "--adapter houlsby",
        "LHUC": "--adapter lhuc",
        "PAL": "--adapter pal",
        "LoRA": "--adapter lora",
    },
    question="How do adapters compare with fine-tuning of all parameters (layer-level adaptations, table 1)?",
    baseline="baseline",
    columns=(*SCORES, "best norm", "trained", *COST),
    note="The paper trained bert-base at a learning rate of 1e-3 for ten epochs. Here adapters train at 2e-3, their "
    "default, and all other rows at 1e-4. Untrained heads cannot be scored, so the plain row has SST alone.",
    paper={
        "plain (SST only)": {"sst": 0.319, "para": 0.552, "sts": -0.067},
        "baseline": {"sst": 0.293, "para": 0.586, "sts": -0.047},
        "SMART with Bregman": {"sst": 0.308, "para": 0.582, "sts": 0.202},
        "adapter before": {"sst": 0.312, "para": 0.584, "sts": 0.195},
        "adapter after": {"sst": 0.301, "para": 0.563, "sts": -0.087},
    },
)
RECIPE = {"best recipe, seed 1": "--seed 1", "best recipe, seed 2": "--seed 2", "best recipe, seed 3": "--seed 3"}
SCORE = Group(
    "--epochs 3 --epoch_size 1 --batch_size 16 --pooling mean --bregman sst sts",
    RECIPE | {"ensemble of three seeds": f"-m {ENSEMBLE} {' '.join(map(slug, RECIPE))}"},
    question="What do three models of the best recipe score, alone and as an ensemble?",
    columns=(*SCORES, "best norm", "Quora positive", *COST),
)
GROUPS = {
    "core": CORE,
    "methods": METHODS,
    "defaults": DEFAULTS,
    "splits": SPLITS,
    "exits": EXITS,
    "berter-table2": BERTER_TABLE_2,
    "exit-thresholds": EXIT_THRESHOLDS,
    "slf-ablation": SLF_ABLATION,
    "embedding-order": EMBEDDING_ORDER,
    "smart-when": SMART_WHEN,
    "berter-figures": BERTER_FIGURES,
    "smarter": SMARTER,
    "adaptations": ADAPTATIONS,
    "score": SCORE,
}
