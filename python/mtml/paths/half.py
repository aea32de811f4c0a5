"""Results in half precision of a fused path, which computed them in float32.

What a plain loop in half precision rounds at every step is rounded once here. Copies on the way in are made by the
paths themselves (`Fused.float32`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtml.paths.as_written import AsWritten
from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject
from mtml.paths.fused import Fused
from mtml.paths.path import Outcome
from mtml.paths.trunk import TrunkOnce
from mtml_kernels.checks import Sizes

__all__ = ["Narrowed"]


class Narrowed:
    """A fused path in float32 for calls with tensors in half precision.

    result: dtype of losses and outputs: the model's, under autocast float32. kinds: {name: dtype} of the model's
    tensors, which adapted ones have too, and the update rule's moments.
    """

    kind = "fused"

    def __init__(
        self, path: Fused | TrunkOnce | AsWritten, result: torch.dtype, kinds: Mapping[str, torch.dtype]
    ) -> None:
        self.path, self.result, self.kinds = path, result, dict(kinds)

    @property
    def notice(self) -> tuple[str, str] | None:
        """That of the path."""
        return self.path.notice

    @notice.setter
    def notice(self, given: tuple[str, str] | None) -> None:
        self.path.notice = given

    def __call__(self, batch: Batch) -> Outcome:
        found = self.path(batch)
        dtype = self.result
        adapted = {name: t.to(self.kinds[name]) for name, t in found.adapted.items()}
        moments = found.moments and {
            moment: {name: t.to(self.kinds[name]) for name, t in planes.items()}
            for moment, planes in found.moments.items()
        }
        output = found.output.to(dtype) if isinstance(found.output, Tensor) else found.output
        return Outcome(found.loss.to(dtype), output, found.support_losses.to(dtype), adapted, moments)

    def shaped(self, output: Any) -> Any:
        """The outcome's output [T, Q, ...] in the shape that the model gives it."""
        return self.path.shaped(output)

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        return self.path.explain(subject, sizes)
