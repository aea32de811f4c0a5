"""Meta-Curvature: the inner gradients are transformed by learned matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mtml.algorithms.learner import LearnerOptions, Rate
from mtml.algorithms.maml import MAML
from mtml.inner import SGD, Rule
from mtml.params import ParamsArg, adaptable, select
from mtml_kernels.batch_norm import per_step_batch_norm
from mtml_kernels.checks import check_steps, shown
from mtml_kernels.precision import plainly
from mtml_kernels.schema.update import UpdateSpec

__all__ = ["Curvature", "MetaCurvature"]


class Curvature(nn.Module):
    """An update rule: each tensor's gradient, transformed along its dimensions, goes to a rule of `mtml.inner`.

        MC(G) = G x_1 M_o x_2 M_i x_3 M_f          for G [O, I, filter]: M_o [O, O], M_i [I, I], M_f [f, f]

    The mode products commute. A linear weight [O, I] has M_o and M_i, a bias [O] has M_o, a convolution's weight all
    three, the sizes of its window being one dimension. All start as the identity.

    Args:
        model, params: whose adapted tensors it is for, as `MAML` takes them.
        rule: what follows; None for gradient descent.
    """

    def __init__(self, model: nn.Module, params: ParamsArg = None, rule: Rule | None = None) -> None:
        super().__init__()
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"update: expected a rule of mtml.inner or None, got {shown(rule)}")
        tensors = adaptable(model)
        names = select(model, params)
        self.rule, self.index = SGD() if rule is None else rule, {name: i for i, name in enumerate(names)}
        self.matrices = nn.ModuleList(
            nn.ParameterList(torch.eye(n, dtype=tensors[name].dtype, device=tensors[name].device) for n in sizes)
            for name in names
            for sizes in [_modes(tensors[name].shape)]
        )

    @property
    def spec(self) -> UpdateSpec:
        """Of the rule that follows: what it remembers from step to step."""
        return self.rule.spec

    def __call__(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        lr: Mapping[str, Tensor],
        step: int,
        state: Any = None,
    ) -> tuple[dict[str, Tensor], Any]:
        """One step of a task, as `MAML` calls its update rule: all dicts by name."""
        curved = {name: self.transformed(name, grad) for name, grad in grads.items()}
        found: tuple[dict[str, Tensor], Any] = self.rule(params, curved, lr, step, state)
        return found

    def transformed(self, name: str, grad: Tensor) -> Tensor:
        """MC of one tensor's gradient, of its shape.

        Raises ValueError for a tensor that was none of the adapted ones when this was made.
        """
        if name not in self.index:
            raise ValueError(f"params: {name!r} has no curvature; make the MetaCurvature anew for what is adapted now")
        matrices = self.matrices[self.index[name]]
        assert isinstance(matrices, nn.ParameterList)
        found = grad.reshape(_modes(grad.shape))
        with plainly(grad):  # updates are no products that autocast rounds
            for mode, matrix in enumerate(matrices):
                found = torch.movedim(torch.tensordot(matrix, found, ([1], [mode])), 0, mode)
        return found.reshape(grad.shape)


def _modes(shape: torch.Size) -> tuple[int, ...]:
    """[O], [O, I] or [O, I, filter]; a tensor without dimensions is one of [1]."""
    if len(shape) < 3:
        return tuple(shape) or (1,)
    return shape[0], shape[1], shape[2:].numel()


class MetaCurvature(MAML):
    """`MAML` whose inner steps go along MC(gradient), theta_{k+1} = theta_k - lr * MC(grad L_s(theta_k)): `Curvature`.

    The matrices are meta-learned beside the initialisation, to exact second order. Runs on the general path, which has
    no fused form of such a rule.

    Args:
        model, lr, first_order, params and the keyword arguments: as of `MAML`. `update` is a rule of `mtml.inner` that
            takes the transformed gradients.

    Raises:
        ValueError, TypeError: as `MAML`.

    Example:
        >>> import torch, mtml
        >>> learner = mtml.MetaCurvature(torch.nn.Linear(3, 2), lr=0.1, loss="mse")
        >>> [tuple(p.shape) for p in learner.update.parameters()]
        [(2, 2), (3, 3), (2, 2)]
        >>> x, y = torch.randn(4, 8, 3), torch.randn(4, 8, 2)
        >>> learner.meta_loss(x, y, x, y).mean().backward()

    Paper: Park, Oliva, "Meta-Curvature", 2019 (arXiv:1902.03356).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate,
        first_order: bool = False,
        *,
        params: ParamsArg = None,
        **options: Unpack[LearnerOptions],
    ) -> None:
        if options.get("batch_norm") == "per_step":  # first, because rows for the steps have no curvature
            model = per_step_batch_norm(model, check_steps(options.get("steps", 1)))
        rule: Any = options.get("update")
        options = {"backend": "general", **options, "update": Curvature(model, params, rule)}
        super().__init__(model, lr, first_order, params=params, **options)
