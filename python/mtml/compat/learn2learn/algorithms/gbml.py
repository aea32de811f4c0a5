"""Gradient-based meta-learning with a learned transformation of the inner gradients, as learn2learn has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mtml.clone import Held, clone_module, inner_gradients, shallow
from mtml.compat.learn2learn.algorithms.base_learner import check_model
from mtml.compat.learn2learn.algorithms.engine import Batchable, Inner, bare
from mtml.compat.learn2learn.optim.parameter_update import ParameterUpdate
from mtml.compat.learn2learn.optim.update_rules import DifferentiableSGD
from mtml.compat.rate import number

__all__ = ["GBML"]


class GBML(Batchable, nn.Module):
    """theta' = theta - lr * transform(gradient), where the transform of each parameter is a module that is learned.

    Args:
        module: any module; it is registered as ``module``.
        transform: transform(parameter) -> a module gradient -> update, or None for the gradient itself.
        lr: the inner learning rate.
        adapt_transform: let the inner loop change the transforms too, from its second step on, at the same rate.
        first_order: treat inner gradients as constants.
        allow_unused, allow_nograd: leave parameters as they are that the loss does not depend on, or that require no
            grad.
        compute_update: the `ParameterUpdate` to use; None: a new one of `transform`.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> gbml = l2l.algorithms.GBML(net, l2l.optim.MetaCurvatureTransform, lr=0.1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> learner = gbml.clone()
        >>> learner.adapt(torch.nn.functional.mse_loss(learner(x[0]), y[0]))
        >>> torch.nn.functional.mse_loss(learner(x[0]), y[0]).backward()
        >>> gbml.meta_loss(x, y, x, y, loss="mse").shape
        torch.Size([4])
    """

    module: Any
    compute_update: Any

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[nn.Parameter], nn.Module | None],
        lr: Any = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        *,
        compute_update: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_model("module", module)
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr = number(lr)
        self.first_order = first_order
        self.allow_unused, self.allow_nograd = allow_unused, allow_nograd
        self.compute_update = (
            ParameterUpdate(module.parameters(), transform) if compute_update is None else compute_update
        )
        self.diff_sgd = DifferentiableSGD(lr)
        self._params_updated = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> GBML:
        """A copy to adapt to one task; gradients arrive in this learner's parameters and transforms."""
        done: dict[int, Tensor] = {}
        given = {"first_order": first_order, "allow_unused": allow_unused, "allow_nograd": allow_nograd}
        given["adapt_transform"] = adapt_transform
        learner: GBML = shallow(
            self,
            given,
            module=clone_module(self.module, done=done),
            compute_update=clone_module(self.compute_update, done=done),
            diff_sgd=DifferentiableSGD(self.lr),
        )
        learner._params_updated = False
        return learner

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """One inner step on a task's loss, in place; call it on a clone.

        The last two arguments have learn2learn's order, which is not that of `MAML.adapt`. Raises as that does.
        """
        second = not (self.first_order if first_order is None else first_order)
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        if self.adapt_transform and self._params_updated:
            self._adapt_transforms(loss, second, allow_unused)
        updates = self.compute_update(
            loss,
            self.module.parameters(),
            create_graph=second or self.adapt_transform,
            retain_graph=second or self.adapt_transform,
            allow_unused=allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        self.diff_sgd(self.module, updates)
        self._params_updated = True

    def _adapt_transforms(self, loss: Tensor, second: bool, allow_unused: bool) -> None:
        """A step on the transforms, through the step on the parameters before."""
        held = Held(self.compute_update)
        grads = inner_gradients(
            loss,
            held.tensors,
            held.names,
            create_graph=second,
            retain_graph=True,  # the loss is differentiated by the parameters next
            allow_unused=allow_unused,
            allow_nograd=False,
        )
        self.diff_sgd(self.compute_update, grads)

    def _inner(self) -> Inner:
        if self.adapt_transform:
            raise ValueError(
                "adapt_transform: expected False for meta_loss, which takes one update rule for all steps; with True "
                "adapt a clone for each task"
            )
        kept = self.__dict__.get("_engine")
        rule = None if kept is None else kept.update
        if rule is None or rule.compute_update is not self.compute_update or rule.model is not self.module:
            rule = _Rule(self.compute_update, self.module)
        return Inner(self.lr, self.allow_unused, rule)


class _Rule(nn.Module):
    """A `ParameterUpdate` as an update rule of `mtml.MAML`: all dicts by name."""

    compute_update: Any

    def __init__(self, compute_update: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.compute_update = compute_update
        self.__dict__["model"] = module  # whose parameters are not the rule's
        self.names = [name for name, _ in bare(module).named_parameters()]

    def __call__(
        self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], lr: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """One step of a task."""
        updates = self.compute_update.transformed([grads.get(name) for name in self.names])
        moved = dict(zip(self.names, updates, strict=True))
        return {name: p - lr[name] * moved[name] for name, p in params.items()}
