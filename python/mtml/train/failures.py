"""One line for everything that goes wrong with the machine rather than with the program."""

from __future__ import annotations

import errno
import re

__all__ = ["line_of", "missing", "with_notes"]

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # whose module has another name
MEMORY = re.compile(r"allocate|out of memory|not enough memory", re.IGNORECASE)
WAY_OUT = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use",
    errno.EPERM: "choose a place that you may use",
    errno.EEXIST: "it is a file where a folder is needed; choose another place, or move the file",
    errno.ENOTDIR: "a part of the path is a file; choose another place, or move the file",
    errno.EISDIR: "it is a folder where a file is needed; choose another place, or move the folder",
}


def line_of(error: BaseException) -> str | None:
    """What happened and the way out, with the notes that were added to `error`; None where it is a fault to look into.

    Example:
        >>> line_of(FileExistsError(17, "File exists", "runs"))
        'runs: File exists: it is a file where a folder is needed; choose another place, or move the file'
    """
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, ImportError):
        text = _import_line(error)
    elif isinstance(error, OSError):
        text = _file_line(error)
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and MEMORY.search(str(error))):
        text = f"not enough memory ({error}): ask for fewer tasks, shots or queries at a time"
    else:
        return None
    return with_notes(text, error)


def with_notes(text: str, error: BaseException) -> str:
    """The text with what was added to `error` on its way, as one line."""
    return " ".join("; ".join([text, *getattr(error, "__notes__", [])]).split())


def missing(*modules: str) -> str:
    """That these are not installed, and how they are."""
    names = [PACKAGES.get(name, name) for name in modules]
    return f'{", ".join(names)} is needed and not installed: pip install "mtml-kernels[train]"'


def _import_line(error: ImportError) -> str:
    name = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name and not name.startswith("mtml"):
        return missing(name)
    return f"cannot be imported: {error}; `mtml doctor` says what is installed"


def _file_line(error: OSError) -> str:
    where = error.filename or "output"  # what has no name is what we print to
    way = WAY_OUT.get(error.errno or 0)
    return f"{where}: {error.strerror or error}" + (f": {way}" if way else "")
