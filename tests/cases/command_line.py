"""What the tests of the command line share: commands, faults of a disk, training that counts its steps."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtml.tasks import files
from mtml.train.loop import Budget, Loop

SINUSOID = ["train", "sinusoid", "--meta-batch", "2", "--plain-seconds", "0.1", "--iterations", "30"]
DIGITS = ["train", "omniglot", "--meta-batch", "2", "--plain-seconds", "0.1", "--iterations", "4", "--test-tasks", "20"]
GROUPS = ["train", "multitask", "--groups", "sinusoid", "--meta-batch", "2", "--iterations", "4"]
START = {
    "sinusoid": SINUSOID,
    "omniglot": DIGITS,
    "multitask": GROUPS,
    "record": ["record", "run", "kept/run"],
    "plot": ["plot", "log.csv"],
}

REASONS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use",
    errno.EIO: os.strerror(errno.EIO),
}


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Make writing a file of that name fail, where a disk does: when what was written is to reach it."""
    replace = os.replace

    def refusing(source: str, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), source, None, str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refusing)


def raising(error: BaseException) -> Callable[..., None]:
    """A function that does nothing else."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function


class Steps:
    """A model that counts its steps; actions happen in the steps named."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.count, self.actions = 0, actions

    def __call__(self) -> torch.Tensor:
        self.count += 1
        self.actions.get(self.count, lambda: None)()
        return torch.ones(2)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def interrupt() -> None:
    """Ctrl-C, now."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # Python runs a handler between two bytecodes
        pass


def run_of(steps: Steps, folder: Path, iterations: int = 1000, **options: object) -> Loop:
    """Training of those steps, which logs every tenth."""
    return Loop(steps, {"steps": steps}, Budget(iterations), folder, {}, log_every=10, **options)
