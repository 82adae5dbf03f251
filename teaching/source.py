"""Functions in a module's source: find them in the syntax tree, and remove their bodies from the text.

A function is named by its module, its class if it has one, and itself: "bert.BertLayer.forward". The text outside the
removed bodies stays as it is, character by character.
"""

import ast
import copy
from pathlib import Path

from .parts import PARTS

ROOT = Path(__file__).resolve().parents[1]


def definition(tree, name):
    """Return the node of a function or class of a module; None if there is none. The name has no module.

    The last definition counts, as in Python.
    """
    node = tree
    for word in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == word]
        if not found:
            return None
        node = found[-1]
    return node


def split_name(name):
    """Split "bert.BertLayer.forward" into the module and the name in it."""
    module, _, inner = name.partition(".")
    return module, inner


def signature(function):
    """Return a function's decorators and its parameters with their defaults, as text without annotations."""
    arguments = copy.deepcopy(function.args)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    decorators = "".join(f"@{ast.unparse(decorator)} " for decorator in function.decorator_list)
    return f"{decorators}{function.name}({ast.unparse(arguments)})"


def body_after_docstring(function):
    """Return the statements of a function without its docstring."""
    return function.body[ast.get_docstring(function, clean=False) is not None :]


def remove_bodies(text, sentences):
    """Replace the bodies of functions by an error; `sentences` is {name in the module: text of the error}.

    Docstring and signature stay. Comments of a body vanish with it.
    """
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    functions = [(definition(tree, name), sentence) for name, sentence in sentences.items()]
    functions = [(function, sentence) for function, sentence in functions if function is not None]
    # from the last function to the first, so that the line numbers of the earlier ones stay right
    for function, sentence in sorted(functions, key=lambda pair: -pair[0].lineno):
        first = (body_after_docstring(function) or function.body)[0]  # a student may leave a docstring alone
        start, end = first.lineno - 1, function.end_lineno
        while lines[start - 1].lstrip().startswith("#") or not lines[start - 1].strip():
            start -= 1
        lines[start:end] = [f'{" " * first.col_offset}raise NotImplementedError("{sentence}")\n']
    return "".join(lines)


def left_out(parts):
    """Return what a copy without some parts lacks: {module: {name in it: sentence of the error}}."""
    sentences = {}
    for part in parts:
        for name in PARTS[part].equivalents:
            module, inner = split_name(name)
            sentences.setdefault(module, {})[inner] = f"left out, because it shows the answer of part {part}"
    # a function that is the answer of one part and an equivalent of another one is a blank
    for part in parts:
        for name in PARTS[part].blanks:
            module, inner = split_name(name)
            sentences.setdefault(module, {})[inner] = f"part {part}: write {inner}"
    return sentences
