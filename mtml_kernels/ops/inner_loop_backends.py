"""The backends of `mtml::inner_loop`: the compiled CPU engine, the schedule in Triton and in PyTorch, the plain
PyTorch reference.

A backend's two callables:

    forward(a) -> (loss, output, support_losses, [adapted parameters], [carry])
    backward(grad_loss, grad_output, grad_support_losses, [grad or None per adapted output], a, carry)
        -> (grads of params, of lr, of support_x, of query_x, of hyper, of moments, and four lists of one or none: of
            support_y, of query_y, of support_mask, of query_mask)

with `a` an `InnerLoopArgs`. Cotangents may be None and are contiguous otherwise; inputs
may have any strides. Outputs, carry and gradients are contiguous, each in memory of its own. The carry is empty where
`needs` is 0, and has the shapes and dtypes of `carry_shapes(a)` otherwise; of a backend without that function the
registered op drops it, and backward does without. A group of gradients that
`needs` does not ask for is a list of None; in one that it does, None may stand for zeros and for integer tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtml_kernels import native
from mtml_kernels.checks import check_ids
from mtml_kernels.cuda.backends import INNER_LOOP as CUDA_INNER_LOOPS
from mtml_kernels.native.inner_loop import (
    AUTO,
    LOW_RANK,
    WEIGHTS,
    inner_loop_backward,
    inner_loop_carry_shapes,
    inner_loop_forward,
)
from mtml_kernels.native.inner_loop_lane import engine_lane
from mtml_kernels.ops.common import own_memory, recording
from mtml_kernels.program import decode
from mtml_kernels.reference.inner_loop import inner_loop as reference_inner_loop
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schedule.backend import torch_schedule
from mtml_kernels.schema.dtypes import cpu_supports, floating_supports
from mtml_kernels.schema.inner_loop import (
    DATA,
    DATA_NEEDS,
    NEED_HYPER,
    NEED_LR,
    NEED_MOMENTS,
    NEED_PARAMS,
    NEED_QUERY_X,
    NEED_SUPPORT_X,
    STARTS,
    TASKS_APART,
    Grads,
    InnerLoopArgs,
    Outputs,
    output_shapes,
)
from mtml_kernels.triton.backends import INNER_LOOP

__all__ = ["BACKENDS", "FORMS"]

GradGroups = tuple[Grads, ...]

BACKENDS = Registry("inner_loop")


def _tensors(a: InnerLoopArgs) -> list[Tensor]:
    return [*(t for _, tensors in a.groups for t in tensors), *(t for t in a.fixed if t is not None)]


def _check_tables(a: InnerLoopArgs) -> None:
    """Raise ValueError for an id that is no row of its embedding's table."""
    for at, rows in decode(tuple(a.spec.program)).tables:
        for name, inputs in (("support_x (sx)", a.support_x if a.spec.steps else []), ("query_x (qx)", a.query_x)):
            if inputs:
                check_ids(name, inputs[at], rows)


def _run_reference(a: InnerLoopArgs, own: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _check_tables(a)
    loss, output, support_losses, kept = reference_inner_loop(a, own)
    return loss, output, support_losses, list(kept)


def _reference_forward(a: InnerLoopArgs) -> Outputs:
    with recording(), torch.no_grad():
        loss, output, support_losses, adapted = _run_reference(a)
    inputs = _tensors(a)
    *shapes, kept_shapes = output_shapes(a)
    # A loop over no tasks has nothing to stack, so that the other sizes of an empty result are not known there.
    loss, output, support_losses, *kept = (
        own_memory(t.reshape(shape), inputs)
        for t, shape in zip((loss, output, support_losses, *adapted), (*shapes, *kept_shapes), strict=True)
    )
    return loss, output, support_losses, kept, []


def _leaves(tensors: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    return [t.detach().requires_grad_(wanted and t.is_floating_point()) for t in tensors]


def _leaf(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    return None if tensor is None else _leaves([tensor], wanted)[0]


def _reference_backward(
    grad_loss: Tensor | None,
    grad_output: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_adapted: list[Tensor | None],
    a: InnerLoopArgs,
    carry: Sequence[Tensor],
) -> GradGroups:
    cotangents = [grad_loss, grad_output, grad_support_losses, *grad_adapted]
    data: dict[str, Any] = {}
    for name, bit in zip(DATA, DATA_NEEDS, strict=True):
        data[name] = _leaf(getattr(a, name), bool(a.needs & bit))
    with recording():
        leaves = a._replace(
            params=_leaves(a.params, bool(a.needs & NEED_PARAMS)),
            lr=_leaves(a.lr, bool(a.needs & NEED_LR)),
            support_x=_leaves(a.support_x, bool(a.needs & NEED_SUPPORT_X)),
            query_x=_leaves(a.query_x, bool(a.needs & NEED_QUERY_X)),
            hyper=_leaves(a.hyper, bool(a.needs & NEED_HYPER)),
            moments=_leaves(a.moments, bool(a.needs & NEED_MOMENTS)),
            **data,
        )
        own = None
        if a.spec.has(TASKS_APART):
            own = [True] * len(a.params)
            leaves = leaves._replace(params=[_apart(leaves, i) for i in range(len(own))])
        loss, output, support_losses, adapted = _run_reference(leaves, own)
        return _pull_back([loss, output, support_losses, *adapted], cotangents, leaves)


def _apart(a: InnerLoopArgs, param: int) -> Tensor:
    """A parameter as each task's own, so that its gradients come a task."""
    tensor = a.params[param]
    if a.spec.adapted[param] and a.spec.has(STARTS):
        return tensor
    return tensor.detach().expand(a.tasks, *tensor.shape).clone().requires_grad_(tensor.requires_grad)


def _pull_back(outputs: list[Tensor], cotangents: list[Tensor | None], a: InnerLoopArgs) -> GradGroups:
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None and o.requires_grad]
    groups = [tensors for _, tensors in a.groups]
    wanted = [t for group in groups for t in group if t.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    inputs = [*_tensors(a), *(g for g in cotangents if g is not None)]
    fresh = (torch.zeros_like(t) if g is None else own_memory(g, inputs) for t, g in zip(wanted, found, strict=True))
    filled: list[Grads] = [[next(fresh) if t.requires_grad else None for t in group] for group in groups]
    return tuple(filled)


def _checked(backend: Backend) -> Backend:
    """A backend by schedule that has looked at the ids of embeddings."""

    def forward(a: InnerLoopArgs) -> Outputs:
        _look_at_ids(a)
        outputs: Outputs = backend.forward(a)
        return outputs

    def backward(*arguments: Any) -> tuple[Grads, ...]:
        *_, a, carry = arguments
        if not carry:  # else forward did
            _look_at_ids(a)
        groups: tuple[Grads, ...] = backend.backward(*arguments)
        return groups

    return dataclasses.replace(backend, forward=forward, backward=backward)


def _look_at_ids(a: InnerLoopArgs) -> None:
    if a.params[0].device.type == "cpu":  # elsewhere PyTorch's kernels assert it, and a look would wait for the device
        _check_tables(a)


def _cpu_backend(name: str, form: int) -> Backend:
    return Backend(
        name,
        available=native.availability,
        forward=partial(inner_loop_forward, form=form),
        backward=partial(inner_loop_backward, form=form),
        supports=cpu_supports,
        carry_shapes=partial(inner_loop_carry_shapes, form=form),
        fast_lane=engine_lane(form),
    )


# How tasks' weights are held: as a cost model says, or as asked for.
FORMS = {"cpu": AUTO, "cpu:weights": WEIGHTS, "cpu:low_rank": LOW_RANK}
for _name, _form in FORMS.items():
    BACKENDS.register(_cpu_backend(_name, _form))
BACKENDS.register(_checked(INNER_LOOP))
BACKENDS.register(
    _checked(
        Backend(
            "torch",
            available=lambda: None,
            forward=torch_schedule.forward,
            backward=torch_schedule.backward,
            supports=floating_supports,
        )
    )
)
# Behind `torch`, which takes every call: for those who ask by name, as no GPU has timed it and it has no convolutions.
for _cuda in CUDA_INNER_LOOPS:
    BACKENDS.register(_checked(_cuda))
BACKENDS.register(Backend(REFERENCE, available=lambda: None, forward=_reference_forward, backward=_reference_backward))
