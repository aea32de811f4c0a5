"""`mtml.compat` beside the originals: one provider function runs on either package.

A provider is a module ``bench/compat_<library>.py`` with

- ``step(package, model, tasks, lr, steps) -> forward``: the meta-step of a script for the library, of which `package`
  is the original or ours; ``forward()`` gives the mean query loss over tasks (sx, sy, qx, qy), each [T, N, ...], from
  which a backward reaches the model's parameters;
- ``engine(package, model, tasks, lr, steps)``: the same by ours's one line for the batched engine;
- ``original(path) -> package``, where the source tree cannot simply be put on ``sys.path``.

Beside them runs the same loop over tasks without any library: what no library that is called task by task can beat.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.gate import within, worst
from bench.measure.timing import Timing, interleave
from bench.workloads import WORKLOADS, make_data, make_network

__all__ = ["ENGINE", "FLOOR", "ORIGINAL", "OURS", "Comparison", "error_of", "floor", "libraries", "measure"]

ORIGINAL, OURS, FLOOR, ENGINE = "original", "mtml.compat", "no library", "batched engine"
TOLERANCE = 1e-9  # of losses and gradients in float64
HERE = Path(__file__).resolve().parent


def libraries() -> list[str]:
    """Those that have a provider."""
    return sorted(path.stem.removeprefix("compat_") for path in HERE.glob("compat_*.py"))


@dataclass(frozen=True)
class Comparison:
    """Of one library: times by the ways' names, and the largest relative difference of a gradient in float64."""

    library: str
    times: dict[str, Timing]
    error: float
    steps: int

    @property
    def ok(self) -> bool:
        return within(self.error, TOLERANCE)

    def lines(self) -> Iterator[str]:
        """For people."""
        match = "match" if self.ok else "THEY DIFFER"
        yield f"{self.library}: sinusoid, 25 tasks, {self.steps} steps; gradients within {self.error:.1e}, {match}"
        base = self.times.get(ORIGINAL, self.times[OURS])
        for name, time_ in self.times.items():
            yield (
                f"  {name:15} {time_.ms:8.2f} ms (best {time_.best_ms:.2f}), {base.ms / time_.ms:5.2f}x as fast "
                f"(best {base.best_ms / time_.best_ms:.2f}x), {time_.n} rounds"
            )
        if ORIGINAL not in self.times:
            yield f"  {self.library} itself is not installed: name its source tree by --original PATH"


def measure(library: str, original: str | None, seconds: float, steps: int) -> Comparison:
    """Compare gradients, then time the ways in turn on one thread.

    Raises:
        ValueError: no such provider, fewer than one step, or a path that is no folder.
    """
    if library not in libraries():
        raise ValueError(f"library: expected one of {', '.join(libraries())}, got {library!r}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    provider = importlib.import_module(f"bench.compat_{library}")
    package = _original(library, provider, original)
    ours = importlib.import_module(f"mtml.compat.{library}")
    ways: dict[str, tuple[Any, Any]] = {} if package is None else {ORIGINAL: (provider.step, package)}
    ways |= {OURS: (provider.step, ours), FLOOR: (floor, None), ENGINE: (provider.engine, ours)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        error = error_of(ways, steps)
        runs = {name: _run(*way, torch.float32, steps)[0] for name, way in ways.items()}
        return Comparison(library, interleave(runs, seconds, clock=time.thread_time), error, steps)
    finally:
        torch.set_num_threads(threads)


def floor(package: None, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The loop over tasks on a perceptron's tensors alone, in the fewest operations that autograd knows for it."""

    def output(params: list[Tensor], x: Tensor) -> Tensor:
        for i in range(0, len(params), 2):
            x = F.linear(x if i == 0 else F.relu(x), params[i], params[i + 1])
        return x

    def forward() -> Tensor:
        losses = []
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            params = [p.clone() for p in model.parameters()]
            for _ in range(steps):
                grads = torch.autograd.grad(F.mse_loss(output(params, sx), sy), params, create_graph=True)
                params = [torch.add(p, g, alpha=-lr) for p, g in zip(params, grads, strict=True)]
            losses.append(F.mse_loss(output(params, qx), qy))
        return torch.stack(losses).mean()

    return forward


def _original(library: str, provider: Any, path: str | None) -> Any:
    """The original package; None where it is not to be had."""
    if path is None:
        return importlib.import_module(library) if importlib.util.find_spec(library) else None
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise ValueError(f"original: expected a folder with {library}'s source, got {path!r}")
    if hasattr(provider, "original"):
        return provider.original(folder)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(library)
    finally:
        sys.path.remove(str(folder))


def _run(
    build: Callable[..., Callable[[], Tensor]], package: Any, dtype: torch.dtype, steps: int
) -> tuple[Callable[[], Tensor], nn.Module]:
    """One meta-step, backward included, and the model that it trains: equal ones for all."""
    w = WORKLOADS["sinusoid"]
    model = copy.deepcopy(make_network(w, dtype))
    forward = build(package, model, tuple(make_data(w, dtype)), w.lr, steps)

    def run() -> Tensor:
        model.zero_grad()
        loss = forward()
        loss.backward()
        return loss

    return run, model


def error_of(ways: dict[str, tuple[Any, Any]], steps: int) -> float:
    """The largest difference of a way's loss or gradients from the first's, relative to the first's."""
    found = []
    for build, package in ways.values():
        run, model = _run(build, package, torch.float64, steps)
        loss = run()
        found.append([loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())])
    first = found[0]
    return worst(float((a - b).norm() / a.norm()) for other in found[1:] for a, b in zip(first, other, strict=True))
