"""Meta-SGD as learn2learn has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtml.clone import Held, clone_module, inner_gradients, shallow
from mtml.compat.learn2learn.algorithms.base_learner import BaseLearner, check_model
from mtml.compat.learn2learn.algorithms.engine import Batchable, Inner, bare
from mtml.compat.learn2learn.utils import clone_parameters
from mtml.compat.rate import number, rate, scalar

__all__ = ["MetaSGD", "meta_sgd_update"]


def meta_sgd_update(
    model: nn.Module, lrs: Iterable[Tensor] | None = None, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    """Put ``p - lr * grad`` in the place of each parameter p, in the model itself; differentiable in all of them.

    Args:
        lrs, grads: in the order of ``model.parameters()``, a gradient of None for what stays. Without them: the
            tensors' attributes `_lr` and `grad`, of buffers too.

    Returns:
        The model.

    Raises:
        ValueError: rates or gradients that are not as many as the parameters.
    """
    held = Held(model, buffers=grads is None or lrs is None)
    if grads is None or lrs is None:
        found = [(getattr(t, "_lr", None), t.grad if t.is_leaf or t.retains_grad else None) for t in held.tensors]
        rates: list[Any] = [lr for lr, _ in found]
        grads = [None if lr is None else grad for lr, grad in found]
    else:
        rates = list(lrs)
    if not len(rates) == len(grads) == len(held.tensors):
        raise ValueError(
            f"lrs, grads: expected one for each of the model's {len(held.tensors)} parameters, got {len(rates)} rates "
            f"and {len(grads)} gradients"
        )
    triples = zip(held.tensors, rates, grads, strict=True)
    held.replace([None if g is None else t - number(lr) * g for t, lr, g in triples])
    return model


class MetaSGD(Batchable, BaseLearner):
    """learn2learn's Meta-SGD: MAML with a learned rate for every element of every parameter.

    Args:
        model: any module; it is registered as ``module``.
        lr: where every rate starts.
        first_order: treat inner gradients as constants.
        lrs: the rates to use, in the order of ``model.parameters()``; None: new parameters, `lrs`.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> sgd = l2l.algorithms.MetaSGD(torch.nn.Linear(2, 1), lr=0.1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> sgd.meta_loss(x, y, x, y, loss="mse").mean().backward()
        >>> [tuple(lr.grad.shape) for lr in sgd.lrs]
        [(1, 2), (1,)]

    Paper: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs: Iterable[Tensor] | None = None
    ) -> None:
        check_model("model", model)
        super().__init__(model)
        if lrs is None:
            start = scalar(rate("lr", lr))
            lrs = nn.ParameterList([nn.Parameter(torch.ones_like(p) * start) for p in model.parameters()])
        self.lrs: Any = lrs
        self.first_order = first_order

    def clone(self) -> MetaSGD:
        """A copy to adapt to one task; gradients arrive in this learner's parameters and rates."""
        learner: MetaSGD = shallow(self, {}, module=clone_module(self.module))
        learner._modules.pop("lrs", None)
        learner.__dict__["lrs"] = clone_parameters(self.lrs)
        return learner

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner gradient step on a task's loss, in place; call it on a clone. Raises as `MAML.adapt`."""
        held = Held(self.module)
        create_graph = not (self.first_order if first_order is None else first_order)
        grads = inner_gradients(
            loss, held.tensors, held.names, create_graph=create_graph, allow_unused=False, allow_nograd=False
        )
        meta_sgd_update(self.module, self.lrs, grads)

    def _inner(self) -> Inner:
        pairs = zip(bare(self.module).named_parameters(), self.lrs, strict=True)
        return Inner({name: lr for (name, p), lr in pairs if p.requires_grad}, allow_unused=False)
