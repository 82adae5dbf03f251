"""A user's mistake, said in one line: the leaf that every other file may import."""

import argparse
import os
import sys
from contextlib import contextmanager


class InputError(ValueError):
    """A mistake in what the user gave; its text is one line that names file, line, value and what to do."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are user's mistakes: one line, without the whole usage."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def stop_without(package):
    """End a script that was started outside .venv: a package is not installed there."""
    print(f"error: {package} is not installed here: run ./setup.sh once, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)


# how torch says it: of GPUs, of a CPU on Linux and macOS, of one on Windows
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def spare_memory(advice):
    """Say what to do where memory, a GPU's or the machine's, does not suffice.

    Raises: InputError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if isinstance(error, RuntimeError) and not any(words in told for words in NO_MEMORY):
            raise
        raise InputError(f"out of memory: {advice}") from None


def smaller(flag, size):
    """The advice to halve what a flag gives, while there is something to halve."""
    return f"try {flag} {size // 2}" if size > 1 else "even one example is too much: try a shorter --max_length"


def run_script(main):
    """Run a script's main function so that a user's mistake ends with one line and exit status 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output has gone (`| head`): stop quietly, as other command-line programs do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
