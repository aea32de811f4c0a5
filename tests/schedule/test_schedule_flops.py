"""The products that are counted are those that the kernels in PyTorch multiply, part by part, of random programs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.engine_random import random_case
from cases.images import random_image_case
from cases.inner_loop import Case, make_case
from torch.utils.flop_counter import FlopCounterMode

from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schedule.call import ABSENT, Part, Plane
from mtml_kernels.schedule.cost import costs, part_flops, products_of
from mtml_kernels.schedule.describe import describe
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, InnerLoopArgs


def _onto(_: Any, left: torch.Size, right: torch.Size, **options: Any) -> int:
    """FLOPs of a product that is added to a matrix in place, which PyTorch's counter does not know."""
    return 2 * left.numel() * right[-1]


COUNTED = {torch.ops.aten.baddbmm_: _onto, torch.ops.aten.addmm_: _onto}
# PyTorch counts the gradients of a strided convolution as if they were dense ones.
COMPARED = (
    "linear.forward",
    "linear.backward",
    "linear.tangent",
    "linear.back_tangent",
    "conv.forward",
    "conv.tangent",
)


def arguments(case: Case, needs: int = NEED_PARAMS | NEED_LR) -> InnerLoopArgs:
    """The case as backends take it."""
    lists = (case.params, case.lr, case.support_x, case.query_x, case.hyper, case.moments)
    data = (case.support_y, case.query_y, case.support_mask, case.query_mask, case.step_weights)
    return InnerLoopArgs(*lists, *data, case.spec, needs)


def products(a: InnerLoopArgs) -> Iterator[tuple[Part, tuple[Plane, ...]]]:
    """The parts there and back that hold products."""
    plan = plan_of(a)
    trip = plan.trip(plan.usually)
    for schedule in (trip.there, trip.back):
        for call in schedule.calls:
            yield from ((part, schedule.planes) for part in call.parts if part.kernel in COMPARED)


def multiplied(part: Part, planes: tuple[Plane, ...]) -> int:
    """FLOPs of the kernel's products, run without memory."""
    found = [None if i == ABSENT else planes[i] for i in part.reads]
    operands = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device="meta") for p in found]
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        TORCH[part.kernel](part, *operands)
    return counter.get_total_flops()


@pytest.mark.parametrize("images", [False, True])
def test_counted_products_are_multiplied(images: bool) -> None:
    seen: set[str] = set()
    for seed in range(12):
        case = random_image_case(seed) if images else random_case(random.Random(seed))
        for part, planes in products(arguments(case)):
            counted = sum(product.flops for product in products_of(part, planes))
            assert counted == multiplied(part, planes), (seed, part)
            seen.add(part.kernel)
    assert {name for name in COMPARED if images or name.startswith("linear")} <= seen


def test_costs_of_random_programs_add_up() -> None:
    """Parts to calls, calls to the description; nothing is read that nobody wrote."""
    for seed in range(12):
        a = arguments(random_case(random.Random(seed)))
        plan = plan_of(a)
        trip = plan.trip(plan.usually)
        described = describe(a, DEVICES["h200"])
        total = 0
        for schedule in (trip.there, trip.back):
            found = costs(schedule)
            parts = [part for call in schedule.calls for part in call.parts]
            assert sum(cost.flops for cost in found) == sum(part_flops(part, schedule.planes) for part in parts)
            assert all(cost.read > 0 for cost in found if cost.flops)
            total += sum(cost.flops for cost in found)
        assert described.flops == total and described.precision == "fp64"
        assert (described.bytes > 0) == (len(described.lines) > 0)  # a call may have nothing to do


def test_without_gradients_the_way_there_is_all() -> None:
    case = make_case()
    both, there = (describe(arguments(case, needs), DEVICES["h200"]) for needs in (NEED_PARAMS, 0))
    assert 0 < len(there.lines) < len(both.lines) and there.flops < both.flops
