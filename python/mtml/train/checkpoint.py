"""Checkpoints that are whole or not there, and that only continue the run they came from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from mtml.tasks.errors import DataError
from mtml.tasks.files import atomic_write
from mtml.tasks.seal import Unsealed, sealed, unsealed

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 2  # raise it when what is stored changes; 1 had no digest and was never released
SHOWN = 4  # settings that differ


def save_checkpoint(path: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) and the `config` that made it; `path` is replaced in one go.

    The file is one that ``torch.load`` opens, with a line after it that holds the number of the format and a digest.

    Raises:
        OSError: where it cannot be written; what was at `path` before is still there.
    """
    memory = io.BytesIO()
    torch.save({"config": config, "state": state}, memory)
    with atomic_write(path) as file:
        file.write(sealed(memory.getvalue(), "checkpoint", FORMAT))


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The state saved at `path`, the same bits.

    Raises:
        DataError: where there is no checkpoint, a bit of it has changed, it is of another format, or it was made with
            another `config`.
    """
    saved = _read(path)
    was, state = saved["config"], saved["state"]
    if differing := [name for name in config if was.get(name) != config[name]]:
        if "experiment" in differing:
            differing = ["experiment"]  # the others follow from it
        found = ", ".join(f"{name} {was.get(name)!r} (now {config[name]!r})" for name in differing[:SHOWN])
        more = f" and {len(differing) - SHOWN} more differences" if len(differing) > SHOWN else ""
        raise DataError(f"resume: {path} was made with {found}{more}; give the same options, or start without --resume")
    return dict(state)


def _read(path: Path) -> dict[str, Any]:
    """What was saved at `path`."""
    try:
        content = unsealed(path.read_bytes(), "checkpoint", FORMAT)
    except FileNotFoundError as error:
        raise DataError(
            f"resume: there is no checkpoint at {path}; start without --resume, or name its folder with --out"
        ) from error
    except OSError as error:
        raise DataError(
            f"resume: {path} cannot be read ({error.strerror or error}); name another folder with --out, or start "
            "without --resume"
        ) from error
    except Unsealed as error:
        raise DataError(f"resume: {path} is not a checkpoint to go on from: {error}; start without --resume") from error
    try:
        return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # the bytes are those written, so it is this torch that does not know them
        raise DataError(
            f"resume: torch {torch.__version__} cannot read {path} ({' '.join(str(error).split())}); use the version "
            "that wrote it, or start without --resume"
        ) from error
