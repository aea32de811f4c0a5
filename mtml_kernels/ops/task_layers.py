"""Layers of many tasks, y[t] = f(P(x[t], W[t]) + b[t]) with P linear in both: what `task_linear`, `task_conv2d` share.

Differentiable any number of times, because the way back consists of the same two operations. With g = dy f'(z), X and
W the adjoints of P to its operands (results of the backward operation), and c the cotangents of its results:

    forward     y  = f(P(x, w) + b)
    backward    dx = X(g, w)        dw = W(g, x)        db = sum g
    of which    gbar = P(cx, w) + P(x, cw) + cb         to x: X(g, cw)      to w: W(g, cx)
                to dy and z, by the adjoint of dy f'(z), and from z on as in backward

A weight or bias of one task stands for all. Doors: eager code and torch.func take the autograd.Functions, whatever
traces the registered ops; forward mode takes the PyTorch formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.ops.common import contiguous, own_memory, recording
from mtml_kernels.precision import plainly
from mtml_kernels.registry import Backend, Registry
from mtml_kernels.schedule.call import ABSENT, Part
from mtml_kernels.transforms import abstract, alive, is_forward_mode

__all__ = [
    "Static",
    "TaskLayer",
    "adjoint",
    "backward_call",
    "backward_now",
    "forward_now",
    "layer_call",
    "part",
    "reference_backend",
    "spread",
]

Grads = list[Tensor | None]


class TaskLayer(NamedTuple):
    """One op of this kind.

    formula: (x, weight, bias, form) -> y in PyTorch, differentiable any number of times.
    slope: (z, d, form) -> d f'(z), likewise; None where no form has an activation.
    `form` is a NamedTuple in the order of the op's schema, whose `plain` has no activation.
    backends: forward(x, weight, bias, form) -> y; backward(d, y, x, weight, bias, form, needs) -> [dx, dw, db], None
    where the bit of `needs` is not set; d is contiguous.
    read: makes a form of the options in the order of the schema.
    check: (x, weight, bias, form), raises where they do not fit.
    """

    name: str
    backends: Registry
    formula: Callable[..., Tensor]
    slope: Callable[..., Tensor] | None
    read: Callable[..., Any]
    check: Callable[..., None]

    @property
    def op(self) -> Any:
        """The registered op."""
        return getattr(torch.ops.mtml, self.name)

    @property
    def backward_op(self) -> Any:
        """Its backward op."""
        return getattr(torch.ops.mtml, f"{self.name}_backward")


class Static(NamedTuple):
    """What is known of a call beside its tensors."""

    layer: TaskLayer
    form: Any
    backend: str

    @property
    def plain(self) -> Static:
        """The same call without the activation."""
        return self._replace(form=self.form.plain)

    @property
    def curved(self) -> bool:
        """Whether there is an activation."""
        return bool(self.form != self.form.plain)


def part(kernel: str, constants: Any, wants: Sequence[bool] = (True,)) -> Part:
    """What the schedule's kernels in PyTorch are told beside their operands."""
    return Part(kernel, (), tuple(0 if want else ABSENT for want in wants), constants)


def reference_backend(name: str, formula: Callable[..., Tensor]) -> Backend:
    """The formula and autograd."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: Any) -> Tensor:
        with torch.no_grad():
            return own_memory(formula(x, weight, bias, form), [t for t in (x, weight, bias) if t is not None])

    def backward(d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: Any, needs: int) -> Grads:
        with recording():
            leaves = [
                t if t is None else t.detach().requires_grad_(bool(needs >> i & 1))
                for i, t in enumerate((x, weight, bias))
            ]
            found = formula(*leaves, form)
            asked = [t for t in leaves if t is not None and t.requires_grad]
            grads: Sequence[Any] = [None] * len(asked)
            if found.requires_grad:
                grads = torch.autograd.grad(found, asked, d, allow_unused=True)
        pairs = zip(asked, grads, strict=True)
        own = iter([torch.zeros_like(t) if g is None else own_memory(g, [d, *asked]) for t, g in pairs])
        return [next(own) if t is not None and t.requires_grad else None for t in leaves]

    return Backend(name, lambda: None, forward, backward)


# --- the doors --------------------------------------------------------------------------------------------------------


def _tracing() -> bool:
    return bool(is_compiling() or torch._C._len_torch_dispatch_stack())


def _formulas_only() -> bool:
    """Forward mode, whose rules PyTorch runs with forward mode switched off, and transforms that are traced."""
    return is_forward_mode() or (torch._C._are_functorch_transforms_active() and _tracing())


def layer_call(static: Static, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y by the door that is right here. x [T, N, ...], weight [T or 1, O, ...], bias [T or 1, O] or None."""
    if _formulas_only():
        with plainly(x):
            return static.layer.formula(x, weight, bias, static.form)
    if _tracing():
        found: Tensor = static.layer.op(x, weight, bias, *static.form, static.backend)
        return found
    given = [t for t in (x, weight, bias) if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if recorded or torch._C._are_functorch_transforms_active():
        y: Tensor = _Forward.apply(static, x, weight, bias)
        return y
    return forward_now(static, x, weight, bias)


def forward_now(static: Static, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = static.layer.backends.named(static.backend).forward(x, weight, bias, static.form)
    return y


def backward_now(
    static: Static, needs: int, d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Grads:
    backend = static.layer.backends.named(static.backend)
    found: Grads = backend.backward(contiguous(d), y, x, weight, bias, static.form, needs)
    return found


def spread(found: Sequence[Tensor], needs: int) -> Grads:
    given = iter(found)
    return [next(given) if needs >> i & 1 else None for i in range(3)]


def backward_call(
    static: Static, needs: int, d: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Grads:
    """[dx, dw, db], differentiable; y may lack where there is no activation."""
    if needs == 0:
        return [None, None, None]
    y = d if y is None else y
    if _formulas_only():
        return _by_formula(static, needs, d, x, weight, bias)
    if _tracing():
        found = static.layer.backward_op(d, y, x, weight, bias, *static.form, needs, static.backend)
        return spread(found, needs)
    return spread(_Backward.apply(static, needs, d, y, x, weight, bias), needs)


def _by_formula(static: Static, needs: int, d: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Grads:
    given = [t for t in (x, weight, bias) if t is not None]

    def formula(*tensors: Tensor) -> Tensor:
        x, weight, *rest = tensors
        return static.layer.formula(x, weight, rest[0] if rest else None, static.form)

    with plainly(d):
        found = [*torch.func.vjp(formula, *given)[1](d), None]
    return [found[i] if needs >> i & 1 else None for i in range(3)]


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(static: Static, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return forward_now(static, x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.static, *tensors = inputs
        ctx.save_for_backward(*tensors, output if ctx.static.curved else None)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = alive(ctx.saved_tensors)
        needs = sum(bool(need) << i for i, need in enumerate(ctx.needs_input_grad[1:]))
        if torch.is_grad_enabled() or abstract(d):
            return (None, *backward_call(ctx.static, needs, d, y, x, weight, bias))
        return (None, *backward_now(ctx.static, needs, d, d if y is None else y, x, weight, bias))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], static: Static, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        batch = info.batch_size
        xs = _fold(x, in_dims[1], batch)
        tasks = xs.shape[0] // max(batch, 1)
        others = [_fold_shared(t, dim, batch, tasks) for t, dim in zip((weight, bias), in_dims[2:], strict=True)]
        y = layer_call(static, xs, *others)
        return y.unflatten(0, (batch, tasks)), 0


def _fold(t: Tensor, dim: int | None, batch: int) -> Tensor:
    """[T, ...] with a batch at `dim`, or the same for all of it, as [B T, ...]."""
    first = t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    return first.flatten(0, 1)


def _fold_shared(t: Tensor | None, dim: int | None, batch: int, tasks: int, apart: bool = False) -> Any:
    """The same of what may be one for all tasks; `apart`: every sample of the batch is to have its own."""
    if t is None or (dim is None and t.shape[0] == 1 and not apart):
        return t
    first = t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    return first.expand(batch, tasks, *first.shape[2:]).flatten(0, 1)


class _Backward(torch.autograd.Function):
    """y, which follows from the others, gets no gradient: its part is in theirs."""

    @staticmethod
    def forward(
        static: Static, needs: int, d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(g for g in backward_now(static, needs, d, y, x, weight, bias) if g is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.static, ctx.needs, d, _, *tensors = inputs
        ctx.save_for_backward(d, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        d, *tensors = alive(ctx.saved_tensors)
        found = adjoint(ctx.static, spread(cotangents, ctx.needs), d, *tensors)  # type: ignore[arg-type]
        return (None, None, found[0], None, *found[1:])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], static: Static, needs: int, *tensors: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batch = info.batch_size
        d, y, x = (_fold(t, dim, batch) for t, dim in zip(tensors[:3], in_dims[2:5], strict=True))
        tasks = x.shape[0] // max(batch, 1)
        shared = [
            t if t is None or dim is None else t.select(dim, 0) for t, dim in zip(tensors[3:], in_dims[5:], strict=True)
        ]
        others = [
            _fold_shared(t, dim, batch, tasks, apart=bool(needs >> i & 1))
            for i, (t, dim) in enumerate(zip(tensors[3:], in_dims[5:], strict=True), 1)
        ]
        found = backward_call(static, needs, d, y, x, *others)
        own = [g if g is None else g.unflatten(0, (batch, tasks)) for g in found]
        for i, t in enumerate(shared, 1):
            g = own[i]
            if g is not None and t is not None and t.shape[0] == 1:  # a sum over the tasks
                own[i] = g.sum(1, keepdim=True)
        results = tuple(g for g in own if g is not None)
        return results, (0,) * len(results)


def adjoint(static: Static, cotangents: Grads, d: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Grads:
    """From the cotangents of [dx, dw, db] to those of d, x, weight and bias: the formulas at the head of this file."""
    cx, cw, cb = cotangents
    plain, g = static.plain, d
    pull: Any = None
    if static.curved:
        slope = static.layer.slope
        assert slope is not None
        z = layer_call(plain, x, weight, bias)
        found: Any = torch.func.vjp(lambda z, d: slope(z, d, static.form), z, d)
        g, pull = found
    terms = [] if cx is None else [layer_call(plain, cx, weight, None if cw is not None else cb)]
    if cw is not None:
        terms.append(layer_call(plain, x, cw, cb))
    if cx is None and cw is None:
        if cb is None:
            return [None, None, None, None]
        terms.append(cb.reshape(cb.shape[0], *_along(d, cb)).expand_as(d))
    bar = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    to_x = None if cw is None else backward_call(plain, 1, g, None, x, cw, None)[0]
    to_w = None if cx is None else backward_call(plain, 2, g, None, cx, weight, None)[1]
    if pull is None:
        return [bar, to_x, to_w, None]
    zbar, bar = pull(bar)
    more = backward_call(plain, 3 if bias is None else 7, zbar, None, x, weight, bias)
    return [bar, _plus(to_x, more[0]), _plus(to_w, more[1]), more[2]]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _along(d: Tensor, cb: Tensor) -> tuple[int, ...]:
    """The shape of a bias [O] under y [T, N, O, ...], less the tasks."""
    return (1, cb.shape[1], *(1,) * (d.ndim - 3))
