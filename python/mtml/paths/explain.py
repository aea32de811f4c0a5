"""How calls run, and why: which path, which kernel, and what becomes of every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from mtml_kernels import native
from mtml_kernels.losses import Recognised, loss_name

__all__ = ["Explanation", "Subject", "loss_names", "with_isa"]

Node = dict[str, Any]


class Subject(NamedTuple):
    """What is explained: the layers, what stands in the way of fusing them, and the learner's losses and mode."""

    reasons: list[str]
    nodes: list[Node]
    loss: str
    query_loss: str
    batch_norm: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """How calls run; printable, and `to_dict()` has the same as plain data.

    Attributes:
        path: "fused", "general", or "head" (of ANIL), "ridge" (of R2D2).
        kernel: the engine's backend, or "vmap" or "loop".
        reason: why, in one line.
        reasons: what stands in the way of fusing; empty where nothing does.
        nodes: one dict per layer or operation.
        trunk: whether the layers before the first adapted one run once or in every step, and why; empty where there
            are none.
        low_rank: how many weights are held as the shared ones plus a low-rank correction a task.
        adapted: names of the adapted tensors.
        steps: of the learner, as the next four.
        first_order: whether inner gradients are constants.
        loss: of the support set.
        query_loss: of the query set.
        batch_norm: how batch normalisation normalises.
        predicted: where a schedule is what runs: how many calls it has, their work, and the time that a model predicts
            for them on a GPU; else empty.
        launch: where a schedule is what runs, or the backend "cuda": the one launch that this backend makes of it
            (kernel, phases, blocks, bytes), or why it cannot; else empty.
        threads: how many threads of those that PyTorch allows a training call uses at most: fewer where it is too short
            to be worth their start. Empty where the engine for CPUs is not what runs.
        calls: those calls, a dict each: where in the inner loop, name, flops, bytes, us (predicted), what bounds it.
    """

    path: str
    kernel: str
    reason: str
    reasons: list[str]
    nodes: list[Node]
    trunk: str
    low_rank: int
    adapted: list[str]
    steps: int
    first_order: bool
    loss: str
    query_loss: str
    batch_norm: str
    predicted: str = ""
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    launch: str = ""
    threads: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dicts."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        order = "first order" if self.first_order else "exact second order"
        losses = self.loss if self.loss == self.query_loss else f"{self.loss} (query: {self.query_loss})"
        lines = [
            f"path: {self.path} ({self.kernel}): {self.reason}",
            f"{self.steps} {'step' if self.steps == 1 else 'steps'}, {order}, loss {losses}, "
            f"adapts {_listed(self.adapted)}",
        ]
        lines += [f"trunk: {self.trunk}"] if self.trunk else []
        lines += [f"schedule: {self.predicted}"] if self.predicted else []
        lines += [f"launch: {self.launch}"] if self.launch else []
        lines += [f"threads: {self.threads}"] if self.threads else []
        lines += [f"  not fused: {reason}" for reason in self.reasons]
        return "\n".join(lines + _table(self.nodes))

    __repr__ = __str__


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _table(nodes: Sequence[Node]) -> list[str]:
    """The nodes as aligned lines: number, operation, shape per sample, module, parameters, fused or not."""
    rows = []
    for node in nodes:
        shape = node.get("shape", "")
        shape = shape if isinstance(shape, str) else " x ".join(map(str, shape))
        fused = "fused" if node.get("fused", True) else "not fused"
        names = " ".join(node.get("params", ()))
        rows.append(
            [str(node.get("node", "")), str(node.get("op", "")), shape, str(node.get("path", "")), names, fused]
        )
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def loss_names(loss: Any, query_loss: Any, known: Sequence[Any] = ()) -> tuple[str, str]:
    """What to call a learner's losses: their own names, or their classes'; those among `known` by what they compute."""
    names = [loss_name(loss), loss_name(loss if query_loss is None else query_loss)]
    for at, found in enumerate(known):
        names[at] = str(found) if isinstance(found, Recognised) else names[at]
    return names[0], names[1]


def with_isa(backend: str) -> str:
    """A backend's name, with the instruction set where the compiled engine is what runs."""
    return f"{backend}, {native.info()['isa']}" if backend.split(":")[0] == "cpu" else backend
