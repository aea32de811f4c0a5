"""A user's callable as a loss of the table, where it computes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtml_kernels.losses.matching import match
from mtml_kernels.losses.recognise import Opaque, loss_name
from mtml_kernels.schema.losses import LossSpec

__all__ = ["Recognised", "in_words", "recognise"]


def in_words(spec: LossSpec) -> str:
    """The kind, and what differs from its default.

    Example:
        >>> in_words(LossSpec("huber", "sum", delta=0.5))
        'huber(delta=0.5, sum)'
    """
    option = spec.info.option
    parts = [f"{option}={spec.p0:g}"] if option and spec.p0 != getattr(LossSpec(spec.kind), option) else []
    parts += ["sum"] if spec.reduction == "sum" else []
    return spec.kind + (f"({', '.join(parts)})" if parts else "")


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A callable that computes a loss of the table at the sizes of some calls."""

    spec: LossSpec
    callable: Callable[..., Tensor]

    def __str__(self) -> str:
        return f"{in_words(self.spec)} (recognised: {loss_name(self.callable)})"


def recognise(
    loss: Opaque, shape: Sequence[int], target: Tensor, dtype: torch.dtype, masked: bool
) -> Recognised | Opaque:
    """What a callable that `live_because` finds nothing against computes at these sizes.

    Args:
        shape: of one task's output, [N, *out]. target: one task's. dtype: the model's. masked: samples are weighed.

    Returns:
        Recognised, or Opaque with what stands in the way.

    Example:
        >>> loss = resolve(lambda output, target: ((output - target) ** 2).mean())
        >>> print(recognise(loss, (8, 1), torch.zeros(8, 1), torch.float32, masked=False))
        mse (recognised: <lambda>)
    """
    found = match(loss.callable, shape, target, dtype)
    if isinstance(found, str):
        why = found
    elif found.scale != 1.0:
        why = f"it computes {found.scale:g} x {in_words(found.spec)}, and a factor is not fused"
    elif masked and not found.weighs:
        why = "it returns a scalar, so that its samples cannot be weighed"
    else:
        return Recognised(found.spec, loss.callable)
    return dataclasses.replace(loss, reason=f"{loss.reason}: {why}")
