"""User errors in one line, and standard streams that take every character; every other file may import it."""

import argparse
import io
import os
import sys
import time
from contextlib import contextmanager, suppress

# seconds that a process of torchrun waits before it prints an error; torchrun needs far less to end it
PATIENCE = 30
# the messages of torch: of GPUs, of a CPU on Linux and macOS, of one on Windows
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class InputError(ValueError):
    """A mistake in what the user gave; its text is one line that names file, line, value and what to do."""


class UnreadableError(InputError):
    """The system, or the kind of a file, does not let us read it."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are user's mistakes: one line, without the whole usage."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse, but refuse bytes that are not UTF-8, which Python turns into lone surrogates."""
        for word in sys.argv[1:] if args is None else args:
            if any("\ud800" <= character <= "\udfff" for character in word):
                self.error(f"{ascii(word)} is not UTF-8: convert it to UTF-8")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


# --- out of memory ------------------------------------------------------------------------------------------------


@contextmanager
def explain_out_of_memory(advice):
    """Turn an out-of-memory error, of a GPU or of the machine, into one line with advice.

    Raises: InputError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise InputError(f"out of memory: {advice}") from None


def smaller(flag, size):
    """The advice to halve the value of a flag, while there is something to halve."""
    return f"try {flag} {size // 2}" if size > 1 else "even one example is too much: try a shorter --max_length"


# --- output -------------------------------------------------------------------------------------------------------


class Lenient(io.FileIO):
    """A standard stream that drops what it cannot write."""

    def write(self, data):
        """Write the data, or drop them."""
        with suppress(OSError):
            return super().write(data)
        return len(data)


def open_streams(lenient):
    """Make standard output and error take every character.

    A stream that is closed becomes the null device. A `lenient` stream also takes what a full disk or a pipe without
    a reader refuses, because a run must not end with its terminal: its log has the same numbers.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        stream = getattr(sys, name)
        if stream is None:
            # gets the number of the closed stream, which otherwise the next file of the run would get
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and stream is getattr(sys, f"__{name}__"):  # not where a test has put another one
            stream.flush()
            raw = (Lenient if lenient else io.FileIO)(number, "w", closefd=False)
            wrapped = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, wrapped)


def is_first():
    """Whether this process prints, of those that torchrun started; parallel.rank() is not known before they join."""
    return os.environ.get("RANK", "0") == "0"


def warn(message):
    """Print a warning, in the first process."""
    if is_first():
        print(f"warning: {message}", file=sys.stderr)


def stop(message, status=2):
    """Print an error and end the process."""
    if not is_first():
        # Process 0 usually prints the same error. Then torchrun ends this process meanwhile, and one line is printed.
        time.sleep(PATIENCE)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def stop_without(package):
    """End a script that was started outside .venv: a package is not installed there."""
    stop(f"{package} is not installed here: run ./setup.sh once, then use .venv/bin/python")


def run_script(main, lenient=False):
    """Run a script's main function so that a user's mistake ends with one line and exit status 2.

    An error of the system that names a file is a user's mistake too: a name that is too long, a missing permission.
    """
    open_streams(lenient)
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            # Only output has no name. What is still to be printed at exit must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            # the reader of our output has gone (`| head`): stop quietly, as other command-line programs do
            sys.exit(1)
        stop(f"{error.filename or 'standard output'}: {error.strerror}: check the path and its permissions")
