"""The course: the table fits the code, the starter has no answers, and the grade of a copy can be trusted.

A submission is a folder with the modules of the project, of which a test changes one or a few.
"""

import ast
import csv
import importlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from teaching_bugs import BUGS
from teaching_solution import BODIES, HELPERS, METHODS
from tiny import refusal

from teaching import grade as grading
from teaching.__main__ import main, make_parser
from teaching.grade import PUBLIC_SEED, grade_part, originals, reference_results, report, runner, signatures
from teaching.parts import PARTS
from teaching.source import ROOT, body_after_docstring, definition, left_out, remove_bodies, signature, split_name
from teaching.starter import write_starter
from teaching.transplant import transplant

SEED = PUBLIC_SEED
BLANKS = [name for part in PARTS.values() for name in part.blanks]


def replace_body(text, inner, body):
    """A module's text with other statements after the docstring of a function."""
    function, lines = definition(ast.parse(text), inner), text.splitlines(keepends=True)
    first = body_after_docstring(function)[0]
    lines[first.lineno - 1 : function.end_lineno] = [textwrap.indent(body.strip("\n") + "\n", " " * first.col_offset)]
    return "".join(lines)


def points(results):
    """The points of some results."""
    return sum(result.points for result in results)


class Submission:
    """A student's folder: a copy of all modules, to be changed."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)

    def read(self, file):
        """The text of a module."""
        return (self.folder / file).read_text()

    def write(self, file, text):
        """Replace the text of a module."""
        (self.folder / file).write_text(text)

    def change(self, file, old, new):
        """Replace a text that occurs once, or the body of a function that `old` names."""
        text = self.read(file)
        if old.startswith("def ") and "(" not in old:
            return self.write(file, replace_body(text, old.removeprefix("def "), new))
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
        return self.write(file, text.replace(old, new))

    def body(self, name, body, helpers=""):
        """Replace the body of a function, and add statements at the end of its file."""
        module, inner = split_name(name)
        self.write(f"{module}.py", replace_body(self.read(f"{module}.py"), inner, body) + helpers)

    def grade(self, part, **options):
        """The results of one part."""
        return grade_part(part, self.folder, **{"seed": SEED} | options)


@pytest.fixture
def submission(tmp_path):
    """A copy of the project, with all solutions."""
    return Submission(tmp_path / "submission")


@pytest.fixture(scope="session")
def starter(tmp_path_factory):
    """A starter copy without any part."""
    folder = tmp_path_factory.mktemp("course") / "starter"
    write_starter(folder, list(PARTS))
    return folder


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_what_the_table_names_exists(part):
    row = PARTS[part]
    for name in (*row.blanks, *row.equivalents):
        module, inner = split_name(name)
        function = definition(ast.parse((ROOT / f"{module}.py").read_text()), inner)
        assert isinstance(function, ast.FunctionDef), name
    assert 3 <= len(row.checks) <= 6
    checks = importlib.import_module(f"teaching.checks.{part}")
    last_names = {name.split(".")[-1] for name in row.blanks} | {name.split(".")[-2] for name in row.blanks}
    for check in row.checks:
        assert callable(getattr(checks, check.name)) and check.points > 0
        assert any(name in check.hint for name in last_names), f"{check.name}'s hint names no function"


def test_the_table_is_a_course():
    assert sum(part.points for part in PARTS.values()) == 100
    assert len(BLANKS) == len(set(BLANKS))
    # a body to write: no class, constructor or other special method but __call__
    assert [name for name in BLANKS if re.search(r"\.__(?!call__)", name)] == []


# --- the starter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_the_starter_differs_in_the_bodies_only(starter, path):
    before, after = path.read_text(), (starter / path.name).read_text()
    compile(after, path.name, "exec")
    missing = left_out(PARTS).get(path.stem, {})
    lines = iter(before.splitlines())
    kept = [line for line in after.splitlines() if "raise NotImplementedError(" not in line]
    assert len(after.splitlines()) - len(kept) == len(missing) + before.count("raise NotImplementedError(")
    assert all(line in lines for line in kept)  # each in its order
    trees = ast.parse(before), ast.parse(after)
    for inner, sentence in missing.items():
        old, new = (definition(tree, inner) for tree in trees)
        assert signature(new) == signature(old) and ast.get_docstring(new) == ast.get_docstring(old)
        assert ast.unparse(body_after_docstring(new)) == f"raise NotImplementedError('{sentence}')"
        # neither comments nor code of the body are left
        assert new.end_lineno - body_after_docstring(new)[0].lineno == 0


def anonymous(statements):
    """The code of some statements with its names numbered, so that a copy under other names is equal."""
    numbers, tree = {}, ast.parse(ast.unparse(statements))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = f"x{numbers.setdefault(node.id, len(numbers))}"
    return ast.dump(tree)


def test_the_starter_has_no_answer(starter):
    """Neither the files with answers nor a function that has the body of a blank under other names."""
    assert {path.name for path in starter.iterdir() if path.is_dir()} == {"data", "handout", "teaching"}
    assert not [*starter.rglob("answers.*"), *starter.rglob("walkthrough.py")]
    assert not (starter / "METHODS.md").exists() and not (starter / "LOG.md").exists()
    assert not (starter / "teaching" / "gradescope").exists() and not (starter / ".git").exists()
    answers = {}
    for name in BLANKS:
        module, inner = split_name(name)
        function = definition(ast.parse((ROOT / f"{module}.py").read_text()), inner)
        answers[anonymous(body_after_docstring(function))] = name
    found = []
    for path in starter.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and body_after_docstring(node):
                found += [(path.name, node.name, answers.get(anonymous(body_after_docstring(node))))]
    assert [row for row in found if row[2]] == []
    # the names of the files that were left out would be dead links
    assert "scaled_dot_product_attention(" not in "".join(path.read_text() for path in starter.glob("*.py"))


def test_a_starter_lacks_only_the_parts_that_were_asked_for(tmp_path):
    write_starter(tmp_path / "one", ["slf"])
    changed = [p.name for p in ROOT.glob("*.py") if p.read_text() != (tmp_path / "one" / p.name).read_text()]
    assert changed == ["slf.py"]
    assert "| slf |" in (tmp_path / "one" / "README.md").read_text()
    assert "exists" in refusal(write_starter, tmp_path / "one", ["slf"])


# --- grades -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_the_untouched_copy_has_all_points_and_a_blank_none(part, starter):
    assert [result.output for result in grade_part(part, ROOT, SEED)] == [""] * len(PARTS[part].checks)
    blank = grade_part(part, starter, SEED)
    # a check that passes on a blank would be worth nothing
    assert points(blank) == 0 and all("is not written yet" in result.output for result in blank)


@pytest.mark.parametrize("blank", PARTS)
def test_a_blank_part_costs_no_other_part(blank, submission):
    missing = [split_name(name) for name in PARTS[blank].blanks]
    for module in PARTS[blank].modules:
        sentences = {inner: "blank" for owner, inner in missing if owner == module}
        submission.write(f"{module}.py", remove_bodies(submission.read(f"{module}.py"), sentences))
    assert points(submission.grade(blank)) == 0
    # The copy that grades another part is that of the untouched project, so its points are all points. The student's
    # modules of a part are all that its copy is made from.
    for part in PARTS:
        if part != blank and set(PARTS[part].modules) & set(PARTS[blank].modules):
            modules, notes = transplant(part, submission.folder, signatures(), originals())
            assert modules == transplant(part, ROOT, signatures(), originals())[0] and notes == []


@pytest.mark.parametrize("name", BUGS)
def test_a_typical_mistake_costs_a_quarter_of_its_part(name, submission):
    file, old, new, part = BUGS[name]
    submission.change(file, old, new)
    results = submission.grade(part)
    failed = [result for result in results if result.output]
    assert 4 * (PARTS[part].points - points(results)) >= PARTS[part].points
    assert all(f"look at {result.check.hint}" in result.output for result in failed)


def test_a_failed_check_prints_the_smallest_case(submission):
    submission.change("bert.py", " / math.sqrt(query.shape[-1])", "")
    output = next(result.output for result in submission.grade("attention") if result.check.name == "scores")
    numbers = {
        kind: re.search(rf"{kind} attend_plain: \[\[\[\[(-?[\d.]+)", output)[1] for kind in ("computed", "expected")
    }
    assert numbers["computed"] != numbers["expected"]
    assert "given query: " in output and "shape [1, 1, " in output


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_report_does_not_depend_on_the_order_of_the_results(names):
    computed, expected = ({name: torch.tensor([number]) for name in names} for number in (1.0, 2.0))
    expected |= {f"given {name}": torch.tensor([3.0]) for name in names}
    lines = grading.explain_difference(computed, expected).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["given a", "given b", "computed a", "expected a"]


@pytest.fixture(scope="session")
def other_solution(tmp_path_factory):
    """The folder of a student who has written everything in another way."""
    work = Submission(tmp_path_factory.mktemp("course") / "other")
    for name, body in BODIES.items():
        work.body(name, body)
    for name, text in METHODS.items():
        module, inner = split_name(name)
        before = work.read(f"{module}.py").splitlines(keepends=True)
        end = definition(ast.parse("".join(before)), inner).end_lineno
        work.write(
            f"{module}.py", "".join([*before[:end], "\n", textwrap.indent(text.strip(), "    "), "\n", *before[end:]])
        )
    for module, text in HELPERS.items():
        work.write(f"{module}.py", work.read(f"{module}.py") + text)
    return work


@pytest.mark.parametrize("part", PARTS)
def test_another_correct_solution_has_all_points(part, other_solution):
    assert set(PARTS[part].blanks) <= set(BODIES)
    assert [result.output for result in other_solution.grade(part)] == [""] * len(PARTS[part].checks)


def test_a_seed_draws_other_cases():
    one, two = (reference_results("attention", seed) for seed in (SEED, SEED + 1))
    assert one.keys() == two.keys()
    shapes = [[tensor.shape for frame in results.values() for tensor in frame.values()] for results in (one, two)]
    assert shapes[0] != shapes[1]


# --- what is refused, with a sentence -----------------------------------------------------------------------------


def refused(submission, part="attention"):
    """The sentence with which a part is refused; it has no points then."""
    results = submission.grade(part)
    assert points(results) == 0 and len({result.output for result in results}) == 1
    return results[0].output.removeprefix("not graded: ")


def test_a_missing_file_or_a_syntax_error_costs_its_own_part_only(submission):
    submission.write("smart.py", "def penalty(:\n")
    (submission.folder / "gradients.py").unlink()
    assert refused(submission, "smart") == "smart.py line 1 is not Python: invalid syntax"
    assert refused(submission, "gradients") == "gradients.py is missing"
    for part in ("slf", "early_exit"):
        known = signatures(), originals()
        assert transplant(part, submission.folder, *known) == transplant(part, ROOT, *known)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("def attend_plain(", "@torch.compile\ndef attend_plain(", "keep `attend_plain(query, key, value"),
        (
            'dropout):\n    """For each token',
            'dropout, scale=1):\n    """For each token',
            "was changed to `attend_plain(query",
        ),
        ("def attend_plain(", "def attend(", "attend_plain is missing: keep the function under its name"),
        ("return weights @ value", "import os\n    return weights @ value", "imports os, which"),
        ("return weights @ value", "return eval('weights @ value')", "uses eval, which"),
        ("return weights @ value", "return attend_plain.__globals__", "uses __globals__, which"),
        ("return weights @ value", "from tasks import helper\n    return helper()", "imports helper from tasks.py"),
    ],
)
def test_what_cannot_be_taken_over_is_named(submission, old, new, sentence):
    submission.change("bert.py", old, new)
    assert sentence in refused(submission)


@pytest.mark.parametrize(
    ("helpers", "sentence"),
    [
        ("\nif True:\n    ROOT_K = math.sqrt\n", "ROOT_K is set inside a statement such as if, try or for"),
        ("\ntry:\n    import os as ROOT_K\nexcept ImportError:\n    pass\n", "ROOT_K is set inside a statement such"),
        ("\n@torch.no_grad()\ndef ROOT_K(x):\n    return 1\n", "ROOT_K has the decorator @torch.no_grad()"),
        ("\nimport sys\nROOT_K = sys.maxsize\n", "sys imports sys, which"),
    ],
)
def test_a_helper_that_cannot_be_taken_over_is_named(submission, helpers, sentence):
    submission.body("bert.attend_plain", "return value * ROOT_K(4)", helpers)
    assert sentence in refused(submission)


def test_a_variable_may_have_the_name_of_a_forbidden_function(submission):
    body = "input = query @ key.transpose(2, 3)\nreturn [exit for exit in (input, value)][1]"
    submission.body("bert.attend_plain", body)
    assert "computed attend_plain" in submission.grade("attention")[1].output


def test_a_blank_does_not_hide_a_mistake_beside_it(submission):
    submission.change("bert.py", *BUGS["heads cut without a transpose"][1:3])
    submission.body(
        "bert.BertSelfAttention.merge_heads", 'raise NotImplementedError("part attention: write merge_heads")'
    )
    assert "computed split_heads(x)" in submission.grade("attention")[0].output


def test_changes_that_are_not_taken_over_are_named(submission):
    submission.change("bert.py", "self.num_attention_heads = config.num_attention_heads", "self.heads = 2")
    submission.body("bert.BertSelfAttention.split_heads", "return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)")
    output = submission.grade("attention")[0].output
    assert "has no attribute 'heads'" in output
    note = "note: bert.py: the course's grader uses the original BertSelfAttention.__init__"
    assert note in report(submission.grade("attention"))[-1]
    submission.change("bert.py", "import math\n", "from math import *\n")
    assert "does not know the names of `import *`" in report(submission.grade("attention"))[-1]


def test_a_starter_warns_of_what_the_course_does_not_take_over(starter, tmp_path):
    """There the project's other functions are the student's own: without the warning all would be well at home."""
    copy = tmp_path / "work"
    shutil.copytree(starter, copy)
    with open(copy / "tasks.py", "a", encoding="utf-8") as file:
        file.write("\n\ndef helper(x):\n    return x\n")
    text = (copy / "bert.py").read_text()
    text = replace_body(text, "attend_plain", "return helper(1)")
    (copy / "bert.py").write_text(text.replace("import math\n", "import math\n\nfrom tasks import helper\n"))
    text = (copy / "evaluation.py").read_text()
    text = text.replace("THRESHOLD_ROOM = ", "THRESHOLD_ROOM = 1e-9 + ")
    (copy / "evaluation.py").write_text(replace_body(text, "score_regression", '"""Not yet."""'))

    def grade(part):
        command = [sys.executable, "-m", "teaching", "grade", ".", part]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True)

    assert "imports helper from tasks.py, where the original has no such name" in grade("attention").stdout
    printed = grade("evaluation").stdout
    assert "note: evaluation.py: the course's grader uses the original THRESHOLD_ROOM" in printed
    assert "fit_decision_threshold is not written yet" in printed
    # a mistake in a file does not stop the parts of the others
    (copy / "tasks.py").write_text("def f(:")
    assert "not graded: tasks.py line 1 is not Python" in grade("losses").stdout
    result = grade("layer")
    assert "0 of 8" in result.stdout and not result.stderr


# --- ways to fool a grader ----------------------------------------------------------------------------------------

TRICKS = {
    "the library's attention": "return attend_sdpa(query, key, value, extended_mask, dropout)",
    "the library's attention under another name": (
        "for name in dir(nn.functional):\n    if name.startswith('scaled_dot'):\n"
        "        return operator.attrgetter(name)(nn.functional)(query, key, value, extended_mask)"
    ),
    "what stands behind the library's attention": (
        "return torch._scaled_dot_product_attention_math(query, key, value, extended_mask)[0]"
    ),
    "the process ends": "torch.os._exit(0)",
    "an exception that no one catches": "raise KeyboardInterrupt",
    "an exit": "raise SystemExit(0)",
    "an endless loop": "while True:\n    pass",
    "a verdict printed by hand": "print('attention 12 of 12  all tests passed')\nreturn value",
    "a patched comparison": (
        "torch.equal = torch.allclose = torch.testing.assert_close = lambda *a, **k: True\n"
        "torch.Tensor.__eq__ = lambda *a: True\nreturn value"
    ),
    "the reference's file": f"return np.genfromtxt({str(ROOT / 'bert.py')!r})",
    "the reference's file by name": "return np.genfromtxt('../bert.py')",
    "a thread that outlives its time": ("import concurrent.futures\nreturn value"),
    "a thread of torch that outlives its time": (
        "def work():\n    while True:\n        pass\n"
        "torch.utils.data.dataloader.threading.Thread(target=work).start()\nreturn value"
    ),
    "a process that outlives its time": "torch.os.fork()\nreturn value",
    "an answer through an import": "from lab.peer import attention\nreturn attention(query, key, value)",
    "an answer of the adapters": "import adapters\nreturn adapters.ProjectedAttention.attend(query, key)",
    "no tensor": "return 'attention'",
    "an answer from the network": "torch.hub.urlopen('http://127.0.0.1:9')\nreturn value",
    "all memory": "return torch.zeros(10**10) + value[0, 0, 0, 0]",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_earns_nothing(trick, submission):
    submission.body("bert.attend_plain", TRICKS[trick], "\nimport numpy as np\nimport operator\n")
    start = time.monotonic()
    results = submission.grade("attention", seconds=2)
    assert points([result for result in results if result.check.name != "heads"]) == 0
    assert all(result.output for result in results if result.check.name != "heads")
    assert time.monotonic() - start < 60


def test_statements_at_the_top_level_and_a_conftest_are_not_run(submission):
    """sys.exit at import, and pytest's hooks in a conftest.py: neither costs nor earns a point."""
    submission.write("bert.py", "import sys\n" + submission.read("bert.py") + "\nsys.exit()\n")
    submission.write("conftest.py", "def pytest_runtest_makereport(item):\n    raise SystemExit(0)\n")
    assert points(submission.grade("attention")) == PARTS["attention"].points
    submission.body("bert.attend_plain", "raise NotImplementedError")
    assert points(submission.grade("attention")) == 3  # the check of the heads


def test_an_answer_that_is_missing_says_why(submission):
    submission.body("bert.attend_plain", "while True:\n    pass")
    outputs = {result.check.name: result.output for result in submission.grade("attention", seconds=3)}
    assert outputs["heads"] == "" and "took longer than 3 seconds" in outputs["scores"]
    submission.body("bert.attend_plain", "return torch.os._exit(0)")
    assert "no result: the process ended before" in submission.grade("attention")[1].output


def test_nothing_runs_after_the_grading(submission):
    """Threads and processes of a student end with the part."""

    def children():
        listed = subprocess.run(["ps", "-A", "-o", "ppid="], capture_output=True, text=True, check=True).stdout
        return listed.split().count(str(runner().process.pid))

    submission.body("bert.attend_plain", TRICKS["a thread of torch that outlives its time"])
    submission.grade("attention", seconds=2)
    assert children() == 0


def test_the_process_has_no_reference_and_no_network(submission):
    """Neither the modules that it imports nor its folders have the solution of the part."""
    for part in PARTS:
        modules, _ = transplant(part, Path(submission.folder), signatures(), originals())
        for name in PARTS[part].equivalents:
            module, inner = split_name(name)
            body = body_after_docstring(definition(ast.parse(modules[module]), inner))
            assert ast.unparse(body).startswith("raise NotImplementedError")
    varying = set(left_out(PARTS))
    assert not varying & {path.stem for path in Path(runner().shared.name).glob("*.py")}
    body = "torch.distributed.rendezvous\nimport urllib.request\nreturn value"
    submission.body("bert.attend_plain", body)
    assert "imports urllib.request" in refused(submission)


def test_the_process_has_no_network_where_the_system_can_take_it():
    if not grading.without_network():
        pytest.skip("no unshare, or no right to use it")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, capture_output=True).returncode == 0
        done = subprocess.run([*grading.without_network(), *command], capture_output=True, text=True)
    assert "unreachable" in done.stderr


def test_frames_are_never_unpickled():
    """What a process returns is read as safetensors only: a pickle in its place is no answer."""
    ours, theirs = socket.socketpair()
    payload = pickle.dumps({"attend_plain": 1})
    theirs.sendall(grading.LENGTH.pack(len(payload)) + payload)
    frames, sentence = runner().collect(ours, 1, 5)
    assert frames == [] and "returned no tensors" in sentence
    ours.close()
    theirs.close()


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_report_and_gradescopes_file(submission, tmp_path, capsys):
    submission.body("slf.smart_alternating", "yield")
    path = tmp_path / "results.json"
    main(["grade", str(submission.folder), "slf", "gradients", "--seed", "4", "--results", str(path)])
    printed = capsys.readouterr().out
    assert re.search(r"slf +2 of 4", printed) and re.search(r"gradients +4 of 4", printed)
    assert re.search(r"total +6 of 8", printed) and "look at smart_alternating" in printed
    results = json.loads(path.read_text())
    assert results["score"] == 6 and results["visibility"] == "visible"
    assert sum(test["score"] for test in results["tests"]) == 6
    assert sum(test["max_score"] for test in results["tests"]) == 8
    assert {"name", "score", "max_score", "output", "visibility", "status"} <= results["tests"][0].keys()
    assert [test["status"] for test in results["tests"]].count("failed") == 2


def test_mistakes_on_the_command_line(tmp_path):
    results = tmp_path / "results.json"
    assert "no folder and no zip" in refusal(main, ["grade", str(tmp_path / "nothing"), "--results", str(results)])
    assert json.loads(results.read_text())["score"] == 0
    assert "invalid choice" in refusal(main, ["grade", ".", "atention"])
    assert make_parser().parse_args(["grade", "."]).part == []


def test_a_class_is_graded(submission, tmp_path, capsys):
    """Folders and zips, the files anywhere inside; a wrong upload costs nobody else the table."""
    submission.body("gradients.PCGrad.factor", "return 0.0")
    everybody, out = tmp_path / "class", tmp_path / "out"
    shutil.copytree(submission.folder, everybody / "ana" / "minbert-main")
    (everybody / "ana" / "notes.py").touch()
    shutil.make_archive(everybody / "dai", "zip", ROOT, "gradients.py")
    (everybody / "eve").mkdir()
    (everybody / "fay.zip").write_text("no zip")
    # Moodle's folder a student; a zip with a capital name; the starter's file beside the solution
    (everybody / "gil").mkdir()
    shutil.copy(everybody / "dai.zip", everybody / "gil")
    shutil.copy(everybody / "dai.zip", everybody / "hal.ZIP")
    shutil.copytree(ROOT, everybody / "ida" / "all", ignore=lambda _, names: [n for n in names if n[-3:] != ".py"])
    (everybody / "ida" / "gradients.py").write_text("")
    # mistakes that Python finds after its grammar; a zip whose bytes are damaged inside
    shutil.copytree(submission.folder, everybody / "jon")
    with open(everybody / "jon" / "gradients.py", "a", encoding="utf-8") as file:
        file.write("def f(x):\n    x = 1\n    global x\n")
    damaged = bytearray((everybody / "dai.zip").read_bytes())
    damaged[200:400] = bytes(200)
    (everybody / "kim.zip").write_bytes(damaged)
    (everybody / "leo.tar.gz").touch()
    shutil.make_archive(everybody / "mia", "zip", ROOT, "LICENSE")
    (everybody / ".hidden").mkdir()
    main(["grade-all", str(everybody), str(out), "gradients", "--seed", str(SEED)])
    rows = list(csv.reader((out / "grades.csv").read_text().splitlines()))
    assert [row[:3] for row in rows] == [
        ["name", "gradients", "total"],
        ["ana", "2", "2"],
        ["dai", "4", "4"],
        ["eve", "0", "0"],
        ["fay", "0", "0"],
        ["gil", "4", "4"],
        ["hal", "4", "4"],
        ["ida", "4", "4"],
        ["jon", "0", "0"],
        ["kim", "0", "0"],
        ["leo.tar.gz", "0", "0"],
        ["mia", "0", "0"],
    ]
    notes = {row[0]: row[3] for row in rows}
    assert "ask for another one" in notes["fay"] and "fay: 0 (" in capsys.readouterr().out
    assert "ask for another one" in notes["kim"] and "no folder and no zip" in notes["leo.tar.gz"]
    assert (
        notes["eve"] == notes["mia"] == "not graded: gradients.py is missing"
        and "is not Python: name 'x'" in notes["jon"]
    )
    assert (out / "ida.txt").read_text().startswith("files of    all\n") and notes["ana"] == ""
    assert (out / "hal.txt").read_text().startswith("files of    hal.ZIP\n")
    assert "look at" in (out / "ana.txt").read_text() and "gradients.py is missing" in (out / "eve.txt").read_text()
    assert "give a new folder" in refusal(main, ["grade-all", str(everybody), str(out)])
    (everybody / "dai").mkdir()
    assert "dai is there twice" in refusal(main, ["grade-all", str(everybody), str(tmp_path / "new")])
    assert "no folders and no zips" in refusal(main, ["grade-all", str(everybody / "eve"), str(tmp_path / "new")])


def test_an_endless_loop_costs_its_own_check(submission):
    submission.body("gradients.PCGrad.factor", "while True: pass")
    results = submission.grade("gradients", seconds=2)
    outputs = [result.output for result in results]
    assert [result.points for result in results] == [0, 0, 1, 1], outputs
    assert all("took longer than 2 seconds" in output for output in outputs[:2])


def test_a_missing_return_is_named(submission):
    submission.body("gradients.PCGrad.factor", "1.0")
    assert "is a `return` missing?" in submission.grade("gradients")[0].output


def test_a_starter_has_what_a_run_reads_beside_the_modules(starter):
    assert (starter / "report_page.html").read_bytes() == (ROOT / "report_page.html").read_bytes()


def test_a_student_solves_attention_in_a_starter_copy(starter, tmp_path, other_solution):
    """The grade follows each step; the starter's own expected results serve."""
    copy = tmp_path / "work"
    shutil.copytree(starter, copy)
    source, text = other_solution.read("bert.py"), (copy / "bert.py").read_text()
    steps = ["BertSelfAttention.split_heads", "BertSelfAttention.merge_heads", "attend_plain"]
    earned = []
    for k in range(len(steps) + 1):
        for inner in steps[:k]:
            body = ast.unparse(body_after_docstring(definition(ast.parse(source), inner)))
            text = replace_body(text, inner, body)
        (copy / "bert.py").write_text(text + (HELPERS["bert"] if k == len(steps) else ""))
        earned.append(points(grade_part("attention", copy, SEED)))
    assert earned == [0, 0, 3, 12]
    command = [sys.executable, "-m", "teaching", "grade", ".", "attention", "layer"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert re.search(r"attention +12 of 12", done.stdout), done.stdout + done.stderr
    assert "BertLayer.forward is not written yet" in done.stdout and re.search(r"total +12 of 20", done.stdout)


def test_gradescopes_scripts(submission, tmp_path):
    """The script grades a folder in a zip with another seed, and writes the file where Gradescope reads it."""
    submission.body("gradients.PCGrad.factor", "return 0.0")
    root = tmp_path / "autograder"
    for folder in ("source", "submission", "results"):
        (root / folder).mkdir(parents=True)
    (root / "source" / "minbert").symlink_to(ROOT)
    submission.folder.rename(root / "submission" / "minbert-main")
    scripts = ROOT / "teaching" / "gradescope"
    assert all(os.access(path, os.X_OK) for path in scripts.iterdir())
    assert subprocess.run(["bash", "-n", scripts / "setup.sh"]).returncode == 0
    environment = os.environ | {"AUTOGRADER": str(root), "PYTHON": sys.executable, "PARTS": "gradients"}
    subprocess.run([scripts / "run_autograder"], env=environment, check=True, capture_output=True)
    results = json.loads((root / "results" / "results.json").read_text())
    # without any file nothing is graded, least of all the project itself
    shutil.rmtree(root / "submission" / "minbert-main")
    subprocess.run([scripts / "run_autograder"], env=environment, check=True, capture_output=True)
    assert json.loads((root / "results" / "results.json").read_text())["score"] == 0
    assert results["score"] == 2 and [test["score"] for test in results["tests"]] == [0, 0, 1, 1]


def test_a_starter_has_the_expected_results_of_one_seed(starter, monkeypatch):
    expected = safetensors.torch.load_file(starter / "teaching" / "expected.safetensors")
    assert {key.split("/")[0] for key in expected} == set(PARTS)
    monkeypatch.setattr(grading, "EXPECTED", starter / "teaching" / "expected.safetensors")
    assert "expected results of seed 0 only" in refusal(reference_results.__wrapped__, "slf", 1)
