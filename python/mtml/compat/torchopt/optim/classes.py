"""Optimizers by name: arguments as of `mtml.compat.torchopt.alias`, in the original's order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mtml.compat.torchopt import alias
from mtml.compat.torchopt.alias.utils import Rate
from mtml.compat.torchopt.optim.base import Optimizer

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "RAdam",
    "RMSProp",
    "RMSprop",
]

Betas = tuple[float, float]


class SGD(Optimizer):
    """torch.optim.SGD. Mind the order of the arguments, which in `torchopt.sgd` is another."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            alias.sgd(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
            ),
        )


class Adam(Optimizer):
    """torch.optim.Adam, with `eps_root` added under the root."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        eps_root: float = 0.0,
        maximize: bool = False,
        use_accelerated_op: bool = False,
    ) -> None:
        super().__init__(
            params,
            alias.adam(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                eps_root=eps_root,
                maximize=maximize,
                use_accelerated_op=use_accelerated_op,
            ),
        )


class AdamW(Optimizer):
    """torch.optim.AdamW; `mask` says which parameters decay."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        eps_root: float = 0.0,
        mask: Any = None,
        maximize: bool = False,
        use_accelerated_op: bool = False,
    ) -> None:
        super().__init__(
            params,
            alias.adamw(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                eps_root=eps_root,
                mask=mask,
                maximize=maximize,
                use_accelerated_op=use_accelerated_op,
            ),
        )


class AdaDelta(Optimizer):
    """torch.optim.Adadelta."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, alias.adadelta(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay))


class AdaGrad(Optimizer):
    """torch.optim.Adagrad."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            alias.adagrad(
                lr=lr,
                lr_decay=lr_decay,
                weight_decay=weight_decay,
                initial_accumulator_value=initial_accumulator_value,
                eps=eps,
                maximize=maximize,
            ),
        )


class AdaMax(Optimizer):
    """torch.optim.Adamax."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, alias.adamax(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))


class RAdam(Optimizer):
    """torch.optim.RAdam."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, alias.radam(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))


class RMSProp(Optimizer):
    """torch.optim.RMSprop; `initial_scale` is what the mean square begins with."""

    def __init__(
        self,
        params: Iterable[Tensor],
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
    ) -> None:
        super().__init__(
            params,
            alias.rmsprop(
                lr=lr,
                alpha=alpha,
                eps=eps,
                weight_decay=weight_decay,
                momentum=momentum,
                centered=centered,
                initial_scale=initial_scale,
                nesterov=nesterov,
                maximize=maximize,
            ),
        )


Adadelta = AdaDelta
Adagrad = AdaGrad
Adamax = AdaMax
RMSprop = RMSProp
