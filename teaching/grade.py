"""The grader: points for a student's copy, part by part and check by check.

For each part transplant.py takes the student's functions into a copy of the project. child.py runs the checks on this
copy in a process of its own, which has limits and no expected values: it returns tensors. The same checks run on the
reference. This file compares the two. So a student's code cannot print a verdict, patch a comparison or end the
grading. A check without a result has no points. This is no sandbox against malice: grade the work of people whom you
do not trust on a machine that has nothing else on it, as Gradescope does.

In a starter copy there is no reference. The results of the reference for one seed are in EXPECTED instead.
"""

import ast
import atexit
import compileall
import contextlib
import csv
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from errors import InputError

from .checks.common import SIZES
from .child import ERROR, GIVEN, LENGTH
from .parts import PARTS
from .source import ROOT, definition, left_out, signature, split_name
from .transplant import Refused, transplant

EXPECTED = Path(__file__).parent / "expected.safetensors"
PUBLIC_SEED = 0  # the seed of a starter copy
SECONDS = 30  # limit of a part
LESS = 10  # limit of the checks that are left after one that did not end
RELATIVE, ABSOLUTE = 1e-6, 1e-6  # tolerances: the checks compute in float64; a body that rounds to float32 passes
LARGEST_FRAME = 1 << 26  # bytes
SHOWN = 24  # numbers of a tensor that the report prints
NOT_GRADED = "not graded: "


@dataclass(frozen=True)
class Result:
    """The result of one check. `output` is empty if it earned its points; `notes` are about the part's files."""

    part: str
    check: object
    output: str = ""
    notes: tuple = ()

    @property
    def points(self):
        """The points that were earned."""
        return 0 if self.output else self.check.points


# --- running the checks of a part in a process ----------------------------------------------------------------------


def without_network():
    """Return the command that starts a program without network, or an empty one if this system has none."""
    command = ["unshare", "--map-root-user", "--net"]
    works = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


def receive(channel, size, deadline=None):
    """Read exactly `size` bytes from a socket; None if it was closed before.

    Raises: TimeoutError after the deadline, a time of time.monotonic().
    """
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            channel.settimeout(max(1e-3, deadline - time.monotonic()))
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


class Runner:
    """The process that has imported torch and forks one process for each part; see child.py."""

    def __init__(self):
        # the modules that are the same in every copy, compiled once
        self.shared = tempfile.TemporaryDirectory(prefix="grade-")
        self.varying = sorted(left_out(PARTS))
        for path in ROOT.glob("*.py"):
            if path.stem not in self.varying:
                shutil.copy(path, self.shared.name)
        checks = Path(__file__).parent / "checks"
        shutil.copytree(checks, Path(self.shared.name) / "checks", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(self.shared.name, quiet=2)
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-B", Path(__file__).with_name("child.py"), str(theirs.fileno())]
        self.process = subprocess.Popen(
            [*without_network(), *command, self.shared.name],
            pass_fds=[theirs.fileno()],
            cwd=self.shared.name,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1", "HOME": self.shared.name},
        )
        theirs.close()
        self.read_number()  # it is ready

    def read_number(self):
        """Read a number that the process reports."""
        data = receive(self.control, LENGTH.size)
        if data is None:
            raise InputError("the process that runs the checks does not start: is this copy's .venv complete?")
        return LENGTH.unpack(data)[0]

    def close(self):
        """End the process and remove its folder."""
        self.control.close()
        self.process.wait()
        self.shared.cleanup()

    def run(self, part, modules, cases, seconds):
        """Run checks of a part on a copy with these modules.

        `cases` are (check, seed, size). Returns the frames that were received, {name: tensor} each, and a sentence that
        says how the process ended.
        """
        with tempfile.TemporaryDirectory(prefix="grade-") as folder:
            for module in self.varying:
                text = modules.get(module) or (ROOT / f"{module}.py").read_text(encoding="utf-8")
                (Path(folder) / f"{module}.py").write_text(text, encoding="utf-8")
            job = {"part": part, "folder": folder, "checks": cases, "seconds": seconds}
            job["forbidden"] = PARTS[part].forbidden
            channel, theirs = socket.socketpair()
            with channel:
                socket.send_fds(self.control, [json.dumps(job).encode()], [theirs.fileno()])
                theirs.close()
                pid = self.read_number()
                frames, sentence = self.collect(channel, len(cases), seconds)
            # also what it has started, and threads that would go on
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            status = self.read_number()
        if not sentence and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            sentence = f"took longer than {seconds} seconds"
        return frames, sentence or "the process ended before this check returned a result"

    def collect(self, channel, count, seconds):
        """Receive the frames of a part until its time is over. Returns them, and a sentence if something is wrong."""
        frames, deadline = [], time.monotonic() + seconds
        try:
            for _ in range(count):
                head = receive(channel, LENGTH.size, deadline)
                if head is None or (size := LENGTH.unpack(head)[0]) > LARGEST_FRAME:
                    break
                frames.append(safetensors.torch.load(receive(channel, size, deadline) or b""))
        except TimeoutError:
            return frames, f"took longer than {seconds} seconds"
        except (safetensors.SafetensorError, OSError) as error:
            return frames, f"the process returned no tensors ({error})"
        return frames, ""


@functools.cache
def runner():
    """Return the process that runs checks; it starts at the first call and ends with this program."""
    process = Runner()
    atexit.register(process.close)
    return process


# --- what is expected -----------------------------------------------------------------------------------------------


def cases_of(part, seed):
    """Return the cases of a part, the smallest case of every check first within the check."""
    return [(check.name, seed, size) for check in PARTS[part].checks for size in range(SIZES)]


@functools.cache
def reference_results(part, seed):
    """Return the results of the reference for each case of a part: {(check, size): {name: tensor}}."""
    if EXPECTED.exists():
        if seed != PUBLIC_SEED:
            raise InputError(f"--seed {seed}: a starter copy has the expected results of seed {PUBLIC_SEED} only")
        results = {(check, size): {} for check, _, size in cases_of(part, seed)}
        for key, tensor in safetensors.torch.load_file(EXPECTED).items():
            owner, check, size, name = key.split("/", 3)
            if owner == part:
                results[check, int(size)][name] = tensor
        return results
    cases = cases_of(part, seed)
    frames, sentence = runner().run(part, {}, cases, 10 * SECONDS)
    if len(frames) < len(cases):
        raise RuntimeError(f"part {part}: the reference gave {len(frames)} of {len(cases)} results: {sentence}")
    for (check, _, size), frame in zip(cases, frames, strict=True):
        if ERROR in frame:
            raise RuntimeError(f"part {part}, check {check}, size {size}, seed {seed}: {as_text(frame[ERROR])}")
    return {(check, size): frame for (check, _, size), frame in zip(cases, frames, strict=True)}


@functools.cache
def recorded():
    """Return what a starter copy records of its original: the parts, the blanks' signatures, the modules' texts."""
    with safetensors.safe_open(EXPECTED, "pt") as file:
        return json.loads(file.metadata()["original"])


@functools.cache
def signatures():
    """Return the signatures of the original blanks: {function: signature}."""
    if EXPECTED.exists():
        return recorded()["signatures"]
    found = {}
    for part in PARTS.values():
        for name in part.blanks:
            module, inner = split_name(name)
            tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
            found[name] = signature(definition(tree, inner))
    return found


@functools.cache
def originals():
    """Return the modules as the student got them: {module: text}. The student's own files may differ by now."""
    if EXPECTED.exists():
        return recorded()["modules"]
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}


def write_expected(path, parts, modules):
    """Write what a starter copy needs of the reference: its results for the public seed, and `recorded`."""
    tensors = {
        f"{part}/{check}/{size}/{name}": tensor
        for part in PARTS
        for (check, size), frame in reference_results(part, PUBLIC_SEED).items()
        for name, tensor in frame.items()
    }
    original = {"parts": parts, "signatures": signatures(), "modules": modules}
    # not save_file, which writes a file that nobody else may read
    path.write_bytes(safetensors.torch.save(tensors, metadata={"original": json.dumps(original)}))


# --- comparing ------------------------------------------------------------------------------------------------------


def as_text(tensor):
    """Return the text of a tensor of bytes."""
    return bytes(tensor.tolist()).decode(errors="replace")


def equal(computed, expected):
    """Return whether two results are equal: text exactly, numbers within the tolerance, NaN only to NaN."""
    is_text = [tensor.dtype == torch.uint8 for tensor in (computed, expected)]
    if computed.shape != expected.shape or is_text[0] != is_text[1]:
        return False
    if is_text[0]:
        return torch.equal(computed, expected)
    return torch.allclose(computed.double(), expected.double(), RELATIVE, ABSOLUTE, equal_nan=True)


def show(tensor):
    """Return a short text for a result."""
    if tensor.dtype == torch.uint8:
        return as_text(tensor)
    if tensor.is_floating_point():
        tensor = (tensor.double() * 1e5).round() / 1e5
    if tensor.numel() > SHOWN:
        return f"shape {list(tensor.shape)}, first numbers {tensor.flatten()[:SHOWN].tolist()}"
    return f"{tensor.tolist()}" + (f", shape {list(tensor.shape)}" if tensor.dim() > 1 else "")


def explain_error(part, text, hint):
    """Return the report of a check that raised an error. A blank is no mistake, so it needs no hint."""
    blank = re.search(r"NotImplementedError: part (\w+): write ([\w.]+)", text)
    if not blank:
        return f"{text}\n{hint}"
    if blank[1] != part:
        return f"this check runs {blank[2]} of part {blank[1]}, which is not written yet"
    return f"{blank[2]} is not written yet"


def inputs_of(name, expected):
    """Return the inputs of a result, one text each. An input "p for X" belongs to results with X in their name."""
    keys = [key for key in sorted(expected) if key.startswith(GIVEN) and key.partition(" for ")[2] in name]
    return [f"{key}: {show(expected[key])}" for key in keys]


def explain_difference(frame, expected):
    """Return the first result that differs, by name, with the inputs of this case; an empty text if none does.

    The names are sorted, because a safetensors file keeps no order: the same mistake gives the same report every time.
    """
    for name in sorted(name for name in expected if not name.startswith(GIVEN)):
        if name not in frame and ERROR not in frame:
            return f"{name} is missing"
        if name in frame and not equal(frame[name], expected[name]):
            numbers = [f"computed {name}: {show(frame[name])}", f"expected {name}: {show(expected[name])}"]
            return "\n".join([*inputs_of(name, expected), *numbers])
    return ""


def run_checks(part, modules, seed, seconds):
    """Run the checks of a part. A check that ends the process (an endless loop, exit) costs only its own points.

    Returns the frames {(check, size): frame}, and {check: sentence} for the checks that ended the process.
    """
    cases, received, lost = cases_of(part, seed), {}, {}
    while cases:
        frames, sentence = runner().run(part, modules, cases, seconds)
        received |= {(check, size): frame for (check, _, size), frame in zip(cases, frames, strict=False)}
        left = cases[len(frames) :]
        lost |= {check: sentence for check, _, _ in left[:1]}
        cases, seconds = [case for case in left if case[0] not in lost], min(seconds, LESS)
    return received, lost


def compare(part, received, lost, seed):
    """Compare the frames of a student (see run_checks) with those of the reference: one Result for each check."""
    expected, results = reference_results(part, seed), []
    for check in PARTS[part].checks:
        output, hint = "", f"look at {check.hint}"
        for size in range(SIZES):  # the smallest case first: the report shows only the first one that differs
            frame = received.get((check.name, size))
            if frame is None:
                output = f"no result: {lost[check.name]}\n{hint}"
            elif difference := explain_difference(frame, expected[check.name, size]):
                output = f"{difference}\n{hint}"
            elif ERROR in frame:
                output = explain_error(part, as_text(frame[ERROR]), hint)
            if output:
                break
        results.append(Result(part, check, output))
    return results


# --- grading --------------------------------------------------------------------------------------------------------


def grade_part(part, submission, seed=PUBLIC_SEED, seconds=SECONDS):
    """Grade one part of a student's folder: one Result for each check."""
    try:
        modules, notes = transplant(part, Path(submission), signatures(), originals())
    except (Refused, SyntaxError, RecursionError) as refusal:
        return [Result(part, check, f"{NOT_GRADED}{refusal}") for check in PARTS[part].checks]
    results = compare(part, *run_checks(part, modules, seed, seconds), seed)
    return [replace(result, notes=tuple(notes)) for result in results]


def report(results):
    """Return the lines of one part's report."""
    part = results[0].part
    lines = [f"{part:<12}{sum(r.points for r in results):>4} of {PARTS[part].points:<4}{PARTS[part].title}"]
    if results[0].output and len({result.output for result in results}) == 1:
        return [*lines, f"  {results[0].output}"]  # one sentence for all checks
    for result in results:
        if result.output:
            lines.append(f"  failed  {result.check.name} ({result.check.points}): {result.check.title}")
            lines += [f"          {line}" for line in result.output.splitlines()]
    return [*lines, *(f"  {note}" for note in results[0].notes)]


def gradescope(results):
    """Return Gradescope's results.json: a score, and a test for each check."""
    tests = [
        {
            "name": f"{result.part}: {result.check.title}",
            "number": f"{list(PARTS).index(result.part) + 1}.{PARTS[result.part].checks.index(result.check) + 1}",
            "score": result.points,
            "max_score": result.check.points,
            "status": "failed" if result.output else "passed",
            # where points are missing, a change that was not taken over may be the reason
            "output": "\n".join([result.output, *result.notes]) if result.output else "",
            "visibility": "visible",
        }
        for result in results
    ]
    score, possible = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    return {"score": score, "output": f"{score} of {possible} points", "visibility": "visible", "tests": tests}


def write_results(path, content):
    """Write Gradescope's results.json."""
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_zip(path):
    """Return whether a path is a zip by its name, which macOS hides for its own files."""
    return path.suffix.lower() == ".zip" and path.name[0] != "." and path.is_file()


def unpack(path, folder):
    """Unpack a zip into a folder.

    Raises: InputError if it is damaged or has a password.
    """
    try:
        shutil.unpack_archive(path, folder, "zip")
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path.name}: cannot be unpacked ({error}): ask for another one") from None


def folders_with_modules(path):
    """Return {folder: number of the course's files in it} for the folders below a path that have any.

    Hidden folders (.venv), what macOS adds to a zip (__MACOSX) and the grader itself are no work of a student.
    """
    modules, found = {f"{module}.py" for part in PARTS.values() for module in part.modules}, {}
    for folder, inside, files in os.walk(path):
        # os.walk does not enter what is not in this list
        inside[:] = [name for name in inside if name[0] != "." and name not in ("__MACOSX", "teaching")]
        if modules & set(files):
            found[Path(folder)] = len(modules & set(files))
    return found


def find_files(submission, scratch):
    """Return the folder with a student's .py files: in a folder or a zip, the one with most of the course's files.

    Of two with equally many it is the one with the shorter path. A zip, or those in a folder without such files, is
    unpacked in the folder `scratch`.
    Raises: InputError if there is no such folder or zip, or if it cannot be unpacked.
    """
    path, scratch = Path(submission), Path(scratch)
    if not path.is_dir() and not is_zip(path):
        raise InputError(f"{submission}: no folder and no zip: give what has the student's .py files in it")
    found = {} if is_zip(path) else folders_with_modules(path)
    if not found:
        for file in [path] if is_zip(path) else sorted(filter(is_zip, path.rglob("*"))):
            unpack(file, scratch / file.relative_to(path.parent))
        found = folders_with_modules(scratch)
    return min(found, key=lambda folder: (-found[folder], len(folder.parts), folder), default=scratch)


def grade(submission, parts=(), seed=PUBLIC_SEED, seconds=SECONDS, results_path=None):
    """Grade the parts of a student's folder or zip and print the report. Returns all results.

    Raises: see find_files.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="grade-") as scratch:
        try:
            folder = find_files(submission, scratch)
        except InputError as error:
            if results_path:  # Gradescope shows it to the student
                write_results(results_path, {"score": 0, "output": str(error)})
            raise
        inside = folder.relative_to(scratch if folder.is_relative_to(scratch) else submission)
        print(f"files of    {inside}")
        for part in parts or (recorded()["parts"] if EXPECTED.exists() else PARTS):
            results += (of_part := grade_part(part, folder, seed, seconds))
            print("\n".join(report(of_part)), flush=True)
    points, possible = sum(r.points for r in results), sum(r.check.points for r in results)
    print(f"{'total':<12}{points:>4} of {possible}")
    if results_path:
        write_results(results_path, gradescope(results))
    return results


def grade_all(folder, out, parts=(), seed=PUBLIC_SEED, seconds=SECONDS):
    """Grade everything in a folder: NAME.txt in `out` is a student's report, grades.csv has all points.

    The table's note says why a student, or a part, was not graded.
    Raises: InputError if there is nothing to grade, if `out` exists, or if a student is there twice.
    """
    out, parts = Path(out), list(parts or PARTS)
    paths = sorted(Path(folder).glob("[!.]*"))
    if not paths:
        raise InputError(f"{folder}: no folders and no zips of students in it")
    if out.exists():
        raise InputError(f"{out} exists: give a new folder")
    names = [path.stem if is_zip(path) else path.name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{folder}: {name} is there twice, as a folder and as a zip: remove one")
    out.mkdir(parents=True)
    with open(out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["name", *parts, "total", "note"])
        for name, path in zip(names, paths, strict=True):
            results, note = [], ""  # a class is graded to its end, whatever one student hands in
            with open(out / f"{name}.txt", "w", encoding="utf-8") as text, contextlib.redirect_stdout(text):
                try:
                    results = grade(path, parts, seed, seconds)
                    reasons = dict.fromkeys(r.output for r in results if r.output.startswith(NOT_GRADED))
                    note = "; ".join(reasons)
                except InputError as error:
                    print(note := str(error))
            points = [sum(result.points for result in results if result.part == part) for part in parts]
            table.writerow([name, *points, sum(points), note])
            print(f"{name}: {sum(points)}" + f" ({note})" * bool(note), flush=True)
