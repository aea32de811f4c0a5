"""The training loop: iterations or minutes, progress bar, log, checkpoints, and an orderly end on Ctrl-C."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from mtml.tasks.errors import DataError
from mtml.tasks.files import remove_stale
from mtml.train.checkpoint import load_checkpoint, save_checkpoint
from mtml.train.log import CsvLog

__all__ = ["Budget", "Diverged", "Loop", "Progress"]

PATIENCE = 0.5  # seconds an iteration may last before who presses Ctrl-C is told that it is waited for


class Diverged(RuntimeError):
    """The loss is no longer a number; what was saved before remains."""


class Stateful(Protocol):
    """What a checkpoint holds: modules, optimisers, streams of tasks."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Budget:
    """How long to train: until `iterations` are done or `minutes` have passed, whichever is first."""

    iterations: int | None = None
    minutes: float | None = None

    def share(self, progress: Progress) -> float:
        """How much of the budget is used, 0..1."""
        done = 0.0 if self.iterations is None else progress.iteration / max(self.iterations, 1)
        spent = 0.0 if self.minutes is None else progress.seconds / max(60.0 * self.minutes, 1e-9)
        return min(1.0, max(done, spent))


@dataclass
class Progress:
    """Where a run stands; `seconds` are those of training, not of evaluation."""

    iteration: int = 0
    seconds: float = 0.0
    stopped: bool = False  # by Ctrl-C


@dataclass
class Loop:
    """One run.

    Args:
        step: trains on one meta-batch and returns the losses [T], detached.
        parts: what a checkpoint saves and restores, by name.
        budget: how long to train.
        folder: for checkpoint.pt and log.csv.
        config: what must be equal for a checkpoint to be continued.
        columns: of the log, besides iteration, seconds and loss.
        evaluate: gives the values of those columns; called every `evaluate_seconds` of training.
        log_every, log_seconds: a row of the log after so many iterations, or so much time, whichever is first.
        schedule: called before every iteration with the share of the budget that is used, to set learning rates.
    """

    step: Callable[[], Tensor]
    parts: dict[str, Stateful]
    budget: Budget
    folder: Path
    config: dict[str, Any]
    columns: tuple[str, ...] = ()
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_seconds: float = 30.0
    schedule: Callable[[float], None] | None = None
    log_every: int = 100
    log_seconds: float = 10.0
    save_seconds: float = 20.0
    progress: Progress = field(default_factory=Progress)
    _pending: list[Tensor] = field(default_factory=list)
    _saved: int | None = None  # the iteration that the checkpoint holds, of this run

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's path."""
        return self.folder / "checkpoint.pt"

    def run(self, *, resume: bool = False) -> Progress:
        """Train to the end of the budget or to Ctrl-C; the last iteration is saved either way.

        Raises:
            DataError: where there is no checkpoint to resume that fits.
            Diverged: where the loss is no longer finite.
            OSError: where the folder cannot be written to.
            KeyboardInterrupt: at a second Ctrl-C. These say in a note what the checkpoint holds.
        """
        remove_stale(self.folder)
        if resume:
            self._load()
        elif self.checkpoint.is_dir():  # which saving would find only after some training
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.checkpoint))
        elif self.checkpoint.exists():
            print(f"{self.checkpoint} of an earlier run will be replaced (--resume would continue it)", file=sys.stderr)
        keep = self.progress.iteration if resume else None
        self._saved = keep
        log = CsvLog(self.folder / "log.csv", ["iteration", "seconds", "loss", *self.columns], keep)
        try:
            with _interrupts(self.progress) as stop, _bar(self.budget, self.progress) as bar:
                self._train(log, bar, stop)
                self._save()
                self.progress.stopped = stop.asked
        except OSError as error:
            with suppress(OSError, Diverged):  # where the log could not be written, perhaps this still can
                if self._pending:
                    self._mean_loss()  # raises where there is nothing worth saving
                self._save()
            error.add_note(self._kept())
            raise
        except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
            error.add_note(self._kept())
            raise
        finally:
            log.close()
        return self.progress

    def _kept(self) -> str:
        """What a run that ends early leaves behind."""
        if self._saved is None:
            return "nothing was saved yet"
        return f"{self.checkpoint} holds iteration {self._saved}, from which --resume continues"

    def _train(self, log: CsvLog, bar: Any, stop: _Stop) -> None:
        """The iterations; everything but the step itself happens once per row of the log."""
        saved = evaluated = reported = self.progress.seconds
        offset = time.perf_counter() - self.progress.seconds
        limit = math.inf if self.budget.iterations is None else self.budget.iterations
        deadline = math.inf if self.budget.minutes is None else 60.0 * self.budget.minutes
        progress = self.progress
        while progress.iteration < limit and progress.seconds < deadline and not stop.asked:
            if self.schedule is not None:
                self.schedule(self.budget.share(progress))
            self._pending.append(self.step())
            progress.iteration += 1
            progress.seconds = time.perf_counter() - offset
            if progress.iteration % self.log_every and progress.seconds - reported < self.log_seconds:
                continue
            reported = progress.seconds
            loss = self._mean_loss()
            due = self.evaluate is not None and progress.seconds - evaluated >= self.evaluate_seconds
            pause = time.perf_counter()
            values = self._evaluated(stop) if due else {}
            if progress.seconds - saved >= self.save_seconds:
                self._save()
                saved = progress.seconds
            offset += time.perf_counter() - pause  # neither evaluating nor saving is training time
            evaluated = progress.seconds if due else evaluated
            self._report(log, bar, loss, values)
        if self._pending:
            self._report(log, bar, self._mean_loss(), self._evaluated(stop))

    def _evaluated(self, stop: _Stop) -> dict[str, float]:
        """The values of the log's own columns; none once the user wants to stop, who need not wait for them."""
        if self.evaluate is None or stop.asked:
            return {}
        try:
            stop.at_once = True
            values = self.evaluate()
            stop.at_once = False
        except KeyboardInterrupt:
            stop.at_once = False
            return {}
        return values

    def _mean_loss(self) -> float:
        """Over the iterations since it was last asked for; raises before a diverged state could be saved."""
        loss = float(torch.stack(self._pending).mean())
        self._pending.clear()
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at iteration {self.progress.iteration}: try a lower --inner-lr or --outer-lr"
            )
        return loss

    def _report(self, log: CsvLog, bar: Any, loss: float, values: dict[str, float]) -> None:
        """Write a row of the log and move the bar."""
        progress = self.progress
        log.write(iteration=progress.iteration, seconds=progress.seconds, loss=loss, **values)
        shown = {k: f"{v:.3f}" for k, v in values.items()}
        if self.budget.iterations is None:  # else the bar itself counts iterations
            shown["it/s"] = f"{progress.iteration / max(progress.seconds, 1e-9):.1f}"
        bar.set_postfix(loss=f"{loss:.4f}", **shown, refresh=False)
        bar.update(_position(self.budget, progress) - bar.n)

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["progress"] = {"iteration": self.progress.iteration, "seconds": self.progress.seconds}
        save_checkpoint(self.checkpoint, state, self.config)
        self._saved = self.progress.iteration

    def _load(self) -> None:
        state = load_checkpoint(self.checkpoint, self.config)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.progress = Progress(**state["progress"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise DataError(
                f"resume: {self.checkpoint} does not fit this run ({why}); start without --resume"
            ) from error


def _position(budget: Budget, progress: Progress) -> float:
    """Where the bar stands: in iterations where their number is given, else in seconds, of which the last iteration may
    need a few more than there are (tqdm forgets its total when it is exceeded)."""
    if budget.iterations is not None:
        return progress.iteration
    return min(round(progress.seconds, 1), 60.0 * (budget.minutes or 0.0))


@contextmanager
def _bar(budget: Budget, progress: Progress) -> Iterator[Any]:
    """A progress bar on the terminal; in a file, a line now and then."""
    from tqdm import tqdm

    in_seconds = budget.iterations is None
    total = round(60.0 * (budget.minutes or 0.0), 1) if in_seconds else budget.iterations
    with tqdm(
        total=total,
        initial=_position(budget, progress),
        unit="s" if in_seconds else "it",
        desc="training",
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        miniters=1,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s, {remaining} left{postfix}" if in_seconds else None,
    ) as bar:
        yield bar


class _Stop:
    """What the user wants: the first Ctrl-C (or SIGTERM) is looked at between iterations, so that the one in progress
    is neither lost nor half done; the second ends at once, and so does the first where `at_once` says that nothing can
    be lost."""

    def __init__(self, progress: Progress) -> None:
        self.asked = self.at_once = False
        self._progress = progress

    def handle(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if self.at_once or not first:
            raise KeyboardInterrupt
        if self._progress.seconds > PATIENCE * self._progress.iteration:
            os.write(
                2, b"\nstopping after this iteration; Ctrl-C again ends at once, without it\n"
            )  # safe in a handler


@contextmanager
def _interrupts(progress: Progress) -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM as wishes, in the main thread; others get no signals."""
    stop = _Stop(progress)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(s, stop.handle) for s in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
