"""The building blocks as kernels of ``python -m bench kernel``: their calls, FLOPs and compulsory bytes by formula.

``task_linear`` on a shape inputs-outputs and ``task_conv2d`` on channels-outputs-size-kernel (padded so that the size
stays, every tap counted) have ``support`` rows or images a task; ``task_update`` steps the tensors of an MLP of these
widths. A product costs 2 FLOPs a multiply-add, a way back two of them; an update's arithmetic is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.measure.kernel import Options

__all__ = ["BLOCKS", "MODES", "Block", "describe"]

MODES = ("forward", "forward+backward")
ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "gelu": "gelu", "sine": "sin"}


class Block(NamedTuple):
    """A call: results of tensors that all get a gradient; FLOPs of the way there, and bytes of both ways."""

    function: Callable[..., Any]
    tensors: list[Tensor]
    flops: float
    results: int  # elements

    def call(self, gradient: bool) -> Callable[[], object]:
        """What is timed."""
        leaves = [t.requires_grad_(gradient) for t in self.tensors]

        def run() -> object:
            with torch.set_grad_enabled(gradient):
                found = self.function(*leaves)
                outputs = [found] if isinstance(found, Tensor) else found
                given = [torch.ones((), dtype=y.dtype).expand_as(y) for y in outputs]
                return torch.autograd.grad(outputs, leaves, given) if gradient else found

        return run

    def work(self, gradient: bool) -> tuple[float, float]:
        """(FLOPs, compulsory bytes)"""
        inputs, size = sum(t.numel() for t in self.tensors), self.tensors[0].itemsize
        forward = inputs + self.results
        # back: the cotangents and the inputs are read, as many gradients written
        return self.flops * (3 if gradient else 1), size * (forward + (self.results + 2 * inputs if gradient else 0))


def _sizes(o: Options, op: str, count: int, names: str) -> tuple[int, ...]:
    if len(o.shape) != count:
        raise ValueError(f"shape: expected {names} for {op}, got {'-'.join(map(str, o.shape))}")
    return o.shape


def _linear(o: Options) -> Block:
    from mtml_kernels import task_linear

    inputs, outputs = _sizes(o, "task_linear", 2, "inputs-outputs such as 784-256")
    x = torch.randn(o.tasks, o.support, inputs, dtype=o.dtype)
    weight = torch.randn(o.tasks, outputs, inputs, dtype=o.dtype) / math.sqrt(inputs)
    bias = torch.zeros(o.tasks, outputs, dtype=o.dtype)
    activation = ACTIVATIONS[o.activation]
    results = o.tasks * o.support * outputs

    def function(*tensors: Tensor) -> Tensor:
        return task_linear(*tensors, activation=activation, backend=o.backend)

    return Block(function, [x, weight, bias], 2.0 * results * inputs, results)


def _conv2d(o: Options) -> Block:
    from mtml_kernels import task_conv2d

    channels, outputs, size, kernel = _sizes(o, "task_conv2d", 4, "channels-outputs-size-kernel such as 32-32-14-3")
    if kernel % 2 == 0:
        raise ValueError(f"shape: expected an odd kernel, which keeps the size, got {kernel}")
    x = torch.randn(o.tasks, o.support, channels, size, size, dtype=o.dtype)
    weight = torch.randn(o.tasks, outputs, channels, kernel, kernel, dtype=o.dtype) / math.sqrt(channels * kernel**2)
    bias = torch.zeros(o.tasks, outputs, dtype=o.dtype)
    results = o.tasks * o.support * outputs * size**2

    def function(*tensors: Tensor) -> Tensor:
        return task_conv2d(*tensors, padding=kernel // 2, backend=o.backend)

    return Block(function, [x, weight, bias], 2.0 * results * channels * kernel**2, results)


def _update(o: Options) -> Block:
    from mtml_kernels import task_update
    from mtml_kernels.schema.update import NAMED

    if o.rule not in NAMED:
        raise ValueError(f"rule: expected one of {', '.join(NAMED)}, got {o.rule!r}")
    pairs = zip(o.shape, o.shape[1:], strict=False)
    shapes = [shape for inputs, outputs in pairs for shape in ((outputs, inputs), (outputs,))]
    params, grads = ([torch.randn(o.tasks, *s, dtype=o.dtype) for s in shapes] for _ in range(2))
    moments = [torch.rand_like(p) for _ in NAMED[o.rule][0].moments for p in params]
    n, step = len(params), 1 if moments else None

    def function(*tensors: Tensor) -> list[Tensor]:
        state = tensors[2 * n :] if moments else None
        options: dict[str, Any] = {"state": state, "step": step, "rule": o.rule, "backend": o.backend}
        return task_update(tensors[:n], tensors[n : 2 * n], o.lr, **options)

    return Block(function, [*params, *grads, *moments], 0.0, sum(t.numel() for t in (*params, *moments)))


BLOCKS: dict[str, Callable[[Options], Block]] = {
    "task_linear": _linear,
    "task_conv2d": _conv2d,
    "task_update": _update,
}


def describe(op: str, o: Options) -> str:
    """The problem in words."""
    shape = "-".join(map(str, o.shape))
    what = {"task_linear": f"{o.support} rows, {o.activation}", "task_conv2d": f"{o.support} images"}.get(op, o.rule)
    return f"{op} {shape}, {o.tasks} tasks, {what}, {o.dtype}, backend {o.backend}"
