"""Which of the kernels' losses a user's loss is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mtml_kernels.schema.losses import IGNORED, KINDS, LOSSES, LossSpec

__all__ = ["Loss", "Opaque", "loss_name", "resolve", "unfused_target"]


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A loss that only its callable knows; `reason` says why it is not fused.

    unknown: neither PyTorch's nor a partial of PyTorch's: it may compute what a loss of the table does (`recognise`).
    """

    callable: Callable[..., Tensor]
    reason: str
    unknown: bool = False


Loss = str | LossSpec | Callable[..., Tensor]

_FUNCTIONS: dict[Any, str] = {function: kind for kind in KINDS for function in LOSSES[kind].functions}
_MODULES: dict[type[nn.Module], str] = {module: kind for kind in KINDS for module in LOSSES[kind].modules}
# Options that change the value and are not fused, with the setting under which they change nothing.
_OTHER_OPTIONS = {"weight": None, "pos_weight": None, "ignore_index": IGNORED, "beta": 1.0}


def _fused_options(kind: str) -> set[str]:
    return {"reduction", LOSSES[kind].option} - {""}


def resolve(loss: Loss) -> LossSpec | Opaque:
    """What the kernels make of a user's loss.

    Args:
        loss: a name in KINDS; an `nn.*Loss` instance or `F.*_loss` function (also `functools.partial` of one with
            keyword options); a LossSpec; or any callable `(output, target) -> scalar`.

    Returns:
        A LossSpec where the loss and all its options are fused, otherwise Opaque with the reason.

    Raises:
        ValueError: an unknown name, or reduction="none".
        TypeError: neither a name nor callable.

    Example:
        >>> resolve(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        LossSpec(kind='cross_entropy', reduction='mean', label_smoothing=0.1, delta=1.0)
        >>> resolve(torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))).reason
        'BCEWithLogitsLoss: the option pos_weight is not fused'
    """
    if isinstance(loss, LossSpec):
        return loss
    if isinstance(loss, str):
        return LossSpec(loss)
    if not callable(loss):
        raise TypeError(f"loss: expected a name, an nn loss, an F function or a callable, got {type(loss).__name__}")
    if isinstance(loss, nn.Module):
        return _resolve_module(loss)
    if isinstance(loss, functools.partial):
        return _resolve_function(loss, loss.func, loss.args, loss.keywords)
    return _resolve_function(loss, loss, (), {})


def _resolve_module(loss: nn.Module) -> LossSpec | Opaque:
    name = type(loss).__name__
    kind = _MODULES.get(type(loss))  # exact types only: a subclass may compute anything
    if kind is None:
        return Opaque(loss, f"{name}: this loss is not fused", unknown=True)
    if loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or "forward" in vars(loss):
        return Opaque(loss, f"{name}: it carries hooks or a replaced forward")
    known = _fused_options(kind) | set(_OTHER_OPTIONS)
    return _spec(loss, name, kind, {key: getattr(loss, key) for key in sorted(known) if hasattr(loss, key)})


def _resolve_function(loss: Loss, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> LossSpec | Opaque:
    assert callable(loss)
    name = getattr(function, "__name__", type(function).__name__)
    kind = _FUNCTIONS.get(function) if _hashable(function) else None
    if kind is None:
        return Opaque(loss, f"{name}: this callable is not fused", unknown=True)
    if args:
        return Opaque(loss, f"{name}: positional arguments of a partial are not fused")
    return _spec(loss, name, kind, options)


def loss_name(loss: Any) -> str:
    """What to call a loss: its kind, its own name, or its class's."""
    if isinstance(loss, LossSpec):
        return loss.kind
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _hashable(value: object) -> bool:
    return type(value).__hash__ is not None


def _spec(loss: Callable[..., Tensor], name: str, kind: str, options: dict[str, Any]) -> LossSpec | Opaque:
    """A LossSpec from a recognised loss and its options, or Opaque naming the option in the way."""
    fused = _fused_options(kind)
    for key, value in options.items():
        neutral = key in _OTHER_OPTIONS and (value is None or value == _OTHER_OPTIONS[key])
        if key not in fused and not neutral:
            return Opaque(loss, f"{name}: the option {key} is not fused")
    return LossSpec(kind, **{key: value for key, value in options.items() if key in fused})


def unfused_target(
    spec: LossSpec, output_shape: tuple[int, ...], target: Tensor, sample_shape: tuple[int, ...]
) -> str | None:
    """Why a target cannot go to the kernels, or None.

    Args:
        output_shape: the shape of one sample's output. target: the tensor. sample_shape: the shape of one sample of it.
    """
    if not spec.info.ids:
        if sample_shape != output_shape:
            return f"{spec.kind}: the target's shape {sample_shape} per sample is not the output's {output_shape}"
        return None if target.is_floating_point() else f"{spec.kind}: the target is {target.dtype}, not floating point"
    if len(output_shape) != 1 or sample_shape not in ((), output_shape):
        return f"cross_entropy: one label per sample is fused, got output {output_shape} and target {sample_shape}"
    return None
