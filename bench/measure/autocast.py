"""``python -m bench autocast``: fused meta-steps under autocast and in bfloat16, beside float32 and the plain loop.

The fused path computes in float32 whatever autocast says, so what is measured is what the copies cost; and what the
same autocast makes of the loop that users would write. Gradients are compared with the plain loop's in float64 first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import providers, workloads
from bench.measure import timing
from bench.measure.gate import median, within
from bench.measure.match import Truth
from bench.measure.runner import outcome, prepare
from bench.providers import Prepared
from bench.workloads import Workload

SEEDS = 5
FLOAT32, AUTOCAST, BFLOAT16, LOOP = "mtml, float32", "mtml, autocast", "mtml, bfloat16 model", "loop, autocast"


def _under_autocast(prepared: Prepared) -> Prepared:
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return prepared.run()

    return Prepared(run, prepared.result)


def _rounded(w: Workload, provider: str, dtype: torch.dtype, seed: int) -> Prepared:
    """On network and data that are rounded to bfloat16."""
    net = workloads.make_network(w, torch.float32, "cpu", seed).to(torch.bfloat16).to(dtype)
    data = workloads.make_data(w, torch.float32, "cpu", seed)
    given: Any = tuple(t.to(torch.bfloat16).to(dtype) if t.is_floating_point() else t for t in data)
    return providers.load(provider)(w, net, given)


def _ways(w: Workload, seed: int) -> dict[str, Prepared]:
    """What is compared, on the network and data of a seed."""
    return {
        FLOAT32: prepare(w, "mtml", torch.float32, "cpu", seed),
        AUTOCAST: _under_autocast(prepare(w, "mtml", torch.float32, "cpu", seed)),
        BFLOAT16: _rounded(w, "mtml", torch.bfloat16, seed),
        LOOP: _under_autocast(prepare(w, "loop", torch.float32, "cpu", seed)),
    }


def _errors(w: Workload) -> dict[str, float]:
    """Relative errors of the gradient beside float64, medians over seeds: one flipped ReLU decides a single draw."""
    found: dict[str, list[float]] = {name: [] for name in (FLOAT32, AUTOCAST, BFLOAT16, LOOP)}
    for seed in range(SEEDS):
        exact = outcome(prepare(w, "loop", torch.float64, "cpu", seed))
        of_rounded = outcome(_rounded(w, "loop", torch.float64, seed))
        for name, prepared in _ways(w, seed).items():
            truth = of_rounded if name == BFLOAT16 else exact
            found[name].append(Truth(truth, truth, 0.0).judge(outcome(prepared)).error)
    return {name: median(errors) for name, errors in found.items()}


@dataclass(frozen=True)
class Compared:
    """Errors and times of one workload, {way: ..}."""

    workload: str
    errors: dict[str, float]
    times: dict[str, timing.Timing]

    @property
    def ok(self) -> bool:
        """Whether the error under autocast is at most twice the plain loop's."""
        return within(self.errors[AUTOCAST], 2 * self.errors[LOOP])

    def lines(self) -> list[str]:
        """A line a way: time, its ratio to float32's, error."""
        if not self.ok:
            return [
                f"{self.workload}: error {self.errors[AUTOCAST]:.1e}, the loop's {self.errors[LOOP]:.1e}: not timed"
            ]
        base = self.times[FLOAT32].ms
        return [
            f"{self.workload:20s} {name:22s} {t.ms:10.3f} ms  IQR {t.iqr_ms:8.3f}  n={t.n:<4d} "
            f"{t.ms / base:6.2f} x float32  error {self.errors[name]:.1e}"
            for name, t in self.times.items()
        ]


def measure(names: tuple[str, ...], threads: int, seconds: float, say: Callable[[str], None] = print) -> list[Compared]:
    """Compare and time workloads. Raises ValueError for an unknown one before anything is measured."""
    selected = workloads.select(names)
    torch.set_num_threads(threads or torch.get_num_threads())
    found = []
    for w in selected:
        compared = Compared(w.name, _errors(w), {})
        if compared.ok:
            runs = {name: prepared.run for name, prepared in _ways(w, 0).items()}
            compared.times.update(timing.interleave(runs, seconds))
        for line in compared.lines():
            say(line)
        found.append(compared)
    return found
