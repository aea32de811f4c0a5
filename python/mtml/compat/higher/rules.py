"""Differentiable optimisers by the formulas of torch.optim, exact in everything they compute with, settings included.

Where a root is taken of what is exactly zero, its derivative counts as zero: what has had no gradient leaves no NaN.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from mtml.compat.higher.optimizer import DifferentiableOptimizer
from mtml_kernels.reference.update import root, update
from mtml_kernels.schema.update import UpdateSpec

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "Rule",
]

Group = dict[str, Any]
State = dict[str, Any]


class Rule(DifferentiableOptimizer):
    """An optimiser that looks at each parameter by itself."""

    settings_known = True

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            params = group["params"]
            for j, grad in enumerate(grads):
                if grad is not None:
                    params[j] = self.moved(group, params[j], grad, self.state[i][j])

    @classmethod
    def moved(cls, group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        """The parameter after a step; `state` is brought up to date."""
        if grad.is_sparse:
            raise RuntimeError(
                f"{cls.__name__}: expected dense gradients, got a sparse one; make the Embedding with sparse=False"
            )
        return cls.stepped(group, p, -grad if group.get("maximize") else grad, state)

    @staticmethod
    @abc.abstractmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        """The formula."""


def _given(value: Any) -> bool:
    return isinstance(value, Tensor) or value != 0


def _decayed(group: Group, p: Tensor, grad: Tensor) -> Tensor:
    return grad + group["weight_decay"] * p if _given(group["weight_decay"]) else grad


def _taken(state: State) -> int:
    """Steps before this one, which is counted; torch.optim keeps a float32 tensor, too coarse for powers of 0.999."""
    taken = int(state.get("step", 0))
    state["step"] = taken + 1
    return taken


def _like(p: Tensor, state: State, *names: str) -> list[Tensor]:
    """Tensors of the state, zeros before the first step."""
    return [p.detach().new_zeros(p.shape) if state.get(name) is None else state[name] for name in names]


def _by_spec(spec: UpdateSpec, numbers: Group, group: Group, p: Tensor, grad: Tensor, state: State, n: int) -> Tensor:
    """A rule that the engine has too."""
    moments = [[tensor] for tensor in _like(p, state, *spec.moments)]
    (new,), kept = update(spec, numbers, [p], [grad], [group["lr"]], moments, n)
    state.update((name, plane[0]) for name, plane in zip(spec.moments, kept, strict=True))
    return new


class DifferentiableSGD(Rule):
    """torch.optim.SGD: momentum, dampening, nesterov, weight decay."""

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        lr = group["lr"]
        if not _given(group["momentum"]):
            grad = _decayed(group, p, grad)
            # as one operation it is one node to run backward through, at every step
            return p - lr * grad if isinstance(lr, Tensor) else torch.sub(p, grad, alpha=lr)
        decayed = _given(group["weight_decay"])
        spec = UpdateSpec("sgd", momentum=True, nesterov=bool(group["nesterov"]), decayed=decayed)
        return _by_spec(spec, group, group, p, grad, state, int(state.get("momentum_buffer") is not None))


class DifferentiableAdam(Rule):
    """torch.optim.Adam, amsgrad included (Kingma, Ba 2015; Reddi, Kale, Kumar 2018)."""

    decoupled = False

    @classmethod
    def moved(cls, group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        own = group if not cls.decoupled else {**group, "decoupled_weight_decay": True}
        return super().moved(own, p, grad, state)

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        decoupled = bool(group.get("decoupled_weight_decay"))
        if group["amsgrad"]:
            return _amsgrad(decoupled, group, p, grad, state)
        spec = UpdateSpec("adam", decoupled=decoupled, decayed=_given(group["weight_decay"]))
        numbers = {**group, "beta1": group["betas"][0], "beta2": group["betas"][1]}
        return _by_spec(spec, numbers, group, p, grad, state, _taken(state))


class DifferentiableAdamW(DifferentiableAdam):
    """torch.optim.AdamW (Loshchilov, Hutter 2019)."""

    decoupled = True


def _amsgrad(decoupled: bool, group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
    beta1, beta2 = group["betas"]
    if decoupled:
        p = p * (1 - group["lr"] * group["weight_decay"])
    else:
        grad = _decayed(group, p, grad)
    mean, square, largest = _like(p, state, "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    mean = beta1 * mean + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad * grad
    largest = torch.maximum(largest, square)
    step = _taken(state) + 1
    state.update(exp_avg=mean, exp_avg_sq=square, max_exp_avg_sq=largest)
    spread = root(largest) / (1 - beta2**step) ** 0.5 + group["eps"]
    return p - group["lr"] / (1 - beta1**step) * (mean / spread)


class DifferentiableAdadelta(Rule):
    """torch.optim.Adadelta (Zeiler 2012)."""

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        rho, eps = group["rho"], group["eps"]
        grad = _decayed(group, p, grad)
        square, moved = _like(p, state, "square_avg", "acc_delta")
        square = rho * square + (1 - rho) * grad * grad
        delta = root(moved + eps) / root(square + eps) * grad
        state.update(step=_taken(state) + 1, square_avg=square, acc_delta=rho * moved + (1 - rho) * delta * delta)
        return p - group["lr"] * delta


class DifferentiableAdagrad(Rule):
    """torch.optim.Adagrad (Duchi, Hazan, Singer 2011)."""

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        grad = _decayed(group, p, grad)
        before = state.get("sum")
        if before is None:
            before = torch.full_like(p.detach(), group.get("initial_accumulator_value", 0.0))
        total = before + grad * grad
        rate = group["lr"] / (1 + _taken(state) * group["lr_decay"])
        state["sum"] = total
        return p - rate * (grad / (root(total) + group.get("eps", 1e-10)))


class DifferentiableAdamax(Rule):
    """torch.optim.Adamax (Kingma, Ba 2015)."""

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        beta1, beta2 = group["betas"]
        grad = _decayed(group, p, grad)
        mean, largest = _like(p, state, "exp_avg", "exp_inf")
        mean = beta1 * mean + (1 - beta1) * grad
        largest = torch.maximum(beta2 * largest, grad.abs() + group["eps"])
        step = _taken(state) + 1
        state.update(exp_avg=mean, exp_inf=largest)
        return p - group["lr"] / (1 - beta1**step) * (mean / largest)


class DifferentiableASGD(Rule):
    """torch.optim.ASGD (Polyak, Juditsky 1992); the average is `state[group][position]["ax"]`."""

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        grad = _decayed(group, p, grad)
        (average,) = _like(p, state, "ax")
        eta: Any = state["eta"] if "eta" in state else group["lr"]
        weight = float(state.get("mu", 1.0))
        new = p * (1 - group["lambd"] * eta) - eta * grad
        step = _taken(state) + 1
        state["ax"] = new if weight == 1 else average + (new - average) * weight
        state["eta"] = group["lr"] / (1 + group["lambd"] * group["lr"] * step) ** group["alpha"]
        state["mu"] = 1 / max(1.0, step - float(group["t0"]))
        return new


class DifferentiableRMSprop(Rule):
    """torch.optim.RMSprop (Hinton 2012; centred: Graves 2013)."""

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        spec = UpdateSpec(
            "rmsprop",
            momentum=_given(group["momentum"]),
            centered=bool(group["centered"]),
            decayed=_given(group["weight_decay"]),
        )
        return _by_spec(spec, {**group, "beta2": group["alpha"]}, group, p, grad, state, _taken(state))


class DifferentiableRprop(Rule):
    """torch.optim.Rprop (Riedmiller, Braun 1993).

    It sees the signs of gradients alone, whose derivative is zero: meta-gradients have no second-order part.
    """

    @staticmethod
    def stepped(group: Group, p: Tensor, grad: Tensor, state: State) -> Tensor:
        (smaller, larger), (least, most) = group["etas"], group["step_sizes"]
        (before,) = _like(p, state, "prev")
        fresh = state.get("step_size") is None
        size: Any = group["lr"] + grad.detach().new_zeros(grad.shape) if fresh else state["step_size"]
        agreed = (grad * before).sign().detach()
        factor = torch.ones_like(agreed)
        factor = torch.where(agreed > 0, larger, torch.where(agreed < 0, smaller, factor))
        size = (size * factor).clamp(min=least).clamp(max=most)
        grad = torch.where(agreed < 0, torch.zeros_like(grad), grad)
        _taken(state)
        state.update(prev=grad, step_size=size)
        return p - grad.sign() * size
