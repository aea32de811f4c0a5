"""Clipping of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mtml.compat.torchopt.base import GradientTransformation, Kernel, Leaves, transformation
from mtml.compat.torchopt.transform.leaves import present, put, scaled, settled
from mtml.compat.torchopt.transform.simple import at_least

__all__ = ["clip_grad_norm"]


@dataclass(frozen=True, eq=False)
class ClipGradNorm(Kernel):
    max_norm: float
    norm_type: float
    error_if_nonfinite: bool

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        if not at:
            return list(grads), state
        given = [grads[i] for i in at]
        norms = [torch.linalg.vector_norm(g.detach(), self.norm_type).to(given[0].device) for g in given]
        total = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
        if self.error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"clip_grad_norm: expected a finite norm, got {total.item()}; error_if_nonfinite=False scales by it"
            )
        factor = (self.max_norm / (total + 1e-6)).clamp(max=1.0)
        return settled(grads, put(grads, at, scaled(given, factor)), inplace), state


def clip_grad_norm(max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> GradientTransformation:
    """Scale all updates together to a norm of at most `max_norm`.

    The factor is a constant to autograd, as in the original; `mtml.inner` has clipping that is differentiated through.

    Args:
        max_norm: the largest norm that passes.
        norm_type: of the p-norm; infinity too.
        error_if_nonfinite: raise where the norm is not finite.

    Raises:
        TypeError, ValueError: a `max_norm` that is no number, or below 0, which would turn the updates round.
    """
    at_least("max_norm", max_norm)
    return transformation(ClipGradNorm(max_norm, float(norm_type), error_if_nonfinite))
