"""A user's mistake, said in one line: the leaf every other file may import; read nothing before it."""

import argparse
import os
import sys


class InputError(Exception):
    """A mistake in what the user gave; its text is one line that names file, line, value and what to do."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are user's mistakes: one line, without the whole usage."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


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
