"""Tests of the Triton building blocks through its interpreter: test_triton_inner_loop.py runs them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cases.task_ops import second_order, with_gradients
from cases.triton_watch import watched
from ops import test_task_conv2d as conv
from ops import test_task_linear as linear
from ops import test_task_update as update

from mtml_kernels import task_conv2d, task_linear

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_inner_loop.py, which sets the interpreter up"
# The interpreter computes padding, which is masked, in numpy, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("shared, bias", [(False, "own"), (True, "shared"), (True, "none")])
def test_linear(shared: bool, bias: str) -> None:
    case = linear.tensors(tasks=2, rows=3, inputs=17, shared=shared, bias=bias)
    with watched() as watch:
        found = with_gradients(task_linear, case, backend="triton")
    assert watch.launches and not watch.conflicts
    torch.testing.assert_close(found, with_gradients(linear.plain, case))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_linear_twice(activation: str) -> None:
    case = linear.tensors(tasks=2, rows=3)
    found, expected = (
        second_order(lambda *a, b=b: task_linear(*a, activation=activation, backend=b), case)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", conv.WINDOWS)
def test_conv(window: str) -> None:
    options: dict[str, Any] = conv.WINDOWS[window]
    case = conv.of_window(window, samples=2, shared=window == "same")
    found = with_gradients(task_conv2d, case, backend="triton", **options)
    torch.testing.assert_close(found, with_gradients(conv.plain, case, **options))


def test_conv_twice() -> None:
    case = conv.of_window("strided", samples=1)
    found, expected = (
        second_order(lambda *a, f=f: f(*a, **conv.WINDOWS["strided"]), case)
        for f in (lambda *a, **o: task_conv2d(*a, backend="triton", **o), conv.plain)
    )
    torch.testing.assert_close(found, expected)


def test_nothing_to_do() -> None:
    for sizes in ({"tasks": 0}, {"rows": 0}, {"inputs": 0}):
        case = linear.tensors(**sizes)  # type: ignore[arg-type]
        torch.testing.assert_close(
            with_gradients(task_linear, case, backend="triton"), with_gradients(task_linear, case, backend="reference")
        )
    case = conv.tensors(samples=0)
    torch.testing.assert_close(
        with_gradients(task_conv2d, case, backend="triton"), with_gradients(task_conv2d, case, backend="reference")
    )


@pytest.mark.parametrize(
    "name, rates", [("sgd decay clipped", "task"), ("adam", "one"), ("rmsprop centered", "element")]
)
def test_update(name: str, rates: str) -> None:
    case = update.Case(name, shapes=[(3, 2), (5,)], tasks=2, rates=rates)
    found, expected = (with_gradients(case.backend(b), case.tensors) for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected)
