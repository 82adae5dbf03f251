"""The shape of the project: who may import whom, how modules open, and that README's commands and names are right."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from flags import check_flags, make_parser, parse_flags

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
CORE = ("errors", "files", "tokenizer", "base_bert", "bert", "optimizer", "tasks", "datasets", "samplers")
METHODS = ("parallel", "smart", "early_exit", "slf", "frozen", "adapters", "gradients")
LOOP = (*CORE, *METHODS, "evaluation", "plots", "closing", "flags", "runs")
# {module: what it may import of ours}; each names only modules above it, so that there is no circle
MAY_IMPORT = {
    "errors": (),
    "parallel": ("errors",),
    "files": ("errors", "parallel"),
    "tokenizer": ("errors",),
    "base_bert": ("errors", "files"),
    "bert": ("errors", "base_bert"),
    "optimizer": ("errors",),
    "download": ("errors",),
    "tasks": ("errors",),
    "datasets": ("errors", "tokenizer", "tasks"),
    "samplers": (),
    "smart": ("bert", "errors", "parallel", "tasks"),
    "early_exit": ("errors", "tasks"),
    "slf": (),
    "frozen": ("errors",),
    "adapters": ("errors",),
    "gradients": ("parallel",),
    "evaluation": ("errors", "files", "parallel", "tasks", "datasets", "early_exit"),
    "plots": ("files",),
    "closing": ("early_exit", "evaluation", "plots"),
    "flags": ("errors", "tasks", "datasets", "samplers", "optimizer", "adapters", "gradients", "slf", "early_exit"),
    "runs": ("errors", "files", "parallel"),
    "multitask_classifier": LOOP,
    "predict": (*LOOP, "multitask_classifier"),
    "peer": LOOP,
    "experiments": (*LOOP, "multitask_classifier", "peer"),
    "timing": ("files", "runs"),
    "workloads": (*LOOP, "multitask_classifier", "peer", "timing"),
    "benchmark": (*LOOP, "multitask_classifier", "peer", "timing", "workloads"),
}
README = ROOT / "README.md"


def imports(path):
    """Every module that a file imports, at its top or anywhere inside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="module")
def readme():
    return README.read_text()


def test_the_allowed_imports_form_no_circle():
    above = set()
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed) <= above, name
        above.add(name)


def test_there_is_no_module_beside_the_plan():
    assert set(MODULES) <= set(MAY_IMPORT)
    assert not {"utils", "helpers", "common"} & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_it_may(name):
    assert imports(MODULES[name]) & set(MODULES) <= set(MAY_IMPORT[name])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_opens_with_a_docstring(name):
    tree = ast.parse(MODULES[name].read_text())
    assert len(ast.get_docstring(tree) or "") > 20
    first = MODULES[name].read_text().splitlines()
    assert first[first[0].startswith("#!")].startswith('"""')


@pytest.mark.parametrize("name", MODULES)
def test_a_public_name_has_a_docstring(name):
    for node in ast.parse(MODULES[name].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", MODULES)
def test_pickled_code_is_never_loaded(name):
    """torch.load appears only with weights_only=True, and nothing else that unpickles."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), [ast.unparse(keyword) for keyword in node.keywords]
            assert called != "torch.load" or "weights_only=True" in given
            assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            assert "allow_pickle=True" not in given


def test_readme_names_every_module(readme):
    assert [name for name in MODULES if f"{name}.py" not in readme] == []


def test_files_that_readme_links_to_are_there(readme):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def commands(text):
    """The command lines of the shell blocks, without comments: one list of words each."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
                yield words[:end]
                words = words[end + 1 :]


def check_command(words):
    """Parse one command as the program it calls would."""
    program, *arguments = [word for word in words if word != ".venv/bin/python" and word != "python"]
    if program == "./setup.sh":
        known = (ROOT / "setup.sh").read_text()
        assert all(word in known for word in arguments if word.startswith("--"))
    elif program.endswith(".py"):
        assert (ROOT / program).is_file(), program
        if program == "multitask_classifier.py":
            flags, given, _ = parse_flags(arguments)
            check_flags(flags, given)
        elif "/" not in program:
            importlib.import_module(Path(program).stem).make_parser().parse_args(arguments)
    else:
        assert program in ("-m", "git", "cd", "cat"), words


def test_readme_commands_parse(readme):
    found = list(commands(readme))
    assert len(found) > 5
    for words in found:
        check_command(words)


def test_help_lists_every_flag_with_a_sentence():
    actions = make_parser()._actions
    assert [action.dest for action in actions if not action.help] == []
    text = make_parser().format_help()
    assert [action.dest for action in actions if action.option_strings and action.option_strings[-1] not in text] == []
