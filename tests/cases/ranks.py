"""Several processes of one group on this machine: how tests start them, and what each of them does."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SECONDS = 120.0
Work = Callable[[Path], Any]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, but for its own store; and the interface that every machine has."""
    place = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**{name: str(value) for name, value in place.items()}, "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(work: Work, folder: Path, count: int = 2) -> list[Any]:
    """What `work(folder)` returns on each of `count` ranks, in new processes of one thread each.

    A rank that raises fails the test with its traceback; one that ends without a result gives None.
    """
    port, context = free_port(), multiprocessing.get_context("spawn")  # a forked child hangs in OpenMP
    processes = [context.Process(target=_rank, args=(work, folder, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
            assert process.exitcode is not None, "a rank did not come to its end"
    finally:
        for process in processes:
            process.kill()
    return [_read(folder / f"rank-{rank}.pt") for rank in range(count)]


def _rank(work: Work, folder: Path, rank: int, count: int, port: int) -> None:
    os.environ.update(environment(rank, count, port))
    torch.set_num_threads(1)
    try:
        found = {"found": work(folder)}
    except BaseException:
        found = {"failed": traceback.format_exc()}
    torch.save(found, folder / f"rank-{rank}.pt")


def _read(path: Path) -> Any:
    if not path.exists():
        return None
    result = torch.load(path, weights_only=False)
    assert "failed" not in result, result["failed"]
    return result["found"]


@contextmanager
def alone() -> Iterator[None]:
    """Within it, a test's own process knows nothing of ranks that the test run itself may be one of."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        yield
