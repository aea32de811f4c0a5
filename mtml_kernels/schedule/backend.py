"""`inner_loop` by schedule: forward and backward as the backends of `ops.inner_loop` have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.schedule.build import Plan, Trip, plan_of
from mtml_kernels.schedule.call import ABSENT, Plane, Schedule
from mtml_kernels.schedule.capacity import fits, in_words, needed_bytes, tasks_at_a_time
from mtml_kernels.schedule.graphs import Graphs, Memory, Ticket, wanted
from mtml_kernels.schedule.loop import Given
from mtml_kernels.schedule.pieces import (
    Cut,
    cotangents_of,
    cuts,
    joined_gradients,
    joined_outputs,
    narrowed,
    of_all_tasks,
)
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schedule.torch_kernels.common import wide_dtype
from mtml_kernels.schema.inner_loop import PER_STEP, Grads, InnerLoopArgs, Outputs, empty_outputs, output_shapes

__all__ = ["OF_SUPPORT", "Arguments", "Cotangents", "Scheduled", "group_of", "torch_schedule"]


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
_MAX_BOUND = 512
OF_SUPPORT = (2, 6, 8)  # among `InnerLoopArgs.groups`: support_x, support_y, support_mask


class Arguments:
    """The tensors of a call, by planes."""

    def __init__(self, a: InnerLoopArgs, cotangents: Cotangents | None = None) -> None:
        self.a, self.cotangents = a, cotangents
        self.per_step = a.spec.has(PER_STEP)

    def __call__(self, plane: Plane) -> Tensor:
        """As the plane has it: of one step, in the plane's shape."""
        source = plane.source
        assert source is not None
        tensor = self.tensor(source.field, source.position)
        if source.step is not None:
            tensor = tensor[:, source.step] if source.field.startswith("support_") else tensor[source.step]
        tensor = tensor.detach()
        if tensor.is_floating_point() and tensor.dtype != plane.dtype and source.field != "params":
            tensor = tensor.to(plane.dtype)
        return tensor.reshape(plane.shape)

    def tensor(self, field: str, position: int) -> Tensor:
        """The whole tensor of a field, at the position in it where that is a list."""
        owner: Any = self.cotangents if field.startswith("grad_") else self.a
        tensor = getattr(owner, field)
        found: Tensor = tensor[position] if field in _LISTS else tensor
        return found


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


class Scheduled:
    """A backend of `inner_loop` by schedules.

    bind: a schedule with the provider's kernels, made once for each.
    graphs: where schedules are recorded as CUDA graphs, if at all.
    """

    def __init__(self, bind: Callable[[Schedule], Bound], graphs: Graphs | None = None) -> None:
        self._make, self._graphs = bind, graphs
        self._bound: dict[int, tuple[Schedule, Bound]] = {}

    def _bind(self, schedule: Schedule) -> Bound:
        found = self._bound.get(id(schedule))
        if found is None or found[0] is not schedule:
            if len(self._bound) >= _MAX_BOUND:
                self._bound.clear()
            found = self._bound[id(schedule)] = schedule, self._make(schedule)
        return found[1]

    def forward(self, a: InnerLoopArgs) -> Outputs:
        """The op's forward; the carry is what the usual way back reads."""
        if not a.tasks:
            return empty_outputs(a, [])
        plan, device = plan_of(a), a.params[0].device
        with in_words(a, device):
            if fits(needed_bytes(plan), device) or self._forward_is_recorded(plan, device):
                return self._forward(a, plan)
            size = tasks_at_a_time(a, plan, device)
            small = (narrowed(a, cut)._replace(needs=0) for cut in cuts(a.tasks, size))
            return joined_outputs(a, [self._forward(piece, plan_of(piece), recorded=False) for piece in small])

    def _forward(self, a: InnerLoopArgs, plan: Plan, recorded: bool = True) -> Outputs:
        memory, ticket = self._there(plan, Arguments(a), recorded)
        loss, output, support, kept = output_shapes(a)
        alive = memory if ticket else [memory[i] for i in plan.there.kept]
        dtype, taken = a.params[0].dtype, _memory([*_inputs(a), *alive])
        results = []
        for i, shape in zip(plan.there.results, [loss, output, support, *kept], strict=True):
            found = memory[i] if i != ABSENT else None
            made = a.params[0].new_zeros(shape) if found is None else _fresh(found, shape, dtype, taken)
            results.append(made)
        carry = [ticket.tensor()] if ticket else [memory[i] for i in plan.there.kept]
        return results[0], results[1], results[2], results[3:], [t for t in carry if t is not None]

    def _forward_is_recorded(self, plan: Plan, device: torch.device) -> bool:
        """Whether a recording has the memory of the way there."""
        if self._graphs is None:
            return False
        key = wanted(device, plan.there.peak_bytes)
        return key is not None and self._graphs.has_forward(key, self._bind(plan.there))

    def _backward_is_recorded(self, trip: Trip, carry: Sequence[Tensor]) -> bool:
        if self._graphs is None:
            return False
        ticket = Ticket.of(carry)
        return ticket is not None and self._graphs.has_backward(ticket, self._bind(trip.back))

    def _there(self, plan: Plan, arguments: Arguments, recorded: bool) -> tuple[Memory, Ticket | None]:
        """The way there, recorded or plainly: a recording keeps its memory."""
        bound = self._bind(plan.there)
        if self._graphs is not None and recorded:
            key = wanted(arguments.a.params[0].device, plan.there.peak_bytes)
            found = None if key is None else self._graphs.forward(key, bound, arguments)
            if found is not None:
                return found
        return bound.run(arguments, {}), None

    def backward(
        self,
        grad_loss: Tensor | None,
        grad_output: Tensor | None,
        grad_support_losses: Tensor | None,
        grad_adapted: Sequence[Tensor | None],
        a: InnerLoopArgs,
        carry: Sequence[Tensor],
    ) -> tuple[Grads, ...]:
        """The op's backward. Where the carry did not come along, or other cotangents than the usual ones read more than
        it has, the way there is gone again.
        """
        cotangents = Cotangents(grad_loss, grad_output, grad_support_losses, grad_adapted)
        single = (grad_loss, grad_output, grad_support_losses)
        if not (a.needs and a.tasks) or all(g is None for g in (*single, *grad_adapted)):
            return tuple(group_of(a, at, [], [], set()) for at in range(len(a.groups)))
        plan, device = plan_of(a), a.params[0].device
        given = cotangents.given
        usual = carry if given == plan.usually else []
        with in_words(a, device):
            needed = needed_bytes(plan, given, bool(usual))
            if fits(needed, device) or self._backward_is_recorded(plan.trip(given), usual):
                return self._backward(a, plan, cotangents, usual)
            size = tasks_at_a_time(a, plan, device, given)
            return joined_gradients(a, (self._piece(a, cut, cotangents) for cut in cuts(a.tasks, size)))

    def _piece(self, a: InnerLoopArgs, cut: Cut, cotangents: Cotangents) -> tuple[Grads, ...]:
        """The gradients of some tasks; what is summed over tasks in the precision of sums."""
        piece, own = narrowed(a, cut), Cotangents(*cotangents_of(a, cut, *cotangents))
        return self._backward(piece, plan_of(piece), own, [], summing=True)

    def _backward(
        self, a: InnerLoopArgs, plan: Plan, cotangents: Cotangents, carry: Sequence[Tensor], summing: bool = False
    ) -> tuple[Grads, ...]:
        trip = plan.trip(cotangents.given)
        memory, alive = self._back(trip, Arguments(a, cotangents), carry)
        *single, adapted = cotangents
        taken = _memory([*_inputs(a), *alive, *single, *adapted])
        return tuple(group_of(a, at, planes, memory, taken, summing) for at, planes in enumerate(trip.groups))

    def _back(
        self, trip: Trip, arguments: Arguments, carry: Sequence[Tensor]
    ) -> tuple[Memory, Sequence[Tensor | None]]:
        """The planes after the way back, and those whose memory somebody else holds."""
        bound, kept, before = self._bind(trip.back), trip.there.kept, None
        ticket = Ticket.of(carry) if self._graphs is not None else None
        if ticket is not None and self._graphs is not None:
            recorded = self._graphs.backward(ticket, bound, arguments, kept)
            if recorded is not None:
                return recorded, recorded
            before = self._graphs.kept(ticket, kept)
        elif len(carry) == len(kept):
            before = dict(zip(kept, carry, strict=True))
        if before is None:
            again = self._bind(trip.there).run(arguments, {})
            before = {i: t for i in kept if (t := again[i]) is not None}
        return bound.run(arguments, before), [*before.values()]


def group_of(
    a: InnerLoopArgs,
    at: int,
    planes: Sequence[int],
    memory: Sequence[Tensor | None],
    taken: set[int],
    summing: bool = False,
) -> list[Tensor | None]:
    """One group of gradients in the shapes and dtypes of their tensors, but for sums that go on (`summing`)."""
    needed, tensors = a.groups[at]
    found: list[Tensor | None] = []
    for i, own in enumerate(tensors):
        tensor = memory[planes[i]] if planes and planes[i] != ABSENT else None
        if not needed or not own.is_floating_point():
            found.append(None)
        elif tensor is None:
            found.append(own.new_zeros(a.gradient_shape(at, i)))
        else:
            if a.spec.has(PER_STEP) and at in OF_SUPPORT:  # [K, T, S, ...], as the caller has it [T, K, S, ...]
                tensor = tensor.transpose(0, 1)
            dtype = wide_dtype(own.dtype) if summing and of_all_tasks(a, at, i) else own.dtype
            found.append(_fresh(tensor, a.gradient_shape(at, i), dtype, taken))
    return found


torch_schedule = Scheduled(lambda schedule: Bound.of(schedule, TORCH))
