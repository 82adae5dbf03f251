"""What every test shares: one thread, so that the tests of a busy machine stay quick, and the tiny program.

The fixtures import what they need when they are asked for: where the classifier does not work (a student's copy), the
tests of its parts still run.
"""

import multiprocessing
import signal

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Weights and data for runs that several tests may read; see tiny.Program."""
    from tiny import Program

    return Program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes that find everything imported: to import it takes longer than to train a tiny model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["driver", "pytest", "scipy.stats", "sklearn.metrics", "torch._dynamo"])
    return context


@pytest.fixture(scope="session")
def kill(program, forkserver):
    """Run a command in a process that is killed at the n-th call of a function."""
    from tiny import run_and_kill

    def start(argv, owner, name, at):
        output = program.folder / "killed.txt"
        process = forkserver.Process(target=run_and_kill, args=(argv, owner, name, at, output))
        process.start()
        process.join(300)  # on a busy machine a start alone can take a minute
        assert process.exitcode == -signal.SIGKILL, f"exit code {process.exitcode}: {output.read_text()}"

    return start
