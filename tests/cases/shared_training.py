"""Trainings by several ranks, run on each of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtml.distributed import RankLost
from mtml.tasks import DataError
from mtml.train.loop import Budget, Diverged, Loop
from mtml.train.omniglot import OmniglotRun, OmniglotSettings
from mtml.train.presets import resolve
from mtml.train.ranks import ALONE, Ranks, join
from mtml.train.sinusoid import SinusoidRun, SinusoidSettings

SINUSOID = SinusoidSettings(iterations=40, meta_batch=3, shots=5)
PRESET = resolve("learn2learn", 5, 1, meta_batch=5, norm="none", init="torch", cosine=True)
LONG = 1000.0  # minutes, by which the cosine looks at the clock
DIGITS = OmniglotSettings(None, PRESET, iterations=8, minutes=LONG, log_tasks=20)
RUNS: dict[str, SinusoidSettings | OmniglotSettings] = {
    "sinusoid": SINUSOID,
    "meta-sgd": replace(SINUSOID, meta_sgd=True, steps=2),
    "one task": replace(SINUSOID, meta_batch=1),
    "digits": DIGITS,
    "plain": replace(DIGITS, plain=True, iterations=4, preset=replace(PRESET, meta_batch=1)),
}


def trained(name: str, folder: Path, ranks: Ranks = ALONE, *, resume: bool = False, **changes: Any) -> list[Tensor]:
    """The weights that a run ends with."""
    settings: Any = replace(RUNS[name], **changes)
    kind: Any = SinusoidRun if isinstance(settings, SinusoidSettings) else OmniglotRun
    run = kind(settings, folder, ranks)
    run.train(resume)
    return [p.detach().clone() for p in run.maml.parameters()]


class Counted:
    """A model that counts its steps; actions happen in the steps named, on the ranks named."""

    def __init__(self, rank: int, actions: dict[tuple[int, int], Callable[[], Any]] | None = None) -> None:
        self.rank, self.actions, self.count, self.loss = rank, actions or {}, 0, torch.ones(rank + 1)

    def __call__(self) -> Tensor:
        self.count += 1
        self.actions.get((self.rank, self.count), lambda: None)()
        return self.loss * (self.count + self.rank)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def loop(steps: Counted, folder: Path, ranks: Ranks, budget: Budget, **options: Any) -> Loop:
    return Loop(steps, {"steps": steps}, budget, folder, {}, log_every=10, ranks=ranks, **options)


def interrupted(folder: Path, ranks: Ranks, who: int) -> tuple[int, bool]:
    """One rank alone is sent a signal: after how many iterations this one stops, and whether it knows why."""
    steps = Counted(ranks.rank, {(who, 17): lambda: os.kill(os.getpid(), signal.SIGTERM)})
    progress = loop(steps, folder, ranks, Budget(10**6)).run()
    return progress.iteration, progress.stopped


def by_time(folder: Path, ranks: Ranks) -> tuple[int, float]:
    """Iterations and seconds of a budget of minutes."""
    progress = loop(Counted(ranks.rank), folder, ranks, Budget(minutes=0.003)).run()
    return progress.iteration, progress.seconds


def diverged(folder: Path, ranks: Ranks) -> str:
    """What is said where one rank's losses alone are no numbers."""
    steps = Counted(ranks.rank)
    steps.loss *= float("nan") if ranks.rank else 1.0
    try:
        loop(steps, folder, ranks, Budget(30)).run()
    except Diverged as error:
        return str(error)
    return "nothing"


def started(folder: Path, ranks: Ranks) -> int:
    """Where a rank begins that stood elsewhere than the main one."""
    steps = Counted(ranks.rank)
    steps.count = 5 * ranks.rank + 1
    loop(steps, folder, ranks, Budget(0)).run()
    return steps.count


def evaluation_fails(folder: Path, ranks: Ranks) -> tuple[str, str]:
    """The last of a group: an error of the main rank alone, and what the others make of it."""

    def evaluate() -> dict[str, float]:
        raise DataError("no such test")

    try:
        loop(Counted(ranks.rank), folder, ranks, Budget(30), evaluate=evaluate, evaluate_seconds=0.0).run()
    except (DataError, RankLost) as error:
        return type(error).__name__, "; ".join([str(error), *getattr(error, "__notes__", [])])
    return "nothing", ""


def session(folder: Path) -> dict[str, Any]:
    """Everything of a group of ranks, in one start of the processes."""
    ranks = join()
    found: dict[str, Any] = {name: trained(name, folder / name, ranks) for name in RUNS}
    trained("sinusoid", folder / "later one", ranks, iterations=20)
    found["later two"] = trained("sinusoid", folder / "later two", ranks, resume=True)
    found["interrupted"] = [interrupted(folder / f"interrupted {who}", ranks, who) for who in (0, 1)]
    found |= {"by time": by_time(folder / "time", ranks), "diverged": diverged(folder / "diverged", ranks)}
    found["started"] = started(folder / "started", ranks)
    found["fails"] = evaluation_fails(folder / "fails", ranks)
    return found
