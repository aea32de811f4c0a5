"""Files that are either whole or not there, and the folder for caches."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["atomic_write", "cache_folder", "remove_stale"]

PREFIX, SUFFIX = ".mtml-", ".tmp"  # of temporary files


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; it takes the place of `path` only once it is complete and on disk.

    A reader, a crash or a full disk therefore never meets half a file: the previous version stays until the end. What a
    killed process left in the folder is removed.

    Raises:
        OSError: with the name of `path`, whichever call failed.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        file, name = _temporary(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes files private; these are ordinary outputs
            os.replace(name, path)  # while the lock is held
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError) and (error.filename is None or Path(error.filename).name.startswith(PREFIX)):
            error.filename, error.filename2 = str(path), None
        raise


def remove_stale(folder: Path) -> None:
    """Remove temporary files of processes that were killed.

    A writer holds a lock on its file, which ends with the process however it ends; unlike its number, the lock is also
    known where the folder is shared with containers or other machines.
    """
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # BlockingIOError: its writer lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _temporary(path: Path) -> tuple[IO[bytes], str]:
    """A new locked file beside `path`, and its name."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PREFIX}{path.name}.", suffix=SUFFIX)
        file = os.fdopen(handle, "wb")
        with contextlib.suppress(OSError):  # a file system without locks: nobody takes it for stale either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(name):
            return file, name
        file.close()  # another process took it for stale before it was locked


def cache_folder() -> Path:
    """Where decoded data are kept: $MTML_CACHE, else $XDG_CACHE_HOME/mtml, else ~/.cache/mtml."""
    if folder := os.environ.get("MTML_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtml"
