"""The fast lane of the engine's `inner_loop`: what calls of one form have in common, made once; then one native call
there, and one back.

A call in the lane reads its tensors, makes room, runs the plan and hands out tensors within
csrc/bindings/inner_loop_plan_lane.cpp. `mtml_kernels.native.inner_loop` takes all others: tensors that must be made
contiguous first, no tasks, and on the way back cotangents of more than the losses and gradients of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mtml_kernels.native import engine
from mtml_kernels.native.inner_loop import Plan, carry_shapes_of, data_places, in_words, plan_of
from mtml_kernels.native.tensors import home_of, read_call
from mtml_kernels.schema.inner_loop import LISTS, NEED_LR, NEED_PARAMS, TASKS_APART, InnerLoopArgs, output_shapes
from mtml_kernels.schema.inner_loop_lane import FastLane, LaneCall

__all__ = ["engine_lane"]

Native = Callable[..., Any]


def engine_lane(form: int) -> FastLane:
    """The engine's lane, with weights held in this form."""
    return FastLane(read_call, partial(_make, form=form))


def _make(a: InnerLoopArgs, form: int) -> LaneCall | None:
    """For calls of this form; None where the lane does not take them."""
    if not a.tasks or a.spec.has(TASKS_APART):
        return None
    plan = plan_of(a, form)
    if not _as_read(a, plan):
        return None
    home, (*outputs, kept), carry = home_of(a.params[0]), output_shapes(a), carry_shapes_of(plan, a)
    forward = engine().PlanForward(
        home=home, plan=plan.engine_plan, tasks=a.tasks, lists=[len(getattr(a, name)) for name in LISTS],
        outputs=[*outputs, *kept], adapted=sum(a.spec.adapted) if a.spec.keep else 0,
        carry=carry, data=data_places(a) if carry else [],
    )  # fmt: skip
    back = None
    if carry and not a.needs & ~(NEED_PARAMS | NEED_LR):
        back = engine().PlanBackward(
            home=home, plan=plan.engine_plan, tasks=a.tasks, carry=carry[0], **_wanted(a)
        )  # fmt: skip
    return LaneCall(_calling(forward), back)


def _wanted(a: InnerLoopArgs) -> dict[str, Any]:
    """Which of the parameters, and of the rates behind them, get gradients, and of what shapes."""
    wanted = [(i, list(t.shape)) for i, t in enumerate((*a.params, *a.lr)) if t.requires_grad]
    return {"wanted": [i for i, _ in wanted], "shapes": [shape for _, shape in wanted]}


def _as_read(a: InnerLoopArgs, plan: Plan) -> bool:
    """Whether the engine reads the tensors as they are; else the long way says what is wrong, or converts them."""
    values, ids = plan.dtype, torch.int64
    fits = all(t.dtype is values for t in (*a.params, *a.lr, *a.moments))
    fits &= all(t.dtype is torch.float64 for t in a.hyper)
    for inputs in (a.support_x, a.query_x):
        fits &= all(t.dtype is (ids if i in plan.ids else values) for i, t in enumerate(inputs))
    single = ((a.support_y, plan.support_ids), (a.query_y, plan.query_ids))
    fits &= all(t is None or t.dtype is (ids if labels else values) for t, labels in single)
    fits &= all(t is None or t.dtype is values for t in (a.support_mask, a.query_mask, a.step_weights))
    return fits and all(t is None or t.device.type == "cpu" for t in a.tensors)


def _calling(native: Native) -> Native:
    """The same with its errors in words."""

    def call(addresses: bytes) -> Any:
        try:
            return native(addresses)
        except ValueError as error:
            raise in_words(error) from None

    return call
