"""Files that appear whole or not at all."""

import os
from pathlib import Path

from errors import InputError
from parallel import on_first


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
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}): free some space or choose another folder; "
            "what was there before is intact"
        ) from None
    finally:
        if os.path.lexists(beside):
            beside.unlink()
