"""MAML as learn2learn has it: clone, adapt, and the batched engine for those who give it a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtml.clone import Held, clone_module, descend, inner_gradients, shallow, step_rates
from mtml.compat.learn2learn.algorithms.base_learner import BaseLearner, check_model
from mtml.compat.learn2learn.algorithms.engine import Batchable, Inner
from mtml.compat.learn2learn.utils import update_module
from mtml.compat.rate import number, scalar
from mtml_kernels.checks import check_finite

__all__ = ["MAML", "maml_update"]


def maml_update(model: nn.Module, lr: Any, grads: Sequence[Tensor | None] | None = None) -> nn.Module:
    """Put ``p - lr * grad`` in the place of each parameter p, in the model itself; differentiable in all of them.

    Args:
        lr: a number or a tensor.
        grads: in the order of ``model.parameters()``, None for what stays. None: add the parameters' attributes
            `update`.

    Returns:
        The model.

    Raises:
        ValueError: other gradients in number than parameters.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> clone = l2l.clone_module(net)
        >>> grads = torch.autograd.grad(clone(torch.ones(1, 2)).sum(), list(clone.parameters()), create_graph=True)
        >>> clone = l2l.algorithms.maml_update(clone, 0.5, grads)
        >>> torch.allclose(clone.weight, net.weight - 0.5)
        True
    """
    if grads is None:
        return update_module(model)
    lr = number(lr)
    return update_module(model, [None if g is None else -lr * g for g in grads])


class MAML(Batchable, BaseLearner):
    """learn2learn's MAML: `clone` for a task, `adapt` by a gradient step, and `meta_loss` for a batch of tasks at once.

    Args:
        model: any module; it is registered as ``module`` and its attributes are found on the learner. Not one in
            DistributedDataParallel.
        lr: the inner learning rate: a number, or a tensor, which may require grad; also every other rate that
            `mtml.MAML` takes, such as an `mtml.InnerLR` with a rate for each step and tensor.
        first_order: treat inner gradients as constants (FOMAML).
        allow_unused: leave parameters as they are that the loss does not depend on. Defaults to `allow_nograd`.
        allow_nograd: leave parameters as they are that require no grad.

    Raises:
        TypeError, ValueError: a model or a rate that can be none.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> maml = l2l.algorithms.MAML(torch.nn.Linear(2, 1), lr=0.1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> learner = maml.clone()
        >>> learner.adapt(torch.nn.functional.mse_loss(learner(x[0]), y[0]))
        >>> torch.nn.functional.mse_loss(learner(x[0]), y[0]).backward()
        >>> maml.meta_loss(x, y, x, y, loss="mse").shape  # all four tasks at once
        torch.Size([4])

    Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Any,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        check_model("model", model)
        lr = number(lr)
        if isinstance(lr, float | int):
            lr = float(lr)
            check_finite("lr", lr)
        super().__init__(model)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self._taken = 0  # inner steps so far

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        step: int | None = None,
    ) -> None:
        """One inner gradient step on a task's loss, in place; call it on a clone.

        Args:
            loss: one number, computed from this clone.
            first_order, allow_unused, allow_nograd: instead of the learner's own.
            step: which of the rates to take where there is one for each step; None: as many as steps were taken.

        Raises:
            RuntimeError: the loss does not depend on a parameter (unless `allow_unused`), or a parameter requires no
                grad (unless `allow_nograd`).
            ValueError: the loss is no scalar, or there is no rate for this step.
        """
        held = Held(self.module)
        grads = inner_gradients(
            loss,
            held.tensors,
            held.names,
            create_graph=not (self.first_order if first_order is None else first_order),
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        held.replace(self._stepped(held, grads, self._taken if step is None else step))
        self._taken += 1

    def _stepped(self, held: Held, grads: list[Tensor | None], step: int) -> list[Tensor | None]:
        """The parameters after the step, None for those that stay."""
        lr = scalar(self.lr)
        if isinstance(lr, float | int):
            return descend(held.tensors, grads, lr)
        if isinstance(lr, Tensor) and lr.ndim == 0:
            return [None if g is None else t - lr * g for t, g in zip(held.tensors, grads, strict=True)]
        triples = zip(held.names(), held.tensors, grads, strict=True)
        moved = {name: (tensor, grad) for name, tensor, grad in triples if grad is not None}
        if not moved:
            return [None] * len(grads)
        rates = step_rates(lr, self.module, {name: tensor for name, (tensor, _) in moved.items()}, step)
        new = iter([tensor - rates[name] * grad for name, (tensor, grad) in moved.items()])
        return [None if g is None else next(new) for g in grads]

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A copy to adapt to one task; gradients of what it computes arrive in this module's parameters.

        Buffers, and so running statistics, are shared, and the learning rate too. The arguments replace this learner's
        settings in the copy.
        """
        given = {"first_order": first_order, "allow_unused": allow_unused, "allow_nograd": allow_nograd}
        learner: MAML = shallow(self, given, module=clone_module(self.module))
        return learner

    def _inner(self) -> Inner:
        return Inner(self.lr, self.allow_unused)
