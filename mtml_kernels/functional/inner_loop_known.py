"""Calls of `inner_loop` of a form that has passed all checks before, on their way to a backend's fast lane.

The checks look at shapes, dtypes, devices and options: the lane reads all that there is of the tensors in one go, and
what a call of equal form and options has passed, this one has. Values (class ids) are looked at in every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.checks import check_class_ids
from mtml_kernels.ops.inner_loop import BACKENDS, lane_of
from mtml_kernels.ops.inner_loop_lane import Lane, run
from mtml_kernels.program import Program
from mtml_kernels.registry import AUTO, Backend
from mtml_kernels.schema.inner_loop import InnerLoopArgs, InnerLoopSpec
from mtml_kernels.schema.losses import IGNORED, LossSpec

__all__ = ["Asked", "answer", "remember"]

_MOST = 512
_NUMBERS = (float, int)  # True is none
_LASTING = (str, LossSpec, type(None))  # losses that always mean the same: a module's attributes can change


class Asked(NamedTuple):
    """A call as the user has it, where lanes are open."""

    program: Program
    params: Any
    lr: Any
    inputs: tuple[list[Tensor], list[Tensor]]  # support, query
    single: tuple[Any, Any, Any, Any, Any]  # `SINGLE` of the schema
    losses: tuple[Any, Any]
    options: tuple[Any, ...]  # what else there is
    backend: str


class _Known(NamedTuple):
    """What calls of one form and options have in common."""

    program: Program  # whose id is then nobody else's
    lane: Lane | None
    names: list[str]  # of the adapted parameters
    labels: list[tuple[str, int]]  # targets that are class ids which the backend does not look at, in `single`


def _parameters(call: Asked) -> list[Tensor]:
    params = call.params
    return [*map(params.__getitem__, call.program.names)] if hasattr(params, "keys") else [*params]


def _chosen(backend: str, like: Tensor) -> Backend:
    """The backend; that one asked for by name can run is known where anything is."""
    return BACKENDS.named(backend) if backend != AUTO else BACKENDS.resolve(backend, like.device.type, like.dtype)


def answer(call: Asked) -> tuple[tuple[Tensor, ...], list[str]] | None:
    """The results, and the names of the adapted parameters. None where no such call has been remembered."""
    program, _, lr, (support_x, query_x), single, losses, options, backend = call
    if type(lr) not in _NUMBERS:
        return None
    try:
        tensors = _parameters(call)
        lane = _chosen(backend, tensors[0]).fast_lane
        if lane is None:
            return None
        rates = lane.rates[lr]
        form, addresses = lane.read(tensors, rates, support_x, query_x, (), (), *single)
        known: _Known = lane.checked[id(program), lr, torch.is_grad_enabled(), form, losses, options]
    except (KeyError, TypeError, AttributeError, IndexError):
        return None  # not known, or the checks say what is wrong
    if known.lane is None:
        return None
    for name, place in known.labels:
        check_class_ids(name, single[place], program.output_shape[-1], IGNORED)
    return run(known.lane, addresses, (*tensors, *rates, *support_x, *query_x, *single)), known.names


def remember(
    call: Asked, chosen: Backend, spec: InnerLoopSpec, rates: list[Tensor], names: list[str],
    labels: list[tuple[str, int]],
) -> None:  # fmt: skip
    """To be called when all checks have passed."""
    lane, lr = chosen.fast_lane, call.lr
    if lane is None or type(lr) not in _NUMBERS or not all(type(loss) in _LASTING for loss in call.losses):
        return
    tensors = _parameters(call)
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return  # the rates will be written when the graph is replayed, not before
    plain = lane.read(tensors, rates, *call.inputs, (), (), *call.single)
    if plain is None:
        return
    for table in (lane.rates, lane.checked):
        if len(table) >= _MOST:
            table.clear()
    a = InnerLoopArgs(tensors, rates, *call.inputs, [], [], *call.single, spec, 0)
    key = id(call.program), lr, torch.is_grad_enabled(), plain[0], call.losses, call.options
    lane.checked[key] = _Known(call.program, lane_of(chosen, a, plain[0]), names, labels)
    lane.rates[lr] = rates
