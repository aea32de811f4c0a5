"""Gradients and Hessians of tasks' support losses at one point, read off one gradient step (`mtml_kernels.hvp`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mtml.adapted import Adapted
from mtml_kernels.functional.hvp import long_rate, products
from mtml_kernels.precision import autocast_dtype, cast, plainly

__all__ = ["Point", "long_rate"]


class Step(Protocol):
    """A learner whose rate is `long_rate`."""

    def adapt_tasks(
        self, sx: Any, sy: Any, *, steps: int, support_mask: Tensor | None, start: Mapping[str, Tensor]
    ) -> Adapted:
        """One gradient step from `start`."""


class Point:
    """The support losses of T tasks around one point.

    Args:
        step: takes the step.
        data: sx, sy, support_mask.
        start: the point, {name: [T, *shape]} of every adapted tensor.

    Attributes:
        losses: [T], at the point.
    """

    def __init__(self, step: Step, data: tuple[Any, Any, Tensor | None], start: Mapping[str, Tensor]) -> None:
        sx, sy, mask = data
        self.start = dict(start)
        like = next(iter(self.start.values()))
        if autocast_dtype(like.device.type) is torch.float16:  # whose range cotangents times such a rate leave
            sx, sy = cast((sx, sy), like.dtype)
            with plainly(like):
                adapted = step.adapt_tasks(sx, sy, steps=1, support_mask=mask, start=self.start)
        else:
            adapted = step.adapt_tasks(sx, sy, steps=1, support_mask=mask, start=self.start)
        self.after, self.losses = adapted.params, adapted.support_losses[0]

    def gradient(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}: theta' = theta - alpha g, where theta vanishes beside alpha g."""
        return {name: (t - self.after[name]) / long_rate(t.dtype) for name, t in self.start.items()}

    def hvp(self, vectors: Mapping[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
        """H v by the tensors that `vectors` names. The point must require grad, and have been made with grad enabled.

        Raises ValueError or TypeError for vectors unlike the point.
        """
        return products(self.start, self.after, vectors, create_graph)
