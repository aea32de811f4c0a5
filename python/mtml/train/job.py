"""Several processes that are one command: which of them this is, and which of them says why the job ends.

Nothing but the standard library is imported until something goes wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

__all__ = ["end_at_once", "end_with_grace", "own_place", "remember", "say_why"]

ENDED = "mtml/ended"  # how many of the processes have come to an end that they want to explain
GRACE = 3  # seconds
SECONDS = 5.0  # to wait for an answer about that; with none, who asks speaks

_store: Any = None  # of the group that this process has joined


def own_place() -> tuple[int, int]:
    """This process's rank and the number of ranks, as `torchrun` and its like tell them: (0, 1) without one.

    Raises:
        DataError: the variables contradict each other.
    """
    count, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if count == "1":
        return 0, 1
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count) and "RANK" in os.environ):
        from mtml.tasks.errors import DataError

        raise DataError(
            f"the variables RANK and WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE, got {os.environ.get('RANK')!r} and "
            f"{count!r}; start with torchrun, or unset both"
        )
    return int(rank), int(count)


def end_with_grace() -> None:
    """Leave this process some seconds after SIGTERM: a launcher that has lost one process sends it to the others at
    once, before they could say why they end. Only in the main thread, to which signals come."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _last_words)


def end_at_once() -> None:
    """SIGTERM ends this process again."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _last_words(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's, which waits for no native call
    signal.alarm(GRACE)


def remember(store: Any) -> None:
    """Ask this store who speaks: a `torch.distributed.Store` that all processes of the job share."""
    global _store
    _store = store


def say_why(line: str) -> None:
    """Print the error that ends this process, unless another process of the job has already printed its own, from which
    this one follows."""
    if not _speaks():
        return
    start = "" if os.environ.get("RANK", "0") == "0" else "\n"  # rank 0's progress bar stands in the line
    print(f"{start}error: {line}", file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether this process is the first that asks, or cannot ask the others."""
    try:
        store = _store or _of_launcher()
        if store is None:
            return True
        store.set_timeout(timedelta(seconds=SECONDS))
        return bool(store.add(ENDED, 1) == 1)
    except (ImportError, RuntimeError, ValueError):  # the store's process is gone, or there never was one
        return True


def _of_launcher() -> Any:
    """torchrun's own store, which is there before any group and outlives each process; None elsewhere."""
    if own_place()[1] == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=SECONDS))))
    return store
