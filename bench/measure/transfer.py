"""``python -m bench transfer``: what a few steps make of models on tasks that none was trained on, over many seeds.

A model meta-trained by `mtml.MultiTaskMAML`, one trained on the same tasks jointly (``steps=0``, on support and query
sets alike), and one that was not trained, take equally many steps on the support sets of new tasks. Every one of them
is given the rate, and the tensors to adapt, that are best on validation tasks: heads alone or all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

import mtml
from bench.workloads.teachers import HEADS, Teachers, make_trunk

__all__ = ["Estimate", "Setting", "Transfer", "measure"]

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
TENSORS = ("head.*", "*")
START = "from scratch"
JOINT, META = "joint training", "MultiTaskMAML"
T_975 = {20: 2.093, 25: 2.064, 30: 2.045}  # Student's, for so many seeds


@dataclass(frozen=True)
class Setting:
    """How long is trained, on how much, and how often."""

    seeds: int = 20
    iterations: int = 600
    tasks: int = 8
    shots: int = 10
    steps: int = 5
    inner_lr: float = 0.3
    outer_lr: float = 2e-3
    test_tasks: int = 50
    own: float = 0.9  # of a task's teacher, as `Teachers` has it


class Estimate(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval."""

    mean: float
    ci95: float

    @staticmethod
    def of(values: list[float]) -> Estimate:
        """By Student's distribution."""
        n = len(values)
        factor = T_975.get(n, 1.96 + 2.4 / max(n - 1, 1))  # within 1 % for 10 seeds and more
        return Estimate(statistics.fmean(values), factor * statistics.stdev(values) / math.sqrt(n))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.ci95:.3f}"


@dataclass(frozen=True)
class Transfer:
    """Query losses after adaptation, {way: {group: one a seed}}."""

    setting: Setting
    losses: dict[str, dict[str, list[float]]]

    def margin(self, way: str, group: str) -> Estimate:
        """By how much the loss of `way` is above that of the meta-trained model, seed by seed."""
        pairs = zip(self.losses[way][group], self.losses[META][group], strict=True)
        return Estimate.of([other - ours for other, ours in pairs])

    @property
    def ok(self) -> bool:
        """Whether the meta-trained model is better than each of the others, in every group, beyond the interval."""
        margins = [self.margin(way, group) for way in (START, JOINT) for group in HEADS]
        return all(margin.mean - margin.ci95 > 0 for margin in margins)

    def lines(self) -> list[str]:
        """The report."""
        s = self.setting
        found = [
            f"query loss on {s.test_tasks} new tasks of each group after {s.steps} steps on {s.shots} samples, "
            f"{s.seeds} seeds, 95 % intervals",
            f"trained for {s.iterations} iterations of {s.tasks} tasks a group; own share of a task {s.own:g}",
            f"{'':<16}" + "".join(f"{group:>18}" for group in HEADS),
        ]
        for way, groups in self.losses.items():
            found.append(f"{way:<16}" + "".join(f"{Estimate.of(values)!s:>18}" for values in groups.values()))
        for way in (START, JOINT):
            margins = [self.margin(way, group) for group in HEADS]
            found.append(f"{'margin over':<16}" + "".join(f"{margin!s:>18}" for margin in margins) + f"  {way}")
        return [*found, "better than both, beyond the intervals: " + ("yes, in every group" if self.ok else "NO")]


def measure(setting: Setting, report: Callable[[str], None]) -> Transfer:
    """All seeds."""
    losses: dict[str, dict[str, list[float]]] = {way: {name: [] for name in HEADS} for way in (START, JOINT, META)}
    for seed in range(setting.seeds):
        found = _one(setting, seed)
        for way, groups in found.items():
            for group, loss in groups.items():
                losses[way][group].append(loss)
        report(f"seed {seed}: " + "; ".join(f"{way} {_short(groups)}" for way, groups in found.items()))
    return Transfer(setting, losses)


def _short(groups: Mapping[str, float]) -> str:
    return " ".join(f"{loss:.3f}" for loss in groups.values())


def _one(s: Setting, seed: int) -> dict[str, dict[str, float]]:
    """{way: {group: loss}} of one seed."""
    teachers = Teachers(seed, s.own)
    stream = [teachers.batches(s.tasks, s.shots, s.shots) for _ in range(s.iterations)]  # the same for both
    validation, test = (teachers.batches(s.test_tasks, s.shots, 50) for _ in range(2))
    models = {START: _made(s, seed, 1), JOINT: _made(s, seed, 0), META: _made(s, seed, s.steps)}
    for way in (JOINT, META):
        _train(models[way], stream, s)
    return {way: _judged(model, validation, test, s.steps) for way, model in models.items()}


def _made(s: Setting, seed: int, steps: int) -> mtml.MultiTaskMAML:
    torch.manual_seed(seed)
    return mtml.MultiTaskMAML(make_trunk(), HEADS, s.inner_lr, steps=steps)


def _train(model: mtml.MultiTaskMAML, stream: list[dict[str, mtml.TaskBatch]], s: Setting) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=s.outer_lr, fused=True)
    for batches in stream:
        if not model.steps:  # without an inner loop, all samples are there to learn from
            batches = {name: _all_samples(batch) for name, batch in batches.items()}
        optimizer.zero_grad()
        model.meta_loss(batches).total.backward()
        optimizer.step()


def _all_samples(batch: mtml.TaskBatch) -> mtml.TaskBatch:
    return batch._replace(qx=torch.cat([batch.sx, batch.qx], 1), qy=torch.cat([batch.sy, batch.qy], 1))


@torch.no_grad()
def _judged(
    model: mtml.MultiTaskMAML,
    validation: Mapping[str, mtml.TaskBatch],
    test: Mapping[str, mtml.TaskBatch],
    steps: int,
) -> dict[str, float]:
    """The loss on new tasks, by the rate and the tensors that are best on validation tasks."""
    found = {}
    models = {params: _adapting(model, params) for params in TENSORS}

    def loss(name: str, choice: tuple[str, float], batch: mtml.TaskBatch) -> float:
        adapted = models[choice[0]].transfer(name, None, batch.sx, batch.sy, steps, lr=choice[1])
        value = float(adapted.loss(batch).mean())
        return value if math.isfinite(value) else math.inf

    for name in HEADS:
        choices = [(params, rate) for params in TENSORS for rate in RATES]
        best = min(choices, key=lambda choice, n=name: loss(n, choice, validation[n]))  # type: ignore[misc]
        found[name] = loss(name, best, test[name])
    return found


def _adapting(model: mtml.MultiTaskMAML, params: str) -> mtml.MultiTaskMAML:
    """The same weights, of which the inner loop adapts those that `params` names."""
    twin = mtml.MultiTaskMAML(make_trunk(), HEADS, 0.1, params=params)
    twin.load_state_dict(model.state_dict())
    return twin
