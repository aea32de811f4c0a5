"""Differentiable optimizers by name: arguments as of `mtml.compat.torchopt.alias`, in the original's order."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtml.compat.torchopt import alias
from mtml.compat.torchopt.alias.utils import Rate
from mtml.compat.torchopt.optim.meta.base import MetaOptimizer

__all__ = [
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
]

Betas = tuple[float, float]


class MetaSGD(MetaOptimizer):
    """Differentiable: torch.optim.SGD. Mind the order of the arguments, which in `torchopt.sgd` is another."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        moment_requires_grad: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            module,
            alias.sgd(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                dampening=dampening,
                nesterov=nesterov,
                moment_requires_grad=moment_requires_grad,
                maximize=maximize,
            ),
        )


class MetaAdam(MetaOptimizer):
    """Differentiable: torch.optim.Adam, with `eps_root` added under the root."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        eps_root: float = 0.0,
        moment_requires_grad: bool = True,
        maximize: bool = False,
        use_accelerated_op: bool = False,
    ) -> None:
        super().__init__(
            module,
            alias.adam(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                eps_root=eps_root,
                moment_requires_grad=moment_requires_grad,
                maximize=maximize,
                use_accelerated_op=use_accelerated_op,
            ),
        )


class MetaAdamW(MetaOptimizer):
    """Differentiable: torch.optim.AdamW; `mask` says which parameters decay."""

    def __init__(
        self,
        module: nn.Module,
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
    ) -> None:
        super().__init__(
            module,
            alias.adamw(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                eps_root=eps_root,
                mask=mask,
                moment_requires_grad=moment_requires_grad,
                maximize=maximize,
                use_accelerated_op=use_accelerated_op,
            ),
        )


class MetaAdaDelta(MetaOptimizer):
    """Differentiable: torch.optim.Adadelta."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        moment_requires_grad: bool = True,
    ) -> None:
        super().__init__(
            module,
            alias.adadelta(
                lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, moment_requires_grad=moment_requires_grad
            ),
        )


class MetaAdaGrad(MetaOptimizer):
    """Differentiable: torch.optim.Adagrad."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            module,
            alias.adagrad(
                lr=lr,
                lr_decay=lr_decay,
                weight_decay=weight_decay,
                initial_accumulator_value=initial_accumulator_value,
                eps=eps,
                maximize=maximize,
            ),
        )


class MetaAdaMax(MetaOptimizer):
    """Differentiable: torch.optim.Adamax."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moment_requires_grad: bool = True,
    ) -> None:
        super().__init__(
            module,
            alias.adamax(
                lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, moment_requires_grad=moment_requires_grad
            ),
        )


class MetaRAdam(MetaOptimizer):
    """Differentiable: torch.optim.RAdam."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moment_requires_grad: bool = True,
    ) -> None:
        super().__init__(
            module,
            alias.radam(
                lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, moment_requires_grad=moment_requires_grad
            ),
        )


class MetaRMSProp(MetaOptimizer):
    """Differentiable: torch.optim.RMSprop; `initial_scale` is what the mean square begins with."""

    def __init__(
        self,
        module: nn.Module,
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
            module,
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


MetaAdadelta = MetaAdaDelta
MetaAdagrad = MetaAdaGrad
MetaAdamax = MetaAdaMax
MetaRMSprop = MetaRMSProp
