"""``python -m bench predict --backend cuda``: meta-steps as one launch of the persistent kernel, on chips by name."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.sass.chips import CHIPS
from bench.sass.emulation.clocks import Phase
from bench.sass.persistent.engine import Emulated, Ran
from bench.sass.persistent.meta_steps import POLICY, call_of
from bench.sass.persistent.model import BEFORE, Time, time_of
from bench.sass.persistent.perceptrons import EmulatedKernels, RanMlp, macs_of_perceptron
from bench.sass.persistent.tiles import RanTiles, time_of_call
from bench.sass.persistent.where import shares
from bench.sass.persistent.words import macs_of, phases_of
from bench.workloads import Workload, select
from mtml_kernels.cuda.backends import FORMS
from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.errors import BackendUnavailable

__all__ = ["COLUMNS", "DEFAULT", "Prediction", "Request", "predicted", "report"]

DEFAULT = ("sinusoid", "policy")  # larger ones take many minutes
COLUMNS = (
    "workload",
    "chip",
    "kernel",
    "tasks",
    "steps",
    "us",
    "bound",
    "peak_share",
    "phases",
    "threads",
    "blocks",
    "fma_share",
)


class Request(NamedTuple):
    """What a report is to say: chips, numbers of tasks and of steps (empty: the workload's), phases, a file or "".

    interpreted: by a program also where a perceptron has a kernel of its own.
    form: of the backend, one of mtml_kernels.cuda.backends.FORMS.
    """

    chips: Sequence[str]
    tasks: Sequence[int]
    steps: Sequence[int]
    worst: int
    out: str = ""
    interpreted: bool = False
    form: str = "cuda"


class Prediction(NamedTuple):
    """Of a workload on a chip: the first task's phases, and the launch's time."""

    workload: Workload
    chip: str
    ran: Ran | RanMlp | RanTiles
    time: Time

    @property
    def phases(self) -> list[Phase]:
        """Between barriers: `BEFORE` of them, then the program's; of tiles those of one launch of every kind."""
        return self.ran.phases if isinstance(self.ran, RanTiles) else self.ran.clocks.phases

    @property
    def peak_share(self) -> float:
        """FLOPs of products a second, of the chip's peak."""
        ran = self.ran
        macs = macs_of(ran.program.words) if isinstance(ran, Ran) else macs_of_perceptron(ran.widths, ran.call)
        flops = 2 * macs * self.workload.tasks
        return flops / self.time.seconds / CHIPS[self.chip].device.fp32

    def row(self) -> tuple[str, ...]:
        """By COLUMNS."""
        w, issued = self.workload, sum(phase.issued for phase in self.phases)
        fma = sum(phase.issued_fma for phase in self.phases)
        numbers = (f"{1e6 * self.time.seconds:.1f}", self.time.bound, f"{self.peak_share:.4f}")
        before = 0 if isinstance(self.ran, RanTiles) else BEFORE
        launch = (str(len(self.phases) - before), str(self.ran.threads), str(self.time.blocks), f"{fma / issued:.3f}")
        kernel = {Ran: "program", RanMlp: "perceptron", RanTiles: "tiles"}[type(self.ran)]
        return (w.name, self.chip, kernel, str(w.tasks), str(w.steps), *numbers, *launch)

    def worst(self, count: int) -> Iterator[str]:
        """The longest phases, with what they do; of tiles every launch."""
        if isinstance(self.ran, RanTiles):
            yield from self.ran.lines(CHIPS[self.chip])
            return
        names = self._names()
        order = sorted(range(len(names)), key=lambda i: -self.phases[i + BEFORE].clocks)
        for i in order[:count]:
            phase, done = self.phases[i + BEFORE], names[i]
            yield f"  phase {i:3d} {phase.clocks:7.0f} clocks, {phase.bound}, {phase.issued:6d} issued: {done}"
        spent = shares(self.ran.kernel, self.ran.clocks)
        yield f"  clocks of warps: {', '.join(f'{name} {share:.0%}' for name, share in spent)}"

    def _names(self) -> list[str]:
        """What the phases do."""
        if isinstance(self.ran, Ran):
            return ["; ".join(map(str, works)) for works in phases_of(self.ran.program.words)]
        return ["see csrc/cuda/inner_loop/mlp/kernel.cuh"] * (len(self.phases) - BEFORE)


def predicted(w: Workload, chip: str, interpreted: bool = False, form: str = "cuda") -> Prediction:
    """Compile where that is needed, run a task, and predict. Raises BackendUnavailable for what has no kernel."""
    terms = FORMS[form]
    a, kernels, engine = call_of(w), EmulatedKernels(chip, w.tasks, terms > 0), Emulated(chip, w.tasks)
    perceptrons = Perceptrons(kernels, terms)
    found = None if interpreted else perceptrons.bound(a)
    ran: Ran | RanMlp | RanTiles
    if found is not None:
        perceptrons.forward(a, found)
        ran = kernels.ran[0]
        if isinstance(ran, RanTiles):
            return Prediction(w, chip, ran, time_of_call(ran.launches, CHIPS[chip]))
    else:
        Persistent(lambda: engine, perceptrons if terms else None, form if terms else None).forward(a)
        ran = engine.ran[0]
    return Prediction(w, chip, ran, time_of(ran.clocks.phases, CHIPS[chip], w.tasks, ran.blocks))


def _workloads(names: Iterable[str], request: Request) -> Iterator[Workload]:
    for name in names:
        w = POLICY if name == POLICY.name else select([name])[0]
        for tasks, steps in itertools.product(request.tasks or (w.tasks,), request.steps or (w.steps,)):
            yield dataclasses.replace(w, tasks=tasks, steps=steps)


def _line(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:14s} " + " ".join(f"{cell:>13s}" for cell in rest)


def report(names: Iterable[str], request: Request) -> Iterator[str]:
    """The table, line by line as it is found."""
    rows: list[tuple[str, ...]] = []
    yield _line(COLUMNS)
    for w, chip in itertools.product(_workloads(names, request), request.chips):
        try:
            found = predicted(w, chip, request.interpreted, request.form)
        except BackendUnavailable as why:
            yield f"{w.name:14s} {chip:>13s}: {why}"
            continue
        rows.append(found.row())
        yield _line(rows[-1])
        if request.worst:
            yield from found.worst(request.worst)
    if request.out:
        with Path(request.out).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        yield f"wrote {request.out}"
