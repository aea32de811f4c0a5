"""How calls of a MAML run, and why: which path, which kernel, and what becomes of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtml.paths.fused import Fused, General
from mtml.paths.trunk import TrunkOnce
from mtml_kernels.checks import Sizes

if TYPE_CHECKING:
    from mtml.algorithms.maml import MAML

__all__ = ["Explanation", "explain_path"]


class Explanation:
    """Printable; `to_dict()` has the same as plain data.

    Keys: "path" ("fused" or "general"), "kernel" (the engine's backend, or "vmap" or "loop"), "reason" (one line),
    "reasons" (what stands in the way of fusing; empty where nothing does), "nodes" (one dict per layer or operation),
    "trunk" (whether the layers before the first adapted one run once or in every step, and why; empty where there are
    none), "low_rank" (how many weights are held as the shared ones plus a low-rank correction a task), "adapted"
    (names), "steps", "first_order", "loss", "query_loss", "batch_norm".
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dicts."""
        return dict(self._content)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_content"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __str__(self) -> str:
        c = self._content
        order = "first order" if c["first_order"] else "exact second order"
        losses = c["loss"] if c["loss"] == c["query_loss"] else f"{c['loss']} (query: {c['query_loss']})"
        lines = [
            f"path: {c['path']} ({c['kernel']}): {c['reason']}",
            f"{c['steps']} {'step' if c['steps'] == 1 else 'steps'}, {order}, loss {losses}, "
            f"adapts {_listed(c['adapted'])}",
        ]
        lines += [f"trunk: {c['trunk']}"] if c["trunk"] else []
        lines += [f"  not fused: {reason}" for reason in c["reasons"]]
        return "\n".join(lines + _table(c["nodes"]))

    __repr__ = __str__


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _table(nodes: Sequence[dict[str, Any]]) -> list[str]:
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


def _loss_name(loss: Any) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _isa(backend: str) -> str | None:
    """The instruction set of the compiled engine, where that is what runs."""
    if backend.split(":")[0] != "cpu":
        return None
    from mtml_kernels import native

    return str(native.info()["isa"])


def _general_trunk(path: General, maml: MAML) -> str:
    """What the general path, which knows no order of layers but that of their names, says of those not adapted."""
    if next((name for name, _ in maml.module.named_parameters()), "") in ("", *path.rule.adapted):
        return ""
    return "it runs in every step: the general path does not look into models; mtml.ANIL runs any trunk once"


def explain_path(
    path: Fused | TrunkOnce | General,
    reasons: Sequence[str],
    nodes: Sequence[dict[str, Any]],
    maml: MAML,
    sizes: Sizes,
) -> Explanation:
    """The explanation of a prepared path; `reasons` and `nodes` are what tracing the model gave."""
    if isinstance(path, General):
        kernel, trunk, low_rank = path.plan.mode, _general_trunk(path, maml), 0
        adapted, steps, first_order = list(path.rule.adapted), path.rule.steps, path.rule.first_order
        reasons = list(reasons) or ["backend: 'general' was asked for"]
        why = f"{'; '.join(reasons)}; {path.plan.reason}"
    else:
        isa = _isa(path.backend)
        low_rank = path.low_rank(sizes)
        kernel, why = path.backend, f"every layer is fused, {path.spec.steps} steps in one call{path.how}"
        if low_rank:
            why += f"; {low_rank} weight{'' if low_rank == 1 else 's'} as shared values plus low-rank corrections"
        kernel += f", {isa}" if isa else ""
        adapted, steps, first_order = path.order, path.spec.steps, path.spec.first_order
        reasons, trunk = [], path.trunk
    query_loss = maml.loss if maml.query_loss is None else maml.query_loss
    return Explanation(
        {
            "path": path.kind,
            "kernel": kernel,
            "reason": why,
            "reasons": list(reasons),
            "nodes": [dict(node) for node in nodes],
            "trunk": trunk,
            "low_rank": low_rank,
            "adapted": list(adapted),
            "steps": steps,
            "first_order": first_order,
            "loss": _loss_name(maml.loss),
            "query_loss": _loss_name(query_loss),
            "batch_norm": maml.batch_norm,
        }
    )
