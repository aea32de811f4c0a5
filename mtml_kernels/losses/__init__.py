"""Loss specifications: which losses the kernels know, with which options, and what they mean for one task."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.transforms import is_forward_mode

KINDS = ("mse", "cross_entropy", "bce_with_logits", "huber", "l1")
REDUCTIONS = ("mean", "sum")
IGNORED = -100  # the class id that F.cross_entropy passes over by default
ELEMENTWISE = frozenset(KINDS) - {"cross_entropy"}


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """A loss that the kernels compute: its kind and options, as in the torch function of that name.

    Raises ValueError for an unknown kind or reduction or an option outside its range.

    Example:
        >>> LossSpec("cross_entropy", label_smoothing=0.1).encode()
        (1, 0, 0.1)
    """

    kind: str
    reduction: str = "mean"
    label_smoothing: float = 0.0
    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"loss: expected one of {', '.join(KINDS)}, got {self.kind!r}; or pass any callable")
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"loss: expected reduction 'mean' or 'sum', got {self.reduction!r}; "
                "an inner loop needs one number per task"
            )
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"loss: expected label_smoothing between 0 and 1, got {self.label_smoothing}")
        if not self.delta > 0.0:
            raise ValueError(f"loss: expected delta above 0, got {self.delta}")

    def encode(self) -> tuple[int, int, float]:
        """(kind, reduction, p0): codes are positions in KINDS and REDUCTIONS, p0 is label_smoothing or delta."""
        p0 = {"cross_entropy": self.label_smoothing, "huber": self.delta}.get(self.kind, 0.0)
        return KINDS.index(self.kind), REDUCTIONS.index(self.reduction), p0

    @staticmethod
    def decode(kind: int, reduction: int, p0: float) -> LossSpec:
        """The inverse of `encode`."""
        option = {"cross_entropy": "label_smoothing", "huber": "delta"}.get(KINDS[kind])
        return LossSpec(KINDS[kind], REDUCTIONS[reduction], **({option: p0} if option else {}))


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A loss that only its callable knows; `reason` says why it is not fused."""

    callable: Callable[..., Tensor]
    reason: str


Loss = str | LossSpec | Callable[..., Tensor]

_FUNCTIONS: dict[Any, str] = {
    F.mse_loss: "mse",
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "bce_with_logits",
    F.huber_loss: "huber",
    F.smooth_l1_loss: "huber",  # with its default beta = 1 it is the Huber loss with delta = 1
    F.l1_loss: "l1",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.MSELoss: "mse",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "bce_with_logits",
    nn.HuberLoss: "huber",
    nn.SmoothL1Loss: "huber",
    nn.L1Loss: "l1",
}
_FUSED_OPTIONS = {
    "mse": {"reduction"},
    "cross_entropy": {"reduction", "label_smoothing"},
    "bce_with_logits": {"reduction"},
    "huber": {"reduction", "delta"},
    "l1": {"reduction"},
}
# Options that change the value and are not fused, with the setting under which they change nothing.
_OTHER_OPTIONS = {"weight": None, "pos_weight": None, "ignore_index": -100, "beta": 1.0}


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
        return Opaque(loss, f"{name}: this loss is not fused")
    if loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or "forward" in vars(loss):
        return Opaque(loss, f"{name}: it carries hooks or a replaced forward")
    known = _FUSED_OPTIONS[kind] | set(_OTHER_OPTIONS)
    return _spec(loss, name, kind, {key: getattr(loss, key) for key in sorted(known) if hasattr(loss, key)})


def _resolve_function(loss: Loss, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> LossSpec | Opaque:
    assert callable(loss)
    name = getattr(function, "__name__", type(function).__name__)
    kind = _FUNCTIONS.get(function) if _hashable(function) else None
    if kind is None:
        return Opaque(loss, f"{name}: this callable is not fused")
    if args:
        return Opaque(loss, f"{name}: positional arguments of a partial are not fused")
    return _spec(loss, name, kind, options)


def _hashable(value: object) -> bool:
    return type(value).__hash__ is not None


def _spec(loss: Callable[..., Tensor], name: str, kind: str, options: dict[str, Any]) -> LossSpec | Opaque:
    """A LossSpec from a recognised loss and its options, or Opaque naming the option in the way."""
    fused = _FUSED_OPTIONS[kind]
    for key, value in options.items():
        neutral = key in _OTHER_OPTIONS and (value is None or value == _OTHER_OPTIONS[key])
        if key not in fused and not neutral:
            return Opaque(loss, f"{name}: the option {key} is not fused")
    return LossSpec(kind, **{key: value for key, value in options.items() if key in fused})


def per_sample(spec: LossSpec, output: Tensor, target: Tensor) -> Tensor:
    """The loss of every sample, the mean over the elements of the sample.

    Args:
        output: [N, *out]; [N, C] logits for cross_entropy.
        target: exactly output's shape; class ids [N] (integers) for cross_entropy.

    Returns:
        [N], differentiable any number of times.

    Example:
        >>> per_sample(LossSpec("mse"), torch.zeros(2, 3), torch.ones(2, 3))
        tensor([1., 1.])
    """
    if spec.kind == "cross_entropy":
        log_p = log_softmax(output)  # [N, C]
        nll = -log_p.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
        return (1.0 - spec.label_smoothing) * nll - spec.label_smoothing * log_p.mean(-1)
    n = output.shape[0]
    return _elements(spec, output, target).reshape(n, elements_of(output)).mean(-1)


def _elements(spec: LossSpec, output: Tensor, target: Tensor) -> Tensor:
    if spec.kind == "mse":
        return (output - target).square()
    if spec.kind == "l1":
        return (output - target).abs()
    if spec.kind == "huber":
        return huber(output, target, spec.delta)
    return F.binary_cross_entropy_with_logits(output, target, reduction="none")


def log_softmax(z: Tensor) -> Tensor:
    """F.log_softmax over the last dimension.

    PyTorch's forward-mode rule for it writes over what autograd kept, so that no gradient of a tangent can be had.
    """
    if not is_forward_mode() or z.shape[-1] == 0:
        return F.log_softmax(z, -1)
    lower = z - z.detach().amax(-1, keepdim=True)
    return lower - lower.exp().sum(-1, keepdim=True).log()


def huber(output: Tensor, target: Tensor, delta: float) -> Tensor:
    """F.huber_loss of every element.

    PyTorch's backward of it has no rule for forward mode, and its batching rule fails under vmap of vmap: there it is
    made of operations that every transform differentiates.
    """
    if not is_forward_mode() and not torch._C._are_functorch_transforms_active():
        return F.huber_loss(output, target, reduction="none", delta=delta)
    apart = output - target
    size = apart.abs()
    inside = ~(size >= delta)  # NaN too, whose square has a gradient of NaN
    near, zero = torch.where(inside, apart, 0.0), torch.zeros_like(size)
    return 0.5 * near.square() + delta * torch.where(inside, zero, size - 0.5 * delta)


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
    if spec.kind == "cross_entropy":  # an ignored label counts as a sample that is masked out
        counts = target != IGNORED
        target = target.where(counts, torch.zeros_like(target))
    losses = per_sample(spec, output, target)  # [N]
    weights = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    weights = weights if counts is None else weights * counts
    weighted = (weights * losses).sum()
    if spec.reduction == "sum":
        return weighted * (elements_of(output) if spec.kind in ELEMENTWISE else 1)
    total = weights.sum()
    empty = total == 0
    return torch.where(empty, torch.zeros_like(weighted), weighted / torch.where(empty, torch.ones_like(total), total))


def unfused_target(
    spec: LossSpec, output_shape: tuple[int, ...], target: Tensor, sample_shape: tuple[int, ...]
) -> str | None:
    """Why a target cannot go to the kernels, or None.

    Args:
        output_shape: the shape of one sample's output. target: the tensor. sample_shape: the shape of one sample of it.
    """
    if spec.kind != "cross_entropy":
        if sample_shape != output_shape:
            return f"{spec.kind}: the target's shape {sample_shape} per sample is not the output's {output_shape}"
        return None if target.is_floating_point() else f"{spec.kind}: the target is {target.dtype}, not floating point"
    if target.is_floating_point():
        return "cross_entropy: probabilities as targets are not fused (class ids are)"
    if len(output_shape) != 1 or sample_shape != ():
        return f"cross_entropy: one class id per sample is fused, got output {output_shape} and target {sample_shape}"
    return None
