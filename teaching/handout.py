"""The handout: a cover page and a page for each part, in Markdown.

    python -m teaching handout OUT [--parts PART ...]

A page has typed text from pages/PART.md. The rest is made when the handout is written: names and docstrings of the
functions, points and minutes (parts.py), expected scores (scores.py). A typed page marks the places:

    @write     the functions that a student writes, with their docstrings
    @check     the commands and the checks with their points
    @schedule  on the cover, the parts of each week

The examples of a page are doctests: `python -m doctest handout/PART.md` compares them with the student's functions.
"""

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

from errors import InputError
from files import write_whole

from .parts import PARTS
from .scores import score_table

PAGES = Path(__file__).parent / "pages"
# names of methods that are also words of the hints
ORDINARY = ("forward", "pool", "update", "penalty", "factor", "perturb")
# the parts of each week, and what else happens in it
WEEKS = (
    (
        ("tokenizer", "attention", "layer", "embeddings"),
        "Set-up. At the end your BERT computes what the pretrained one does.",
    ),
    (
        ("optimizer", "losses", "classifier", "evaluation"),
        "The first training: BERT frozen, then fine-tuned, on the sample data.",
    ),
    (("early_exit", "slf"), "Choose the question of your project and write half a page about it."),
    (("smart", "gradients", "adapters"), "Run the baseline of your project with three seeds."),
    ((), "The project: one change, three seeds, a report of four pages."),
)


def find_function(name):
    """Return the function or method that a part names, such as "bert.BertLayer.forward"."""
    module, *path = name.split(".")
    return reduce(inspect.getattr_static, path, importlib.import_module(module))


def describe_function(name):
    """Return a function's name, parameters and docstring as Python text."""
    function = find_function(name)
    function = getattr(function, "__func__", function)  # of a static method
    docstring = inspect.cleandoc(function.__doc__ or "")
    end = "\n" if "\n" in docstring else ""
    text = f'"""{docstring}{end}"""' if docstring else "..."
    body = "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
    # a default that is a function is printed by its name, not by its address
    parameters = re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(function)))
    return f"# {name}\ndef {function.__name__}{parameters}:\n{body}"


def describe_blanks(part):
    """Return the section on what to write."""
    files = " and ".join(f"`{module}.py`" for module in part.modules)
    several = len(part.blanks) > 1
    lines = [
        "## What you write",
        "",
        f"The {'bodies' if several else 'body'} of {'these functions' if several else 'this function'} in {files}. "
        "Keep names and parameters. Helper functions of your own are welcome in the same file.",
    ]
    if part.forbidden:
        names = ", ".join(f"`{name}`" for name in part.forbidden)
        lines += ["", f"These names are not allowed here, because they hold the ready answer: {names}."]
    functions = "\n".join(describe_function(name) for name in part.blanks)
    return "\n".join([*lines, "", "```python", functions.rstrip(), "```"])


def checked_functions(part, check):
    """Return the functions of a part that a check's hint names, as a student reads them: "AdamW.update"."""
    functions = [name.partition(".")[2] for name in part.blanks]
    last = [function.rpartition(".")[2] for function in functions]
    # a hint may name a method without its class, if no other function and no ordinary word has this name
    words = [(f, m) if last.count(m) == 1 and m not in ORDINARY else (f,) for f, m in zip(functions, last, strict=True)]
    return [f for f, names in zip(functions, words, strict=True) if any(named(name, check.hint) for name in names)]


def named(name, text):
    """Return whether a text has a name, not as a part of a longer one."""
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\.?\w)", text) is not None


def describe_checks(name, part):
    """Return the section with the commands, the checks with their points, and the expected scores."""
    rows = [
        f"| {check.title} | {check.points} | {', '.join(f'`{f}`' for f in checked_functions(part, check))} |"
        for check in part.checks
    ]
    lines = [
        "## Is it right?",
        "",
        "```sh",
        f".venv/bin/python -m doctest handout/{name}.md      # the example above; prints nothing if it is right",
        f".venv/bin/python -m teaching grade . {name}",
        "```",
        "",
        "The grader runs these checks. A check earns all of its points or none: all functions in its row must be "
        "right. Where a check fails, it prints what your function computed, what was expected, and the equation to "
        "look at.",
        "",
        "| check | points | functions |",
        "|---|---|---|",
        *rows,
    ]
    scores = score_table(name)
    if scores:
        lines += ["", "## Expected scores", "", scores]
    return "\n".join(lines)


def part_page(name):
    """Return the page of a part."""
    part, number = PARTS[name], list(PARTS).index(name) + 1
    head = f"# Part {number}. {part.title}\n\n{part.points} points, about {part.minutes} minutes.\n\n"
    text = head + (PAGES / f"{name}.md").read_text(encoding="utf-8")
    return text.replace("@write", describe_blanks(part)).replace("@check", describe_checks(name, part))


def schedule(parts=PARTS):
    """Return the table of the weeks with these parts, and the sums of minutes and points."""
    lines = ["| week | parts | hours | points | besides |", "|---|---|---|---|---|"]
    for week, (names, text) in enumerate(WEEKS, start=1):
        if names and not set(names) & set(parts):
            continue  # a week of other parts
        names = [name for name in names if name in parts]
        links = ", ".join(f"[{name}]({name}.md)" for name in names)
        hours = sum(PARTS[name].minutes for name in names) / 60
        points = sum(PARTS[name].points for name in names)
        lines.append(
            f"| {week} | {links} | {hours:.1f} | {points} | {text} |" if names else f"| {week} | | | | {text} |"
        )
    minutes, points = (sum(getattr(PARTS[name], key) for name in parts) for key in ("minutes", "points"))
    return "\n".join([*lines, f"| | all {len(parts)} parts | {minutes / 60:.1f} | {points} | |"])


def cover_page(parts=PARTS):
    """Return the cover page of a course of these parts."""
    text = (PAGES / "cover.md").read_text(encoding="utf-8")
    return text.replace("@schedule", schedule(parts)).replace("@scores", score_table())


def pages(parts=PARTS):
    """Return the pages of a handout on these parts: {file name: text}."""
    made = {"README.md": cover_page(parts), "skeleton.md": (PAGES / "skeleton.md").read_text(encoding="utf-8")}
    return made | {f"{name}.md": part_page(name) for name in parts}


def write_handout(out, parts=PARTS):
    """Write the handout on these parts into a new or empty folder.

    Raises: InputError for a folder that has files.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: give a new folder")
    for name, text in pages(parts).items():
        write_whole(out / name, text.rstrip() + "\n")
