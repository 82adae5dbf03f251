"""The run directory: what a run leaves behind, and what resuming needs. Read first: files.py.

    config.json        every flag, the command, git commit, versions, device, hashes of data and weights, BERT's sizes
    log.jsonl          a line per logged step and per phase
    best.safetensors   the model of the best phase (with vocab.txt and config.json: all that predict.py needs)
    last.pt            model, optimiser, recorded scores and generator states: what --resume continues from
    predictions/       the course's format and a readable CSV
    summary.json       the closing numbers

A killed run is continued from last.pt; what the log says beyond that position is cut off and written again.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from errors import InputError
from files import write_whole
from parallel import on_first, world_size

# flags that say where and how a run is looked after, not what it computes: free to differ when it is resumed
CARE_FLAGS = {"run_dir", "resume", "overwrite", "keep_last", "log_every", "save_every", "eval_batch_size"}
FREE_FLAGS = CARE_FLAGS | {"data_dir", "weights"}
# where a new run's first files wait until all of them are written
STAGING = ".minbert-new-run"


def sha256(path):
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit():
    """The commit of the code, with + where files differ from it; empty outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit + "+" * bool(changed)


def name_run(flags, defaults):
    """A directory name made of the flags that differ from the defaults: runs/finetune-slf-lr_1e-05."""
    parts = [flags["option"]]
    for name, value in flags.items():
        if name not in CARE_FLAGS | {"option", "use_gpu"} and value != defaults[name]:
            text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(name if value is True else f"{name}_{Path(text).name}")
    kept = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in "-".join(parts))
    return Path("runs") / kept[:150]


def describe_environment(device):
    """Versions and hardware of this run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def memory_mib(device, peak=True):
    """Memory that this process holds, or most that it has held: of the GPU where there is one. Units: MiB.

    On Linux this is not getrusage's ru_maxrss, in which the process that started this one counts too.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20
    status, key = Path("/proc/self/status"), "VmHWM" if peak else "VmRSS"
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


class RunFolder:
    """A run directory, new or resumed."""

    def __init__(self, path):
        self.path = Path(path)
        self.log_path = self.path / "log.jsonl"

    def exists(self):
        """Whether a run has been started here (a weights folder has a config.json too, without flags)."""
        try:
            return "flags" in json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            return False

    def half_made(self):
        """Whether what is here is only what a killed `create` left behind."""
        if (self.path / "config.json").exists():
            return False
        # all of the new files are there before anything of an old run goes
        return (self.path / STAGING / "config.json").exists() or list(self.path.iterdir()) == [self.path / STAGING]

    def refuse_existing(self, overwrite):
        """Fail where something is here already that must not be replaced."""
        if not self.path.exists() or (self.path.is_dir() and (not any(self.path.iterdir()) or self.half_made())):
            return
        if not overwrite:
            raise InputError(
                f"{self.path}: exists already: continue it with --resume, replace it with --overwrite, "
                "or choose another --run_dir"
            )
        if not self.exists():
            raise InputError(f"{self.path}: is not a run directory, so --overwrite leaves it alone")

    @on_first
    def create(self, config, vocab, overwrite):
        """Start a run here, with its config and the vocabulary it reads with.

        An old run goes only when the new one's files are on the disk, its config.json first; the new one's config.json
        comes last. A kill in between leaves a half-made run, which the next start replaces.
        """
        self.refuse_existing(overwrite)
        staging = self.path / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        files = [vocab.parent / name for name in ("tokenizer_config.json", "vocab.txt")]
        content = {path.name: path.read_bytes() for path in files if path.is_file()}
        content["config.json"] = json.dumps({"id": uuid.uuid4().hex, **config}, indent=1)
        try:
            for name, data in content.items():
                write_whole(staging / name, data)
        except InputError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        (self.path / "config.json").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path != staging:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in content:
            os.replace(staging / name, self.path / name)
        staging.rmdir()

    def identity(self):
        """What tells this run from others; None before it is created."""
        return self.config().get("id") if self.exists() else None

    def config(self):
        """What config.json says."""
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except OSError:
            raise InputError(f"{self.path}: no run here (no config.json to read): check the path") from None
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}): the run directory is damaged") from None
        if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
            raise InputError(f"{path}: not the config of a run: check the path")
        return config

    @on_first
    def log(self, **record):
        """Append a line to log.jsonl."""
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"{self.log_path}: cannot be written ({error.strerror}): free some space") from None

    def log_position(self):
        """Length of the log so far, in bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def complete(self):
        """Whether the run has ended and dropped what resuming needs."""
        return (self.path / "summary.json").exists() and not (self.path / "last.pt").exists()

    @on_first
    def save_last(self, state):
        """Save everything that resuming needs."""
        state = state | {"log_position": self.log_position(), "id": self.identity()}
        write_whole(self.path / "last.pt", lambda file: torch.save(state, file))

    @on_first
    def cut_back(self, log_position):
        """Cut the log back to a saved moment and remove half-written files."""
        try:
            for part in self.path.rglob(".*.part"):
                part.unlink()
            if self.log_path.exists():
                os.truncate(self.log_path, min(self.log_position(), log_position))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}): check its permissions") from None

    def load_last(self):
        """What save_last saved, or None; cuts the log back to that moment and removes half-written files.

        Raises: InputError where there is nothing to continue, or the file is damaged.
        """
        path = self.path / "last.pt"
        state = None
        if self.complete():
            raise InputError(f"{self.path}: this run is complete: --overwrite replaces it, or choose another --run_dir")
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a cut-off or foreign file raises one of many kinds
                reason = str(error).split("\n")[0][:100]
                raise InputError(f"{path}: cannot be loaded ({reason}): start again with --overwrite") from None
            if not isinstance(state, dict) or "progress" not in state or state.get("id") != self.identity():
                raise InputError(
                    f"{path}: saved by another run than config.json beside it: put the right one back, or start again "
                    "with --overwrite"
                )
        self.cut_back(state["log_position"] if state else 0)
        return state

    @on_first
    def remove_last(self):
        """Drop last.pt: the run is complete."""
        (self.path / "last.pt").unlink(missing_ok=True)

    @on_first
    def save_best(self, model):
        """Save the model's weights as the best so far."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        content = safetensors.torch.save(tensors, {"format": "pt"})
        write_whole(self.path / "best.safetensors", content)

    def load_best(self, model):
        """Fill the model with the best weights.

        Raises: InputError where the file is missing, cut off, or of another model.
        """
        path = self.path / "best.safetensors"
        try:
            tensors = safetensors.torch.load_file(path)
        except FileNotFoundError:
            raise InputError(f"{path}: missing: the run has not finished its first phase") from None
        except Exception as error:  # safetensors raises its own kinds for a cut-off header or body
            raise InputError(f"{path}: cannot be loaded ({error}): copy the run again") from None
        expected = model.state_dict()
        for name in expected.keys() ^ tensors.keys():
            side = "is missing" if name in expected else "does not belong to this model"
            raise InputError(f"{path}: tensor {name} {side}: saved with other flags than config.json says")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise InputError(
                    f"{path}: tensor {name} has shape {list(tensor.shape)}, not {list(expected[name].shape)}: "
                    "it was saved with other flags than config.json says"
                )
        model.load_state_dict(tensors)

    def read_summary(self):
        """What summary.json says; nothing for a run that has not finished."""
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}): copy the run again") from None

    def summary(self, content):
        """Write summary.json."""
        write_whole(self.path / "summary.json", json.dumps(content, indent=1))


def check_same_run(config, flags, given):
    """Fail where a resumed run is given other flags, or other processes, than it was started with."""
    processes = config.get("processes", 1)
    if processes != world_size():
        raise InputError(
            f"torchrun: this run was started with {processes} processes, not {world_size()}: resume with as many"
        )
    for name in given - FREE_FLAGS:
        if flags[name] != config["flags"].get(name):
            raise InputError(
                f"--{name} {flags[name]}: this run was started with {config['flags'].get(name)}: "
                "resume with the same flags, or start another run"
            )


def check_same_files(before, now, paths):
    """Fail where a resumed run reads other files than it was started with: {name: sha256} twice, {name: path}."""
    for name in before | now:
        if name not in now:
            found = "this run was started with it, and it is gone"
        elif name not in before:
            found = "this run was started without it"
        else:
            found = "not the file this run was started with (its sha256 differs)"
        if before.get(name) != now.get(name):
            raise InputError(f"{paths.get(name, name)}: {found}: cannot resume")


def hash_weights(folder):
    """sha256 of every file that decides what the weights in a folder compute, by name."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    files += [folder / name for name in ("config.json", "vocab.txt", "tokenizer_config.json")]
    return {path.name: sha256(path) for path in files if path.is_file()}


def command_line():
    """The command as typed."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
