"""Make a Jupyter notebook of a .py file in percent format: each `# %%` line starts a cell."""

import json
from pathlib import Path

from errors import InputError
from files import write_whole


def cells(source):
    """Split percent format into cells: (kind, text) with kind "markdown" or "code".

    The lines of a markdown cell are comments; the cell contains their text. The module's docstring is no cell.
    """
    parts = []
    for line in source[source.index("# %% ") :].splitlines():
        if line.startswith("# %%"):
            parts.append(("markdown" if line.endswith("[markdown]") else "code", []))
        else:
            kind, lines = parts[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    return [(kind, "\n".join(lines).strip()) for kind, lines in parts]


def to_notebook(source):
    """Return the notebook as plain data, in version 4.5 of Jupyter's format.

    Source: the JSON schema of nbformat 4.5.
    """
    made = []
    for number, (kind, text) in enumerate(cells(source)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(path):
    """Write the notebook of walkthrough.py to a file.

    Raises: InputError in a starter copy, which has no walk-through, since it shows answers.
    """
    walkthrough = Path(__file__).with_name("walkthrough.py")
    if not walkthrough.exists():
        raise InputError(f"{walkthrough} is not part of a starter copy: run this command in the complete project")
    source = walkthrough.read_text(encoding="utf-8")
    write_whole(path, json.dumps(to_notebook(source), indent=1) + "\n")
