"""The loss of one task: what every engine's is held against, and, with any loss and any mask, the general path's.

The loss of a task weighs its samples: sum(w l) / sum(w), and 0 where all weights are 0; without a mask every w is 1.
Plain PyTorch operations only, so that it is differentiable at will.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtml_kernels.checks import widened
from mtml_kernels.losses.recognise import Opaque
from mtml_kernels.schema.losses import IGNORED, LossSpec

__all__ = ["TaskLoss", "elements_of", "per_sample", "refuse_several", "takes", "task_loss", "weigh"]


def per_sample(spec: LossSpec, output: Tensor, target: Tensor) -> Tensor:
    """The loss of every sample, the mean over the elements of the sample.

    Args:
        output: [N, *out]; [N, C] logits for cross_entropy.
        target: exactly output's shape; class ids [N] (integers) for cross_entropy, or probabilities [N, C].

    Returns:
        [N], differentiable any number of times.

    Example:
        >>> per_sample(LossSpec("mse"), torch.zeros(2, 3), torch.ones(2, 3))
        tensor([1., 1.])
    """
    losses = spec.info.formula(output, target, spec.p0)
    return losses if spec.info.classes else losses.reshape(output.shape[0], elements_of(output)).mean(-1)


def elements_of(output: Tensor) -> int:
    """How many elements one sample of [N, *out] has."""
    return math.prod(output.shape[1:])


def task_loss(spec: LossSpec, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loss of one task: sum_n w_n l_n / sum_n w_n (0 where all weights are 0), or the weighted sum of all elements.

    Args:
        output: [N, *out]; target: as in `per_sample`, or class id -100 (ignored); mask: weights [N] or None for ones.

    Returns:
        A scalar.
    """
    counts = None
    if not target.is_floating_point():  # an ignored label counts as a sample that is masked out
        counts = target != IGNORED
        target = target.where(counts, torch.zeros_like(target))
    losses = per_sample(spec, output, target)  # [N]
    weights = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    weights = weights if counts is None else weights * counts
    weighted = (weights * losses).sum()
    if spec.reduction == "sum":
        return weighted * (elements_of(output) if not spec.info.classes else 1)
    total = weights.sum()
    empty = total == 0
    return torch.where(empty, torch.zeros_like(weighted), weighted / torch.where(empty, torch.ones_like(total), total))


def weigh(per_sample: Tensor, mask: Tensor | None) -> Tensor:
    """Weighted mean of losses [N, ...]; further dimensions are averaged first, so that they count alike."""
    if mask is None:
        return per_sample.mean()
    per_sample = per_sample.flatten(1).mean(1) if per_sample.ndim > 1 else per_sample
    weights = mask.to(per_sample.dtype)
    total = weights.sum()
    return (weights * per_sample).sum() / torch.where(total == 0, torch.ones_like(total), total)


def _reduced(spec: LossSpec) -> Callable[..., Tensor]:
    """The F function of a known loss with its option bound; takes (output, target, reduction=...)."""
    function = spec.info.reduced or spec.info.functions[0]
    return functools.partial(function, **({spec.info.option: spec.p0} if spec.info.option else {}))


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
        self.callable: Callable[..., Any] = _reduced(resolved) if isinstance(resolved, LossSpec) else resolved.callable
        self.alone = self.spec is None and takes(self.callable, 1)  # it can do without a target
        self.with_target = self.spec is not None or not self.alone or takes(self.callable, 2)

    def __call__(self, output: Any, target: Any = None, mask: Tensor | None = None) -> Tensor:
        if self.spec is None:
            return self._opaque(output, target, mask)
        refuse_several("loss", self.spec.kind, output)
        if not self.spec.info.ids:  # not every loss promotes by itself, as mse does
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
