"""What setup.sh prints before it does anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup(tmp_path):
    """Run a copy of setup.sh in an otherwise empty folder, from another working directory."""
    copy = tmp_path / "copy with a space"
    copy.mkdir()
    shutil.copy(ROOT / "setup.sh", copy)

    def run(*arguments, **variables):
        environment = {**os.environ, **variables}
        command = [str(copy / "setup.sh"), *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert [path.name for path in copy.iterdir()] == ["setup.sh"]
        return result

    return run


def fake_python(folder, version):
    path = folder / f"python-{version}"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


def assert_one_line(result, *words):
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_help_lists_every_option(setup):
    result = setup("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for option in ("--dev", "--bert-base", "--data DIR", "PYTHON"):
        assert option in result.stdout


def test_an_unknown_option(setup):
    assert_one_line(setup("--bert-bass"), "--bert-bass", "--help")


def test_a_data_folder_that_is_not_there(setup):
    assert_one_line(setup("--data", "nowhere"), "nowhere")


def test_a_folder_for_temporary_files_that_is_not_there(setup):
    assert_one_line(setup(TMPDIR="/nonexistent"), "TMPDIR=/nonexistent")


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10", "3.14"])
def test_a_python_out_of_range(setup, tmp_path, version):
    python = fake_python(tmp_path, version)
    assert_one_line(setup(PYTHON=python), python, f"Python {version}", "3.11, 3.12 or 3.13")


def test_a_python_that_is_not_there(setup):
    assert_one_line(setup(PYTHON="/nowhere/python3"), "/nowhere/python3", "does not run")


def test_no_python_in_range_on_the_path(setup, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "cmp"):
        (tools / name).symlink_to(shutil.which(name))
    Path(fake_python(tools, "3.9")).rename(tools / "python3")
    assert_one_line(setup(PATH=str(tools), PYTHON=""), "3.11, 3.12 or 3.13", "PYTHON=")


def test_python3_is_taken_before_the_others_where_it_is_in_range(setup, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, version in (("python3", "3.12"), ("python3.13", "3.13")):
        # answers what version it is, and cannot make an environment
        (tools / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version} && exit\nexit 1\n')
        (tools / name).chmod(0o755)
    result = setup(PATH=f"{tools}:{os.environ['PATH']}", PYTHON="")
    assert result.returncode == 1
    assert result.stdout == "Making .venv with Python 3.12\n"
    assert "python3.12-venv" in result.stderr


@pytest.mark.parametrize("network", ["none", "lost"])
def test_without_a_network_an_environment_that_works_is_kept(tmp_path, network):
    """Its pip is made of shell: the look at what is wanted fails at once, or only the installation after it does."""
    copy = tmp_path / "copy"
    bin_folder = copy / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(ROOT / "setup.sh", copy)
    (copy / "requirements.txt").write_text("new\n")
    stamp = copy / ".venv" / "installed-requirements.txt"
    stamp.write_text("old\n")
    passes = "exit 1" if network == "none" else 'case "$*" in *--dry-run*) exit 0 ;; *) exit 1 ;; esac'
    python = bin_folder / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 3.12 && exit\necho "ERROR: no route to the host"\n{passes}\n')
    python.chmod(0o755)
    result = subprocess.run([copy / "setup.sh"], capture_output=True, text=True, env={**os.environ, "PYTHON": ""})
    assert (
        result.returncode == 1
        and result.stdout == "Installing requirements.txt into .venv (some minutes the first time)\n"
    )
    [line] = result.stderr.splitlines()
    assert "no route to the host" in line and "check the network" in line
    # what was touched is made anew by the next call, what was not is whole
    assert stamp.exists() == (network == "none") and python.exists()
