"""Handlers of convolutions, poolings and normalisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mtml_kernels.program import Act, Norm, Pool, Shape
from mtml_kernels.program.builder import Builder, Constants
from mtml_kernels.program.values import BatchSize, Cannot, Value, dimension

__all__ = [
    "adaptive_avg_pool",
    "avg_pool",
    "batch_norm",
    "conv",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "max_pool",
    "mean",
]


class Axis(NamedTuple):
    """One dimension of an image under a sliding window; `pad` is what is added before it."""

    size: int
    out: int
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1


_LINE = Axis(1, 1)  # the height of a sequence


def _constants(axes: Sequence[Axis], last: float) -> Constants:
    """H, W, OH, OW, kh, kw, ..., then the groups or the divisor."""
    height, width = axes if len(axes) == 2 else (_LINE, *axes)
    return (*(float(v) for pair in zip(height, width, strict=True) for v in pair), float(last))


def _image(x: object, dims: int) -> Value:
    """The operand, which must be a batch of images with so many dimensions of space."""
    if not isinstance(x, Value):
        raise Cannot(f"an operand is a {type(x).__name__}, not a tensor")
    if not x.batched or len(x.shape) != dims + 1:
        raise Cannot(f"it takes a batch [N, C, {'L' if dims == 1 else 'H, W'}], got {x}")
    return x


def _optional(x: Any) -> Value | None:
    if x is None or isinstance(x, Value):
        return x
    raise Cannot(f"an operand is a {type(x).__name__}, not a tensor")


def _sizes(value: Any, dims: int, name: str) -> list[int]:
    """A number for all dimensions, or one for each."""
    found = [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
    if len(found) != dims or not all(isinstance(size, int) for size in found):
        raise Cannot(f"its {name} {value} is not {dims} plain sizes")
    return found


# Convolution


def conv(
    b: Builder, dims: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Value:
    x, w = _image(input, dims), weight
    if not isinstance(w, Value) or len(w.shape) != dims + 2 or w.batched:
        raise Cannot(f"the weight of a convolution must be a parameter with {dims + 2} dimensions")
    if x.shape[0] != w.shape[1] * groups or w.shape[0] % groups:
        raise Cannot(f"the layer expects {w.shape[1] * groups} channels, its input is {x}")
    strides, dilations = _sizes(stride, dims, "stride"), _sizes(dilation, dims, "dilation")
    axes = [
        _conv_axis(*axis)
        for axis in zip(x.shape[1:], w.shape[2:], strides, _paddings(padding, dims), dilations, strict=True)
    ]
    space = tuple(axis.out for axis in axes)
    if min(space) < 1:
        raise Cannot(f"its kernel is larger than its input {x}")
    return b.conv(x, w, _optional(bias), space, _constants(axes, groups))


def _paddings(padding: Any, dims: int) -> list[int | None]:
    """Sizes, with None for what keeps the image's size."""
    if padding == "valid":
        return [0] * dims
    return [None] * dims if padding == "same" else [*_sizes(padding, dims, "padding")]


def _conv_axis(size: int, kernel: int, stride: int, pad: int | None, dilation: int) -> Axis:
    reach = dilation * (kernel - 1)
    if pad is None:
        if stride != 1:
            raise Cannot("padding='same' is not defined for strides")
        return Axis(size, size, kernel, 1, reach // 2, dilation)
    return Axis(size, (size + 2 * pad - reach - 1) // stride + 1, kernel, stride, pad, dilation)


# Pooling


def _pool_axes(
    x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[list[Axis], Shape]:
    dims = len(x.shape) - 1
    kernels = _sizes(kernel, dims, "kernel")
    strides = kernels if stride is None or stride == [] else _sizes(stride, dims, "stride")
    pads, dilations = _sizes(padding, dims, "padding"), _sizes(dilation, dims, "dilation")
    if any(2 * pad > size for pad, size in zip(pads, kernels, strict=True)):
        raise Cannot("its padding is more than half of its kernel")
    axes = [
        _pool_axis(*axis, ceil_mode=ceil_mode)
        for axis in zip(x.shape[1:], kernels, strides, pads, dilations, strict=True)
    ]
    space = tuple(axis.out for axis in axes)
    if min(space) < 1:
        raise Cannot(f"its window is larger than its input {x}")
    return axes, space


def _pool_axis(size: int, kernel: int, stride: int, pad: int, dilation: int, *, ceil_mode: bool) -> Axis:
    """As PyTorch counts; with ceil_mode the last window must still begin inside the image or the padding before it."""
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out -= 1
    return Axis(size, out, kernel, stride, pad, dilation)


def max_pool(
    b: Builder, dims: int, input: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool,
    return_indices: bool,
) -> Value:  # fmt: skip
    x = _image(input, dims)
    if return_indices:
        raise Cannot("max pooling with return_indices=True is not fused")
    axes, space = _pool_axes(x, kernel, stride, padding, dilation, ceil_mode)
    return b.pool(x, Pool.MAX, space, _constants(axes, 0))


def avg_pool(
    b: Builder, dims: int, input: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include: bool,
    divisor: int | None,
) -> Value:  # fmt: skip
    x = _image(input, dims)
    axes, space = _pool_axes(x, kernel, stride, padding, 1, ceil_mode)
    return b.pool(x, Pool.AVG, space, _constants(axes, divisor or (0 if include else -1)))


def adaptive_avg_pool(b: Builder, dims: int, input: Any, output_size: Any) -> Value:
    x = _image(input, dims)
    wanted = [output_size] * dims if output_size is None or isinstance(output_size, int) else list(output_size)
    wanted = [size if want is None else want for want, size in zip(wanted, x.shape[1:], strict=False)]
    space = tuple(_sizes(wanted, dims, "output size"))
    return _adaptive(b, x, space)


def _adaptive(b: Builder, x: Value, space: Shape) -> Value:
    axes = [Axis(size, out) for size, out in zip(x.shape[1:], space, strict=True)]
    return b.pool(x, Pool.ADAPTIVE_AVG, space, _constants(axes, 0))


def mean(b: Builder, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Over dimensions of each sample that lie side by side, at the front or at the end."""
    x = input
    if not isinstance(x, Value) or not x.batched or dtype is not None:
        raise Cannot("only the mean of a sample's own values is fused")
    over = sorted({dimension(x, d) for d in ([dim] if isinstance(dim, int) else dim or [])})
    if not over or over[0] == 0 or x.lead > 1:
        raise Cannot("it reduces over the samples of the batch")
    first, last, count = over[0] - 1, over[-1] - 1, len(x.shape)
    if x.image and first > 0 and count <= 3:  # any dimensions of space
        pooled = _adaptive(b, x, tuple(1 if i in over else size for i, size in enumerate(x.shape[1:], 2)))
    elif last - first >= len(over) or (first > 0 and last < count - 1):
        raise Cannot("the mean over dimensions that are neither the first nor the last of a sample is not fused")
    elif last == count - 1:  # [kept, reduced]
        kept = math.prod(x.shape[:first])
        pooled = _adaptive(b, b.reshape(x, 1, (kept, x.elements // kept)), (1,))
    else:  # [reduced, kept]
        reduced = math.prod(x.shape[: last + 1])
        turned = b.rotate(b.reshape(x, 1, (reduced, x.elements // reduced)), 1)
        pooled = _adaptive(b, turned, (1,))
    shape = [1 if i in over else size for i, size in enumerate(x.shape, 1)]
    return b.reshape(pooled, 1, tuple(shape if keepdim else [s for i, s in enumerate(shape, 1) if i not in over]))


# Normalisation


def _channels(x: object, what: str) -> Value:
    if not isinstance(x, Value) or not x.batched or not x.shape:
        raise Cannot(f"{what} takes a batch [N, C, ...], got {x}")
    return x


def batch_norm(
    b: Builder, input: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool, eps: float
) -> Value:
    """By batch statistics in training or where there are no others; running statistics are read, never written."""
    x, scale, shift = _channels(input, "batch normalisation"), _optional(weight), _optional(bias)
    if training or mean is None:
        return b.norm(x, Norm.BATCH, float(eps), 1, scale, shift)
    mean, var = (_statistic(b, value, x) for value in (mean, var))
    deviation = b.act(Act.RSQRT, var, float(eps))
    factor = deviation if scale is None else b.mul(scale, deviation)
    out = b.mul(b.add(x, b.per_channel(b.affine(mean, -1.0, 0.0), x)), b.per_channel(factor, x))
    return out if shift is None else b.add(out, b.per_channel(shift, x))


def _statistic(b: Builder, value: Any, x: Value) -> Value:
    if not isinstance(value, Value) or not value.param or value.transposed:
        raise Cannot("running statistics must be buffers themselves, not values computed from them")
    if value.shape != x.shape[:1]:
        raise Cannot(f"the layer expects {value.shape[0]} channels, its input is {x}")
    return b.statistic(value.param)


def group_norm(b: Builder, input: Any, groups: int, weight: Any, bias: Any, eps: float) -> Value:
    x = _channels(input, "group normalisation")
    if x.lead > 1 or x.shape[0] % groups:
        raise Cannot(f"{x} does not fall into {groups} groups of channels for each sample")
    return b.norm(x, Norm.GROUP, float(eps), groups, _optional(weight), _optional(bias))


def instance_norm(b: Builder, input: Any, weight: Any, bias: Any, use_input_stats: bool, eps: float) -> Value:
    x = _channels(input, "instance normalisation")
    if not use_input_stats:
        raise Cannot("instance normalisation by running statistics is not fused")
    if len(x.shape) < 2:
        raise Cannot(f"instance normalisation takes a batch [N, C, ...], got {x}")
    return group_norm(b, x, x.shape[0], weight, bias, eps)


def layer_norm(b: Builder, input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Value:
    """Over the last dimensions. Over a whole image it is the normalisation of one group, which leaves it an image."""
    x = _channels(input, "layer normalisation")
    over = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if any(isinstance(size, BatchSize) for size in over) or x.shape[len(x.shape) - len(over) :] != over:
        raise Cannot(f"it normalises {list(over)}, its input is {x}")
    scale, shift = _optional(weight), _optional(bias)
    if len(over) == 1:
        return b.norm(x, Norm.LAYER, float(eps), 1, scale, shift)
    if x.image and over == x.shape:
        out = b.norm(x, Norm.GROUP, float(eps), 1, None, None)
    else:
        kept = x.shape[: len(x.shape) - len(over)]
        flat = b.reshape(x, x.lead, (*kept, math.prod(over)))
        out = b.reshape(b.norm(flat, Norm.LAYER, float(eps), 1, None, None), x.lead, x.shape)
    out = out if scale is None else b.mul(out, scale)
    return out if shift is None else b.add(out, shift)
