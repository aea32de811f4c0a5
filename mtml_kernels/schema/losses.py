"""The losses that the kernels know: one entry each, which specifications, recognition, references and tests read.

A new loss is an entry in `LOSSES`, and its formula in the engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.transforms import is_forward_mode

__all__ = [
    "CLASS_KINDS",
    "GRAM_KINDS",
    "HEAD_KINDS",
    "IGNORED",
    "KINDS",
    "LOSSES",
    "REDUCTIONS",
    "SOFT",
    "HeadLoss",
    "LossInfo",
    "LossSpec",
    "huber",
    "log_softmax",
    "rows_shape",
]

REDUCTIONS = ("mean", "sum")
SOFT = 5  # the code, in the inner loop, of cross_entropy whose targets are probabilities
IGNORED = -100  # the class id that F.cross_entropy passes over by default


# --- formulas ---------------------------------------------------------------------------------------------------------


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


def _reduced_huber(output: Tensor, target: Tensor, reduction: str, delta: float) -> Tensor:
    if not is_forward_mode():  # PyTorch's backward has no rule for it
        return F.huber_loss(output, target, reduction=reduction, delta=delta)
    each = huber(output, target, delta)
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()


def _cross_entropy(z: Tensor, target: Tensor, smoothing: float) -> Tensor:
    log_p = log_softmax(z)  # [N, C]
    if target.is_floating_point():  # probabilities [N, C], whose sum need not be 1
        return -(((1.0 - smoothing) * target + smoothing / z.shape[-1]) * log_p).sum(-1)
    nll = -log_p.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    return (1.0 - smoothing) * nll - smoothing * log_p.mean(-1)


def _bce(z: Tensor, t: Tensor, _: float, pos_weight: Tensor | None = None) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, t, pos_weight=pos_weight, reduction="none")


def _gaussian_nll(z: Tensor, t: Tensor, _: float) -> Tensor:
    mean, log_var = z.chunk(2, -1)
    return 0.5 * (log_var + (t - mean).square() * torch.exp(-log_var))


def _kl(z: Tensor, t: Tensor, _: float) -> Tensor:
    return (torch.xlogy(t, t) - t * log_softmax(z)).sum(-1)


# --- the table --------------------------------------------------------------------------------------------------------


class LossInfo(NamedTuple):
    """One loss.

    formula: (output, target, p0) to the loss of every element, or for a loss over classes from [..., C] to [...].
    code: in the inner loop, `enum LossKind` in csrc/include/mtml/program.h; None where it has none.
    head_code: in the multi-head ops, `enum HeadKind` of csrc/cpu/multihead_loss; None where they have none.
    classes: it is a softmax over classes. ids: its targets may be class ids.
    outputs: outputs of the model for each element of the target.
    option: the field of the specification that is p0.
    weights: what else a head of this kind may be given, "class_weights" or "pos_weights"; `formula` takes pos_weight.
    prediction, slope: p and c, where the gradient to the output z [T, C, N] is c w (p(z) - y): it has a Gram form.
    functions, modules: how PyTorch spells it; the first function takes `reduction` and `option`.
    reduced: what runs in place of that function.
    """

    formula: Callable[..., Tensor]
    code: int | None = None
    head_code: int | None = None
    classes: bool = False
    ids: bool = False
    outputs: int = 1
    option: str = ""
    weights: str = ""
    prediction: Callable[[Tensor], Tensor] | None = None
    slope: int = 1
    functions: tuple[Any, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    reduced: Callable[..., Tensor] | None = None


LOSSES: dict[str, LossInfo] = {
    "cross_entropy": LossInfo(
        _cross_entropy,
        code=1,
        head_code=0,
        classes=True,
        ids=True,
        option="label_smoothing",
        weights="class_weights",
        prediction=lambda z: z.softmax(1),
        functions=(F.cross_entropy,),
        modules=(nn.CrossEntropyLoss,),
    ),
    "bce_with_logits": LossInfo(
        _bce,
        code=2,
        head_code=1,
        weights="pos_weights",
        prediction=lambda z: z.sigmoid(),
        functions=(F.binary_cross_entropy_with_logits,),
        modules=(nn.BCEWithLogitsLoss,),
    ),
    "mse": LossInfo(
        lambda z, t, _: (z - t).square(),
        code=0,
        head_code=2,
        prediction=lambda z: z,
        slope=2,
        functions=(F.mse_loss,),
        modules=(nn.MSELoss,),
    ),
    "l1": LossInfo(lambda z, t, _: (z - t).abs(), code=4, head_code=3, functions=(F.l1_loss,), modules=(nn.L1Loss,)),
    "huber": LossInfo(
        huber,
        code=3,
        head_code=4,
        option="delta",
        functions=(F.huber_loss, F.smooth_l1_loss),  # with its default beta = 1 the latter is the one with delta = 1
        modules=(nn.HuberLoss, nn.SmoothL1Loss),
        reduced=_reduced_huber,
    ),
    "gaussian_nll": LossInfo(_gaussian_nll, head_code=5, outputs=2),
    "kl": LossInfo(_kl, head_code=6, classes=True),
}


def _by_code(column: str) -> tuple[str, ...]:
    codes = {getattr(info, column): name for name, info in LOSSES.items() if getattr(info, column) is not None}
    return tuple(codes[code] for code in sorted(codes))


KINDS = _by_code("code")  # of the inner loop: a code is a position in it
HEAD_KINDS = _by_code("head_code")  # likewise of the multi-head ops
GRAM_KINDS = tuple(name for name in KINDS if LOSSES[name].prediction is not None)
CLASS_KINDS = frozenset(name for name, info in LOSSES.items() if info.classes)


# --- specifications ---------------------------------------------------------------------------------------------------


def _check_options(prefix: str, spec: LossSpec | HeadLoss) -> None:
    for name in ("label_smoothing", "delta"):
        value: Any = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{prefix}: expected a number as {name}, got {value!r}")
    if not 0.0 <= spec.label_smoothing <= 1.0:
        raise ValueError(f"{prefix}: expected label_smoothing between 0 and 1, got {spec.label_smoothing}")
    if not spec.delta > 0.0:
        raise ValueError(f"{prefix}: expected delta above 0, got {spec.delta}")


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """A loss that the kernels compute: its kind and options, as in the torch function of that name.

    Raises:
        ValueError: an unknown kind or reduction, or an option outside its range.

    Example:
        >>> LossSpec("cross_entropy", label_smoothing=0.1).encode()
        (1, 0, 0.1)
    """

    kind: str
    reduction: str = "mean"
    label_smoothing: float = 0.0
    delta: float = 1.0
    soft: bool = dataclasses.field(default=False, repr=False)  # the targets are probabilities: see `fitting`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"loss: expected one of {', '.join(KINDS)}, got {self.kind!r}; or pass any callable")
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"loss: expected reduction 'mean' or 'sum', got {self.reduction!r}; "
                "an inner loop needs one number per task"
            )
        _check_options("loss", self)

    @property
    def info(self) -> LossInfo:
        """The entry of the table."""
        return LOSSES[self.kind]

    @property
    def p0(self) -> float:
        """The option that the formula takes, 0 where it takes none."""
        return float(getattr(self, self.info.option)) if self.info.option else 0.0

    def encode(self) -> tuple[int, int, float]:
        """(kind, reduction, p0): positions in KINDS (or SOFT) and REDUCTIONS, and label_smoothing or delta."""
        return SOFT if self.soft else KINDS.index(self.kind), REDUCTIONS.index(self.reduction), self.p0

    @staticmethod
    def decode(kind: int, reduction: int, p0: float) -> LossSpec:
        """The inverse of `encode`."""
        name = "cross_entropy" if kind == SOFT else KINDS[kind]
        option = LOSSES[name].option
        return LossSpec(name, REDUCTIONS[reduction], soft=kind == SOFT, **({option: p0} if option else {}))

    def fitting(self, target: Any) -> LossSpec:
        """The loss for such targets: of probabilities where it takes class ids too and these are floating point."""
        soft = self.info.ids and isinstance(target, Tensor) and target.is_floating_point()
        return self if soft == self.soft else dataclasses.replace(self, soft=soft)


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The loss of one head.

    | kind                            | logits                            | target                                     |
    |---------------------------------|-----------------------------------|--------------------------------------------|
    | cross_entropy                   | [N, C, ...] (or [..., C])         | class ids [N, ...], or probabilities       |
    | kl                              | [N, C, ...] (or [..., C])         | probabilities: KL from softmax to target   |
    | bce_with_logits, mse, l1, huber | [N, ...]                          | like logits                                |
    | gaussian_nll                    | [N, ..., 2 O]: mean, log variance | [N, ..., O]                                |

    Probabilities have the shape of the logits. gaussian_nll: Kendall, Gal 2017, arXiv:1703.04977.

    Args:
        kind: one of the above.
        reduction: "mean" over what counts (see `reference.multihead_loss`), or "sum".
        ignore_index: class id whose rows count for nothing (cross_entropy with ids).
        label_smoothing: in [0, 1] (cross_entropy).
        delta: where huber turns linear, above 0.
        class_dim: where the classes lie, 1 (per-pixel: [N, C, H, W]) or -1 (per-token: [N, L, V]).

    Raises:
        ValueError: an unknown kind or reduction, or an option outside its range.

    Example:
        >>> HeadLoss("cross_entropy", ignore_index=0).kind
        'cross_entropy'
    """

    kind: str = "cross_entropy"
    reduction: str = "mean"
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0
    delta: float = 1.0
    class_dim: int = 1

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise ValueError(f"kinds: expected one of {', '.join(HEAD_KINDS)}, got {self.kind!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"kinds: expected reduction 'mean' or 'sum', got {self.reduction!r}")
        _check_options("kinds", self)
        if self.class_dim not in (1, -1):
            raise ValueError(f"kinds: expected class_dim 1 or -1, got {self.class_dim}")

    @property
    def info(self) -> LossInfo:
        """The entry of the table."""
        return LOSSES[self.kind]

    @property
    def p0(self) -> float:
        """The option that the formula takes, 0 where it takes none."""
        return float(getattr(self, self.info.option)) if self.info.option else 0.0

    @staticmethod
    def of(value: str | HeadLoss) -> HeadLoss:
        """A head loss from its kind's name, or itself.

        Raises:
            TypeError: neither a name nor a HeadLoss.
        """
        if isinstance(value, HeadLoss):
            return value
        if isinstance(value, str):
            return HeadLoss(value)
        raise TypeError(f"kinds: expected a name or a HeadLoss, got {type(value).__name__}")


def rows_shape(spec: HeadLoss, logits: Tensor) -> Sequence[int]:
    """The shape of what is weighed one by one: without the class dimension for softmax kinds, else [N]."""
    if spec.kind not in CLASS_KINDS:
        return logits.shape[:1]
    dim = spec.class_dim % logits.ndim
    return (*logits.shape[:dim], *logits.shape[dim + 1 :])
