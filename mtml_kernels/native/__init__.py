"""The compiled CPU engine: this file finds it, `tensors` checks what goes in, and each op's file gives tensors back."""

from __future__ import annotations

import importlib
import math
import os
from types import ModuleType
from typing import Any

import torch

from mtml_kernels.schema.dtypes import DTYPES

__all__ = ["availability", "engine", "fma_peak", "info", "native_seconds"]

_module: ModuleType | None = None
_reason: str | None = None


def _load() -> ModuleType | None:
    global _module, _reason
    if _module is None and _reason is None:
        try:
            module = importlib.import_module("mtml_kernels._C")
        except ImportError as error:
            _reason = (
                f"the compiled module mtml_kernels._C cannot be loaded ({error}). Build it with `pip install .` (or "
                "`pip install -e .` in a checkout); from a checkout's root, Python imports the source tree"
            )
        else:
            _reason = _thread_work(module) if module.isa() else module.isa_reason()
            _module = module if _reason is None else None
    return _module


def _thread_work(module: ModuleType) -> str | None:
    """Sets what MTML_THREAD_WORK says; the reason why it cannot be."""
    given = os.environ.get("MTML_THREAD_WORK")
    if not given:
        return None
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 1 <= share < math.inf:
        return f"MTML_THREAD_WORK: expected multiply-adds a thread, at least 1, got {given!r}; unset it for 524288"
    module.thread_work(share)
    return None


def availability() -> str | None:
    """None where the compiled engine can run, else the reason why it cannot."""
    return None if _load() is not None else _reason


def engine() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it cannot run here; see `availability`.
    """
    module = _load()
    if module is None:
        raise RuntimeError(_reason)
    return module


def info() -> dict[str, Any]:
    """The instruction set that runs, why it was chosen, and those that could run here."""
    module = engine()
    return {
        "isa": module.isa(),
        "isa_reason": module.isa_reason(),
        "available": module.isa_available().split(","),
        "path": module.__file__,
    }


def fma_peak(dtype: str = "float32", threads: int = 0, seconds: float = 0.2) -> float:
    """The machine's measured multiply-add peak in GFLOP/s, all `threads` (0: torch's number) together."""
    codes = {str(t).removeprefix("torch."): code for t, code in DTYPES.items()}
    if dtype not in codes:
        raise ValueError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
    peak: float = engine().fma_peak(codes[dtype], threads or torch.get_num_threads(), seconds)
    return peak


def native_seconds() -> float:
    """Seconds that this process has spent inside the engine: what remains of a step's time is the host's."""
    seconds: float = engine().native_seconds()
    return seconds
