"""Shared by all tests: fixed seeds, poisoned memory, one hypothesis profile.

The package is imported as it is installed: there is no conftest at the root and no `pythonpath`, so that a test run
never mistakes the source tree for the installation.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections.abc import Callable
from typing import Any

# Before torch loads OpenMP: on busy cores, threads that wait awake for one another burn many times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Small cases are shared by threads as large ones are.
os.environ.setdefault("MTML_THREAD_WORK", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("mtml", derandomize=True, deadline=None, print_blob=True, database=None)
settings.load_profile("mtml")

PACKAGES = ("mtml", "mtml_kernels")

# Test processes side by side share the cores, instead of each one's threads waiting for all of them.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # and so do the processes that tests start

# PyTorch notes on first use which functions a default device is for: let it see them before they are replaced below.
with torch.device("cpu"):
    torch.empty(0)


def pytest_collection_finish() -> None:
    """Six thousand tests are millions of objects: a garbage collection is not to walk through them every time.

    Without this, one torch.compile late in a run takes 20 s instead of one.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries complain at the end that their objects are still there


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, in any order and alone."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate` with NaN (the largest integer, True) instead of whatever lay in memory, for callers in the package."""

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # a traced graph allocates for itself
            return result
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] not in PACKAGES:
            return result
        with torch.no_grad():
            if result.is_floating_point() or result.is_complex():
                return result.fill_(float("nan"))
            return result.fill_(True if result.dtype == torch.bool else torch.iinfo(result.dtype).max)

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory often holds zeros, and code that forgets to write passes by luck: here it reads NaN."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
