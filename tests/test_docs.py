"""The documents: README's size, every name that it gives for a method, links and commands of the other pages."""

import ast
import re

import pytest
from test_structure import README, ROOT, check_command, commands

# pages that were written by hand, at least in part
RESULTS = ("README", "comparison", "core", "defaults", "exits", "methods", "papers", "speed", "splits")
PAGES = ("DISTRIBUTED.md", *(f"results/{name}.md" for name in RESULTS))


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
    assert README.stat().st_size <= 10 * 1024


def test_readme_has_no_placeholder_left():
    assert re.findall(r"@@.*?@@", README.read_text()) == []


def test_names_in_the_paper_to_code_table_exist():
    rows = re.findall(r"\| (\w+\.py):([\w, ]+) \|", README.read_text())
    assert len(rows) > 8
    for file, names in rows:
        nodes = ast.parse((ROOT / file).read_text()).body
        defined = {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        assert set(names.split(", ")) <= defined, file


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
    assert links and missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_parse(page):
    for words in commands((ROOT / page).read_text()):
        check_command(words)
