"""The program that runs a student's functions, in a process of its own. It imports nothing of the project.

    python -I -B child.py FD FOLDER       grade.py starts it; FD is a socket to it, FOLDER has the modules of no part

It imports torch once and then forks a process for each part, because to import torch takes longer than to grade a part.
The process of a part reads from its socket the folder with the student's modules and a list of (check, seed, size). It
runs the checks and writes one frame for each: the tensors that the check returned. It has no expected values. A frame
is a safetensors file, so that reading it cannot run code.

The process has limits of time and memory, and refuses to open files, sockets and other processes. It is no sandbox: it
stops mistakes and common tricks, not an attack on the machine.
"""

import contextlib
import importlib
import json
import linecache
import os
import resource
import socket
import struct
import sys
import traceback

import numpy
import safetensors.torch
import torch

ERROR, GIVEN = "error", "given "  # keys of a frame that are no results
LENGTH = struct.Struct("!Q")
# what Python reports before it does one of these things; see "audit events" in its documentation
REFUSED_EVENTS = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "ctypes.")
REFUSED_EVENTS += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "shutil.")
# what the modules of a part import at their first use: imported once for all of its processes
SLOW_IMPORTS = {"optimizer": "torch._dynamo", "classifier": "torch._dynamo", "evaluation": "scipy.stats"}
MEMORY = 8 << 30  # bytes of address space; torch alone reserves a few GiB


def to_tensor(value):
    """Turn what a check returned into a tensor; text becomes the bytes of its characters."""
    if value is None:
        raise TypeError("the function returned a NoneType")
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().contiguous().clone()
    return torch.as_tensor(numpy.asarray(value)).contiguous()


def describe(error, folder):
    """Return an error in one line, with the line of the student's function where it happened."""
    sentence = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if "NoneType" in sentence:
        sentence += " (is a `return` missing?)"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    if frames and not isinstance(error, NotImplementedError):
        line = linecache.getline(frames[-1].filename, frames[-1].lineno).strip()
        sentence += f" (in {frames[-1].name}: {line[:150]})"
    return sentence


def run_check(module, name, seed, size, folder):
    """Run one check of a part. Returns {name: tensor}, with the inputs to print and the text of the first error.

    A check may return functions in place of results, so that an error in one of them does not hide the others.
    """
    frame = {}
    try:
        common = importlib.import_module("checks.common")
        check, draw = getattr(importlib.import_module(f"checks.{module}"), name), common.Draw(name, seed, size)
        results = check(draw)
        for key, value in (results | {GIVEN + key: value for key, value in draw.given.items()}).items():
            try:
                frame[key] = to_tensor(value() if callable(value) else value)
            except Exception as error:
                frame.setdefault(ERROR, to_tensor(f"{key}: {describe(error, folder)}"))
    except Exception as error:
        frame[ERROR] = to_tensor(describe(error, folder))
    return frame


def refuse_events(folders):
    """Let Python refuse to open files outside some folders, and to start anything that outlives this process."""

    def hook(event, arguments):
        if event.startswith(REFUSED_EVENTS):
            raise PermissionError(f"{event} is not available while grading")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, (_, mode, flags) = os.path.realpath(os.fsdecode(arguments[0])), arguments
            writes = set(mode or "r") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes or not path.startswith(folders):
                raise PermissionError(f"{arguments[0]} is not available while grading")

    sys.addaudithook(hook)


def forbid(names):
    """Replace functions of torch that a part forbids, whatever name a student calls them by."""

    def refuse(*arguments, **keywords):
        raise RuntimeError("this function of torch is forbidden in this part")

    for module in (torch, torch.nn.functional, torch.nn.utils):
        for name in names:
            if callable(getattr(module, name, None)):
                setattr(module, name, refuse)


def run_part(job, channel, shared):
    """Run the checks of a part in this process, and send a frame for each."""
    os.setpgid(0, 0)  # a process group of its own, which the grader ends
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # what a student prints is not part of the report
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    folder = os.path.realpath(job["folder"])
    sys.path[:0] = [folder, shared]
    os.chdir(folder)
    libraries = [path for path in sys.path[2:] if path]
    forbid(job["forbidden"])
    refuse_events(tuple(os.path.realpath(path) for path in (folder, shared, sys.prefix, sys.base_prefix, *libraries)))
    for name, seed, size in job["checks"]:
        frame = safetensors.torch.save(run_check(job["part"], name, seed, size, folder))
        channel.sendall(LENGTH.pack(len(frame)) + frame)


def serve(control, shared):
    """Fork a process for each job; report its id when it starts and its exit status when it has ended."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 1)
        if not message:
            return
        job = json.loads(message)
        if job["part"] in SLOW_IMPORTS:
            importlib.import_module(SLOW_IMPORTS[job["part"]])
        pid = os.fork()
        if pid == 0:
            control.close()
            with contextlib.suppress(BaseException):
                run_part(job, socket.socket(fileno=descriptors[0]), shared)
            os._exit(0)
        with contextlib.suppress(OSError):  # the process does the same; whoever comes first
            os.setpgid(pid, pid)
        os.close(descriptors[0])
        control.sendall(LENGTH.pack(pid))
        _, status = os.waitpid(pid, 0)
        control.sendall(LENGTH.pack(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    numpy.seterr(all="ignore")
    control = socket.socket(fileno=int(sys.argv[1]))
    control.sendall(LENGTH.pack(0))  # ready
    serve(control, os.path.realpath(sys.argv[2]))
