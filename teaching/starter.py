"""The starter copy: the project without the answers, for students to write.

The bodies of the blanks raise a NotImplementedError that names the part. Files that show an answer elsewhere (tests,
pages, results, the comparison with transformers) and the history are left out. The copy contains the grader, with the
reference's results for one seed in place of the reference, so that `grade` works in it.
"""

import shutil
from pathlib import Path

from errors import InputError

from .grade import EXPECTED, write_expected
from .handout import write_handout
from .parts import PARTS
from .source import ROOT, left_out, remove_bodies

FILES = ("requirements.txt", "setup.sh", "pyproject.toml", "LICENSE", ".gitignore", "report_page.html")
FOLDERS = ("data/sample", "teaching")
LEFT_OUT = ("__pycache__", "gradescope", "answers.*", "walkthrough.py")
README = """# minBERT, to be written

The modules here are complete but for the bodies that raise NotImplementedError. The docstring of each module has its
equations; the docstring of each function has its shapes. The folder handout has a page for each part, with an example
by hand and hints; begin with handout/README.md. Write the bodies, part by part, in this order:

| part | | points | minutes | what to write |
|---|---|---|---|---|
{rows}

```sh
./setup.sh                                        # packages and weights, once
.venv/bin/python -m teaching grade . attention    # one part: points, and what to look at
.venv/bin/python -m teaching grade .              # all parts
```

Keep names and parameters of the functions. You may add helper functions, constants and imports of torch, numpy, scipy
and the standard library's mathematics at the top level of the same file. Constructors and all else stay as they are:
the course's grader takes your functions into its own copy, and runs the same checks with another seed.
"""


def table(parts):
    """Return the rows of the README's table."""
    rows = []
    for name in parts:
        part = PARTS[name]
        blanks = ", ".join(f"`{blank}`" for blank in part.blanks)
        rows.append(f"| {name} | {part.title} | {part.points} | {part.minutes} | {blanks} |")
    return "\n".join(rows)


def write_starter(out, parts):
    """Write a starter copy without the answers of some parts to a new folder.

    Raises: InputError if the folder exists, or if this copy is a starter itself.
    """
    out = Path(out)
    if EXPECTED.exists():
        raise InputError(f"{ROOT} is a starter copy without answers: run this command in the complete project")
    if out.exists():
        raise InputError(f"{out} exists: give a new folder")
    out.mkdir(parents=True)
    parts = [part for part in PARTS if part in parts]  # in the table's order
    sentences = left_out(parts)
    modules = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
    modules = {module: remove_bodies(text, sentences.get(module, {})) for module, text in modules.items()}
    for module, text in modules.items():
        (out / f"{module}.py").write_text(text, encoding="utf-8")
    for name in FILES:
        shutil.copy(ROOT / name, out / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (out / "README.md").write_text(README.format(rows=table(parts)), encoding="utf-8")
    write_handout(out / "handout", parts)
    write_expected(out / EXPECTED.relative_to(ROOT), parts, modules)
