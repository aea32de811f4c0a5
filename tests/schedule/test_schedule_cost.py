"""FLOPs and bytes of calls, against counts by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtml_kernels.program.activations import Act
from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.call import ABSENT, Call, Schedule
from mtml_kernels.schedule.cost import OPERATIONS, Cost, Product, costs, part_flops, products_of
from mtml_kernels.schedule.draft import Draft
from mtml_kernels.schedule.kernels import KERNELS, Activation, Convolution, Linear, Normalisation, Shape

T, N, I, O = 3, 4, 5, 7  # noqa: E741 - the symbols of kernels.py
RELU = Activation(int(Act.RELU), 1.0, 0.0)
MATRIX = Linear(turned=False, over_tasks=False)


def layer(draft: Draft, shared: bool) -> tuple[int, int, int]:
    """x [T, N, 1, I], w [T or 1, O, I], b [T or 1, 1, O]."""
    lead = 1 if shared else T
    x = draft.argument("support_x", 0, (T, N, 1, I), "x")
    return x, draft.argument("params", 0, (lead, O, I), "w"), draft.argument("params", 1, (lead, 1, O), "b")


def schedule(draft: Draft, calls: Sequence[int], results: Sequence[int], kept: Sequence[int] = ()) -> Schedule:
    """The draft's parts cut into calls of so many."""
    parts = iter([part for _, part in draft.parts])
    made = tuple(Call(tuple(next(parts) for _ in range(count)), "") for count in calls)
    return Schedule(tuple(draft.planes), made, tuple(results), tuple(kept))


# --- a linear layer ---------------------------------------------------------------------------------------------------


def test_forward_of_a_layer_with_its_activation() -> None:
    for shared in (True, False):
        draft = Draft(torch.float32)
        x, w, b = layer(draft, shared)
        y = draft.one("linear.forward", (x, w, b), (T, N, 1, O), "y", MATRIX)
        z = draft.one("act.forward", (y,), (T, N, 1, O), "z", RELU)
        (cost,) = costs(schedule(draft, [2], [z]))
        (product,) = cost.products
        assert product == (Product(1, T * N, O, T * N * O * I) if shared else Product(T, N, O, T * N * O * I))
        assert product.depth == I
        assert cost.flops == 2 * T * N * O * I + T * N * O + OPERATIONS["act.forward"] * T * N * O
        # y stays on chip; all else once
        assert cost.read == 4 * (T * N * I + (1 if shared else T) * (O * I + O))
        assert cost.written == 4 * T * N * O


def test_a_plane_that_somebody_else_reads_is_written() -> None:
    draft = Draft(torch.float32)
    x, w, b = layer(draft, shared=True)
    y = draft.one("linear.forward", (x, w, b), (T, N, 1, O), "y", MATRIX)
    z = draft.one("act.forward", (y,), (T, N, 1, O), "z", RELU)
    plane = 4 * T * N * O
    assert costs(schedule(draft, [2], [z], [y]))[0].written == 2 * plane  # the way back reads y
    assert costs(schedule(draft, [2], [z, y]))[0].written == 2 * plane  # or the caller
    first, second = costs(schedule(draft, [1, 1], [z]))  # or another call
    assert (first.written, second.read, second.written) == (plane, plane, plane)
    assert costs(schedule(draft, [2], []))[0].written == 0


def backward(wanted: tuple[bool, bool, bool], over_tasks: bool = False, half: bool = False) -> Cost:
    draft = Draft(torch.bfloat16 if half else torch.float32)
    x, w, _ = layer(draft, shared=True)
    d = draft.argument("grad_output", 0, (T, N, 1, O), "d")
    lead = 1 if over_tasks else T
    shapes = [(T, N, 1, I), (lead, O, I), (lead, 1, O)]
    found = draft.emit(
        "linear.backward",
        (d, x, w),
        [shape if want else None for shape, want in zip(shapes, wanted, strict=True)],
        "gradient",
        Linear(False, over_tasks),
        [draft.dtype, draft.wide, draft.wide],
    )
    return costs(schedule(draft, [1], found))[0]


def test_backward_counts_what_is_wanted() -> None:
    one = T * N * O * I
    assert backward((True, False, False)).flops == 2 * one
    assert backward((False, True, False)).products == (Product(T, O, I, one),)
    everything = backward((True, True, True))
    assert everything.flops == 4 * one + T * N * O
    assert everything.products[0] == Product(1, T * N, I, one)  # the weight is shared
    assert everything.bytes == 4 * (2 * T * N * I + T * N * O + (1 + T) * O * I + T * O)
    assert backward((False, True, False), over_tasks=True).products == (Product(1, O, I, one),)


def test_half_precision_takes_half_the_bytes_but_for_gradients() -> None:
    cost = backward((True, True, True), half=True)
    assert cost.bytes == 2 * (2 * T * N * I + T * N * O + O * I) + 4 * (T * O * I + T * O)


def along(kernel: str, absent: Sequence[str] = (), unwanted: Sequence[str] = ()) -> int:
    """FLOPs of the products of one of the two kernels along a direction, in products of the layer."""
    shapes = {"x": (T, N, 1, I), "d": (T, N, 1, O), "w": (1, O, I), "b": (T, 1, O)}
    draft = Draft(torch.float32)
    roles = KERNELS[f"linear.{kernel}"]
    reads = []
    for at, role in enumerate(roles.reads):
        shape = (T, *shapes[role[0]][1:]) if role == "wt" else shapes[role[0]]
        reads.append(ABSENT if role in absent else draft.argument("params", at, shape, role))
    results = {"yt": (T, N, 1, O), "dxt": (T, N, 1, I), "dwt": (T, O, I), "dbt": (T, 1, O)}
    draft.emit(
        f"linear.{kernel}",
        reads,
        [None if role in unwanted else results[role] for role in roles.writes],
        "",
        MATRIX,
    )
    ((_, part),) = draft.parts
    (flops,) = {sum(p.flops for p in products_of(part, draft.planes))}
    return flops // (2 * T * N * O * I)


def test_the_product_rule_has_two_products_where_both_pairs_are_there() -> None:
    assert along("tangent") == 2
    assert along("tangent", ["xt"]) == along("tangent", ["wt"]) == 1  # a first layer; a shared one after adapted ones
    assert along("tangent", ["xt", "wt"]) == 0  # a bias alone
    assert along("back_tangent") == 4
    assert along("back_tangent", ["xt"]) == 3
    assert along("back_tangent", ["d"]) == 2
    assert along("back_tangent", ["xt"], ["dxt"]) == 1  # H v of a first layer: with its tangent two, as flops.py counts


# --- a convolution, a normalisation -----------------------------------------------------------------------------------


def test_convolution_in_groups() -> None:
    height, width, channels, outputs, groups = 6, 5, 4, 8, 2
    window = (height, width, height, width, 3, 3, 1, 1, 1, 1, 1, 1, groups)
    constants = Convolution(tuple(map(float, window)), False)
    per_output = channels // groups * 9
    one = T * N * height * width * outputs * per_output
    draft = Draft(torch.float32)
    image, weight = (T, N, height * width, channels), (T, outputs, per_output)
    x, w = draft.argument("support_x", 0, image, "x"), draft.argument("params", 0, weight, "w")
    y = draft.one("conv.forward", (x, w, ABSENT), (T, N, height * width, outputs), "y", constants)
    dx, dw, _ = draft.emit("conv.backward", (y, x, w), [image, weight, None], "", constants)
    forward, back = costs(schedule(draft, [1, 1], [dx, dw]))
    assert forward.products == (Product(T * groups, N * height * width, outputs // groups, one),)
    assert forward.products[0].depth == per_output
    assert forward.bytes == 4 * T * (N * height * width * (channels + outputs) + outputs * per_output)
    to_x, to_w = back.products
    assert to_x == Product(T * groups, N * height * width, channels // groups, one) and to_x.depth == 9 * outputs // 2
    assert to_w == Product(T * groups, outputs // groups, per_output, one) and to_w.depth == N * height * width
    assert back.flops == 4 * one


def test_normalisation_reads_its_input_twice() -> None:
    draft, shape = Draft(torch.float32), (T, N, 9, O)
    constants = Normalisation(int(Norm.BATCH), 1e-5, 1, 0, 1, False)
    x = draft.argument("support_x", 0, shape, "x")
    w, b = (draft.argument("params", i, (1, 1, O), "") for i in range(2))
    mean, rstd = draft.emit("norm.stats", (x,), [(T, 1, 1, O)] * 2, "", constants)
    xhat, y = draft.emit("norm.apply", (x, mean, rstd, w, b), [shape, shape], "", constants)
    z = draft.one("act.forward", (y,), shape, "", RELU)
    stats, apply = costs(schedule(draft, [1, 2], [z], [xhat]))
    elements, statistic = T * N * 9 * O, T * O
    assert (stats.read, stats.written) == (4 * elements, 4 * 2 * statistic)
    assert apply.read == 4 * (elements + 2 * statistic + 2 * O)
    assert apply.written == 4 * 2 * elements  # xhat for the way back, and z; y is read by nobody else
    assert stats.flops == OPERATIONS["norm.stats"] * elements and not stats.products
    assert apply.flops == (OPERATIONS["norm.apply"] + OPERATIONS["act.forward"]) * elements


# --- views ------------------------------------------------------------------------------------------------------------


def test_views_cost_nothing() -> None:
    draft = Draft(torch.float32)
    x = draft.argument("support_x", 0, (T, N, I, O), "x")
    turned = draft.one("transpose", (x,), (T, N, O, I), "")
    flat = draft.one("view", (turned,), (T, N, 1, O * I), "", Shape((T, N, 1, O * I)))
    y = draft.one("add.forward", (flat, x), (T, N, 1, O * I), "")
    seen = draft.one("view", (y,), (T, N, O, I), "", Shape((T, N, O, I)))
    z = draft.one("scale", (seen, x), (T, N, O, I), "")
    plane = 4 * T * N * I * O
    first, second = costs(schedule(draft, [4, 1], [z]))
    assert (first.flops, first.read, first.written) == (T * N * I * O, plane, plane)  # x once, whatever it is called
    assert (second.read, second.written) == (2 * plane, plane)  # what is seen is y
    assert all(part_flops(part, draft.planes) == 0 for _, part in draft.parts if KERNELS[part.kernel].kind == "free")


def test_every_kernel_has_its_count() -> None:
    working = {name for name, kernel in KERNELS.items() if kernel.kind not in ("product", "free")}
    assert set(OPERATIONS) == working


def test_a_rule_of_several_tensors_counts_all_of_them() -> None:
    draft = Draft(torch.float32)
    sizes = [(2, 4, 5), (2, 1, 3)]
    own = [draft.argument("params", i, shape, "own") for i, shape in enumerate(sizes)]
    hyper, rate = draft.argument("hyper", 0, (8,), "hyper"), draft.argument("lr", 0, (), "rate")
    reads = (*own, *own, rate, rate, *[ABSENT] * 6, hyper)
    draft.emit("update.rule", reads, [*sizes, *[None] * 6], "after")
    draft.emit("update.clip", (hyper, *own), [(2,), *sizes], "clipped")
    rule, clip = (part_flops(part, draft.planes) for _, part in draft.parts)
    assert rule == OPERATIONS["update.rule"] * 46 and clip == OPERATIONS["update.clip"] * 46
