"""The run directory, and the recorder: what a run leaves behind, how it is saved, logged, interrupted and resumed.

    config.json        every flag, the command, git commit, versions, device, hashes of data and weights, BERT's sizes
    log.jsonl          a line per logged step and per phase
    best.safetensors   the model of the best phase (with vocab.txt and config.json: all that predict.py needs)
    last.pt            model, optimiser, recorded scores and generator states: what --resume continues from
    predictions/       the course's format and a readable CSV
    summary.json       the closing numbers
    report.html        the page to look at

A killed run continues from last.pt. The log is cut back to that position, and the rest of it is written again.
"""

import fcntl
import json
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

import parallel
from base_bert import TOKENIZER_FILES, BertConfig, dropout_state
from errors import InputError, UnreadableError, warn
from files import read_json, sha256, write_whole
from tasks import TASKS
from weights import load_safetensors, load_torch

# the version of config.json and its flags
FORMAT = 2
# flags that do not change what a run computes: they may differ when it is resumed
NEUTRAL_FLAGS = {"run_dir", "resume", "overwrite", "eval_batch_size", "outputs"}
FREE_FLAGS = NEUTRAL_FLAGS | {"data_dir", "weights"}
# where a new run's first files wait until all of them are written
STAGING = ".minbert-new-run"
# names the process that uses a run, which holds a lock on this file
LOCK = ".lock"
# Every file that a run writes, in its directory and, when it is evaluated, in evaluate/: --overwrite removes these
# and no other file.
FILES = (
    *("config.json", *TOKENIZER_FILES, "log.jsonl", "nan-batch.json", "last.pt"),
    *("best.safetensors", "summary.json", "report.html", "sweep.csv", "sweep.png"),
    *(f"predictions/{name}-{split}-output.csv" for name in TASKS for split in ("dev", "test")),
    *(f"predictions/{name}-{split}-readable.csv" for name in TASKS for split in ("dev", "test")),
)
FILES += tuple(f"evaluate/{name}" for name in FILES)
FOLDERS = ("predictions", "evaluate/predictions", "evaluate")


def git_commit():
    """The commit of the code, with + where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def name_run(flags, defaults):
    """A directory name made of the flags that differ from the defaults: runs/finetune-slf-lr_1e-05."""
    parts = [flags["option"]]
    for name, value in flags.items():
        if name not in NEUTRAL_FLAGS | {"option", "use_gpu"} and value != defaults[name]:
            text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(name if value is True or not text else f"{name}_{Path(text).name}")
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
        "processes": parallel.world_size(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def memory_mib(device):
    """The most memory that this process has held: of the GPU where there is one. Units: MiB.

    On Linux this is not getrusage's ru_maxrss, in which the process that started this one counts too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


@contextmanager
def damaged(path):
    """Turn whatever is wrong with the content of a run's file into one line.

    Raises: InputError.
    """
    try:
        yield
    except UnreadableError:
        raise
    except (InputError, LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error).removeprefix(f"{path}: ")
        raise InputError(f"run directory is damaged: {path}: {problem}: copy it again, or start a new run") from error


def require(values, kinds):
    """Check the types of what a file has: {name: value} and {name: type}, or such a table for an object in it.

    Raises: ValueError.
    """
    for name, kind in kinds.items():
        value, inner = values.get(name), kind if isinstance(kind, dict) else {}
        if not isinstance(value, dict if inner else kind):
            raise ValueError(f"{name} is {value!r:.40}, not {'an object' if inner else f'of type {kind.__name__}'}")
        require(value, inner)


def check_tensors(expected, saved):
    """Compare saved tensors with those of a model, {name: tensor} both.

    Raises: ValueError naming the first that differs.
    """
    for name in sorted(expected.keys() | saved.keys()):
        if name not in saved or name not in expected:
            where = "is missing" if name in expected else "does not belong to this model"
            raise ValueError(f"tensor {name} {where}: saved with other flags than in config.json")
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (saved[name], expected[name])]
        if kinds[0] != kinds[1]:
            raise ValueError(f"tensor {name} is {kinds[0]}, not {kinds[1]}: saved with other flags than in config.json")


class RunFolder:
    """A run directory, new or resumed."""

    def __init__(self, path):
        self.path = Path(path)
        self.log_path = self.path / "log.jsonl"
        self.id = None  # of the run that this process trains; config.json has it too

    # --- who may use it -------------------------------------------------------------------------------------------

    @contextmanager
    def held(self):
        """Hold the run directory while this process trains or evaluates; of several processes the first one holds it.

        The operating system drops the lock when the process ends, however it ends. A new run that fails before its
        first file leaves no directory.
        Raises: InputError where another process holds it.
        """
        if parallel.rank():
            yield
            return
        path, lock = self.path / LOCK, None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the process that held it removes the file at its end, perhaps since it was opened here
            if not os.path.samestat(os.fstat(lock), os.stat(path)):
                raise BlockingIOError
        except OSError as error:
            if lock is None:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}): choose another folder") from None
            if isinstance(error, BlockingIOError | FileNotFoundError):
                holder = os.read(lock, 99).decode() or "another process"
                raise InputError(f"{self.path}: {holder} uses this run: wait until it ends") from None
            warn(f"{self.path}: no locks here ({error.strerror}): do not start another process on this run")
        try:
            with suppress(OSError):  # a full disk
                os.truncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)
            with suppress(OSError):
                self.path.rmdir()

    def check_owner(self):
        """Fail where another run has taken this one's place, for example after a user has removed the directory."""
        if not self.exists() or read_json(self.path / "config.json").get("id") != self.id:
            raise InputError(f"{self.path}: this run was removed or replaced while it was running: stopped")

    # --- its start ------------------------------------------------------------------------------------------------

    def exists(self):
        """Whether a run has been started here (a weights folder has a config.json too, without flags)."""
        try:
            return "flags" in read_json(self.path / "config.json")
        except InputError:
            return False

    def half_made(self):
        """Whether nothing is here, or only what a killed `create` left behind."""
        if (self.path / "config.json").exists():
            return False
        # all of the new files are there before anything of an old run goes
        names = {path.name for path in self.path.iterdir()}
        return (self.path / STAGING / "config.json").exists() or names <= {LOCK, STAGING}

    def refuse_existing(self, overwrite):
        """Fail where something is here already that must not be replaced."""
        if not self.path.exists() or (self.path.is_dir() and self.half_made()):
            return
        if not self.exists():
            raise InputError(f"{self.path}: exists and is not a run directory: choose another")
        if not overwrite:
            raise InputError(f"{self.path}: exists: --resume continues it, --overwrite replaces it; or choose another")

    @parallel.on_first
    def create(self, config, weights, overwrite):
        """Start a run here, with its config and the tokenizer files of the weights.

        Writes the new files to a staging folder, then removes the old run (config.json first), then moves the new
        files in (config.json last). A kill in between leaves a half-made run, which the next start replaces.
        """
        self.refuse_existing(overwrite)
        self.id, staging = uuid.uuid4().hex, self.path / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        files = [weights / name for name in TOKENIZER_FILES]
        content = {path.name: path.read_bytes() for path in files if path.is_file()}
        content["config.json"] = json.dumps({"id": self.id, "format": FORMAT, **config}, indent=1)
        try:
            for name, data in content.items():
                write_whole(staging / name, data)
        except InputError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for path in [*(self.path / name for name in FILES), *self.half_written()]:
            path.unlink(missing_ok=True)
        for name in FOLDERS:
            with suppress(OSError):  # not empty: a user's files stay
                (self.path / name).rmdir()
        for name in content:
            os.replace(staging / name, self.path / name)
        staging.rmdir()

    def config(self):
        """What config.json says.

        Raises: InputError where it is missing or damaged.
        """
        path, weights = self.path / "config.json", {"folder": str, "sha256": dict}
        if not self.path.exists():
            raise InputError(f"{path}: there is no run here: name the folder of a run with --run_dir")
        with damaged(path):
            config = read_json(path)
            require(config, {"flags": dict, "weights": weights, "data": dict, "bert": dict, "format": int})
            BertConfig(**config["bert"])
        if config["format"] != FORMAT:
            version = str(config.get("commit", "")).rstrip("+") or "of its time"
            raise InputError(f"{path}: another version wrote this run: use it with that (git checkout {version})")
        return config

    # --- what it writes and reads again ---------------------------------------------------------------------------

    @parallel.on_first
    def log(self, **record):
        """Append a line to log.jsonl."""
        self.check_owner()
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"{self.log_path}: cannot be written ({error.strerror}): free some space") from None

    def half_written(self):
        """The files that a killed process was writing."""
        paths = [self.path / name for name in FILES]
        return [part for path in paths for part in path.parent.glob(f".{path.name}.*.part")]

    def log_position(self):
        """Length of the log so far, in bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def complete(self):
        """Whether the run has ended and dropped what resuming needs."""
        return (self.path / "summary.json").exists() and not (self.path / "last.pt").exists()

    @parallel.on_first
    def save_last(self, state):
        """Save everything that resuming needs."""
        self.check_owner()
        state = state | {"log_position": self.log_position(), "id": self.id}
        write_whole(self.path / "last.pt", lambda file: torch.save(state, file))

    @parallel.on_first
    def cut_back(self, log_position):
        """Cut the log back to a saved moment and remove half-written files."""
        for part in self.half_written():
            part.unlink()
        if self.log_path.exists():
            os.truncate(self.log_path, min(self.log_position(), log_position))

    def load_last(self):
        """What save_last saved, or None where the run was stopped before that.

        Raises: InputError where there is nothing to continue, or the file is damaged.
        """
        path, self.id = self.path / "last.pt", self.config().get("id")
        if self.complete():
            raise InputError(f"{self.path}: this run is complete: --overwrite replaces it, or choose another --run_dir")
        if not path.exists():
            return None
        with damaged(path):
            state = load_torch(path)
            if not isinstance(state, dict) or state.get("id") != self.id:
                raise ValueError("it is not a state of this run, but of another run or program")
            history = {entry.name: entry.type for entry in fields(History)}
            tables = dict.fromkeys(("model", "optimizer", "terms", "gradients", "scaler"), dict)
            require(state, tables | {"progress": history, "log_position": int, "rng": torch.Tensor})
            if min(lowest := (state["log_position"], state["progress"]["step"])) < 0:
                raise ValueError(f"log_position and step are {lowest}")
        return state

    @parallel.on_first
    def remove_last(self):
        """Drop last.pt: the run is complete."""
        (self.path / "last.pt").unlink(missing_ok=True)

    @parallel.on_first
    def save_best(self, model):
        """Save the model's weights as the best so far."""
        self.check_owner()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        content = safetensors.torch.save(tensors, {"format": "pt"})
        write_whole(self.path / "best.safetensors", content)

    def load_best(self, model):
        """Fill the model with the best weights; a model on the meta device gets its tensors.

        Raises: InputError where the file is missing, cut off, or of another model.
        """
        path = self.path / "best.safetensors"
        if not os.path.lexists(path):
            raise InputError(f"{path}: missing: the run has not finished its first phase")
        with damaged(path):
            # copies, whose place in memory does not depend on the file
            tensors = {name: tensor.clone() for name, tensor in load_safetensors(path).items()}
            check_tensors(model.state_dict(), tensors)
            model.load_state_dict(tensors, assign=next(model.parameters()).is_meta)

    def read_summary(self):
        """What summary.json says; nothing for a run that has not finished."""
        path = self.path / "summary.json"
        with damaged(path):
            return read_json(path) if os.path.lexists(path) else {}

    def read_exits(self, tasks):
        """How the rows of each task leave: {"policies": {task: policy}, "thresholds": {task: threshold}}.

        None for no tasks, and for a run that has not finished. Raises: InputError.
        """
        summary = self.read_summary()
        if not (summary and tasks):
            return None
        with damaged(self.path / "summary.json"):
            kinds = {"policies": dict.fromkeys(tasks, str), "thresholds": dict.fromkeys(tasks, float)}
            require(summary, {"exits": kinds})
            exits = {name: summary["exits"][name] for name in kinds}
            for name in tasks:
                policy, threshold = (values[name] for values in exits.values())
                if policy not in ("confidence", "lte") or not 0 <= threshold < float("inf"):
                    raise ValueError(f"{name} leaves by {policy} at {threshold}")
        return exits

    def check_tokenizer(self, config):
        """Compare the tokenizer's files with those that the run was trained with.

        Raises: InputError.
        """
        for path in [self.path / name for name in TOKENIZER_FILES]:
            with damaged(path):
                if (sha256(path) if os.path.lexists(path) else None) != config["weights"]["sha256"].get(path.name):
                    raise ValueError("not the file that the run was trained with (its sha256 differs)")

    def summary(self, content):
        """Write summary.json."""
        write_whole(self.path / "summary.json", json.dumps(content, indent=1))


def check_same_run(config, flags, typed):
    """Fail where a resumed run gets other flags, or other processes, than it was started with.

    Raises: InputError.
    """
    processes, now = config.get("processes", 1), parallel.world_size()
    if processes != now:
        raise InputError(f"this run was started with {processes} processes, not {now}: resume with as many")
    for name in typed - FREE_FLAGS:
        before = config["flags"].get(name)
        # --pooling auto was replaced by what it chose
        if flags[name] != before and (name, flags[name]) != ("pooling", "auto"):
            before = "the default" if before is None else before
            raise InputError(f"--{name} {flags[name]}: this run has {before}: resume with that, or start another run")


def check_same_files(before, now, paths):
    """Fail where a resumed run reads other files than it was started with: {name: sha256} twice, {name: path}."""
    for name in before | now:
        if before.get(name) != now.get(name):
            found = "is gone" if name not in now else "is new" if name not in before else "has another sha256"
            raise InputError(f"{paths.get(name, name)}: this file {found}: give the run's with --data_dir or --weights")


def hash_weights(folder):
    """sha256 of every file that decides what the weights in a folder compute, by name."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    files = [*sorted(files), *(folder / name for name in ("config.json", *TOKENIZER_FILES))]
    return {path.name: sha256(path) for path in files if path.is_file()}


def command_line():
    """The command as typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


# --- signals and history ------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """One of SignalGuard's signals, raised where the state can be saved; only its own handler may catch it."""


class SignalGuard:
    """Turns SIGINT, SIGTERM and SIGHUP into a request that the recorder reads between two steps.

    While `immediate` is set (an evaluation changes nothing) a signal interrupts at once. A second one always does,
    unsaved.
    """

    def __init__(self, immediate=False):
        self.immediate = immediate

    def __enter__(self):
        self.received = None
        # SIGHUP: a terminal that closes; nohup ignores it, and so does this
        stops = (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN))
        self.before = {number: signal.signal(number, self.handle) for number in stops}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """Remember the signal, or raise Interrupted."""
        again, self.received = self.received is not None, number
        if self.immediate or again:
            raise Interrupted


@dataclass
class History:
    """What a run has done so far: the part of last.pt that is not tensors."""

    scores: list = field(default_factory=list)  # norm after each finished phase
    step: int = 0  # finished steps of the current phase
    epochs: float = 0.0  # epochs before the current phase
    total_steps: int = 0
    best: float = -1.0
    best_phase: str = ""
    last_scores: dict = field(default_factory=dict)
    trained: list = field(default_factory=list)  # names of the parameters that the optimiser holds
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


# --- the recorder -------------------------------------------------------------------------------------------------


class Recorder:
    """Everything around the loop that is not training: saving, logging, signals, progress bar, time and memory.

    The loop calls it at three places: `remaining_steps`, `after_step`, `after_phase`.
    A signal that reaches one process stops all processes after the same step. `state` is what a stopped run saved.
    """

    save_minutes = 10.0  # between saved states within a phase
    steps_per_line = 50  # of log.jsonl

    def __init__(self, folder, parts, state=None):
        self.folder, self.parts, self.state = folder, parts, state
        self.history = History()
        self.signals, self.best_evaluation = SignalGuard(), None
        if state:
            with damaged(folder.path / "last.pt"):
                self.history = History(**state["progress"])
                restore(parts, state)

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, *exception):
        self.signals.__exit__()
        # a signal that came while the last state was saved
        if kind is None and parallel.any_process(self.signals.received is not None)[0]:
            raise Interrupted

    def remaining_steps(self, phase, steps, optimizer, trained):
        """Yield (number of finished steps, step) for the remaining steps of a phase, behind a progress bar."""
        # `pending` holds the results of the steps since the last line of the log
        self.phase, self.optimizer, self.pending, history = phase, optimizer, [], self.history
        if self.state and trained == history.trained:
            with damaged(self.folder.path / "last.pt"):
                optimizer.load_state_dict(self.state["optimizer"])
                for parameter, values in optimizer.state.items():
                    moments = {name: value for name, value in values.items() if torch.is_tensor(value) and value.dim()}
                    check_tensors(dict.fromkeys(moments, parameter), moments)
        history.trained, self.state = trained, None
        # when the phase started or was last saved, and when the recorder last logged and printed
        self.started = self.logged_at = self.printed_at = time.monotonic()
        quiet = not parallel.progress_bars()
        self.bar = tqdm(steps[history.step :], phase.label, len(steps), initial=history.step, disable=quiet)
        for step in self.bar:
            yield history.step, step
        history.train_seconds += time.monotonic() - self.started

    def after_step(self, results):
        """Count the step, and log, print or save where it is time to.

        Raises: Interrupted after saving, where a signal came; InputError where a loss is not a number.
        """
        history, now = self.history, time.monotonic()
        self.pending.append(results)
        history.step += 1
        history.total_steps += 1
        due = now - self.started > 60 * self.save_minutes
        stop, due = parallel.any_process(self.signals.received is not None, due)
        if stop or due or len(self.pending) == self.steps_per_line or history.step == self.bar.total:
            self.log_steps(now)
        if stop or due:
            history.train_seconds += now - self.started
            self.started = time.monotonic()
            self.folder.save_last(snapshot(self.parts, self.optimizer, history))
        if stop:
            raise Interrupted

    def log_steps(self, now):
        """Write a log line for the steps since the last one, and show it beside the progress bar."""
        seconds, history = now - self.logged_at, self.history
        rows = check_finite(self.parts, self.folder, self.pending, history.total_steps - len(self.pending) + 1)
        terms, speed = mean_terms(rows), sum(count for _, count, _ in rows) / seconds
        self.folder.log(
            kind="step",
            phase=self.phase.label,
            step=history.total_steps,
            terms=terms,
            # of all parameter groups, the highest first
            lr=sorted({group["lr"] for group in self.optimizer.param_groups}, reverse=True),
            seconds=round(seconds, 3),
            examples_per_second=round(speed, 1),
            peak_mib=round(memory_mib(self.parts.precision.device)),
            **({"cosines": cosines} if (cosines := mean_cosines(self.pending)) else {}),
        )
        losses = " ".join(f"{name} {sum(values.values()):.3f}" for name, values in terms.items())
        self.bar.set_postfix_str(f"{losses} {speed:.0f} ex/s")
        # without a progress bar a line a minute shows that the run is alive
        if self.bar.disable and now - self.printed_at > 60:
            print(f"{self.phase.label} step {history.step}/{self.bar.total} {losses} {speed:.0f} ex/s", flush=True)
            self.printed_at = now
        self.pending, self.logged_at = [], now

    def after_phase(self, phase, evaluate):
        """Evaluate the model where the phase wants it, keep the best one, and save what resuming needs.

        `evaluate()` returns (Scores, predictions). `best_evaluation` is its result where this model is the best one.
        Returns norm, or None without an evaluation.
        """
        history, norm, self.best_evaluation = self.history, None, None
        # the losses were finite, but the last step may have been too large
        if not all(parameter.isfinite().all() for parameter in self.parts.model.parameters()):
            raise InputError(f"{self.folder.path}: {phase.label} ends with infinite parameters or NaN: lower --lr")
        if phase.keep or phase.scored:
            scores, predictions = self.evaluate(evaluate)
            norm, is_best = scores.norm, phase.keep and scores.norm > history.best
            if is_best:
                history.best, history.best_phase = norm, phase.label
                self.folder.save_best(self.parts.model)
                self.best_evaluation = (scores, predictions)
            history.last_scores = scores.record()
            self.log_phase(phase, scores, is_best)
        history.scores.append(norm)
        history.epochs += phase.fraction
        history.step = 0
        self.folder.save_last(snapshot(self.parts, self.optimizer, history))
        return norm

    def evaluate(self, evaluate):
        """Evaluate the model; a signal interrupts that, since the evaluation can be done again."""
        started = time.monotonic()
        # taken beforehand, while all processes are at the same place
        before = snapshot(self.parts, self.optimizer, self.history)
        self.signals.immediate = True
        try:
            scores, predictions = evaluate()
            scores = parallel.from_first(scores)
        except (Interrupted, InputError):
            self.folder.save_last(before)
            raise
        finally:
            self.signals.immediate = False
        self.history.eval_seconds += time.monotonic() - started
        return scores, predictions

    def log_phase(self, phase, scores, is_best):
        """Write a log line for a phase, and print it."""
        self.folder.log(
            kind="phase",
            phase=phase.label,
            dev=scores.tasks,
            raw=scores.raw,
            norm=scores.norm,
            train_seconds=round(self.history.train_seconds, 2),
            eval_seconds=round(self.history.eval_seconds, 2),
        )
        tasks = self.parts.model.tasks
        metrics = "  ".join(f"{name} {values[tasks[name].metric.name]:.3f}" for name, values in scores.tasks.items())
        best = "  best so far" if is_best else ""
        print(f"{phase.label}: dev {metrics}  raw {scores.raw:.4f}  norm {scores.norm:.4f}{best}", flush=True)
        for warning in scores.warnings if phase.keep else ():
            print(f"warning: {warning}", flush=True)


def snapshot(parts, optimizer, history):
    """Everything that a resumed run needs, loadable with weights_only=True.

    The processes are alike, except for the generators that dropout draws from: all of those are here.
    """
    get_state, _ = dropout_state(parts.precision.device)
    return {
        "model": parts.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(history),
        "terms": {key: term.state_dict() for key, term in parts.terms.items()},
        "gradients": parts.gradients.state_dict(),
        "scaler": parts.precision.scaler.state_dict(),
        "rng": torch.stack(parallel.gather(get_state())),
    }


def restore(parts, state):
    """Put the saved tensors back. The optimiser's tensors follow when it is built.

    Raises: one of the errors that `damaged` turns into a line, where something does not fit.
    """
    get_state, set_state = dropout_state(parts.precision.device)
    # a tensor of its own, because torch crashes on a row of another one
    rng = state["rng"][parallel.rank()].clone()
    check_tensors({"rng": get_state()}, {"rng": rng})
    check_tensors(parts.model.state_dict(), state["model"])
    parts.model.load_state_dict(state["model"])
    for key in parts.terms.keys() | state["terms"].keys():
        parts.terms[key].load_state_dict(state["terms"][key])
    parts.gradients.load_state_dict(state["gradients"])
    parts.precision.scaler.load_state_dict(state["scaler"])
    set_state(rng)


def check_finite(parts, folder, pending, first_step):
    """Stop the run at the first loss that is not a number, saving the batch's ids.

    `pending` holds the results of several steps. Their values are summed over the processes and fetched from the
    device in one transfer. Returns [(task, examples, {term: mean})].
    """
    sums = torch.stack([value for results, _ in pending for *_, values in results for value in values.values()])
    sums, means = iter(parallel.add_up(sums).tolist()), []
    for offset, (results, _) in enumerate(pending):
        for name, rows, values in results:
            values = {key: next(sums) / len(rows) for key in values}
            if not all(map(np.isfinite, values.values())):
                record = {"step": first_step + offset, "task": name, "terms": {k: str(v) for k, v in values.items()}}
                path = folder.path / "nan-batch.json"
                ids = [parts.data[name]["train"].identifier(row) for row in rows]
                write_whole(path, json.dumps(record | {"ids": ids}, indent=1))
                raise InputError(
                    f"{path}: the loss of {name} is {values} at step {first_step + offset}: lower --lr, or look at "
                    "the examples whose ids are saved there"
                )
            means.append((name, len(rows), values))
    return means


def mean_terms(rows):
    """Mean of each task's terms over logged batches: {task: {term: mean}}."""
    means = {}
    for name in dict.fromkeys(name for name, _, _ in rows):
        mine = [(count, values) for task, count, values in rows if task == name]
        total = sum(count for count, _ in mine)
        means[name] = {key: sum(c * v[key] for c, v in mine) / total for key in mine[0][1]}
    return means


def mean_cosines(pending):
    """Mean cosine between the gradients of every pair of tasks over the pending steps: {"sst-para": cosine}."""
    values = {}
    for _, cosines in pending:
        for pair, cosine in cosines.items():
            values.setdefault(pair, []).append(float(cosine))
    return {pair: sum(cosines) / len(cosines) for pair, cosines in values.items()}
