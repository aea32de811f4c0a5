"""How the calls of a mapped function run, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

from mtml.paths.explain import Explanation

__all__ = ["TaskMapExplanation"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskMapExplanation:
    """How calls run; printable, and `to_dict()` has the same as plain data.

    Attributes:
        way: "fused", "vmap" or "loop".
        reason: why, in one line.
        recognised: the inner loop that the function is, where it is fused; else empty.
        not_fused: what stands in the way of fusing; empty where nothing does, or where it was not looked for.
        not_vmap: the same of torch.func.vmap.
        engine: how `mtml.MAML` runs it, where it is fused.
    """

    way: str
    reason: str
    recognised: str = ""
    not_fused: str = ""
    not_vmap: str = ""
    engine: Explanation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dicts."""
        return {**vars(self), "engine": None if self.engine is None else self.engine.to_dict()}

    def __str__(self) -> str:
        lines = [f"way: {self.way}: {self.reason}"]
        lines += [f"  recognised: {self.recognised}"] if self.recognised else []
        lines += [f"  not fused: {self.not_fused}"] if self.not_fused else []
        lines += [f"  not vmap: {self.not_vmap}"] if self.not_vmap else []
        lines += [f"  {line}" for line in str(self.engine).splitlines()] if self.engine is not None else []
        return "\n".join(lines)

    __repr__ = __str__
