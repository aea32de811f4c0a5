"""iMAML: the meta-gradient by the implicit function theorem, whatever way the inner problem was solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from mtml.adapted import Adapted
from mtml.algorithms.base import CallOptions, MetaOutput
from mtml.algorithms.curvature import Point
from mtml.algorithms.implicit import Implicit, conjugate_gradients
from mtml.algorithms.learner import LearnerOptions, ModelLearner, Rate
from mtml.inner import SGD, Rule
from mtml.inner_lr import InnerLR
from mtml.params import ParamsArg, aliases, by_first_name
from mtml.paths.batch import Batch, Parts, unpacked
from mtml.paths.explain import Explanation
from mtml_kernels.checks import check_choice, check_number, check_steps, shown
from mtml_kernels.functional.task_update import task_update
from mtml_kernels.general import GeneralPlan
from mtml_kernels.rates import op_rates, rate_at

__all__ = ["IMAML"]

MASKS = ("support_mask", "query_mask")
Data = tuple[Any, Any, Tensor | None]


class IMAML(ModelLearner):
    """Implicit MAML: adapt with a pull towards the start, and differentiate the solution instead of the way to it.

        phi_t = argmin L_s(phi) + lambda / 2 |phi - theta|^2           K steps of the inner rule from theta
        d phi_t / d theta = (I + H_t / lambda)^-1,   H_t = Hessian of L_s at phi_t
        gradient of theta = sum_t (I + H_t / lambda)^-1 grad L_q(phi_t)

    The inverse is applied by conjugate gradients on Hessian-vector products (`hvp`), for all tasks at once. Memory does
    not grow with the steps, and the inner rule need not be differentiable. Gradients also reach lambda, what is not
    adapted, inputs, float targets and masks. They are exact as far as phi_t is the minimum and the linear system is
    solved: both want enough steps. The inner steps of all tasks are one fused call; with an `update`, a call each.

    Args:
        model, params and the keyword arguments: as of `MAML`. `update` is a rule of `mtml.inner`.
        lr: the inner rate: a number, a tensor that requires no grad, [K] or {name: rate} of such. The solution does not
            depend on it.
        strength: lambda, a number or a scalar tensor; an nn.Parameter is registered and learned. It must exceed
            what the Hessian has below 0 for the inner problem to have a minimum.
        cg_steps: of conjugate gradients; a task's end early where its residual is 0.
        damping: added to the diagonal of the linear system, (1 + damping) I + H / lambda; 0 is exact.

    Raises:
        ValueError, TypeError: as `MAML`; rates that require grad; strength that is not positive.

    Example:
        >>> import torch, mtml
        >>> imaml = mtml.IMAML(torch.nn.Linear(2, 1), lr=0.1, strength=1.0, steps=20, loss="mse")
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> imaml.meta_loss(x, y, x, y).mean().backward()
        >>> imaml.module.weight.grad.shape
        torch.Size([1, 2])

    Paper: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", 2019 (arXiv:1909.04630).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate,
        *,
        strength: float | Tensor = 1.0,
        cg_steps: int = 5,
        damping: float = 0.0,
        params: ParamsArg = None,
        **options: Unpack[LearnerOptions],
    ) -> None:
        check_choice("batch_norm", options.get("batch_norm", "module"), ("module", "batch", "running"))
        super().__init__(model, lr, params=params, **options)
        if self.update is not None and not isinstance(self.update, Rule):
            raise TypeError(f"update: expected a rule of mtml.inner or None, got {shown(self.update)}")
        _check_constant("lr", list(lr.parameters()) if isinstance(lr, InnerLR) else lr)
        _check_constant("update", self.update.numbers() if isinstance(self.update, Rule) else [])
        check_number("strength", strength, above=0)
        check_number("damping", damping)
        self.strength, self.damping = strength, damping
        self._pulled: tuple[tuple[Any, ...], ModelLearner] | None = None
        self.cg_steps = check_steps(cg_steps, "cg_steps")
        if self.cg_steps == 0:
            raise ValueError("cg_steps: expected at least 1, got 0; mtml.FOMAML leaves the inverse out")

    def meta_forward(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> MetaOutput:
        """loss [T], output [T, Q, ...] at the solutions, support_losses [K, T] (without the pull) before each step.

        Arguments as of `MAML.meta_forward`: steps, support_mask and query_mask.

        Raises:
            ValueError: another option of `MAML.meta_forward`.
        """
        _refuse({name: value for name, value in options.items() if name not in ("steps", *MASKS)})
        masks = options.get("support_mask"), options.get("query_mask")
        sx, sy, qx, qy, support_mask, query_mask = unpacked(sx, sy, qx, qy, *masks, self)
        phi, losses = self._solution((sx, sy, support_mask), options.get("steps"))
        found = self._long_step().meta_forward(sx, sy, qx, qy, steps=0, query_mask=query_mask, start=phi)
        return MetaOutput(found.loss, found.output, losses)

    def adapt_tasks(
        self,
        sx: Any,
        sy: Any = None,
        *,
        steps: int | None = None,
        first_order: bool | None = None,
        support_mask: Tensor | None = None,
        keep_steps: bool = False,
        per_step: bool = False,
        start: Adapted | Mapping[str, Tensor] | None = None,
    ) -> Adapted:
        """The solutions phi_t as adapted models, differentiable by the implicit function theorem.

        Arguments as of `MAML.adapt_tasks`: steps and support_mask. Raises ValueError for the others.
        """
        _refuse({"first_order": first_order, "keep_steps": keep_steps, "per_step": per_step, "start": start})
        if sy is None:
            sx, sy, _, _, support_mask, _ = unpacked(sx, sy, None, None, support_mask, None, self, adapting=True)
        phi, losses = self._solution((sx, sy, support_mask), steps)
        loss = self.loss if self.query_loss is None else self.query_loss
        return Adapted(self.module, phi, losses, loss, False, GeneralPlan("vmap", "", self.batch_norm))

    def explain(self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None) -> Explanation:
        """Print and return how each inner step with such data runs: path, kernel, why, and every layer."""
        parts: Parts = (sx, sy, qx, qy, None, None)
        if sy is None:
            parts = unpacked(sx, sy, qx, qy, None, None, self, adapting=True)
        learner = self._descent() if self.update is None else self._long_step()
        learner.steps = self.steps if self.update is None else 1
        found = learner._paths.explain(Batch(*parts))
        times = "" if self.update is None else f", {self.steps} times over"
        why = f"{found.reason}{times}; implicit meta-gradient by {self.cg_steps} conjugate gradients"
        explanation = replace(found, steps=self.steps, reason=why)
        print(explanation)
        return explanation

    def _solution(self, data: Data, steps: int | None) -> tuple[dict[str, Tensor], Tensor]:
        """phi {name: [T, *shape]} with its implicit derivative, and the support losses [K, T]."""
        if isinstance(self.strength, Tensor) and self.strength.device.type == "cpu":
            check_number("strength", self.strength, above=0)
        count = self.steps if steps is None else check_steps(steps)
        theta = self._everywhere(len(Batch(*data[:2])), {})
        with torch.no_grad():
            phi, losses = self._minimised(data, theta, count)
        if not torch.is_grad_enabled():
            return phi, losses
        step = self._long_step()
        moving = Point(step, data, phi).gradient()  # with the derivatives by all but phi
        moved = [theta[name] - grad / self.strength for name, grad in moving.items()]
        point = Point(step, data, {name: t.requires_grad_() for name, t in _copied(phi).items()})
        strength = self.strength.detach().clone() if isinstance(self.strength, Tensor) else self.strength
        solve = solver(point, strength, self.damping, self.cg_steps)
        found = Implicit.apply(solve, *phi.values(), *moved)
        return dict(zip(phi, found, strict=True)), losses

    def _minimised(self, data: Data, theta: Mapping[str, Tensor], steps: int) -> tuple[dict[str, Tensor], Tensor]:
        """phi after the inner steps, and the support losses before each."""
        if self.update is not None:
            return self._step_by_step(cast(Rule, self.update), data, theta, steps)
        pull = {"step": 1, "momentum_buffer": {name: -self.strength * t for name, t in theta.items()}}
        none = next(iter(theta.values())).new_zeros(0, len(Batch(*data[:2])))
        start = Adapted(self.module, theta, none, self.loss, False, GeneralPlan("vmap", ""), pull)
        sx, sy, mask = data
        found = self._descent().adapt_tasks(sx, sy, steps=steps, support_mask=mask, start=start)
        return found.params, found.support_losses

    def _descent(self) -> ModelLearner:
        """Plain descent with the pull, as one call: Nesterov's direction g + weight_decay phi + momentum b is g +
        lambda phi - lambda theta where b stays -lambda theta, which momentum 1 and dampening 1 let it.
        """
        options = (self.module, self.lr, self.strength, self.loss, self.params, self.batch_norm, self.backend)
        if self._pulled is None or any(a is not b for a, b in zip(self._pulled[0], options, strict=True)):
            given: dict[str, Any] = {"loss": self.loss, "params": self.params, "batch_norm": self.batch_norm}
            given |= {"backend": self.backend, "allow_unused": self.allow_unused}
            rule = SGD(momentum=1.0, dampening=1.0, nesterov=True, weight_decay=self.strength)
            self._pulled = options, ModelLearner(self.module, self.lr, update=rule, **given)
        return self._pulled[1]

    def _step_by_step(
        self, rule: Rule, data: Data, theta: Mapping[str, Tensor], steps: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The same by a rule that has a use for its momentum or takes another: a call for each step."""
        names, phi, losses, state, step = list(theta), _copied(theta), [], None, self._long_step()
        rates = self._rates(theta, steps)
        for k in range(steps):
            point = Point(step, data, phi)
            losses.append(point.losses)
            grads = [g + self.strength * (phi[n] - theta[n]) for n, g in point.gradient().items()]
            given = [rate_at(rates, i, k) for i in range(len(names))]
            found = task_update([phi[n] for n in names], grads, given, state=state, step=k, rule=rule)
            phi, state = dict(zip(names, found, strict=False)), found[len(names) :] or None
        like = next(iter(theta.values()))
        return phi, torch.stack(losses) if losses else like.new_zeros(0, len(like))

    def _rates(self, theta: Mapping[str, Tensor], steps: int) -> list[Tensor]:
        lr: Any = self.lr.as_dict() if isinstance(self.lr, InnerLR) else self.lr
        if isinstance(lr, Mapping):
            lr = by_first_name(lr, aliases(self.module))
        like, shapes = next(iter(theta.values())), {name: t.shape[1:] for name, t in theta.items()}
        return op_rates(lr, shapes, steps, like.dtype, like.device, list(lr) if isinstance(lr, Mapping) else ())


def solver(
    point: Point, strength: float | Tensor, damping: float, steps: int
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Cotangents [T, *shape] -> ((1 + damping) I + H / strength)^-1 of them, by `steps` of conjugate gradients."""
    shapes = {name: t.shape for name, t in point.start.items()}
    sizes = [shape[1:].numel() for shape in shapes.values()]

    def parts(flat: Tensor) -> dict[str, Tensor]:
        cut = flat.split(sizes, 1)
        return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), cut, strict=True)}

    def matrix(flat: Tensor) -> Tensor:
        found = torch.cat([h.flatten(1) for h in point.hvp(parts(flat)).values()], 1)
        return (1.0 + damping) * flat + found / strength

    def solve(cotangents: Sequence[Tensor]) -> list[Tensor]:
        b = torch.cat([c.flatten(1) for c in cotangents], 1)
        return list(parts(conjugate_gradients(matrix, b, steps)).values())

    return solve


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def _refuse(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that was given and that iMAML has not."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)}: iMAML has no such option; use mtml.MAML, which takes it")


def _check_constant(name: str, given: Any) -> None:
    """Raise where a rate or a rule's number would silently get no gradient."""
    values = given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else [given]
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise ValueError(
            f"{name}: expected numbers or tensors that require no grad, because iMAML's solution does not depend on "
            "them, got one that does; pass .detach(), or InnerLR(learnable=False)"
        )
