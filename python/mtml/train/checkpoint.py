"""Checkpoints that are whole or not there, and that only continue the run they came from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from mtml.tasks._files import atomic_write
from mtml.tasks.errors import DataError

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) and the `config` that made it; `path` is replaced in one go."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "config": config, "state": state}, file)


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The state saved at `path`.

    Raises:
        DataError: where there is no checkpoint, it is broken, or it was made with another `config`.
    """
    if not path.exists():
        raise DataError(
            f"resume: there is no checkpoint at {path}; start without --resume, or name its folder with --out"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        was, state = saved["config"], saved["state"]
    except (RuntimeError, KeyError, EOFError, OSError, TypeError, pickle.UnpicklingError) as error:
        raise DataError(f"resume: {path} is not a checkpoint of mtml ({error}); start without --resume") from error
    if differing := [name for name in config if was.get(name) != config[name]]:
        found = ", ".join(f"{name} {was.get(name)!r} (now {config[name]!r})" for name in differing)
        raise DataError(f"resume: {path} was made with {found}; give the same options, or start without --resume")
    return state
