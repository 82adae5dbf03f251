"""The shape of the project: sizes, who may import whom, how modules open, and README's commands and names."""

import ast
import importlib
import inspect
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

from flags import check_flags, file_flags, make_parser, parse_flags

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
FOLDERS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("lab", "teaching")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# what a reader came for, in reading order; every other file at the top level runs a job
SUBJECT = (
    *("tokenizer", "bert", "base_bert", "optimizer", "tasks", "datasets", "samplers", "multitask_classifier"),
    *("evaluation", "early_exit", "slf", "smart", "adapters", "gradients", "predict"),
)
# Ceilings in lines of code without blank lines, comments and docstrings. Raise one only with a line in LOG.md.
SUBJECT_LINES, RUNNING_LINES, CLASSIFIER_LINES, FILES = 2775, 1900, 400, 26
COMMENTS_PER_100 = 12
FUNCTION_LINES, PARAMETERS, FIELDS = 60, 7, 12
# the fields of BertConfig are the names of the hub's config.json
MANY_FIELDS = {"BertConfig"}
LOOP_LINES, MODEL_LINES = 40, 110
ACTIONS = 56

METHODS = ("early_exit", "slf", "smart", "adapters", "gradients", "optimizer")
DATA = ("tokenizer", "tasks", "datasets", "samplers")
# {module: what it may import of ours}; each names only modules above it, so that there is no circle
MAY_IMPORT = {
    "errors": (),
    "methods": ("errors",),
    "parallel": ("errors",),
    "files": ("errors", "parallel"),
    "weights": ("errors", "files"),
    "tokenizer": ("errors", "files", "weights"),
    "base_bert": ("errors", "files", "weights"),
    "bert": ("errors", "base_bert"),
    "optimizer": ("errors", "methods"),
    "download": ("errors",),
    "tasks": ("errors",),
    "datasets": ("errors", "files", "tokenizer", "tasks"),
    "samplers": (),
    "early_exit": ("errors", "methods", "tasks"),
    "slf": ("early_exit", "methods", "tasks"),
    "smart": ("base_bert", "bert", "errors", "methods", "parallel", "tasks"),
    "adapters": ("errors", "methods"),
    "gradients": ("methods", "parallel"),
    "evaluation": ("errors", "files", "parallel", "tasks", "datasets", "early_exit"),
    "runs": ("base_bert", "errors", "files", "parallel", "tasks", "weights"),
    "report": ("bert", "early_exit", "errors", "evaluation", "files", "parallel", "runs", "tasks"),
    "flags": (*METHODS, "errors", "methods", "runs", "datasets", "samplers", "tasks"),
    "building": (
        *(*METHODS, *DATA, "base_bert", "errors", "evaluation", "flags", "methods", "parallel", "runs", "weights"),
    ),
    "multitask_classifier": (
        *(*METHODS, *DATA, "base_bert", "bert", "building", "errors", "evaluation", "flags", "methods", "parallel"),
        *("report", "runs"),
    ),
    "classifier": ("errors", "flags", "multitask_classifier"),
    "predict": (
        *(*DATA, "building", "errors", "evaluation", "files", "flags", "methods", "multitask_classifier"),
        "report",
    ),
}
README = ROOT / "README.md"


def code_and_comments(path):
    """Lines with code (docstrings do not count) and lines with a comment."""
    source, docstrings, code, comments = path.read_text(), set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings), len(comments)


def lines_of_code(names):
    """Lines of code of several modules together."""
    return sum(code_and_comments(MODULES[name])[0] for name in names)


# --- sizes --------------------------------------------------------------------------------------------------------


def test_the_files_stay_below_their_ceilings():
    assert len(MODULES) <= FILES
    assert set(SUBJECT) <= set(MODULES)
    assert lines_of_code(SUBJECT) <= SUBJECT_LINES
    assert lines_of_code(set(MODULES) - set(SUBJECT)) <= RUNNING_LINES
    assert lines_of_code(["multitask_classifier"]) <= CLASSIFIER_LINES


@pytest.mark.parametrize("name", SUBJECT)
def test_a_file_of_the_subject_is_commented_beside_its_lines(name):
    code, comments = code_and_comments(MODULES[name])
    assert 100 * comments >= COMMENTS_PER_100 * code, f"{comments} comment lines for {code} lines of code"


def test_the_loop_is_read_on_one_screen():
    import multitask_classifier

    for function in (multitask_classifier.train_step, multitask_classifier.train):
        assert len(inspect.getsource(function).splitlines()) <= LOOP_LINES
    assert len(inspect.getsource(multitask_classifier.MultitaskBERT).splitlines()) <= MODEL_LINES


@pytest.mark.parametrize("path", [*MODULES.values(), *FOLDERS.values()], ids=lambda path: path.name)
def test_functions_and_classes_are_small(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < FUNCTION_LINES, node.name
            assert len(names) <= PARAMETERS, node.name
        elif isinstance(node, ast.ClassDef) and node.name not in MANY_FIELDS:
            assert sum(isinstance(line, ast.AnnAssign) for line in node.body) <= FIELDS, node.name


def test_the_command_line_has_few_dials():
    counted = [a for a in make_parser()._actions if a.dest != "help" and a.dest not in file_flags()]
    assert len(counted) <= ACTIONS


# --- imports ------------------------------------------------------------------------------------------------------


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
    assert imports(MODULES[name]) & {*MODULES, "lab", "teaching"} <= set(MAY_IMPORT[name])


@pytest.mark.parametrize("name", {**MODULES, **FOLDERS})
def test_a_module_opens_with_a_docstring(name):
    path = {**MODULES, **FOLDERS}[name]
    assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 20
    first = path.read_text().splitlines()
    assert first[first[0].startswith("#!")].startswith('"""')


@pytest.mark.parametrize("name", {**MODULES, **FOLDERS})
def test_a_public_name_has_a_docstring(name):
    for node in ast.parse({**MODULES, **FOLDERS}[name].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", {**MODULES, **FOLDERS})
def test_pickled_code_is_never_loaded(name):
    """torch.load appears only with weights_only=True, and nothing else that unpickles."""
    for node in ast.walk(ast.parse({**MODULES, **FOLDERS}[name].read_text())):
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
    elif program == "-m" and arguments[0].startswith("lab."):
        importlib.import_module(arguments[0]).make_parser().parse_args(arguments[1:])
    elif program == "-m" and arguments[0] == "teaching":
        importlib.import_module("teaching.__main__").make_parser().parse_args(arguments[1:])
    else:
        assert program in ("-m", "git", "cd", "cat", "torchrun"), words


def test_readme_commands_parse(readme):
    lines = list(commands(readme))
    assert len(lines) > 5
    for words in lines:
        check_command(words)


def test_help_lists_every_flag_with_a_sentence():
    actions = [action for action in make_parser()._actions if action.dest not in file_flags()]
    assert [action.dest for action in actions if not action.help] == []
    text = make_parser().format_help()
    assert [action.dest for action in actions if action.option_strings and action.option_strings[-1] not in text] == []
