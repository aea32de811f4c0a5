"""A finished run's record, in the few small files that are kept in a repository."""

from __future__ import annotations

import json
from pathlib import Path

from mtml.tasks.errors import DataError
from mtml.tasks.files import atomic_write
from mtml.train.log import read_log

__all__ = ["record_run"]

COPIED = {
    "results.json": ".json",
    "characters.csv": "-characters.csv",
    "omniglot.png": ".png",
    "digits.png": ".png",
    "sinusoid.png": ".png",
    "multitask.png": ".png",
    "tasks.png": "-tasks.png",
    "characters.png": "-characters.png",
}


def record_run(folder: Path, prefix: Path, rows: int = 400) -> list[Path]:
    """Copy results, log and pictures of the run in `folder` to files that start with `prefix`; gives their paths.

    The log keeps about `rows` rows, evenly spread, and besides them every row with an accuracy.

    Raises:
        DataError: where the folder has no finished run, or the prefix names no files but those of the run.
        OSError: where a file cannot be read or written.
    """
    if not (folder / "results.json").exists():
        raise DataError(f"folder: expected a finished run with results.json in {folder}; train to the end first")
    if prefix.name in ("", "..") or prefix.parent.resolve() == folder.resolve():
        raise DataError(f"prefix: expected the start of a file's name outside {folder}, got {str(prefix)!r}")
    found = [(suffix, (folder / name).read_bytes()) for name, suffix in COPIED.items() if (folder / name).exists()]
    _check_results(folder / "results.json", found[0][1])
    found.append((".csv", _thinned(folder / "log.csv", rows)))  # all is read and checked before anything is written
    return [_write(prefix, suffix, content) for suffix, content in found]


def _check_results(path: Path, content: bytes) -> None:
    try:
        json.loads(content)
    except ValueError as error:
        raise DataError(f"folder: {path} is not JSON ({error}); `mtml train --resume` writes it again") from error


def _write(prefix: Path, suffix: str, content: bytes) -> Path:
    path = prefix.with_name(prefix.name + suffix)
    with atomic_write(path) as file:
        file.write(content)
    return path


def _thinned(log: Path, rows: int) -> bytes:
    """The log's text without most of its rows."""
    found = read_log(log)
    if not found:
        raise DataError(f"folder: expected rows in {log}, found none; train to the end first")
    header, *lines = (line for line in log.read_text(encoding="utf-8").splitlines() if line)
    every = -(-len(lines) // rows) or 1
    last = len(lines) - 1
    kept = [
        line
        for i, (line, row) in enumerate(zip(lines, found, strict=True))
        if (i + 1) % every == 0 or "accuracy" in row or i == last
    ]
    return "".join(line + "\n" for line in [header, *kept]).encode()
