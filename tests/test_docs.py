"""The documents: README's size, every name that it gives for a method, links and commands of the other pages."""

import ast
import re
from contextlib import chdir, redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from test_structure import README, ROOT, check_command, commands

from lab.record import load_rows, recipes

PAGES = ("DISTRIBUTED.md", *(f"results/{path.name}" for path in sorted((ROOT / "results").glob("*.md"))))
PAGES_WITH_LINKS = [page for page in PAGES if "](" in (ROOT / page).read_text()]


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
    assert README.stat().st_size <= 10 * 1024


def test_readme_has_no_placeholder_left():
    assert re.findall(r"@@.*?@@", README.read_text()) == []


# the lines of README's table of scores, in their order
README_ROWS = (
    ("core", "pretrain (BERT frozen)"),
    ("core", "[CLS]"),
    ("core", "mean pooling"),
    ("core", "Bregman for SST and STS"),
    ("core", "transformers"),
    ("exits", "SLF + early exit"),
    ("exits", "early exit, mean pooling"),
)


def test_the_scores_in_the_readme_are_the_recorded_ones():
    table = README.read_text().partition("| norm | minutes | GiB |")[2].partition("\n\n")[0].splitlines()[3:]
    for line, (group, recipe) in zip(table, README_ROWS, strict=True):
        runs = recipes(load_rows(group))[recipe]
        scores = [f"{np.mean([row['last'][key] for row in runs]):.3f}" for key in ("sst", "para", "sts", "norm")]
        seconds = [row["train_seconds"] for row in runs]
        minutes = sorted({f"{bound / 60:.{0 if bound > 60 else 1}f}" for bound in (min(seconds), max(seconds))})
        gib = np.mean([row["peak_mib"] for row in runs if row["peak_mib"]]) / 1024
        cells = [f"{len(runs)}", *(score.lstrip("0") for score in scores), "–".join(minutes), f"{gib:.1f}"]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == cells, recipe


def test_names_in_the_paper_to_code_table_exist():
    rows = re.findall(r"\| (\w+\.py):([\w, ]+) \|", README.read_text())
    assert len(rows) > 8
    for file, names in rows:
        nodes = ast.parse((ROOT / file).read_text()).body
        defined = {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        assert set(names.split(", ")) <= defined, file


@pytest.mark.parametrize("page", [*PAGES_WITH_LINKS, "METHODS.md"])
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
    assert links and missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_parse(page):
    for words in commands((ROOT / page).read_text()):
        check_command(words)


@pytest.mark.skipif(not (ROOT / "weights" / "all-MiniLM-L6-v2").is_dir(), reason="needs the default weights")
def test_the_worked_example_prints_what_the_page_shows():
    page = (ROOT / "METHODS.md").read_text().split("## One sentence through BERT")[1]
    code, printed = (
        re.search(r"```python\n(.*?)```", page, re.DOTALL)[1],
        re.search(r"```text\n(.*?)```", page, re.DOTALL)[1],
    )
    output = StringIO()
    try:
        with chdir(ROOT), redirect_stdout(output):
            exec(compile(code, "METHODS.md", "exec"), {})
    finally:
        torch.set_grad_enabled(True)  # the example switches gradients off
    assert output.getvalue() == printed
