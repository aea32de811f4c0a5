"""`task_update` by a provider's kernels, a tensor [T, *shape] as a plane [T, 1, n]: its backends `torch`, `triton`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mtml_kernels.schedule.call import ABSENT, Part, by_tensor
from mtml_kernels.schedule.kernels import Rule
from mtml_kernels.schedule.run import Kernel
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.task_update import UpdateArgs, UpdateForm

__all__ = ["Update", "torch_update"]

_MOST = 3  # moments


def _planes(tensors: Sequence[Tensor]) -> list[Any]:
    return [t.reshape(t.shape[0], 1, t.shape[1:].numel()) for t in tensors]


class Update:
    """The step and its way back. `kernels`: a provider's, by name."""

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._kernels = kernels

    def run(self, kernel: str, constants: Any, wants: Sequence[bool], *operands: Tensor | None) -> Sequence[Any]:
        """One kernel's results."""
        part = Part(kernel, (), tuple(0 if want else ABSENT for want in wants), constants)
        return self._kernels[kernel](part, *operands)

    def forward(self, a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
        """The parameters after one step, then the moments."""
        call, count, n = _Call(a, form, self.run), 1 + len(form.spec.moments), len(a.params)
        wants = [True] * ((1 + _MOST) * n)
        found = by_tensor(self.run("update.rule", call.rule, wants, *call.operands, call.hyper), 1 + _MOST)
        # a first step's buffer is the gradient itself, which no result may alias
        every = ((found[i][j], p, j > 0) for j in range(count) for i, p in enumerate(a.params))
        return [result.reshape(p.shape).to(p.dtype, copy=copy) for result, p, copy in every]

    def backward(self, cotangents: Sequence[Tensor], a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
        """Gradients of `a.flat()`."""
        call, n, m = _Call(a, form, self.run), len(a.params), len(form.spec.moments)
        given = [*_planes(cotangents), *[None] * ((_MOST - m) * n)]
        wants = [True] * ((3 + _MOST) * n + 1)
        *planes, hyper = self.run("update.adjoint", call.rule, wants, *call.operands, *given, call.hyper)
        found = by_tensor(planes, 3 + _MOST)  # of the gradient, the parameter, the moments, the rate
        grads = [own[0] for own in found]
        if call.scale is not None:
            *grads, more = self.run("update.unclip", n, [True] * (n + 1), call.hyper, call.scale, *grads, *call.raw)
            hyper = hyper + more
        moments = [found[i][2 + j] for j in range(len(a.moments) // n) for i in range(n)]
        flat = [*(own[1] for own in found), *grads, *(own[5] for own in found), *moments, hyper]
        return [_shaped(g, t) for g, t in zip(flat, a.flat(), strict=True)]


class _Call:
    """The operands of the kernels, gradients clipped."""

    def __init__(self, a: UpdateArgs, form: UpdateForm, run: Callable[..., Sequence[Any]]) -> None:
        self.rule, self.spec, self.hyper = Rule(form.spec, form.step), form.spec, a.hyper
        self.theta, self.raw, self.rates = _planes(a.params), _planes(a.grads), _planes(a.rates)
        moments = _planes(a.moments)
        self.moments = [*moments, *[None] * (_MOST * len(a.params) - len(moments))]
        self.grads, self.scale = self.raw, None
        if self.spec.clipped:
            self.scale, *self.grads = run("update.clip", None, [True] * (1 + len(self.raw)), self.hyper, *self.raw)

    @property
    def operands(self) -> list[Tensor | None]:
        """Of the rule, role after role."""
        return [*self.theta, *self.grads, *self.rates, *self.moments]


def _shaped(g: Tensor | None, t: Tensor) -> Tensor:
    """A gradient in the form of its tensor, in memory of its own."""
    if g is None:
        return t.new_zeros(t.shape)
    return g.reshape(t.shape).to(t.dtype, copy=True)


torch_update = Update(TORCH)
