"""The fast lane of `mtml::inner_loop` in eager code: an autograd.Function around one native call there and one back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.schema.inner_loop_lane import LaneCall
from mtml_kernels.transforms import is_forward_mode, under_transform

__all__ = ["Lane", "is_open", "picking", "run"]

Saved = Sequence[Tensor]
Grads = Sequence[Tensor | None]


class Lane(NamedTuple):
    """What calls of one form have in common."""

    call: LaneCall
    gradients: Callable[[Saved, Grads], Grads]  # of all that is saved but the carry, by the backend's own backward
    wanted: Callable[[Sequence[Any]], tuple[Any, ...]] | None  # of the call's tensors those that require grad, if any
    carry: int  # where the carry begins among the saved tensors


def is_open() -> bool:
    """Whether a call may take a lane at all: eager code, and no transform around it."""
    return not (is_compiling() or under_transform())  # the latter asks what a tracer cannot follow


def run(lane: Lane, addresses: bytes, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """(loss, output, support_losses, adapted parameters ..) of a call of this form.

    tensors: as `InnerLoopArgs.tensors`, those behind the addresses.
    """
    if lane.wanted is None:
        return lane.call.forward(addresses)[0]
    found: tuple[Tensor, ...] = _apply(lane, addresses, tensors, *lane.wanted(tensors))
    return found


def picking(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]] | None:
    """What takes the values at some places out of a sequence; None where there is no place."""
    if len(places) < 2:
        return (lambda values: (values[places[0]],)) if places else None
    return itemgetter(*places)


class _ByLane(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lane: Lane, addresses: bytes, tensors: Sequence[Tensor | None], *wanted: Tensor
    ) -> tuple[Tensor, ...]:
        """`wanted`: those of the tensors that autograd follows."""
        outputs, carry = lane.call.forward(addresses)
        ctx.lane = lane
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *carry)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        lane: Lane = ctx.lane
        saved = ctx.saved_tensors
        back = lane.call.backward
        if back is not None and not (torch.is_grad_enabled() or is_forward_mode()):  # it takes plain cotangents alone
            found = back(grads, saved[lane.carry])
            if found is not None:
                return found
        assert lane.wanted is not None
        return (None, None, None, *lane.wanted(lane.gradients(saved, grads)))


# `Function.apply` looks first for transforms around, and for wrappings of those that have ended; `is_open` has done the
# one, and who read the tensors the other.
_apply: Callable[..., Any] = super(torch.autograd.Function, _ByLane).apply
