"""Convolutions with zero padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import LAYOUT_CONV, LAYOUT_ROWS, Node
from mtml_kernels.program.layers.window import WINDOW_CONSTANTS, Axis, Window, constants, image_of, planes, rows, sizes
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Given, Op, OpInfo, operation
from mtml_kernels.program.values import Value, optional
from mtml_kernels.program.vocabulary import Handler, Weights, function, layer

__all__ = ["convolve"]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[float]) -> Tensor:
    """[N, H*W, C] -> [N, OH*OW, O] for a weight with the elements of [O, C / groups, kh, kw]."""
    window = Window.of(numbers)
    kernels = weight.reshape(weight.shape[0], x.shape[2] // window.last, *window.kernel)
    image = window.padded(planes(x, window.size), 0.0)
    return rows(F.conv2d(image, kernels, bias, window.stride, 0, window.dilation, window.last))


def _compute(given: Given) -> Tensor:
    assert given.weight is not None
    bias = None if given.bias is None else given.bias.reshape(-1)
    return convolve(given.operands[0], given.weight, bias, given.constants)


def _name(kind: int, constants: Sequence[float]) -> str:
    """`conv2d 3x3 /2`. A line of points under a one-line kernel is a sequence."""
    if not constants:
        return "conv"
    height, _, _, _, kh, kw, sh, sw, _, _, dh, dw, groups = (int(c) for c in constants)
    line = height == kh == 1
    name = f"conv1d {kw}" if line else f"conv2d {kh}x{kw}"
    if (sh, sw) != (1, 1):
        name += f" /{sw}" if sh == sw or line else f" /{sh}x{sw}"
    if (dh, dw) != (1, 1):
        name += " dilated"
    return name + (f" groups {groups}" if groups > 1 else "")


operation(OpInfo(Op.CONV, "conv", _compute, constants=WINDOW_CONSTANTS, label=_name))


def _conv(
    b: Builder, dims: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Value:
    x, w = image_of(input, dims), weight
    if not isinstance(w, Value) or len(w.shape) != dims + 2 or w.batched:
        raise Cannot(f"the weight of a convolution must be a parameter with {dims + 2} dimensions")
    if x.shape[0] != w.shape[1] * groups or w.shape[0] % groups:
        raise Cannot(f"the layer expects {w.shape[1] * groups} channels, its input is {x}")
    strides, dilations = sizes(stride, dims, "stride"), sizes(dilation, dims, "dilation")
    axes = [
        _conv_axis(*axis)
        for axis in zip(x.shape[1:], w.shape[2:], strides, _paddings(padding, dims), dilations, strict=True)
    ]
    space = tuple(axis.out for axis in axes)
    if min(space) < 1:
        raise Cannot(f"its kernel is larger than its input {x}")
    return _build(b, x, w, optional(bias), space, axes, groups)


def _build(
    b: Builder, x: Value, weight: Value, bias: Value | None, space: tuple[int, ...], axes: Sequence[Axis], groups: int
) -> Value:
    """The node; `space` is the shape of its output's points."""
    if not weight.param or weight.transposed:
        raise Cannot("the weight of a convolution must be a parameter itself, not a value computed from one")
    outputs = weight.shape[0]
    own_bias = bias is not None and bias.is_row(outputs)
    draft = Draft(
        Node(Op.CONV, a=b.image(x), rows=math.prod(space), features=outputs),
        weight=b.read(weight.param, LAYOUT_CONV),
        bias=b.read(bias.param, LAYOUT_ROWS) if bias is not None and own_bias else "",
        constants=constants(axes, groups),
    )
    out = b.value(b.emit(draft), (outputs, *space), 1, image=True)
    return out if bias is None or own_bias else b.elementwise(Op.ADD, out, b.per_channel(bias, out))


def _paddings(padding: Any, dims: int) -> list[int | None]:
    """Sizes, with None for what keeps the image's size."""
    if padding == "valid":
        return [0] * dims
    return [None] * dims if padding == "same" else [*sizes(padding, dims, "padding")]


def _conv_axis(size: int, kernel: int, stride: int, pad: int | None, dilation: int) -> Axis:
    reach = dilation * (kernel - 1)
    if pad is None:
        if stride != 1:
            raise Cannot("padding='same' is not defined for strides")
        return Axis(size, size, kernel, 1, reach // 2, dilation)
    return Axis(size, (size + 2 * pad - reach - 1) // stride + 1, kernel, stride, pad, dilation)


def _functional(dims: int) -> Handler:
    def call(
        b: Builder, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        return _conv(b, dims, input, weight, bias, stride, padding, dilation, groups)

    return call


def _layer(dims: int) -> Handler:
    def call(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
        if m.padding_mode != "zeros":
            raise Cannot(f"padding_mode={m.padding_mode!r} is not fused (zeros are)")
        bias = None if m.bias is None else weights(m.bias)
        return _conv(b, dims, input, weights(m.weight), bias, m.stride, m.padding, m.dilation, m.groups)

    return call


function(F.conv1d)(_functional(1))
function(F.conv2d)(_functional(2))
layer(nn.Conv1d)(_layer(1))
layer(nn.Conv2d)(_layer(2))
