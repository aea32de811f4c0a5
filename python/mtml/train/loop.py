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

from torch import Tensor

from mtml.tasks.errors import DataError
from mtml.tasks.files import remove_stale
from mtml.train.checkpoint import load_checkpoint, save_checkpoint
from mtml.train.log import CsvLog
from mtml.train.ranks import ALONE, Ranks

__all__ = ["Budget", "Diverged", "Loop", "Progress"]

TOGETHER = 0.05  # seconds between two looks of several ranks at one clock
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
        ranks: the processes that run this loop together, each with its own `step`. All see the main one's clock and so
            take every turn together; the main one alone evaluates and writes.
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
    ranks: Ranks = ALONE
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
            RankLost: where another rank has ended.
            OSError: where the folder cannot be written to.
            KeyboardInterrupt: at a second Ctrl-C. These say in a note what the checkpoint holds.
        """
        self._begin(resume)
        keep = self.progress.iteration if resume else None
        self._saved = keep
        columns = ["iteration", "seconds", "loss", *self.columns]
        log = CsvLog(self.folder / "log.csv", columns, keep) if self.ranks.main else None
        try:
            with _interrupts(self.progress) as stop, _bar(self.budget, self.progress, self.ranks.main) as bar:
                self._train(log, bar, stop)
                self._save_together()
                self.progress.stopped = stop.asked
        except OSError as error:
            with suppress(OSError, Diverged):  # where the log could not be written, perhaps this still can
                if self._pending:
                    self._mean_loss(ALONE)  # raises where there is nothing worth saving
                self._save()
            error.add_note(self._kept())
            raise
        except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
            error.add_note(self._kept())
            raise
        finally:
            if log is not None:
                log.close()
        return self.progress

    def _begin(self, resume: bool) -> None:
        """Start from the checkpoint, or look whether the folder can take one; all ranks start from the main one's
        state."""
        if self.ranks.main:
            remove_stale(self.folder)
            if resume:
                self._load(load_checkpoint(self.checkpoint, self.config))
            elif self.checkpoint.is_dir():  # which saving would find only after some training
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.checkpoint))
            elif self.checkpoint.exists():
                again = "will be replaced (--resume would continue it)"
                print(f"{self.checkpoint} of an earlier run {again}", file=sys.stderr)
        if self.ranks.count > 1:
            self._load(self.ranks.same(self._state()))

    def _kept(self) -> str:
        """What a run that ends early leaves behind."""
        if self._saved is None:
            return "nothing was saved yet"
        return f"{self.checkpoint} holds iteration {self._saved}, from which --resume continues"

    def _train(self, log: CsvLog | None, bar: Any, stop: _Stop) -> None:
        """The iterations; everything but the step itself happens once per row of the log.

        Ranks take every turn here by what they all know: one that took another would wait for the others for ever.
        """
        saved = evaluated = reported = self.progress.seconds
        offset = time.perf_counter() - self.progress.seconds
        limit = math.inf if self.budget.iterations is None else self.budget.iterations
        deadline = math.inf if self.budget.minutes is None else 60.0 * self.budget.minutes
        progress, clock = self.progress, _Clock(self.ranks, self.progress, stop)
        clock.look(progress.seconds)
        while progress.iteration < limit and progress.seconds < deadline and not clock.asked:
            if self.schedule is not None:
                self.schedule(self.budget.share(progress))
            self._pending.append(self.step())
            progress.iteration += 1
            clock.look(time.perf_counter() - offset)
            if progress.iteration % self.log_every and progress.seconds - reported < self.log_seconds:
                continue
            reported = progress.seconds
            loss = self._mean_loss(self.ranks)
            due = self.evaluate is not None and progress.seconds - evaluated >= self.evaluate_seconds
            pause = time.perf_counter()
            values = self._evaluated(stop) if due else {}
            if progress.seconds - saved >= self.save_seconds:
                self._save_together()
                saved = progress.seconds
            offset += time.perf_counter() - pause  # neither evaluating nor saving is training time
            evaluated = progress.seconds if due else evaluated
            self._report(log, bar, loss, values)
        if self.ranks.count > 1:
            clock.look(time.perf_counter() - offset, last=True)
            stop.asked |= clock.asked
        if self._pending:
            self._report(log, bar, self._mean_loss(self.ranks), self._evaluated(stop))

    def _evaluated(self, stop: _Stop) -> dict[str, float]:
        """The values of the log's own columns; none once the user wants to stop, who need not wait for them."""
        if self.evaluate is None or stop.asked or not self.ranks.main:
            return {}
        try:
            stop.at_once = True
            values = self.evaluate()
            stop.at_once = False
        except KeyboardInterrupt:
            stop.at_once = False
            return {}
        return values

    def _mean_loss(self, ranks: Ranks) -> float:
        """Over the iterations since it was last asked for; raises before a diverged state could be saved."""
        loss = ranks.mean(self._pending)
        self._pending.clear()
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at iteration {self.progress.iteration}: try a lower --inner-lr or --outer-lr"
            )
        return loss

    def _report(self, log: CsvLog | None, bar: Any, loss: float, values: dict[str, float]) -> None:
        """Write a row of the log and move the bar."""
        if log is None:
            return
        progress = self.progress
        log.write(iteration=progress.iteration, seconds=progress.seconds, loss=loss, **values)
        shown = {k: f"{v:.3f}" for k, v in values.items()}
        if self.budget.iterations is None:  # else the bar itself counts iterations
            shown["it/s"] = f"{progress.iteration / max(progress.seconds, 1e-9):.1f}"
        bar.set_postfix(loss=f"{loss:.4f}", **shown, refresh=False)
        bar.update(_position(self.budget, progress) - bar.n)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return state | {"progress": {"iteration": self.progress.iteration, "seconds": self.progress.seconds}}

    def _save(self) -> None:
        if self.ranks.main:
            save_checkpoint(self.checkpoint, self._state(), self.config)
            self._saved = self.progress.iteration

    def _save_together(self) -> None:
        """`_save`, after which every rank may say that the checkpoint is there."""
        self._save()
        self.ranks.wait()
        self._saved = self.progress.iteration

    def _load(self, state: dict[str, Any]) -> None:
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.progress = Progress(**state["progress"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise DataError(
                f"resume: {self.checkpoint} does not fit this run ({why}); start without --resume"
            ) from error


class _Clock:
    """Sets a run's seconds, and knows whether to stop, by what all ranks know.

    One rank asks its own clock and its own user. Several look at the main one's clock together, and at all users'
    wishes, every `TOGETHER` seconds and not at every iteration: a message may take as long as an iteration does.
    Between two looks time stands still.
    """

    def __init__(self, ranks: Ranks, progress: Progress, stop: _Stop) -> None:
        self.ranks, self.progress, self.stop = ranks, progress, stop
        self._last = self._next = progress.iteration
        self._every, self._agreed = 1, False

    @property
    def asked(self) -> bool:
        """Whether to stop before the next iteration."""
        return self.stop.asked if self.ranks.count == 1 else self._agreed

    def look(self, seconds: float, last: bool = False) -> None:
        """Take the time, of which this rank's own clock says `seconds`. The `last` look finds the run's whole time."""
        progress = self.progress
        if self.ranks.count == 1:
            progress.seconds = seconds
        elif last or progress.iteration >= self._next:
            before = progress.seconds
            progress.seconds, self._agreed = self.ranks.clock(seconds, self.stop.asked)
            each = (progress.seconds - before) / max(progress.iteration - self._last, 1)
            self._every = max(1, min(2 * self._every, int(TOGETHER / max(each, 1e-6))))
            self._last, self._next = progress.iteration, progress.iteration + self._every


def _position(budget: Budget, progress: Progress) -> float:
    """Where the bar stands: in iterations where their number is given, else in seconds, of which the last iteration may
    need a few more than there are (tqdm forgets its total when it is exceeded)."""
    if budget.iterations is not None:
        return progress.iteration
    return min(round(progress.seconds, 1), 60.0 * (budget.minutes or 0.0))


@contextmanager
def _bar(budget: Budget, progress: Progress, shown: bool) -> Iterator[Any]:
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
        disable=not shown,
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
