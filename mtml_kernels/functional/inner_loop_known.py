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
from mtml_kernels.ops.inner_loop_backends import FORMS
from mtml_kernels.ops.inner_loop_lane import Lane, run
from mtml_kernels.program import Program
from mtml_kernels.registry import AUTO, Backend
from mtml_kernels.schema.inner_loop import InnerLoopArgs, InnerLoopSpec
from mtml_kernels.schema.losses import IGNORED, LossSpec

__all__ = ["answer", "remember"]

Inputs = tuple[list[Tensor], list[Tensor]]
Single = tuple[Any, Any, Any, Any, Any]
Options = tuple[Any, ...]

_MOST = 512
_NUMBERS = (float, int)  # True is none
_LASTING = (str, LossSpec, type(None))  # losses that always mean the same: a module's attributes can change


class _Known(NamedTuple):
    """What calls of one form and options have in common."""

    program: Program  # whose id is then nobody else's
    lane: Lane | None
    names: list[str]  # of the adapted parameters
    labels: list[tuple[str, int]]  # targets that are class ids which the backend does not look at, in `single`


def answer(
    program: Program, params: Any, lr: Any, inputs: Inputs, single: Single, options: Options, backend: str
) -> tuple[tuple[Tensor, ...], list[str]] | None:
    """The results of a call, and the names of the adapted parameters; None where no such call has been remembered.

    inputs: support, query. single: as `SINGLE` of the schema. options: the losses, and what else is not a tensor.
    """
    if type(lr) not in _NUMBERS:
        return None
    support_x, query_x = inputs
    try:
        tensors = _parameters(program, params)
        if backend and backend != AUTO:
            chosen = BACKENDS.named(backend)  # that it can run is known where anything is
        else:
            chosen = BACKENDS.resolve(backend, tensors[0].device.type, tensors[0].dtype)
        lane = chosen.fast_lane
        if lane is None:
            return None
        rates = lane.rates[lr]
        form, addresses = lane.read(tensors, rates, support_x, query_x, (), (), *single)
        known: _Known = lane.checked[id(program), lr, torch.is_grad_enabled(), form, options]
    except (KeyError, TypeError, AttributeError, IndexError):
        return None  # not known, or the checks say what is wrong
    if known.lane is None:
        return None
    for name, place in known.labels:
        check_class_ids(name, single[place], program.output_shape[-1], IGNORED)
    return run(known.lane, addresses, (*tensors, *rates, *support_x, *query_x, *single)), known.names


def _parameters(program: Program, params: Any) -> list[Tensor]:
    return [*map(params.__getitem__, program.names)] if hasattr(params, "keys") else [*params]


def remember(
    program: Program, tensors: list[Tensor], lr: Any, inputs: Inputs, single: Single, options: Options,
    chosen: Backend, spec: InnerLoopSpec, rates: list[Tensor], names: list[str],
) -> None:  # fmt: skip
    """To be called when all checks have passed."""
    lane = chosen.fast_lane
    if lane is None or type(lr) not in _NUMBERS or not all(type(loss) in _LASTING for loss in options[:2]):
        return
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return  # the rates will be written when the graph is replayed, not before
    plain = lane.read(tensors, rates, *inputs, (), (), *single)
    if plain is None:
        return
    for table in (lane.rates, lane.checked):
        if len(table) >= _MOST:
            table.clear()
    a = InnerLoopArgs(tensors, rates, *inputs, [], [], *single, spec, 0)
    labels = [(n, i) for i, n in enumerate(("y", "query_y")) if single[i] is not None and _is_ids(single[i], chosen)]
    key = id(program), lr, torch.is_grad_enabled(), plain[0], options
    lane.checked[key] = _Known(program, lane_of(chosen, a, plain[0]), names, labels)
    lane.rates[lr] = rates


def _is_ids(target: Tensor, chosen: Backend) -> bool:
    """Whether a target is class ids that the backend does not look at itself."""
    return not target.is_floating_point() and chosen.name not in FORMS
