#!/usr/bin/env python3
"""Predict with a trained run: one text, a CSV file, or standard input.

    python predict.py runs/finetune sst "a gripping film"
    python predict.py runs/finetune para "Is tea healthy?" "Is it good to drink tea?"
    python predict.py runs/finetune sts --file pairs.csv --out answers.csv
    python predict.py runs/finetune sst "a gripping film" --html film.html
    cat reviews.txt | python predict.py runs/finetune sst

It calls evaluation.predict, as a run does for its own prediction files, so a text gets the same numbers here.
"""

import math
import os
import sys

# imported first: it prints what to do where torch is not installed
import multitask_classifier  # isort: skip
from building import choose_device, make_autocast
from datasets import Dataset, read_dataset
from errors import InputError, Parser, run_script, warn
from evaluation import AtExit, describe, predict, readable_table
from files import write_whole
from flags import PRECISIONS
from methods import filled, positive_int
from report import describe_texts, write_page
from tasks import TASKS


def make_parser():
    """The parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0], epilog="Without TEXT and --file, standard input is read.")
    parser.add_argument("run", type=filled, help="run directory")
    parser.add_argument("task", choices=tuple(TASKS), help="which of the run's tasks")
    parser.add_argument("texts", nargs="*", type=filled, metavar="TEXT", help="the text, or the two texts of a pair")
    parser.add_argument("--file", metavar="CSV", help="the course's format, tab separated; it needs no label column")
    parser.add_argument("--out", metavar="CSV", help="write texts and predictions to this file, instead of printing")
    parser.add_argument(
        "--html", metavar="HTML", help="also write a page: the predictions of all exits, attention maps"
    )
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="default: the run's")
    parser.add_argument("--eval_batch_size", type=positive_int, help="texts at once; default: the run's")
    parser.add_argument("--use_gpu", action="store_true", help="work on CUDA or Apple's MPS where there is one")
    return parser


def collect(task, rows, tokenizer, max_length):
    """A dataset of texts without labels, one tuple of texts per row."""
    dataset = Dataset(task, None, tokenizer, max_length)
    for number, texts in enumerate(rows, start=1):
        dataset.add(str(number), [text.strip() for text in texts], math.nan)  # NaN: without a label
    return dataset.freeze()


def check_count(task, texts, where, hint):
    """Fail where a row has another number of texts than the task compares."""
    if len(texts) != len(task.columns):
        wanted = "two texts" if task.is_pair else "one text"
        raise InputError(f"{where}: {len(texts)} texts, but {task.name} takes {wanted}; {hint}")


def read_lines(task, stream):
    """Rows of texts from lines: one text per line, a pair separated by a tab."""
    rows = []
    for number, raw in enumerate(stream, start=1):
        where = f"standard input: line {number}"
        # the bytes are decoded line by line, so that the message can name the line
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            value = raw[error.start : error.start + 1]
            raise InputError(f"{where}: byte {value!r} is not UTF-8: convert the text to UTF-8") from None
        texts = line.split("\t") if task.is_pair else [line]
        # a blank line keeps its place, so that predictions and lines stay side by side
        if not line.strip():
            texts = [""] * len(task.columns)
        check_count(task, texts, where, "separate the two by a tab")
        rows.append(texts)
    if not rows:
        raise InputError("standard input: empty: give a text per line, a TEXT argument, or --file")
    return rows


def read_texts(args, task, tokenizer, max_length):
    """The texts to predict, from the arguments, a file or standard input, as a dataset."""
    if args.file:
        if args.texts:
            raise InputError(f"--file {args.file}: goes without TEXT arguments: give one or the other")
        # a test file: it needs no label column, and every row gets a prediction
        return read_dataset(task, args.file, tokenizer, max_length, labelled=False)
    if args.texts:
        check_count(task, args.texts, "TEXT", "quote a text that has spaces")
        return collect(task, [args.texts], tokenizer, max_length)
    # a person at a terminal would otherwise wait for a prompt
    if sys.stdin.isatty():
        print("one text per line (two, separated by a tab, for a pair); end with Ctrl-D", file=sys.stderr)
    return collect(task, read_lines(task, sys.stdin.buffer), tokenizer, max_length)


def prediction_lines(predictions):
    """One line per row: label and its probability, or the score."""
    for i in range(len(predictions.values)):
        # a regression has no label: its value is the prediction
        value, label, probability = describe(predictions, i)
        yield f"{label}\t{probability}" if label else value


def main(argv=None):
    """Predict what the command line asks for."""
    args = make_parser().parse_args(argv)
    # checked before the model is loaded, which takes seconds
    for flag, path in (("--out", args.out), ("--html", args.html)):
        if path and os.path.lexists(path):
            raise InputError(f"{flag} {path}: exists already: remove it, or choose another name")
    device = choose_device(args.use_gpu)
    changes = {name: value for name in ("precision", "eval_batch_size") if (value := getattr(args, name))}
    # model, tokenizer and exit policy of the run; --precision and --eval_batch_size do not change what it predicts
    run = multitask_classifier.load_run(args.run, device, changes)
    tasks, flags = run.model.tasks, run.flags
    if args.task not in tasks:
        raise InputError(f"{args.task}: {args.run} was not trained on it: choose from {', '.join(tasks)}")
    if flags["early_exit"] and isinstance(run.infer, AtExit):
        warn(f"{args.run}: no exit thresholds (the run has not written summary.json): every row uses all layers")
    data = read_texts(args, tasks[args.task], run.tokenizer, flags["max_length"])
    if data.truncated:
        print(f"note: {data.truncated} rows are cut to {data.max_length} tokens", file=sys.stderr)
    options = {"batch_size": flags["eval_batch_size"], "autocast": make_autocast(flags["precision"], device)}
    # `run.infer` leaves early where the run was trained to
    predictions = predict(run.model, data, infer=run.infer, show_bar=sys.stderr.isatty(), **options)
    if args.html:
        write_page(args.html, describe_texts(run.model, predictions, options["autocast"]))
    if args.out:
        write_whole(args.out, readable_table(predictions))
    else:
        print("\n".join(prediction_lines(predictions)))


if __name__ == "__main__":
    run_script(main)
