"""The documents: README's size, every name that it gives for a method, links and commands of the other pages."""

import ast
import re
from contextlib import chdir, redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from test_structure import README, ROOT, check_command, commands

from errors import InputError
from lab import pages
from lab.numbers import read_source
from lab.record import load_rows, recipes

PAGES = ("DISTRIBUTED.md", *(f"results/{path.name}" for path in sorted((ROOT / "results").glob("*.md"))))
PAGES_WITH_LINKS = [page for page in PAGES if "](" in (ROOT / page).read_text()]


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
    assert README.stat().st_size <= 10 * 1024


def test_readme_has_no_placeholder_left():
    assert re.findall(r"@@.*?@@", README.read_text()) == []


def test_the_scores_in_the_readme_are_the_recorded_ones(tmp_path):
    """report puts them there; a line by hand; a table without one of the lines is refused."""
    [line] = [line for line in README.read_text().splitlines() if line.startswith("| fine-tuned, mean over all tokens")]
    runs = recipes(load_rows("core"))["mean pooling"]
    assert f"| {np.mean([row['last']['norm'] for row in runs]):.3f} |".replace("0.", ".") in line
    assert f"| {round(min(row['train_seconds'] for row in runs) / 60)}–" in line and "| 3 |" in line
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(r"\| 3 \| \.\d+ ", "| 9 | .999 ", README.read_text()))
    assert copy.read_text() != README.read_text()
    pages.write_readme(read_source(), copy)
    assert copy.read_text() == README.read_text()
    copy.write_text(README.read_text().replace(line, ""))
    with pytest.raises(InputError, match="0 lines begin with | fine-tuned, mean"):
        pages.write_readme(read_source(), copy)


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
