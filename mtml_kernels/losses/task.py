"""Task losses of the general path: any loss, any mask, plain PyTorch operations only (so it is differentiable at will).

The loss of a task weighs its samples: sum(w l) / sum(w), and 0 where all weights are 0; without a mask every w is 1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.checks import widened
from mtml_kernels.losses import IGNORED, LossSpec, Opaque, huber
from mtml_kernels.transforms import is_forward_mode

__all__ = ["TaskLoss", "refuse_several", "takes", "weigh"]


def weigh(per_sample: Tensor, mask: Tensor | None) -> Tensor:
    """Weighted mean of losses [N, ...]; further dimensions are averaged first, so that they count alike."""
    if mask is None:
        return per_sample.mean()
    per_sample = per_sample.flatten(1).mean(1) if per_sample.ndim > 1 else per_sample
    weights = mask.to(per_sample.dtype)
    total = weights.sum()
    return (weights * per_sample).sum() / torch.where(total == 0, torch.ones_like(total), total)


def _huber(output: Tensor, target: Tensor, reduction: str, delta: float) -> Tensor:
    if not is_forward_mode():  # PyTorch's backward has no rule for it
        return F.huber_loss(output, target, reduction=reduction, delta=delta)
    each = huber(output, target, delta)
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()


def _elementwise(spec: LossSpec) -> Callable[..., Tensor]:
    """The F function of a known loss with its options bound; takes (output, target, reduction=...)."""
    if spec.kind == "cross_entropy":
        smoothing = spec.label_smoothing
        return lambda o, t, reduction: F.cross_entropy(o, t, reduction=reduction, label_smoothing=smoothing)
    if spec.kind == "huber":
        return functools.partial(_huber, delta=spec.delta)
    plain: dict[str, Callable[..., Tensor]] = {
        "mse": F.mse_loss,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
        "l1": F.l1_loss,
    }
    return plain[spec.kind]


def takes(loss: Any, arguments: int) -> bool:
    """Whether a loss can be called with so many arguments: 1 for the output alone, 2 with the target."""
    if not callable(loss):  # a name
        return arguments == 2
    try:
        inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # a builtin does not tell, and so is asked
        pass
    return True


def refuse_several(name: str, kind: str, output: Any) -> None:
    """Raise TypeError where a loss known by its name gets something else than one tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name}: expected the model to return one tensor for {kind!r}, got a {type(output).__name__}; pass a "
            "callable that picks what it needs, such as lambda output, target: F.mse_loss(output[0], target)"
        )


class TaskLoss:
    """The loss of one task: ``loss(output [N, ...], target [N, ...] | None, mask [N] | None) -> scalar``.

    A callable gets (output, target), or the output alone where there is no target or it takes no more, and returns a
    scalar, or losses [N, ...] per sample, which are then averaged; only the latter can be weighed by a mask.

    Raises:
        ValueError: a mask meets a callable that returned a scalar, or something that is no tensor of losses.
        TypeError: a loss known by its name, and an output that is no tensor.
    """

    def __init__(self, resolved: LossSpec | Opaque) -> None:
        self.spec = resolved if isinstance(resolved, LossSpec) else None
        self.callable: Callable[..., Any] = (
            _elementwise(resolved) if isinstance(resolved, LossSpec) else resolved.callable
        )
        self.alone = self.spec is None and takes(self.callable, 1)  # it can do without a target
        self.with_target = self.spec is not None or not self.alone or takes(self.callable, 2)

    def __call__(self, output: Any, target: Any = None, mask: Tensor | None = None) -> Tensor:
        if self.spec is None:
            return self._opaque(output, target, mask)
        refuse_several("loss", self.spec.kind, output)
        if self.spec.kind != "cross_entropy":  # not every loss promotes by itself, as mse does
            common = torch.promote_types(output.dtype, target.dtype)
            output, target = output.to(common), target.to(common)
        elif not target.is_floating_point():
            target = widened(target)
            counts = target != IGNORED
            if mask is None and self.spec.reduction == "mean":
                # as F.cross_entropy's mean, but 0 instead of NaN where nothing counts
                return self.callable(output, target, reduction="sum") / counts.sum().clamp(min=1)
            if mask is not None:
                each = counts.flatten(1).any(1) if counts.ndim > 1 else counts
                mask = mask * each
        if mask is None:
            return self.callable(output, target, reduction=self.spec.reduction)
        losses = self.callable(output, target, reduction="none")
        if self.spec.reduction == "sum":
            losses = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
            return (losses * mask.to(losses.dtype)).sum()
        return weigh(losses, mask)

    def _opaque(self, output: Any, target: Any, mask: Tensor | None) -> Tensor:
        value = self.callable(output, target) if self.with_target and target is not None else self.callable(output)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss: expected the callable to return a tensor, got {type(value).__name__}")
        if value.ndim == 0:
            if mask is not None:
                raise ValueError(
                    "support_mask/query_mask: the loss callable returned a scalar, so its samples cannot be weighed; "
                    "let it return one loss per sample [N] (reduction='none')"
                )
            return value
        if mask is not None and value.shape[0] != mask.shape[0]:
            raise ValueError(
                f"loss: expected one loss per sample [N] = [{mask.shape[0]}], got {list(value.shape)} from the callable"
            )
        return weigh(value, mask)
