#!/usr/bin/env python3
"""The same recipe written with transformers: what benchmark.py times ours against, and a whole training program.

Read first: tasks.py. Written out so that a reader can judge whether the comparison is fair. Two settings:

    plain   AutoModel as it comes, the fast tokenizer called in the collate function, random batches padded to their
            longest text, torch.optim.AdamW as it comes
    best    AutoModel with sdpa attention, every text tokenised once beforehand, transformers' length-grouped
            batches, torch.optim.AdamW(fused=True), evaluation sorted by length

    python peer.py --run_dir runs/experiments/core/transformers --epochs 4

trains on the equal split with the best settings and leaves what a run of ours leaves: config.json, log.jsonl,
predictions/ (of the best epoch on dev) and summary.json. Needs ./setup.sh --dev.
"""

import argparse
import csv
import random
import time

# ours, but it needs none of the packages: it says what to do where they are not installed
from errors import InputError, run_script, stop_without  # isort: skip

try:
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
    from tqdm import tqdm
except ImportError as error:
    stop_without(error.name)

from base_bert import find_weights
from datasets import find_data_dir
from evaluation import METRICS, format_value, normalise
from files import write_whole
from flags import positive_int
from optimizer import parameter_groups
from runs import RunFolder, command_line, describe_environment, hash_weights, memory_mib, sha256
from samplers import epoch_rows
from tasks import build_tasks

WEIGHT_DECAY, CLIP, WARMUP, MAX_LENGTH = 0.01, 1.0, 0.1, 512


def import_transformers():
    """transformers, quiet.

    Raises: InputError where it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("transformers, the peer, is not installed: run ./setup.sh --dev") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class PeerModel(nn.Module):
    """AutoModel with a linear head per task on its pooler output."""

    def __init__(self, weights, tasks, dropout, **options):
        super().__init__()
        self.bert = import_transformers().AutoModel.from_pretrained(weights, **options)
        self.dropout = nn.Dropout(dropout)
        d = self.bert.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(d, task.outputs) for name, task in tasks.items()})

    def forward(self, task_name, **inputs):
        """Logits of a task. Shapes: inputs [b,s] -> [b, outputs]."""
        return self.heads[task_name](self.dropout(self.bert(**inputs).pooler_output))


def peer_loss(task_name, logits, labels):
    """The mean loss of a task."""
    logits = logits.float()
    if task_name == "sst":
        return F.cross_entropy(logits, labels.long())
    if task_name == "para":
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)
    return F.mse_loss(logits.squeeze(-1), labels)


def peer_optimizer(model, lr, **options):
    """torch.optim.AdamW without decay on biases and LayerNorm."""
    return torch.optim.AdamW(parameter_groups(model.named_parameters(), WEIGHT_DECAY), lr=lr, **options)


class PeerData:
    """One CSV file as lists, without the rows that lack a label or a text.

    With `tokenize_once`, its texts are tokenised here and not batch by batch.
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
        """Tokens of each example, where they are known."""
        return [len(ids) for ids in self.encoded["input_ids"]]

    def collate(self, rows):
        """Inputs and labels of a batch, padded to its longest example."""
        if self.encoded is None:
            texts = [[column[i] for i in rows] for column in self.columns]
            how = dict(truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            inputs = self.tokenizer(*texts, **how)
        else:
            examples = {key: [values[i] for i in rows] for key, values in self.encoded.items()}
            inputs = self.tokenizer.pad(examples, return_tensors="pt")
        return dict(inputs), torch.tensor([self.labels[i] for i in rows])


def cut(order, size):
    """Consecutive batches of a list."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def peer_batches(data, rows, batch_size, best):
    """Batches of the given rows of one file: random ones, or length-grouped as transformers' Trainer makes them."""
    if not best:
        return cut([rows[i] for i in torch.randperm(len(rows)).tolist()], batch_size)
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = data.lengths()
    order = get_length_grouped_indices([lengths[row] for row in rows], batch_size)
    return cut([rows[i] for i in order], batch_size)


def mixed_steps(data, rows, batch_size, best, rng):
    """The (task, rows) of every step of an epoch over {task: rows}, the tasks in random order."""
    steps = [(name, b) for name, part in data.items() for b in peer_batches(part, rows[name], batch_size, best)]
    rng.shuffle(steps)
    return steps


def peer_train(model, data, steps, optimizer, schedule, precision, device, progress=False):
    """Train one epoch: the (task, rows) of `steps`."""
    model.train()
    for name, rows in tqdm(steps, "transformers", disable=None if progress else True):
        inputs, labels = data[name].collate(rows)
        inputs, labels = {k: v.to(device) for k, v in inputs.items()}, labels.to(device)
        with precision():
            logits = model(name, **inputs)
        loss = peer_loss(name, logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def peer_predict(model, data, batch_size, precision, device, best):
    """Predictions for every row of a file, in the order of the file or sorted by length. Shapes: [n]."""
    model.eval()
    order = np.arange(len(data.labels))
    if best:
        order = np.argsort(-np.array(data.lengths()), kind="stable")
    outputs = []
    for rows in cut(order.tolist(), batch_size):
        inputs, _ = data.collate(rows)
        with precision():
            outputs.append(model(data.task.name, **{k: v.to(device) for k, v in inputs.items()}).float())
    outputs = torch.cat(outputs).cpu()
    if data.task.is_regression:
        found = outputs.squeeze(-1).clamp(*data.task.label_range)
    else:
        found = outputs.argmax(-1) if data.task.outputs > 1 else (outputs.squeeze(-1) > 0).long()
    values = np.empty(len(order))
    values[order] = found.numpy()
    return values


def peer_scores(data, values):
    """Scores of {task: PeerData} for {task: predictions}: ({task: {metric: score}}, raw, norm)."""
    metrics, tasks = {}, {name: part.task for name, part in data.items()}
    main = {name: float(METRICS[tasks[name].metric](values[name], np.array(data[name].labels))) for name in data}
    for name, task in tasks.items():
        metrics[name] = {task.metric: main[name]}
        if task.outputs == 1 and not task.is_regression:
            metrics[name]["positive_rate"] = float(values[name].mean())
    norm = float(np.mean([normalise(tasks[name], score) for name, score in main.items()]))
    return metrics, float(np.mean(list(main.values()))), norm


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Train on SST, Quora and STS with transformers and torch.optim, as the comparison of ours.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", help="folder of the course's CSV files; default data/, or data/sample")
    parser.add_argument("--weights", default="minilm", help="a name, or a folder of the hub's layout")
    parser.add_argument("--run_dir", required=True, help="where the run goes")
    parser.add_argument("--epochs", type=positive_int, default=4, help="epochs of the equal split")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="examples a step")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate: linear, with warm-up")
    parser.add_argument("--hidden_dropout_prob", type=float, default=0.1, help="the heads' dropout")
    parser.add_argument("--seed", type=int, default=1, help="of the heads, the order and dropout")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="autocast precision")
    return parser


def main(argv=None):
    """Train, and write predictions and scores."""
    args = make_parser().parse_args(argv)
    transformers, tasks, device = import_transformers(), build_tasks(), torch.device("cpu")
    folder = RunFolder(args.run_dir)
    folder.refuse_existing(overwrite=False)
    weights = find_weights(args.weights)
    files = [(task, split) for task in tasks.values() for split in ("train", "dev")]
    data_dir, _ = find_data_dir(args.data_dir, [task.file(split) for task, split in files])
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(weights)
    train, dev = (
        {name: PeerData(data_dir / task.file(split), task, tokenizer, True) for name, task in tasks.items()}
        for split in ("train", "dev")
    )
    hashes = {f"{task.name} {split}": sha256(data_dir / task.file(split)) for task, split in files}
    config = {"flags": {k: v for k, v in vars(args).items() if k != "run_dir"}, "command": command_line()}
    config |= {**describe_environment(device), "transformers": transformers.__version__, "data": hashes}
    config["weights"] = {"folder": str(weights), "sha256": hash_weights(weights)}
    folder.create(config, weights / "vocab.txt", overwrite=False)
    model = PeerModel(weights, tasks, args.hidden_dropout_prob, attn_implementation="sdpa")

    def precision():
        return torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")

    sizes = {name: len(part.labels) for name, part in train.items()}
    epochs = [
        mixed_steps(train, epoch_rows(sizes, "equal", epoch, 1.0, args.seed), args.batch_size, True, rng)
        for epoch in range(args.epochs)
    ]
    count = sum(map(len, epochs))
    optimizer = peer_optimizer(model, args.lr, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(WARMUP * count), count)
    norms, train_seconds, eval_seconds, best = [], 0.0, 0.0, {}
    for epoch, steps in enumerate(epochs, start=1):
        started = time.monotonic()
        peer_train(model, train, steps, optimizer, schedule, precision, device, progress=True)
        trained = time.monotonic()
        values = {name: peer_predict(model, part, 32, precision, device, True) for name, part in dev.items()}
        metrics, raw, norm = peer_scores(dev, values)
        train_seconds, eval_seconds = train_seconds + trained - started, eval_seconds + time.monotonic() - trained
        scores = {"tasks": metrics, "raw": raw, "norm": norm}
        folder.log(kind="phase", phase=f"epoch {epoch}/{args.epochs}", **scores, train_seconds=round(train_seconds, 1))
        print(f"epoch {epoch}/{args.epochs}: {metrics} raw {raw:.4f} norm {norm:.4f}", flush=True)
        norms.append(norm)
        if norm == max(norms):
            best = {"phase": f"epoch {epoch}/{args.epochs}", **scores}
            for name, part in dev.items():
                pairs = zip(part.ids, values[name], strict=True)
                lines = [part.task.header, *(f"{i} , {format_value(part.task, value)} " for i, value in pairs)]
                write_whole(folder.path / "predictions" / f"{name}-dev-output.csv", "\n".join(lines) + "\n")
    summary = {"best": best, "last": scores, "phase_norms": norms, "steps": count}
    summary |= {"train_seconds": round(train_seconds, 1), "eval_seconds": round(eval_seconds, 1)}
    summary["peak_mib"] = round(memory_mib(device))
    folder.summary(summary | {"positive_rate": metrics["para"]["positive_rate"]})


if __name__ == "__main__":
    run_script(main)
