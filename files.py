"""Read files with one-line errors; write files whole or not at all."""

import hashlib
import json
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from errors import InputError, UnreadableError
from parallel import on_first


@contextmanager
def opened(path):
    """Open a file that the user named, to read its bytes.

    Raises: UnreadableError where it is missing, may not be read, or is no ordinary file.
    """
    try:
        # O_NONBLOCK: to open a pipe would otherwise wait for its writer
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableError(f"{path}: is not a file, but a pipe or a device: write its content into a file")
            yield file
    except OSError as error:
        raise UnreadableError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from None


def sha256(path):
    """Hash of a file's content."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """Read a JSON file that contains an object.

    Raises: InputError for any other file.
    """
    with opened(path) as file:
        try:
            values = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: is not valid JSON ({error}): get it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: contains {values!r:.40}, not an object: get it again")
    return values


@on_first
def write_whole(path, write):
    """Write a file beside its place, then move it there: a reader sees the old one or the new one, never a half.

    `write` is the content (str or bytes) or a function that writes to an open binary file. Of several processes only
    the first one writes.
    Raises: InputError where the disk is full or the folder cannot be written; the old file is intact then.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as out:
            if callable(write):
                write(out)
            else:
                out.write(write.encode() if isinstance(write, str) else write)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # after a failed write torch.save raises a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(
            f"{path}: cannot be written ({cause.strerror or cause}): free some space or choose another folder; "
            "what was there before is intact"
        ) from None
    finally:
        if os.path.lexists(beside):
            beside.unlink()
