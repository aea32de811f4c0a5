"""The CSV log of a run."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from typing import Any

from mtml.tasks.errors import DataError
from mtml.tasks.files import atomic_write

__all__ = ["CsvLog", "read_log"]


class CsvLog:
    """Rows with fixed columns, the first being the iteration; each is on its way to disk when `write` returns.

    With `keep_until`, the rows of an earlier run up to that iteration stay and later ones go: a run that continues from
    a checkpoint repeats what came after it.
    """

    def __init__(self, path: Path, columns: list[str], keep_until: int | None = None) -> None:
        self.path, self.columns = path, columns
        header = ",".join(columns)
        kept = [] if keep_until is None else _lines_until(path, header, keep_until)
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in [header, *kept]).encode())
        self._file = path.open("ab", buffering=0)  # without a buffer, of which closing would fail once more

    def write(self, **row: Any) -> None:
        """Append one row; columns that are not named stay empty.

        Raises:
            OSError: where it could not be written as a whole; half of it may be there, which readers skip.
        """
        line = (",".join(_text(row.get(name)) for name in self.columns) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            error.filename = str(self.path)
            raise
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _lines_until(path: Path, header: str, iteration: int) -> list[str]:
    """The rows of an existing log as they stand, without its header and what a crash or a full disk cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1]  # no newline, no whole row
    whole = [line for line in lines if line.count(",") == header.count(",")]
    return [line for line in whole if line.partition(",")[0].isdigit() and int(line.partition(",")[0]) <= iteration]


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log, numbers as float, without the empty cells.

    Raises:
        DataError: where the file is missing or is not such a log.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and "iteration" not in rows[0]:
            raise ValueError("it has no column named iteration")
        return [{k: float(v) for k, v in row.items() if k and v} for row in rows]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a log of `mtml train`: {error}") from error
