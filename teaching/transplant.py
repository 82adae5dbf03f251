"""Take a student's functions of one part into a copy of the project that lacks this part.

The copy has the reference's other functions, so a mistake costs the points of its own part only. With each function
come what it reaches in the same file: helper functions and classes, constants, new methods of its class, and imports
of an allowed list. A name that the copy uses for something else is renamed. Everything else of the student's file is
not executed: neither constructors nor statements at the top level.

What cannot be taken over raises `Refused` with a sentence. The part then has no points, and the sentence says why.
"""

import ast
import builtins
import copy
import symtable

from .parts import PARTS
from .source import ROOT, body_after_docstring, definition, left_out, remove_bodies, signature, split_name

MODULES = tuple(sorted(path.stem for path in ROOT.glob("*.py")))
# what a student may import besides the modules of the project
LIBRARIES = {"math", "itertools", "functools", "collections", "dataclasses", "typing", "contextlib", "operator", "copy"}
LIBRARIES |= {"re", "string", "unicodedata", "bisect", "heapq", "statistics", "fractions", "enum", "abc", "warnings"}
LIBRARIES |= {"numpy", "torch", "scipy", "sklearn"}
# built-in functions that reach around the graded function: into files, into names, into the running program
BANNED = {"open", "exec", "eval", "compile", "__import__", "globals", "locals", "vars", "getattr", "setattr", "delattr"}
BANNED |= {"input", "breakpoint", "exit", "quit", "__builtins__", "__loader__", "__spec__", "__file__"}
SPECIAL_METHODS = {
    "__init__",
    "__call__",
    "__len__",
    "__iter__",
    "__getitem__",
    "__contains__",
    "__name__",
    "__class__",
}
PREFIX = "student_"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Refused(Exception):
    """A part that cannot be taken over; the text says what and why."""


def scopes(node):
    """Return Python's own tables of names: that of the statements of a node, then those of the functions inside."""
    tables = [symtable.symtable(ast.unparse(node), "student", "exec")]
    for table in tables:
        tables += table.get_children()
    return tables


def names_bound(statement):
    """Return the names that a statement at the top level of a module sets."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    top = scopes(statement)[0]
    return [name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()]


def names_used(node):
    """Return the names of the module, or built-in ones, that a node reads."""
    top, *inner = scopes(node)
    names = {name.get_name() for name in top.get_symbols() if name.is_referenced()}
    return names | {name.get_name() for table in inner for name in table.get_symbols() if name.is_global()}


def is_movable(statement):
    """Return whether a statement can be taken over by itself: a definition, an import or a constant."""
    return isinstance(statement, (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign))


def top_level(tree):
    """Return {name: statement that sets it} of a module; where several do, the last one."""
    return {name: statement for statement in tree.body for name in names_bound(statement)}


def own_names(node):
    """Return the names of a function's parameters and variables."""
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def same(a, b):
    """Return whether two nodes are the same code, whatever their docstrings, comments and layout."""
    if isinstance(a, FUNCTIONS) and isinstance(b, FUNCTIONS):
        bodies = [[ast.dump(line) for line in body_after_docstring(node)] for node in (a, b)]
        return bodies[0] == bodies[1] and signature(a) == signature(b)
    return ast.dump(a) == ast.dump(b)


def without_annotations(node):
    """Remove annotations, which are code that runs at import, in place; return the node."""
    for n in ast.walk(node):
        if isinstance(n, ast.arg):
            n.annotation = None
        if isinstance(n, FUNCTIONS):
            n.returns = None
    return node


def body_of(function):
    """Return a copy of a function without what runs at its definition: decorators, annotations, defaults."""
    function = without_annotations(copy.deepcopy(function))
    function.decorator_list, function.args.defaults = [], []
    function.args.kw_defaults = [None for _ in function.args.kwonlyargs]
    return function


class Rename(ast.NodeTransformer):
    """Rename what a student's code reads, but not its own parameters and variables of the same name."""

    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)

    def visit_inner(self, node):
        own = own_names(node)
        Rename({old: new for old, new in self.names.items() if old not in own}).generic_visit(node)
        if not isinstance(node, ast.Lambda):
            node.name = self.names.get(node.name, node.name)
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_inner

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.name = self.names.get(node.name, node.name)
        return node


class Transplant:
    """The student's functions of one part in one module, on their way into the reference's module."""

    def __init__(self, part, module, text, reference, originals):
        self.part, self.module, self.file = part, module, f"{module}.py"
        self.reference, self.originals = reference, originals
        try:
            self.student = ast.parse(text)
            compile(text, self.file, "exec", dont_inherit=True)  # finds mistakes that are no matter of grammar
        except (SyntaxError, ValueError) as error:
            line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise Refused(f"{self.file}{line} is not Python: {getattr(error, 'msg', error)}") from None
        self.theirs, self.ours = top_level(self.student), top_level(ast.parse(originals[module]))
        # functions that some part blanks are the reference's in this copy, whatever the student has there
        known = {name for row in PARTS.values() for name in (*row.blanks, *row.equivalents)}
        self.parts_names = {inner for owner, inner in map(split_name, known) if owner == module}
        # {name: statement to add at the end}, {old name: new name}
        self.moved, self.renamed = {}, {}
        # functions of the reference that now have the student's body; new methods of its classes
        self.placed, self.added = [], []

    def refuse(self, where, sentence):
        """Stop: the part cannot be taken over."""
        raise Refused(f"{self.file}: {where} {sentence}")

    def check_import(self, where, node):
        """Refuse an import that is not on the list, or of a name that the copy does not have."""
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
        for module in modules:
            first = module.split(".")[0]
            if first not in LIBRARIES and first not in MODULES:
                allowed = "torch, numpy, scipy, sklearn and modules like math and itertools"
                self.refuse(where, f"imports {module}, which the grader does not take over; it takes {allowed}")
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            there = top_level(ast.parse(self.originals[node.module]))
            for alias in node.names:
                if alias.name not in there:
                    what = f"imports {alias.name} from {node.module}.py, where the original has no such name"
                    self.refuse(where, f"{what}: put it into {self.file}")

    def check(self, where, node):
        """Refuse code that uses what is forbidden in this part, or reaches around its function."""
        forbidden = PARTS[self.part].forbidden
        own = own_names(node)
        for n in ast.walk(node):
            if isinstance(n, ast.Import | ast.ImportFrom):
                self.check_import(where, n)
                modules = [alias.name for alias in n.names] + [getattr(n, "module", None) or ""]
                names = [word for module in modules for word in module.split(".")]
            elif isinstance(n, ast.Name | ast.Attribute):
                names = [n.id if isinstance(n, ast.Name) else n.attr]
            else:
                continue
            for name in names:
                if name in forbidden:
                    self.refuse(where, f"uses {name}, which is forbidden in part {self.part}: write it yourself")
                hidden = name.startswith("__") and name.endswith("__") and name not in SPECIAL_METHODS
                if name in BANNED and name not in own and name not in self.theirs or hidden:
                    self.refuse(where, f"uses {name}, which the grader does not take over")

    def check_decorators(self, where, statement, allowed):
        """Refuse decorators, which are code that runs at import, but for some of Python's own."""
        for decorator in getattr(statement, "decorator_list", ()):
            if ast.unparse(decorator).split("(")[0] not in allowed:
                self.refuse(where, f"has the decorator @{ast.unparse(decorator)}, which the grader does not take over")

    def take(self, name):
        """Take over what a name of the student's module means, unless the copy has the same."""
        statement = self.theirs.get(name)
        if statement is None or name in self.moved or name in self.parts_names:
            return  # a built-in, a variable of the function, or a name that the copy has
        ours = self.ours.get(name)
        if ours is not None and (same(statement, ours) or isinstance(ours, ast.ClassDef)):
            return  # the reference's class serves: constructors are not taken over
        if not is_movable(statement):
            self.refuse(name, "is set inside a statement such as if, try or for: define it on a line of its own")
        self.check_decorators(name, statement, {"dataclass", "dataclasses.dataclass"})
        self.check(name, statement)
        for bound in names_bound(statement):
            self.moved[bound] = statement
            if bound in self.ours or hasattr(builtins, bound):
                self.renamed[bound] = PREFIX + bound
        self.follow(statement)

    def follow(self, node):
        """Take over everything that a node reads."""
        for name in sorted(names_used(node)):
            self.take(name)

    def take_methods(self, owner, node, target, theirs):
        """Take over the new methods and constants of a class that a method reads."""
        for n in ast.walk(node):
            if not (isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)):
                continue
            if n.value.id not in ("self", "cls", owner):
                continue
            present = {name for statement in target.body for name in names_bound(statement)}
            new = [statement for statement in theirs.body if n.attr in names_bound(statement)]
            if new and n.attr not in present:
                self.check_decorators(f"{owner}.{n.attr}", new[-1], {"staticmethod", "classmethod", "property"})
                self.check(f"{owner}.{n.attr}", new[-1])
                target.body.append(new[-1])
                self.added.append(new[-1])
                self.follow(new[-1])
                self.take_methods(owner, new[-1], target, theirs)

    def replace(self, inner, expected):
        """Put the student's function in the place of the reference's blank."""
        function, target = definition(self.student, inner), definition(self.reference, inner)
        if not isinstance(function, FUNCTIONS):
            self.refuse(inner, "is missing: keep the function under its name")
        if signature(function) != expected:
            self.refuse(inner, f"was changed to `{signature(function)}`: keep `{expected}`")
        self.check(inner, function)
        self.follow(body_of(function))
        owner, _, _ = inner.rpartition(".")
        if owner:
            self.take_methods(owner, function, definition(self.reference, owner), definition(self.student, owner))
        target.body = function.body
        self.placed.append(target)

    def notes(self):
        """Return sentences for what the student has changed and the course's copy does not take over."""
        pairs = []
        for name, ours in self.ours.items():
            theirs = self.theirs.get(name)
            if isinstance(ours, ast.ClassDef) and isinstance(theirs, ast.ClassDef):
                inner = top_level(theirs)
                pairs += [(f"{name}.{key}", inner.get(key), node) for key, node in top_level(ours).items()]
            elif not isinstance(ours, ast.Import | ast.ImportFrom):
                pairs.append((name, theirs, ours))
        known = {*self.parts_names, *self.moved}
        changed = [name for name, a, b in pairs if name not in known and (a is None or not same(a, b))]
        notes = [f"note: {self.file}: the course's grader uses the original {', '.join(changed)}"] if changed else []
        if "*" in self.theirs:
            notes.append(f"note: {self.file}: the course's grader does not know the names of `import *`: import each")
        return notes

    def finish(self):
        """Rename what clashes, add what was taken over, and return the text of the module."""
        rename = Rename(self.renamed)
        for statement in dict.fromkeys(self.moved.values()):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    bound = (alias.asname or alias.name).split(".")[0]
                    if bound in self.renamed:
                        alias.asname = self.renamed[bound]
        for node in self.placed:
            defaults = copy.deepcopy(node.args)  # the reference's
            rename.visit(node)
            node.args = defaults
        for node in self.added:
            rename.visit(without_annotations(node))
        # in the student's order: a constant may need one above it
        moved = [statement for statement in self.student.body if statement in self.moved.values()]
        self.reference.body += [without_annotations(rename.visit(statement)) for statement in moved]
        return ast.unparse(ast.fix_missing_locations(self.reference)) + "\n"


def read(folder, module):
    """Return the text of a student's module."""
    path = folder / f"{module}.py"
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors on Windows write a mark first
    except FileNotFoundError:
        raise Refused(f"{module}.py is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{module}.py cannot be read: {error}") from None


def transplant(part, submission, signatures, originals):
    """Return the modules that differ from the project's in the copy that grades a part: {module: text}, and notes.

    A note names what the student has changed elsewhere. `signatures` is {function: signature} of the original blanks,
    `originals` is {module: text}.
    Raises: Refused if something cannot be taken over.
    """
    modules, notes = {}, []
    for module, sentences in left_out([part]).items():
        text = read(ROOT, module)
        try:
            text = remove_bodies(text, sentences)
        except SyntaxError as error:  # in a starter copy, where the student's files are the project's
            raise Refused(f"{module}.py line {error.lineno} is not Python: {error.msg}") from None
        if module in PARTS[part].modules:
            work = Transplant(part, module, read(submission, module), ast.parse(text), originals)
            for name in PARTS[part].blanks:
                owner, inner = split_name(name)
                if owner == module:
                    work.replace(inner, signatures[name])
            notes += work.notes()
            text = work.finish()
        modules[module] = text
    return modules, notes
