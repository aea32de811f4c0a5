"""`inner_loop` by schedule: forward and backward as the backends of `ops.inner_loop` have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schedule.call import ABSENT, Plane, Schedule
from mtml_kernels.schedule.loop import Given
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.inner_loop import PER_STEP, Grads, InnerLoopArgs, Outputs, empty_outputs, output_shapes

__all__ = ["scheduled_backward", "scheduled_forward"]


class Cotangents(NamedTuple):
    """What came in, by the names of `Source`."""

    grad_loss: Tensor | None
    grad_output: Tensor | None
    grad_support_losses: Tensor | None
    grad_adapted: Sequence[Tensor | None]

    @property
    def given(self) -> Given:
        """Which are there."""
        single = (self.grad_loss, self.grad_output, self.grad_support_losses)
        loss, output, support = (t is not None for t in single)
        return Given(loss, output, support, tuple(t is not None for t in self.grad_adapted))


_LISTS = frozenset({"params", "lr", "support_x", "query_x", "hyper", "moments", "grad_adapted"})
_bound: dict[int, tuple[Schedule, Bound]] = {}
_MAX_BOUND = 512
_OF_SUPPORT = (2, 6, 8)  # among `InnerLoopArgs.groups`: support_x, support_y, support_mask


def _parts(schedule: Schedule) -> Bound:
    """The schedule with its kernels, made once."""
    found = _bound.get(id(schedule))
    if found is None or found[0] is not schedule:
        if len(_bound) >= _MAX_BOUND:
            _bound.clear()
        found = _bound[id(schedule)] = schedule, Bound.of(schedule, TORCH)
    return found[1]


class _Arguments:
    """The tensors of a call, by planes."""

    def __init__(self, a: InnerLoopArgs, cotangents: Cotangents | None = None) -> None:
        self.a, self.cotangents = a, cotangents
        self.per_step = a.spec.has(PER_STEP)

    def __call__(self, plane: Plane) -> Tensor:
        """As the plane has it: of one step, in the plane's shape."""
        source = plane.source
        assert source is not None
        owner: Any = self.cotangents if source.field.startswith("grad_") else self.a
        tensor = getattr(owner, source.field)
        tensor = tensor[source.position] if source.field in _LISTS else tensor
        if source.step is not None:
            tensor = tensor[:, source.step] if source.field.startswith("support_") else tensor[source.step]
        tensor = tensor.detach()
        if tensor.is_floating_point() and tensor.dtype != plane.dtype and source.field != "params":
            tensor = tensor.to(plane.dtype)
        return tensor.reshape(plane.shape)


def _fresh(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, others: set[int]) -> Tensor:
    """A result in memory of its own, contiguous and of the caller's dtype."""
    result = tensor.to(dtype).reshape(shape).contiguous()
    if result.device.type != "meta" and result.numel():
        at = result.untyped_storage().data_ptr()
        if at in others or result.untyped_storage().nbytes() != result.numel() * result.element_size():
            result = result.clone()
        others.add(result.untyped_storage().data_ptr())
    return result


def _memory(tensors: Sequence[Tensor | None]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel() and t.device.type != "meta"}


def _inputs(a: InnerLoopArgs) -> list[Tensor | None]:
    return [*(t for _, tensors in a.groups for t in tensors), *a.fixed]


def scheduled_forward(a: InnerLoopArgs) -> Outputs:
    """The op's forward; the carry is what the usual way back reads."""
    if not a.tasks:
        return empty_outputs(a, [])
    plan = plan_of(a)
    memory = _parts(plan.there).run(_Arguments(a), {})
    loss, output, support, kept = output_shapes(a)
    dtype, taken = a.params[0].dtype, _memory([*_inputs(a), *(memory[i] for i in plan.there.kept)])
    results = []
    for i, shape in zip(plan.there.results, [loss, output, support, *kept], strict=True):
        found = memory[i] if i != ABSENT else None
        made = a.params[0].new_zeros(shape) if found is None else _fresh(found, shape, dtype, taken)
        results.append(made)
    carry = [memory[i] for i in plan.there.kept]
    return results[0], results[1], results[2], results[3:], [t for t in carry if t is not None]


def scheduled_backward(
    grad_loss: Tensor | None,
    grad_output: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_adapted: Sequence[Tensor | None],
    a: InnerLoopArgs,
    carry: Sequence[Tensor],
) -> tuple[Grads, ...]:
    """The op's backward. Where the carry did not come along, or other cotangents than the usual ones read more than it
    has, the way there is gone again.
    """
    cotangents = Cotangents(grad_loss, grad_output, grad_support_losses, grad_adapted)
    single = (grad_loss, grad_output, grad_support_losses)
    if not (a.needs and a.tasks) or all(g is None for g in (*single, *grad_adapted)):
        return tuple(_group(a, at, [], [], set()) for at in range(len(a.groups)))
    plan, arguments = plan_of(a), _Arguments(a, cotangents)
    trip = plan.trip(cotangents.given)
    if cotangents.given == plan.usually and len(carry) == len(plan.there.kept):
        before = dict(zip(plan.there.kept, carry, strict=True))
    else:
        again = _parts(trip.there).run(arguments, {})
        before = {i: t for i in trip.there.kept if (t := again[i]) is not None}
    memory = _parts(trip.back).run(arguments, before)
    taken = _memory([*_inputs(a), *before.values(), *single, *grad_adapted])
    return tuple(_group(a, at, planes, memory, taken) for at, planes in enumerate(trip.groups))


def _group(
    a: InnerLoopArgs, at: int, planes: Sequence[int], memory: Sequence[Tensor | None], taken: set[int]
) -> list[Tensor | None]:
    """One group of gradients in the shapes of their tensors."""
    needed, tensors = a.groups[at]
    found: list[Tensor | None] = []
    for i, own in enumerate(tensors):
        tensor = memory[planes[i]] if planes and planes[i] != ABSENT else None
        if not needed or not own.is_floating_point():
            found.append(None)
        elif tensor is None:
            found.append(own.new_zeros(a.gradient_shape(at, i)))
        else:
            if a.spec.has(PER_STEP) and at in _OF_SUPPORT:  # [K, T, S, ...], as the caller has it [T, K, S, ...]
                tensor = tensor.transpose(0, 1)
            found.append(_fresh(tensor, a.gradient_shape(at, i), own.dtype, taken))
    return found
