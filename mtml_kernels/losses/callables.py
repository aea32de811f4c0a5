"""A user's callable as a loss of the table, where it computes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mtml_kernels.losses.matching import Sizes, match
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
    """A callable that computes `scale` times a loss of the table at the sizes of some calls.

    passes_over: id -100 counts for nothing, as in the kernels; if not, it is for the callable to say what negative ids
    are. flat: its targets are the kernels' in another shape.
    """

    spec: LossSpec
    callable: Callable[..., Any]
    scale: float = 1.0
    passes_over: bool = True
    flat: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the loss of the table to the letter."""
        return self.scale == 1.0 and self.passes_over and not self.flat

    def __str__(self) -> str:
        factor = "" if self.scale == 1.0 else f"{self.scale:g} x "
        return f"{factor}{in_words(self.spec)} (recognised: {loss_name(self.callable)})"


def recognise(loss: Opaque, sizes: Sizes, masked: bool, factors: bool = True) -> Recognised | Opaque:
    """What a callable that `live_because` finds nothing against computes at these sizes.

    Args:
        masked: samples are weighed. factors: whether the caller can multiply.

    Returns:
        Recognised, or Opaque with what stands in the way.

    Example:
        >>> loss = resolve(lambda output, target: 0.5 * ((output - target) ** 2).mean())
        >>> print(recognise(loss, Sizes((8, 1), (8, 1), torch.float32, torch.float32), masked=False))
        0.5 x mse (recognised: <lambda>)
    """
    found = match(loss.callable, sizes)
    if isinstance(found, str):
        return dataclasses.replace(loss, reason=f"{loss.reason}: {found}")
    if found.scale != 1.0 and not (factors and found.scale > 0.0):
        what = f"it computes {found.scale:g} x {in_words(found.spec)}"
        return dataclasses.replace(loss, reason=f"{loss.reason}: {what}, which is fused without the factor")
    if masked and not found.weighs:
        why = "it returns a scalar, so that its samples cannot be weighed"
        return dataclasses.replace(loss, reason=f"{loss.reason}: {why}")
    return Recognised(found.spec, loss.callable, found.scale, found.passes_over, found.flat)
