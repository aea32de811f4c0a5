"""Functions of single elements and of rows, poolings and moves of the `torch` provider against torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.engine import constants as chosen
from cases.schedule_kernels import close, derivatives, filled, presence, run, scattered
from torch import Tensor

from mtml_kernels.program.activations import Act
from mtml_kernels.program.layers.pool import Pool, pool
from mtml_kernels.program.layers.softmax import Softmax
from mtml_kernels.program.ops import OPS, Given, Op
from mtml_kernels.schedule.kernels import FROM_OUTPUT, Activation, Blank, Pooling, Shape, Span, Table

SHAPE = (3, 4, 5, 6)


def four() -> list[Tensor]:
    return [scattered(*SHAPE) for _ in range(4)]


@pytest.mark.parametrize("kind", list(Act))
def test_activation(kind: Act) -> None:
    c0, c1 = chosen(kind) or (1.0, 0.0)
    x, xt, d, dt = four()
    given = Activation(int(kind), c0, c1)
    f = lambda x: OPS[Op.ACT].compute(Given([x], int(kind), None, None, (c0, c1), ()))  # noqa: E731
    for each in presence(d, dt, xt):
        values = filled(each, [d, dt, xt])
        y, yt, first, second = derivatives(f, [x], values[2:], values[0], values[1])
        ref = y if kind in FROM_OUTPUT else x
        close(run("act.forward", given, x)[0], y)
        if each[0] is not None:
            close(run("act.backward", given, each[0], ref)[0], first[0])
        if each[2] is not None:
            close(run("act.tangent", given, each[2], ref)[0], yt)
        close(run("act.back_tangent", given, each[0], each[1], ref, each[2])[0], second[0])


@pytest.mark.parametrize("kind", list(Act))
def test_activation_beyond_usual_values(kind: Act) -> None:
    """NaN stays, and a value of 0 or far away has PyTorch's derivative."""
    c0, c1 = chosen(kind) or (1.0, 0.0)
    x = torch.tensor([0.0, -0.0, 40.0, -40.0, float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
    x = x.view(1, 1, 1, -1)
    d, given = torch.ones_like(x), Activation(int(kind), c0, c1)
    f = lambda x: OPS[Op.ACT].compute(Given([x], int(kind), None, None, (c0, c1), ()))  # noqa: E731
    y, back = torch.func.vjp(f, x)
    ref = run("act.forward", given, x)[0] if kind in FROM_OUTPUT else x
    mine, expected = run("act.backward", given, d, ref)[0], back(d)[0]
    torch.testing.assert_close(run("act.forward", given, x)[0], y, equal_nan=True)
    torch.testing.assert_close(mine, expected, equal_nan=True)


@pytest.mark.parametrize("kind", list(Softmax))
def test_softmax(kind: Softmax) -> None:
    x, xt, d, dt = four()
    f = lambda x: x.softmax(-1) if kind == Softmax.SOFTMAX else torch.special.log_softmax(x, -1)  # noqa: E731
    if kind == Softmax.LOG_SOFTMAX:  # PyTorch's forward mode of it has no derivative
        f = lambda x: x - x.exp().sum(-1, keepdim=True).log()  # noqa: E731
    for each in presence(d, dt, xt):
        values = filled(each, [d, dt, xt])
        y, yt, first, second = derivatives(f, [x], values[2:], values[0], values[1])
        close(run("softmax.forward", int(kind), x)[0], y)
        tangent = None if each[2] is None else run("softmax.tangent", int(kind), each[2], y)[0]
        close(tangent, yt)
        if each[0] is not None:
            close(run("softmax.backward", int(kind), each[0], y)[0], first[0])
        close(run("softmax.back_tangent", int(kind), each[0], each[1], y, tangent)[0], second[0])


#        size    out     kernel  stride  pad     dilation  last
POOLS = {
    "max": (Pool.MAX, ((6, 7), (3, 3), (2, 2), (2, 2), (0, 0), (1, 1)), 0),
    "max, dilated, padded, overlapping": (Pool.MAX, ((7, 8), (3, 3), (3, 2), (2, 3), (1, 1), (2, 2)), 0),
    "max, ceil": (Pool.MAX, ((6, 6), (3, 3), (3, 3), (2, 2), (0, 0), (1, 1)), 0),
    "max of a line": (Pool.MAX, ((1, 7), (1, 3), (1, 3), (1, 2), (0, 0), (1, 1)), 0),
    "avg": (Pool.AVG, ((6, 7), (3, 4), (2, 3), (2, 2), (0, 1), (1, 1)), 0),
    "avg, ceil, with its padding": (Pool.AVG, ((6, 6), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1)), 0),
    "avg, ceil, without its padding": (Pool.AVG, ((6, 6), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1)), -1),
    "avg by 5": (Pool.AVG, ((6, 6), (3, 3), (2, 2), (2, 2), (0, 0), (1, 1)), 5),
    "adaptive": (Pool.ADAPTIVE_AVG, ((6, 7), (4, 3), (1, 1), (1, 1), (0, 0), (1, 1)), 0),
    "all points": (Pool.ADAPTIVE_AVG, ((6, 7), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)), 0),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("beside", [False, True])
def test_pool(name: str, beside: bool) -> None:
    kind, pairs, last = POOLS[name]
    numbers = (*(float(v) for pair in pairs for v in pair), float(last))
    points = pairs[0][0] * pairs[0][1]
    x, xt = (torch.randn(3, 2, points, 4, dtype=torch.float64).round(decimals=1) for _ in range(2))  # with ties
    if beside:  # the channels of all tasks in a row, as convolutions leave them
        x, xt = (t.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2) for t in (x, xt))
    f = lambda x: pool(kind, x.flatten(0, 1), numbers).unflatten(0, (3, 2))  # noqa: E731
    y, back = torch.func.vjp(f, x)
    d = scattered(*y.shape)
    given = Pooling(int(kind), numbers)
    mine, index = run("pool.forward", given, x, wants=(True, kind == Pool.MAX))
    close(mine, y)
    assert (index is None) == (kind != Pool.MAX)
    close(run("pool.backward", given, d, index)[0], back(d)[0])
    yt = run("pool.tangent", given, xt, index)[0]
    close((yt * d).sum(), (xt * back(d)[0]).sum(), "adjoint")  # linear, and so the transpose of backward
    assert yt.shape == y.shape


def test_max_pool_keeps_nan() -> None:
    _, pairs, last = POOLS["max"]
    numbers = (*(float(v) for pair in pairs for v in pair), float(last))
    x = torch.zeros(1, 1, 42, 1)
    x[0, 0, 0] = float("nan")
    y, index = run("pool.forward", Pooling(0, numbers), x)
    assert y.isnan().sum() == 1
    assert run("pool.backward", Pooling(0, numbers), torch.ones_like(y), index)[0][0, 0, 0] == 1


BROADCASTS = [((3, 4, 5, 6), (3, 4, 5, 6)), ((3, 4, 5, 6), (3, 1, 1, 6)), ((1, 1, 5, 6), (3, 4, 5, 1))]


@pytest.mark.parametrize(("left", "right"), BROADCASTS)
def test_sums_and_products(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, at, b, bt = scattered(*left), scattered(*left), scattered(*right), scattered(*right)
    close(run("add.forward", None, a, b)[0], a + b)
    close(run("mul.forward", None, a, b)[0], a * b)
    d, dt = scattered(*(a + b).shape), scattered(*(a + b).shape)
    close(run("reduce", Shape(left), d)[0], d.sum_to_size(left))
    for each in presence(d, dt, at, bt):
        values = filled(each, [d, dt, at, bt])
        _, yt, first, second = derivatives(torch.mul, [a, b], values[2:], values[0], values[1])
        close(run("mul.tangent", None, a, each[2], b, each[3])[0], yt)
        close(run("mul.backward", Shape(left), each[0], each[1], b, each[3])[0], second[0])
        close(run("mul.backward", Shape(right), each[0], each[1], a, each[2])[0], second[1])
        close(run("mul.backward", Shape(left), None, each[0], b, None)[0], first[0])


def test_moves() -> None:
    x, y, *_ = four()
    results: dict[str, tuple[Any, list[Tensor | None], Tensor]] = {
        "affine.forward": ((1.5, -2.0), [x], 1.5 * x - 2.0),
        "slice.forward": (Span(1, 4, 6), [x], x[..., 1:4]),
        "view": (Shape((3, 4, 30, 1)), [x], x.reshape(3, 4, 30, 1)),
        "transpose": (None, [x], x.transpose(2, 3)),
        "expand": (Shape(SHAPE), [x[:, :1]], x[:, :1].expand(SHAPE)),
        "stack": (None, [x, y], torch.stack([x, y])),
        "zeros": (Blank((2, 3), torch.float64), [x], torch.zeros(2, 3).double()),
        "accumulate": (None, [x, y], x + y),
        "tasks.sum": (None, [x], x.sum(0, keepdim=True)),
    }
    for name, (constants, operands, expected) in results.items():
        close(run(name, constants, *operands)[0], expected, name)
    close(
        run("slice.backward", Span(1, 4, 6), x[..., 1:4])[0],
        torch.cat([x[..., :1] * 0, x[..., 1:4], x[..., 4:] * 0], 3),
    )
    for one in (1.0, 0.5):
        close(run("affine.forward", (one, 0.0), x)[0], x * one)
        close(run("affine.forward", (one, 3.0), x)[0], x * one + 3)


def test_cat() -> None:
    a, b = scattered(3, 4, 5, 2), scattered(1, 1, 5, 3)
    whole = torch.cat([a, b.expand(3, 4, 5, 3)], 3)
    close(run("cat.forward", None, a, b)[0], whole)
    close(run("cat.forward", Shape((1, 1, 5, 3)), a, None)[0], torch.cat([a, torch.zeros(3, 4, 5, 3)], 3).double())
    close(run("cat.forward", Shape((3, 4, 5, 2)), None, b)[0], torch.cat([a * 0, b.expand(3, 4, 5, 3)], 3))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 5, 6), (1, 5, 6)])
def test_scale(shape: tuple[int, ...]) -> None:
    x, s = scattered(*shape), torch.randn(shape[0], dtype=torch.float64)
    close(run("scale", None, x, s)[0], x * s.view(-1, *[1] * (len(shape) - 1)))
    close(run("scale", None, x, s[0])[0], x * s[0])


@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize(("sets", "over"), [(3, False), (1, False), (1, True)])
def test_embedding(padding: int, sets: int, over: bool) -> None:
    ids, w, d = torch.randint(0, 7, (3, 4, 5)), scattered(sets, 7, 2), scattered(3, 4, 5, 2)
    given = Table(padding, 7, over)

    def f(w: Tensor) -> Tensor:
        own = [OPS[Op.EMBEDDING].compute(Given([ids[t]], 0, w[min(t, len(w) - 1)], None, (padding, 0), (*SHAPE[1:3], 2))) for t in range(3)]  # fmt: skip  # noqa: E501
        return torch.stack(own)

    close(run("embedding.forward", given, ids, w)[0], f(w))
    full = w if over or sets > 1 else w.expand(3, 7, 2).clone()
    dw = run("embedding.backward", given, d, ids)[0]
    close(dw, torch.func.vjp(f, full)[1](d)[0])
    wt = torch.randn(full.shape, dtype=w.dtype)
    close((run("embedding.tangent", given, ids, wt)[0] * d).sum(), (wt * dw).sum(), "adjoint")
