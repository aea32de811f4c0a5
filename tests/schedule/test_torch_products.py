"""Linear layers and convolutions of the `torch` provider against torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.schedule_kernels import close, derivatives, filled, presence, run, scattered
from torch import Tensor

from mtml_kernels.program.ops import OPS, Given, Op
from mtml_kernels.schedule.kernels import Convolution, Linear
from mtml_kernels.schedule.torch_kernels.images import geometry

T, N = 3, 2


def each_task(code: int, constants: tuple[float, ...] = ()) -> Callable[..., Tensor]:
    """The node's own computation, task by task, of x [T, N, R, F], w and b [T or 1, rows, cols]."""

    def f(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rows = []
        for t in range(max(x.shape[0], w.shape[0])):
            own = [None if p is None else p[min(t, p.shape[0] - 1)] for p in (x, w, b)]
            rows.append(OPS[code].compute(Given([own[0]], 0, own[1], own[2], constants, ())))
        return torch.stack(rows)

    return f


def check(name: str, constants: Any, f: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None) -> None:
    """All four kernels of a family, with every operand absent that may be."""
    over = constants.over_tasks or w.shape[0] > 1
    full = [x, w if over else w.expand(T, *w.shape[1:]).clone()]  # gradients of each task from weights of all
    full += [] if b is None else [b if over else b.expand(T, *b.shape[1:]).clone()]
    y = f(*full)
    tangents = [torch.randn(p.shape, dtype=p.dtype) for p in full]
    d, dt = scattered(*y.shape), scattered(*y.shape)
    close(run(f"{name}.forward", constants, x, w, b)[0], y, "y")
    first = derivatives(f, full, tangents, d, dt)[2]
    wants = (True, True, b is not None)
    got = run(f"{name}.backward", constants, d, x, w, wants=wants)
    for role, mine, expected in zip(("dx", "dw", "db"), got, first, strict=False):
        close(mine, expected, role)
    for given in presence(d, dt, *tangents):
        each = filled(given, [d, dt, *tangents])
        _, yt, _, second = derivatives(f, full, each[2:], each[0], each[1])
        xt, wt, bt = (*given[2:], None)[:3]
        if any(t is not None for t in (xt, wt, bt)):
            close(run(f"{name}.tangent", constants, x, xt, w, wt, bt)[0], yt, f"yt of {[t is not None for t in given]}")
        if given[0] is None and given[1] is None:
            continue
        got = run(f"{name}.back_tangent", constants, given[0], given[1], x, xt, w, wt, wants=wants)
        for role, mine, expected in zip(("dxt", "dwt", "dbt"), got, second, strict=False):
            close(mine, expected, f"{role} of {[t is not None for t in given]}")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("tasks", "over"), [(T, False), (1, False), (1, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(turned: bool, tasks: int, over: bool, bias: bool) -> None:
    x, w = scattered(T, N, 3, 5), scattered(tasks, *((5, 4) if turned else (4, 5)))
    b = torch.randn(tasks, 1, 4, dtype=torch.float64) if bias else None
    check("linear", Linear(turned, over), each_task(Op.LINEAR_TRANSPOSED if turned else Op.LINEAR), x, w, b)


WINDOWS = {
    "3x3": ((6, 5), (6, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "stride 2": ((6, 7), (3, 4), (3, 3), (2, 2), (1, 1), (1, 1)),
    "points that no window reaches": ((6, 6), (2, 2), (2, 3), (3, 3), (0, 0), (1, 1)),
    "line": ((1, 9), (1, 3), (1, 3), (1, 2), (0, 0), (1, 2)),
    "same under an even kernel": ((5, 5), (5, 5), (2, 4), (1, 1), (0, 1), (1, 1)),
}


def window(name: str, last: int) -> tuple[float, ...]:
    return (*(float(v) for pair in WINDOWS[name] for v in pair), float(last))


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(("tasks", "over", "groups", "bias"), [(T, False, 1, True), (T, False, 2, False)])
def test_conv_of_own_weights(name: str, tasks: int, over: bool, groups: int, bias: bool) -> None:
    check_conv(name, tasks, over, groups, bias)


@pytest.mark.parametrize("name", ["stride 2", "same under an even kernel"])
@pytest.mark.parametrize(("over", "groups"), [(False, 2), (True, 1), (True, 2)])
def test_conv_of_shared_weights(name: str, over: bool, groups: int) -> None:
    check_conv(name, 1, over, groups, True)


def check_conv(name: str, tasks: int, over: bool, groups: int, bias: bool) -> None:
    numbers = window(name, groups)
    (height, width), _, (kh, kw), *_ = WINDOWS[name]
    x, w = scattered(T, N, height * width, 4), scattered(tasks, 6, 4 // groups * kh * kw)
    b = torch.randn(tasks, 1, 6, dtype=torch.float64) if bias else None
    check("conv", Convolution(numbers, over), each_task(Op.CONV, numbers), x, w, b)


def test_the_windows_are_of_every_form() -> None:
    forms = [geometry(window(name, 1)) for name in WINDOWS]
    assert {form.around is None for form in forms} == {True, False}


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_an_own_bias_beside_shared_weights(name: str) -> None:
    numbers = window("3x3", 1)
    constants = Linear(False, False) if name == "linear" else Convolution(numbers, False)
    x = scattered(T, N, 30, 4)
    w, b = scattered(1, 5, 4 if name == "linear" else 36), scattered(T, 1, 5)
    f = each_task(Op.LINEAR if name == "linear" else Op.CONV, () if name == "linear" else numbers)
    close(run(f"{name}.forward", constants, x, w, b)[0], f(x, w, b))
    xt, wt = torch.randn(x.shape, dtype=x.dtype), scattered(T, *w.shape[1:])
    expected = torch.func.jvp(f, (x, w.expand(T, -1, -1).clone(), b), (xt, wt, b))[1]
    close(run(f"{name}.tangent", constants, x, xt, w, wt, b)[0], expected)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_without_a_second_term_the_tangent_of_backward_is_wrong(name: str) -> None:
    """The comparison above would notice: the negative control."""
    constants = Linear(False, False) if name == "linear" else Convolution(window("3x3", 1), False)
    x, d = scattered(T, N, 30, 4), scattered(T, N, 30, 5)
    w = scattered(T, 5, 4 if name == "linear" else 36)
    whole = run(f"{name}.back_tangent", constants, d, d, x, x, w, w, wants=(True, True, False))
    half = run(f"{name}.back_tangent", constants, None, d, x, x, w, w, wants=(True, True, False))
    for mine, dropped in zip(whole[:2], half[:2], strict=True):
        with pytest.raises(AssertionError):
            close(dropped, mine)


@pytest.mark.parametrize("samples", [0, 1])
def test_sets_of_no_and_of_one_sample(samples: int) -> None:
    x, d, w = scattered(T, samples, 3, 5), scattered(T, samples, 3, 4), scattered(T, 4, 5)
    y = run("linear.forward", Linear(False, False), x, w, None)[0]
    assert y.shape == d.shape
    dw = run("linear.backward", Linear(False, False), d, x, w)[1]
    close(dw, torch.einsum("tnro,tnri->toi", d, x))
