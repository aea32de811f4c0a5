"""`mtml::task_update`: one step of an update rule for all tensors of all tasks, differentiable any number of times.

The way back is one call of the backend; where it is differentiated itself, its derivative is that of PyTorch operations
(the vjp of the formula's vjp). Doors as for the layers (task_layers.py): eager code and torch.func take the
autograd.Functions, whatever traces the registered ops, forward mode the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels import native
from mtml_kernels.native.task_update import update_backward, update_forward
from mtml_kernels.ops.common import contiguous, own_memory, recording, resolved_name_in
from mtml_kernels.ops.registration import Rules, register_op
from mtml_kernels.ops.task_update_checks import check_arguments, check_cotangents
from mtml_kernels.reference.task_update import task_update
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schedule.task_update import torch_update
from mtml_kernels.schema.dtypes import cpu_supports, floating_supports
from mtml_kernels.schema.task_update import BACKWARD_SCHEMA, FORWARD_SCHEMA, UpdateArgs, UpdateForm, form_of
from mtml_kernels.transforms import abstract, alive, is_forward_mode
from mtml_kernels.triton.backends import TASK_UPDATE

__all__ = ["BACKENDS", "task_update_call"]

BACKENDS = Registry("task_update")
WAY_OUT = "mtml_kernels.task_update, which every transform differentiates any number of times."

# --- backends: forward(args, form) -> results; backward(cotangents, args, form) -> gradients of args.flat() -----------


def _reference_forward(a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
    with torch.no_grad():
        return [own_memory(t, a.flat()) for t in task_update(a, form)]


def _reference_backward(cotangents: Sequence[Tensor], a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
    with recording():
        leaves = [t.detach().requires_grad_() for t in a.flat()]
        found = task_update(a.divide(leaves), form)
        pairs = [(t, c) for t, c in zip(found, cotangents, strict=True) if t.requires_grad]
        grads = torch.autograd.grad([t for t, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
    held = [*leaves, *cotangents]
    return [torch.zeros_like(t) if g is None else own_memory(g, held) for t, g in zip(leaves, grads, strict=True)]


BACKENDS.register(Backend("cpu", native.availability, update_forward, update_backward, cpu_supports))
BACKENDS.register(TASK_UPDATE)
BACKENDS.register(Backend("torch", lambda: None, torch_update.forward, torch_update.backward, floating_supports))
BACKENDS.register(Backend(REFERENCE, lambda: None, _reference_forward, _reference_backward))
_resolved_name = resolved_name_in(BACKENDS)


# --- the doors --------------------------------------------------------------------------------------------------------


class Static(NamedTuple):
    """What is known of a call beside its tensors: how many parameters and moments are among these, too."""

    form: UpdateForm
    backend: str
    params: int
    moments: int

    def args(self, flat: Sequence[Tensor]) -> UpdateArgs:
        """The arguments, from all tensors in their order."""
        n, at = self.params, 3 * self.params + self.moments
        flat = list(flat)
        return UpdateArgs(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n : at], flat[at])

    @property
    def results(self) -> int:
        """How many tensors come back."""
        return self.params * (1 + len(self.form.spec.moments))


def _static(a: UpdateArgs, form: UpdateForm, backend: str) -> Static:
    return Static(form, backend, len(a.params), len(a.moments))


def _tracing() -> bool:
    return bool(is_compiling() or torch._C._len_torch_dispatch_stack())


def _formulas_only() -> bool:
    return is_forward_mode() or (torch._C._are_functorch_transforms_active() and _tracing())


def _call(a: UpdateArgs, static: Static) -> list[Tensor]:
    form = static.form
    if _formulas_only():
        return task_update(a, form)
    if _tracing():
        found: list[Tensor] = torch.ops.mtml.task_update(*a, form.spec.encode(), form.step, static.backend)
        return found
    flat = a.flat()
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in flat)
    if recorded or torch._C._are_functorch_transforms_active():
        return list(_Update.apply(static, *flat))
    return list(BACKENDS.named(static.backend).forward(a, form))


def _formula_backward(static: Static, cotangents: Sequence[Tensor], flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients by PyTorch operations, differentiable any number of times."""

    def results(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_update(static.args(flat), static.form))

    found: tuple[Tensor, ...] = torch.func.vjp(results, *flat)[1](tuple(cotangents))
    return found


def _backward_call(static: Static, cotangents: Sequence[Tensor], flat: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients of all tensors, differentiable."""
    if _formulas_only():
        return _formula_backward(static, cotangents, flat)
    if _tracing():
        form, a = static.form, static.args(flat)
        found: list[Tensor] = torch.ops.mtml.task_update_backward(
            list(cotangents), *a, form.spec.encode(), form.step, static.backend
        )
        return found
    gradients: tuple[Tensor, ...] = _Gradients.apply(static, *cotangents, *flat)
    return gradients


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(static: Static, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(BACKENDS.named(static.backend).forward(static.args(flat), static.form))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static, *flat = inputs
        ctx.save_for_backward(*flat)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        static, flat = ctx.static, alive(ctx.saved_tensors)
        if torch.is_grad_enabled() or abstract(*cotangents):
            return (None, *_backward_call(static, cotangents, flat))
        given = [contiguous(c) for c in cotangents]
        return (None, *BACKENDS.named(static.backend).backward(given, static.args(flat), static.form))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *flat: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        dims = in_dims[1:]
        if dims[-1] is not None:  # numbers of its own for each of the batch
            return _one_by_one(info, dims, flat, lambda ts: _call(static.args(ts), static))
        batch, n = info.batch_size, static.params
        first = [t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(flat, dims, strict=True)]
        tasks = first[0].shape[1]
        folded = [t.flatten(0, 1) for t in first[:-1]]
        for i in range(2 * n, 3 * n):  # a rate may stand for all tasks
            if first[i].shape[1] == 1:
                one = dims[i] is None
                folded[i] = flat[i] if one else first[i].expand(batch, tasks, *first[i].shape[2:]).flatten(0, 1)
        found = _call(static.args([*folded, flat[-1]]), static)
        return tuple(t.unflatten(0, (batch, tasks)) for t in found), (0,) * len(found)


class _Gradients(torch.autograd.Function):
    """The way back from the backend; its derivative is that of the formula."""

    @staticmethod
    def forward(static: Static, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = [t.contiguous() for t in tensors[: static.results]]
        args = static.args(tensors[static.results :])
        return tuple(BACKENDS.named(static.backend).backward(given, args, static.form))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_formula_again(ctx.static, cotangents, alive(ctx.saved_tensors)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        n = static.results
        return _one_by_one(info, in_dims[1:], tensors, lambda ts: _backward_call(static, ts[:n], ts[n:]))


def _formula_again(static: Static, cotangents: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _formula_backward(static, tensors[: static.results], tensors[static.results :])

    found: tuple[Tensor, ...] = torch.func.vjp(gradients, *tensors)[1](tuple(cotangents))
    return found


def _one_by_one(
    info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor], run: Any
) -> tuple[tuple[Tensor, ...], Any]:
    """A call for each of the batch."""
    found = [
        run([t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)])
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


# --- the registered ops -----------------------------------------------------------------------------------------------


def _read(arguments: Sequence[Any]) -> tuple[UpdateArgs, Static]:
    """(args, what is not a tensor) of the op's arguments."""
    *tensors, rule, step, backend = arguments
    a = UpdateArgs(*tensors)
    return a, _static(a, form_of(rule, step), backend)


def _forward(*arguments: Any) -> list[Tensor]:
    a, static = _read(arguments)
    check_arguments(a, static.form)
    return list(BACKENDS.named(static.backend).forward(a, static.form))


def _forward_fake(*arguments: Any) -> list[Tensor]:
    a, static = _read(arguments)
    check_arguments(a, static.form, traced=True)
    return [t.new_empty(t.shape) for t in a.results(static.form.spec)]


def _backward(cotangents: list[Tensor], *arguments: Any) -> list[Tensor]:
    a, static = _read(arguments)
    check_arguments(a, static.form)
    check_cotangents(cotangents, a, static.form)
    given = [contiguous(c) for c in cotangents]
    return list(BACKENDS.named(static.backend).backward(given, a, static.form))


def _backward_fake(cotangents: list[Tensor], *arguments: Any) -> list[Tensor]:
    a, static = _read(arguments)
    check_arguments(a, static.form, traced=True)
    return [t.new_empty(t.shape) for t in a.flat()]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    a, ctx.static = _read(inputs)
    ctx.save_for_backward(*a.flat())


def _gradient(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    found = _backward_call(ctx.static, cotangents, ctx.saved_tensors)
    return (*ctx.static.args(found), None, None, None)


def _setup_again(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    cotangents, *rest = inputs
    a, ctx.static = _read(rest)
    ctx.save_for_backward(*cotangents, *a.flat())


def _gradient_again(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    found = _formula_again(ctx.static, cotangents, ctx.saved_tensors)
    n = ctx.static.results
    return (list(found[:n]), *ctx.static.args(found[n:]), None, None, None)


_rules = Rules(_forward, _forward_fake, _backward, _backward_fake, _setup, _gradient, _setup_again, _gradient_again)
_library = register_op((FORWARD_SCHEMA, BACKWARD_SCHEMA), _rules, way_out=WAY_OUT)


def task_update_call(a: UpdateArgs, form: UpdateForm, backend: str) -> list[Tensor]:
    """The parameters after one step, then the moments, by the door that is right here.

    Raises:
        TypeError, ValueError: a tensor does not fit.
        BackendUnavailable: the backend asked for cannot run here.
    """
    check_arguments(a, form, traced=_tracing())
    like = a.params[0]
    return _call(a, _static(a, form, _resolved_name(backend, like.device.type, like.dtype)))
