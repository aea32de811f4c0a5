"""Optimizers as transformations: what `init` and `update` work on are trees of tensors.

Where they share arguments: `lr` is a number, a tensor (which may be learnt) or a function of the number of steps taken;
`weight_decay` adds weight_decay * parameters to the gradient; `moment_requires_grad` makes the zeros that moments begin
with leaves that require grad; `maximize` climbs. Each raises ValueError for a number outside its range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtml.compat.torchopt.alias.utils import Rate, check_rate, flip_sign_and_add_weight_decay, scale_by_neg_lr
from mtml.compat.torchopt.base import ChainedGradientTransformation as Chained
from mtml.compat.torchopt.base import GradientTransformation
from mtml.compat.torchopt.transform import (
    add_decayed_weights,
    scale_by_adadelta,
    scale_by_adam,
    scale_by_adamax,
    scale_by_radam,
    scale_by_rms,
    scale_by_rss,
    scale_by_schedule,
    scale_by_stddev,
    trace,
)
from mtml.compat.torchopt.transform.simple import at_least

__all__ = ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd"]

Betas = tuple[float, float]


def sgd(
    lr: Rate,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Gradient descent: torch.optim.SGD. Mind the order of the arguments, which in the classes is another.

    Example:
        >>> import torch
        >>> rule, params = sgd(0.1), [torch.ones(2)]
        >>> rule.update([torch.ones(2)], rule.init(params), params=params)[0]
        [tensor([-0.1000, -0.1000])]
    """
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        trace(momentum, dampening, nesterov, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def adam(
    lr: Rate = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    eps_root: float = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Adam: torch.optim.Adam, with `eps_root` added under the root. `use_accelerated_op` changes nothing."""
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        scale_by_adam(*betas, eps, eps_root, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def adamw(
    lr: Rate = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    eps_root: float = 0.0,
    mask: Any = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """AdamW: torch.optim.AdamW; `mask` (as of `torchopt.transform.masked`) says which parameters decay."""
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(0.0, maximize),
        scale_by_adam(*betas, eps, eps_root, moment_requires_grad),
        add_decayed_weights(weight_decay, mask),
        scale_by_neg_lr(lr),
    )


def adamax(
    lr: Rate = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """AdaMax: torch.optim.Adamax."""
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay),
        scale_by_adamax(*betas, eps, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def radam(
    lr: Rate = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """RAdam: torch.optim.RAdam."""
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay),
        scale_by_radam(*betas, eps, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def adadelta(
    lr: Rate = 1e-3,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Adadelta: torch.optim.Adadelta."""
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay),
        scale_by_adadelta(rho, eps, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


@dataclass(frozen=True)
class _Decaying:
    rate: float

    def __call__(self, count: Any) -> float:
        return 1.0 / (1.0 + self.rate * int(count))


def adagrad(
    lr: Rate = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """AdaGrad: torch.optim.Adagrad."""
    check_rate(lr)
    at_least("lr_decay", lr_decay)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        scale_by_rss(initial_accumulator_value, eps),
        scale_by_schedule(_Decaying(lr_decay)),
        scale_by_neg_lr(lr),
    )


def rmsprop(
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """RMSProp: torch.optim.RMSprop; `initial_scale` is what the mean square begins with."""
    check_rate(lr)
    return Chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        (scale_by_stddev if centered else scale_by_rms)(alpha, eps, initial_scale),
        trace(momentum, nesterov=nesterov),
        scale_by_neg_lr(lr),
    )
