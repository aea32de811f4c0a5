"""`task_linear` and `task_conv2d` in Triton: schedules of a few parts, whose launches are those of the inner loop.

forward     y  = f(P(x, w) + b)                    one launch
backward    g = dy f'(z), from y or z again        one, and one for
            dx = X(g, w),  dw = W(g, x),  db = sum g
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.program.activations import Act
from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane, Schedule, Source
from mtml_kernels.schedule.kernels import FROM_OUTPUT, Activation, Convolution, Linear
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schema.task_conv2d import ConvForm
from mtml_kernels.schema.task_linear import LinearForm
from mtml_kernels.triton.inner_loop import bound

__all__ = ["conv_backward", "conv_forward", "linear_backward", "linear_forward"]

Shape = tuple[int, ...]


class _Layer(NamedTuple):
    """A layer's call as planes see it: x [T, N, R, I], weight [T or 1, rows, cols], bias [T or 1, 1, O] or absent."""

    family: str
    constants: Linear | Convolution
    x: Shape
    weight: Shape
    bias: Shape | None
    y: Shape
    dtype: torch.dtype
    act: Activation | None = None


class _Draft:
    """A schedule of parts in one call."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self.planes: list[Plane] = []
        self.parts: list[Part] = []

    def argument(self, shape: Shape) -> int:
        """The next tensor of the call."""
        source = Source("tensor", len(self.planes))
        self.planes.append(Plane(shape, self.layer.dtype, f"tensor {len(self.planes)}", source))
        return len(self.planes) - 1

    def emit(self, kernel: str, reads: Sequence[int], shapes: Sequence[Shape | None], constants: Any) -> list[int]:
        """A part; the planes of its results."""
        writes = []
        for shape in shapes:
            if shape is not None:
                self.planes.append(Plane(shape, self.layer.dtype, kernel))
            writes.append(ABSENT if shape is None else len(self.planes) - 1)
        self.parts.append(Part(kernel, tuple(reads), tuple(writes), constants))
        return writes

    def operands(self) -> tuple[int, int, int]:
        """x, weight and bias."""
        x, weight = self.argument(self.layer.x), self.argument(self.layer.weight)
        return x, weight, ABSENT if self.layer.bias is None else self.argument(self.layer.bias)

    def bound(self, results: Sequence[int]) -> Bound:
        """With its launches."""
        call = Call(tuple(self.parts), self.layer.family)
        return bound(Schedule(tuple(self.planes), (call,), tuple(results)))


@functools.lru_cache(maxsize=256)
def _forward(layer: _Layer) -> tuple[Bound, list[int]]:
    draft = _Draft(layer)
    (y,) = draft.emit(f"{layer.family}.forward", draft.operands(), [layer.y], layer.constants)
    if layer.act is not None:
        (y,) = draft.emit("act.forward", [y], [layer.y], layer.act)
    return draft.bound([y]), [y]


@functools.lru_cache(maxsize=256)
def _backward(layer: _Layer, needs: int) -> tuple[Bound, list[int]]:
    """Of the tensors x, weight, bias if there is one, y and its cotangent."""
    draft = _Draft(layer)
    x, weight, bias = draft.operands()
    y, d = draft.argument(layer.y), draft.argument(layer.y)
    if layer.act is not None:
        if layer.act.kind not in FROM_OUTPUT:
            (y,) = draft.emit(f"{layer.family}.forward", [x, weight, bias], [layer.y], layer.constants)
        (d,) = draft.emit("act.backward", [d, y], [layer.y], layer.act)
    found = [ABSENT] * 3
    for i, shape in enumerate((layer.x, layer.weight, layer.bias)):
        if shape is not None and needs >> i & 1:
            shapes = [shape if j == i else None for j in range(3)]
            over = layer.constants._replace(over_tasks=i > 0 and shape[0] == 1)
            found[i] = draft.emit(f"{layer.family}.backward", [d, x, weight], shapes, over)[i]
    return draft.bound([plane for plane in found if plane != ABSENT]), found


def _run(made: tuple[Bound, list[int]], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    steps, results = made

    def given(plane: Plane) -> Tensor:
        assert plane.source is not None
        return tensors[plane.source.position].reshape(plane.shape)

    memory = steps.run(given, {})
    return [None if plane == ABSENT else memory[plane] for plane in results]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm) -> _Layer:
    tasks, rows, inputs = x.shape
    act = Activation(form.activation, form.c0, form.c1) if form != form.plain else None
    return _Layer(
        "linear",
        Linear(False, False),
        (tasks, rows, 1, inputs),
        tuple(weight.shape),
        None if bias is None else (bias.shape[0], 1, bias.shape[1]),
        (tasks, rows, 1, weight.shape[1]),
        x.dtype,
        None if act is None else act._replace(kind=Act(act.kind)),
    )


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm) -> Tensor:
    """y [T, N, O]"""
    tensors = [t for t in (x, weight, bias) if t is not None]
    (y,) = _run(_forward(_linear(x, weight, bias, form)), tensors)
    assert y is not None
    return y.squeeze(2)


def linear_backward(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm, needs: int
) -> list[Tensor | None]:
    """dx, dw, db, each where its bit of `needs` is set."""
    operands = (x, weight, bias)
    tensors = [t for t in (*operands, y, d) if t is not None]
    found = _run(_backward(_linear(x, weight, bias, form), needs), tensors)
    return _like(found, operands)


def _like(found: Sequence[Tensor | None], operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the shapes of their tensors."""
    return [None if g is None or t is None else g.reshape(t.shape) for g, t in zip(found, operands, strict=True)]


def _plane(images: Tensor) -> Tensor:
    """[T, N, C, H, W] as [T, N, H W, C]."""
    return images.flatten(3).transpose(2, 3)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm) -> _Layer:
    out = form.outputs(x, weight)
    pairs = (x.shape[3:], out, weight.shape[3:], form.stride, form.padding, form.dilation)
    window = (*(float(value) for pair in pairs for value in pair), float(form.groups))
    tasks, samples, channels = x.shape[:3]
    return _Layer(
        "conv",
        Convolution(window, False),
        (tasks, samples, x.shape[3:].numel(), channels),
        (*weight.shape[:2], weight.shape[2:].numel()),
        None if bias is None else (bias.shape[0], 1, bias.shape[1]),
        (tasks, samples, out[0] * out[1], weight.shape[1]),
        x.dtype,
    )


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm) -> Tensor:
    """y [T, N, O, OH, OW]"""
    tensors = [_plane(x), weight, *([] if bias is None else [bias])]
    (y,) = _run(_forward(_conv(x, weight, bias, form)), tensors)
    assert y is not None
    return y.transpose(2, 3).unflatten(3, form.outputs(x, weight)).contiguous()


def conv_backward(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm, needs: int
) -> list[Tensor | None]:
    """dx, dw, db, each where its bit of `needs` is set."""
    operands = (x, weight, bias)
    tensors = [_plane(x), weight, *([] if bias is None else [bias]), _plane(y), _plane(d)]
    found = _run(_backward(_conv(x, weight, bias, form), needs), tensors)
    if found[0] is not None:
        found[0] = found[0].transpose(2, 3)
    return _like(found, operands)
