"""The same recipe written with transformers: the peer that the benchmark times ours against, and a training program.

It is written out so that a reader can judge whether the comparison is fair. Two settings:

    plain   AutoModel with its defaults; the fast tokenizer runs in the collate function; random batches, each padded
            to its longest text; torch.optim.AdamW with its defaults
    best    AutoModel with sdpa attention; every text is tokenised once, before training; transformers'
            length-grouped batches; torch.optim.AdamW(fused=True); evaluation sorted by length

    python -m lab.peer --run_dir runs/experiments/core/transformers --epochs 4

This trains on the equal split with the best settings and writes the files of an ordinary run: config.json, log.jsonl,
predictions/ (of the epoch with the best dev score) and summary.json. Needs ./setup.sh --dev.
"""

import argparse
import csv
import random
import sys
import time

# first: it needs none of the packages, and prints what to do if they are not installed
from errors import InputError, run_script, stop_without  # isort: skip

try:
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
    from tqdm import tqdm
except ImportError as error:
    stop_without(error.name)

from datasets import find_data_dir
from evaluation import mean_norm, prediction_text
from files import write_whole
from methods import positive_int
from optimizer import parameter_groups
from runs import RunFolder, describe_environment, hash_weights, memory_mib, sha256
from samplers import phase_rows, rows_per_epoch
from tasks import build_tasks
from weights import find_weights

WEIGHT_DECAY, CLIP, WARMUP, MAX_LENGTH, EVAL_BATCH = 0.01, 1.0, 0.1, 512, 32
CPU = torch.device("cpu")


def import_transformers():
    """Import transformers, without its progress bars and log lines.

    Raises: InputError if it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("transformers, the peer, is not installed: run ./setup.sh --dev") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def outputs_of(task):
    """Number of a head's outputs: one per class, but a single one for two classes and for a regression."""
    return len(task.label_names) if len(task.label_names) > 2 else 1


class PeerModel(nn.Module):
    """AutoModel with a linear head per task on its pooler output."""

    def __init__(self, weights, tasks, dropout, **options):
        super().__init__()
        self.bert = import_transformers().AutoModel.from_pretrained(weights, **options)
        self.dropout = nn.Dropout(dropout)
        d = self.bert.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(d, outputs_of(task)) for name, task in tasks.items()})

    def forward(self, task_name, **inputs):
        """Compute the logits of a task. Shapes: inputs [b,s] -> [b,o]."""
        return self.heads[task_name](self.dropout(self.bert(**inputs).pooler_output))


def peer_loss(task, logits, labels):
    """Compute the mean loss of a task. Shapes: logits [b,o], labels [b]."""
    logits = logits.float()
    if task.is_regression:
        return F.mse_loss(logits.squeeze(-1), labels)
    if logits.shape[-1] > 1:
        return F.cross_entropy(logits, labels.long())
    return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)


def peer_optimizer(model, lr, **options):
    """Make torch.optim.AdamW without weight decay on biases and LayerNorm."""
    return torch.optim.AdamW(parameter_groups(model.named_parameters(), WEIGHT_DECAY), lr=lr, **options)


class PeerData:
    """One CSV file as lists, without the rows that lack a label or a text.

    With `tokenize_once` all texts are tokenised here; without it, `collate` tokenises each batch.
    """

    def __init__(self, path, task, tokenizer, tokenize_once):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        rows = [row for row in rows if all(row[name] for name in (*task.columns, task.label_column))]
        self.task, self.ids = task, [row["id"] for row in rows]
        self.columns = [[row[name] for row in rows] for name in task.columns]
        self.labels = [float(row[task.label_column]) for row in rows]
        self.tokenizer, self.encoded = tokenizer, None
        if tokenize_once:
            self.encoded = tokenizer(*self.columns, truncation=True, max_length=MAX_LENGTH)

    def lengths(self):
        """Number of tokens of each example; needs `tokenize_once`."""
        return [len(ids) for ids in self.encoded["input_ids"]]

    def collate(self, rows):
        """Make the inputs and labels of a batch, padded to its longest example. Shapes: inputs [b,s], labels [b]."""
        if self.encoded is None:
            texts = [[column[i] for i in rows] for column in self.columns]
            inputs = self.tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        else:
            examples = {key: [values[i] for i in rows] for key, values in self.encoded.items()}
            inputs = self.tokenizer.pad(examples, return_tensors="pt")
        return dict(inputs), torch.tensor([self.labels[i] for i in rows])


def cut(order, size):
    """Cut a list into consecutive batches."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def peer_batches(data, rows, batch_size, best):
    """Cut rows of one file into batches: random ones, or length-grouped ones as in transformers' Trainer."""
    if not best:
        return cut([rows[i] for i in torch.randperm(len(rows)).tolist()], batch_size)
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = data.lengths()
    order = get_length_grouped_indices([lengths[row] for row in rows], batch_size)
    return cut([rows[i] for i in order], batch_size)


def mixed_steps(data, rows, batch_size, best, rng):
    """List the (task, rows) of every step of an epoch over {task: rows}, the tasks in random order."""
    steps = [(name, b) for name, part in data.items() for b in peer_batches(part, rows[name], batch_size, best)]
    rng.shuffle(steps)
    return steps


def linear_schedule(optimizer, steps):
    """Make the learning rate's schedule: linear warm-up, then linear decay to 0 after `steps` steps."""
    return import_transformers().get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)


def peer_train(model, data, steps, optimizer, schedule, precision, progress=False):
    """Train on the (task, rows) of `steps`, an epoch of {task: PeerData}; `precision()` makes the autocast context."""
    model.train()
    device = next(model.parameters()).device
    for name, rows in tqdm(steps, "transformers", disable=None if progress else True):
        inputs, labels = data[name].collate(rows)
        inputs, labels = {k: v.to(device) for k, v in inputs.items()}, labels.to(device)
        with precision():
            logits = model(name, **inputs)
        loss = peer_loss(data[name].task, logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def peer_predict(model, data, batch_size, precision, best):
    """Predict every row of a PeerData, in batches of the file's order or, with `best`, of decreasing length.

    Shapes: returns [n], in the file's order.
    """
    model.eval()
    device, order = next(model.parameters()).device, np.arange(len(data.labels))
    if best:
        order = np.argsort(-np.array(data.lengths()), kind="stable")
    outputs = []
    for rows in cut(order.tolist(), batch_size):
        inputs, _ = data.collate(rows)
        with precision():
            outputs.append(model(data.task.name, **{k: v.to(device) for k, v in inputs.items()}).float())
    outputs = torch.cat(outputs).cpu()  # [n,o]
    if data.task.is_regression:
        predictions = outputs.squeeze(-1).clamp(*data.task.label_range)
    else:
        # one output is the logit of class 1, several are the logits of all classes
        predictions = outputs.argmax(-1) if outputs.shape[-1] > 1 else (outputs.squeeze(-1) > 0).long()
    values = np.empty(len(order))
    values[order] = predictions.numpy()
    return values


def peer_scores(data, values):
    """Score {task: predictions} on {task: PeerData}. Returns {"tasks": {task: {metric: score}}, "raw", "norm"}."""
    metrics, tasks = {}, {name: part.task for name, part in data.items()}
    main = {name: tasks[name].metric.function(values[name], np.array(data[name].labels)) for name in data}
    for name, task in tasks.items():
        metrics[name] = {task.metric.name: main[name]}
        if len(task.label_names) == 2:
            metrics[name]["positive_rate"] = float(values[name].mean())
    return {"tasks": metrics, "raw": float(np.mean(list(main.values()))), "norm": mean_norm(tasks, main)}


# --- the program --------------------------------------------------------------------------------------------------


def make_parser():
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.peer",
        description="Train on SST, Quora and STS with transformers and torch.optim, to compare with our program.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample")
    parser.add_argument("--weights", default="minilm", help="a name, or a folder of the hub's layout")
    parser.add_argument("--run_dir", required=True, help="the run directory; it must not exist")
    parser.add_argument("--epochs", type=positive_int, default=4, help="epochs of the equal split")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="examples a step")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate: linear, with warm-up")
    parser.add_argument("--hidden_dropout_prob", type=float, default=0.1, help="the heads' dropout")
    parser.add_argument("--seed", type=int, default=1, help="seed of the heads, of the order and of dropout")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="autocast precision")
    return parser


def peer_config(args, weights, files):
    """What config.json records; `files` is {"task split": path}."""
    config = {"flags": {k: v for k, v in vars(args).items() if k != "run_dir"}}
    config["command"] = f"python -m lab.peer {' '.join(sys.argv[1:])}"
    config |= {**describe_environment(CPU), "transformers": import_transformers().__version__}
    config["data"] = {name: sha256(path) for name, path in files.items()}
    config["weights"] = {"folder": str(weights), "sha256": hash_weights(weights)}
    return config


def plan_epochs(args, train):
    """The steps of every epoch over {task: PeerData}: lists of (task, rows)."""
    sizes, rng = {name: len(part.labels) for name, part in train.items()}, random.Random(args.seed)
    per_epoch = rows_per_epoch({name: part.task for name, part in train.items()}, sizes, "equal")
    rows = [phase_rows(per_epoch, sizes, epoch, 1.0, args.seed) for epoch in range(args.epochs)]
    return [mixed_steps(train, of_tasks, args.batch_size, True, rng) for of_tasks in rows]


def write_predictions(folder, data, values):
    """Write {task: dev predictions} in the course's format."""
    for name, part in data.items():
        text = prediction_text(part.task, part.ids, values[name])
        write_whole(folder.path / "predictions" / f"{name}-dev-output.csv", text)


def train_epochs(args, folder, model, train, dev):
    """Train and evaluate epoch by epoch, and write the best epoch's predictions. Returns the run's summary."""
    epochs = plan_epochs(args, train)
    steps = sum(map(len, epochs))
    optimizer = peer_optimizer(model, args.lr, fused=True)
    schedule = linear_schedule(optimizer, steps)
    summary = {"phase_norms": [], "steps": steps, "train_seconds": 0.0, "eval_seconds": 0.0}

    def precision():
        return torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")

    for number, of_epoch in enumerate(epochs, start=1):
        label, started = f"epoch {number}/{args.epochs}", time.monotonic()
        peer_train(model, train, of_epoch, optimizer, schedule, precision, progress=True)
        trained = time.monotonic()
        values = {name: peer_predict(model, part, EVAL_BATCH, precision, True) for name, part in dev.items()}
        scores = peer_scores(dev, values)
        summary["train_seconds"] += trained - started
        summary["eval_seconds"] += time.monotonic() - trained
        folder.log(kind="phase", phase=label, **scores, train_seconds=round(summary["train_seconds"], 1))
        print(f"{label}: {scores['tasks']} raw {scores['raw']:.4f} norm {scores['norm']:.4f}", flush=True)
        summary["last"] = scores
        summary["phase_norms"].append(scores["norm"])
        if scores["norm"] == max(summary["phase_norms"]):
            summary["best"] = {"phase": label, **scores}
            write_predictions(folder, dev, values)
    return summary | {key: round(summary[key], 3) for key in ("train_seconds", "eval_seconds")}


def main(argv=None):
    """Train, and write predictions and scores."""
    args = make_parser().parse_args(argv)
    transformers, tasks = import_transformers(), build_tasks()
    folder = RunFolder(args.run_dir)
    folder.refuse_existing(overwrite=False)
    weights = find_weights(args.weights)
    names = {f"{task.name} {split}": task.file(split) for task in tasks.values() for split in ("train", "dev")}
    data_dir, _ = find_data_dir(args.data_dir, names.values())
    torch.manual_seed(args.seed)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(weights)
    train, dev = (
        {name: PeerData(data_dir / task.file(split), task, tokenizer, True) for name, task in tasks.items()}
        for split in ("train", "dev")
    )
    config = peer_config(args, weights, {name: data_dir / file for name, file in names.items()})
    folder.create(config, weights, overwrite=False)
    model = PeerModel(weights, tasks, args.hidden_dropout_prob, attn_implementation="sdpa")
    summary = train_epochs(args, folder, model, train, dev)
    folder.summary(summary | {"peak_mib": round(memory_mib(CPU))})


if __name__ == "__main__":
    run_script(main)
