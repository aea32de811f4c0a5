"""Normalisations: batch, group, instance, layer, by root mean square and to unit length."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.batch_norm import PerStepBatchNorm
from mtml_kernels.program.activations import Act
from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import LAYOUT_ROWS, LAYOUT_STEPS, Node
from mtml_kernels.program.layers.shapes import rows_along
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Given, Op, OpInfo, operation
from mtml_kernels.program.values import BatchSize, Value, optional, tensor
from mtml_kernels.program.vocabulary import Handler, Weights, function, layer

__all__ = ["Norm", "normalise"]


class Norm(enum.IntEnum):
    """What mean and (biased) variance are taken over; the last two know no mean."""

    BATCH = 0  # for each feature: all samples of the set and all rows
    GROUP = 1  # for each sample and group of neighbouring features: the group and all rows
    LAYER = 2  # for each sample and row: the features
    RMS = 3  # the same, over the root mean square; eps -1: that of the dtype
    UNIT = 4  # the same, over the length, or over eps where that is longer


def _over_length(x: Tensor, eps: float) -> Tensor:
    """Rows over their length, or over eps where that is longer, where the length has no gradient."""
    squares = x.square().sum(-1, keepdim=True)
    length = torch.sqrt(torch.where(squares > 0, squares, 1.0))
    return torch.where((squares > 0) & (length >= eps), x / length, x / eps)


def _over_root_mean_square(x: Tensor, eps: float) -> Tensor:
    eps = eps if eps >= 0 else torch.finfo(x.dtype).eps
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def normalise(
    kind: int, x: Tensor, eps: float, groups: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """[N, rows, F] with mean 0 and variance 1 over what the kind says, then times weight [F], plus bias [F]."""
    out = _normalised(Norm(kind), x, eps, groups)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _normalised(kind: Norm, x: Tensor, eps: float, groups: int) -> Tensor:
    if kind == Norm.UNIT:
        return _over_length(x, eps)
    if kind == Norm.RMS:
        return _over_root_mean_square(x, eps)
    n, rows, features = x.shape
    shape = {
        Norm.BATCH: (1, n * rows, features, 1),
        Norm.GROUP: (n, rows, groups, features // groups),
        Norm.LAYER: (n * rows, 1, 1, features),
    }[kind]
    grouped = x.reshape(shape)
    centred = grouped - grouped.mean((1, 3), keepdim=True)
    variance = centred.square().mean((1, 3), keepdim=True)
    return (centred / torch.sqrt(variance + eps)).reshape(x.shape)


def _compute(given: Given) -> Tensor:
    eps, groups = given.constants
    affine = (None if row is None else row.reshape(-1) for row in (given.weight, given.bias))
    return normalise(given.kind, given.operands[0], eps, int(groups), *affine)


operation(
    OpInfo(
        Op.NORM,
        "norm",
        _compute,
        constants=2,
        mixing=frozenset({Norm.BATCH}),
        label=lambda kind, constants: f"{Norm(kind).name.lower()}_norm",
    )
)


def _build(
    b: Builder, x: Value, kind: Norm, eps: float, groups: int, weight: Value | None, bias: Value | None
) -> Value:
    """Normalises a value [C, *space] (by rows: [..., C]); weight and bias are [C] or, for the steps, [K, C]."""
    image = kind in (Norm.BATCH, Norm.GROUP) and len(x.shape) > 1
    node = b.image(x) if image else b.matrix(x)
    form = b.node(node)
    names = [_row_name(b, row, form.features) for row in (weight, bias)]
    if weight is not None and not names[0]:
        names[1] = ""  # the bias comes after the weight
    norm = Node(Op.NORM, a=node, b=int(kind), rows=form.rows, features=form.features)
    draft = Draft(norm, weight=names[0], bias=names[1], constants=(float(eps), float(groups)))
    out = b.value(b.emit(draft), x.shape, x.lead, image=image)
    for op, row, name in ((Op.MUL, weight, names[0]), (Op.ADD, bias, names[1])):
        if row is not None and not name:
            out = b.elementwise(op, out, b.per_channel(row, x) if kind in (Norm.BATCH, Norm.GROUP) else row)
    return out


def _row_name(b: Builder, row: Value | None, features: int) -> str:
    """The name of a parameter that the node itself can apply, or none."""
    if row is not None and row.param and len(row.shape) == 2:
        return b.read(row.param, LAYOUT_STEPS)
    return b.read(row.param, LAYOUT_ROWS) if row is not None and row.is_row(features) else ""


def _channels(x: object, what: str) -> Value:
    if not isinstance(x, Value) or not x.batched or not x.shape:
        raise Cannot(f"{what} takes a batch [N, C, ...], got {x}")
    return x


def _batch_norm(
    b: Builder, input: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool, eps: float
) -> Value:
    """By batch statistics in training or where there are no others; running statistics are read, never written."""
    x, scale, shift = _channels(input, "batch normalisation"), optional(weight), optional(bias)
    if training or mean is None:
        return _build(b, x, Norm.BATCH, eps, 1, scale, shift)
    mean, var = (_statistic(b, value, x) for value in (mean, var))
    deviation = b.act(Act.RSQRT, var, (float(eps), 0.0))
    factor = deviation if scale is None else b.elementwise(Op.MUL, scale, deviation)
    centred = b.elementwise(Op.ADD, x, b.per_channel(b.affine(mean, -1.0, 0.0), x))
    out = b.elementwise(Op.MUL, centred, b.per_channel(factor, x))
    return out if shift is None else b.elementwise(Op.ADD, out, b.per_channel(shift, x))


def _statistic(b: Builder, value: Any, x: Value) -> Value:
    if not isinstance(value, Value) or not value.param or value.transposed:
        raise Cannot("running statistics must be buffers themselves, not values computed from them")
    if value.shape != x.shape[:1]:
        raise Cannot(f"the layer expects {value.shape[0]} channels, its input is {x}")
    return b.statistic(value.param)


@function(F.group_norm, torch.group_norm)
def _group_norm(
    b: Builder, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    x = _channels(input, "group normalisation")
    if x.lead > 1 or x.shape[0] % num_groups:
        raise Cannot(f"{x} does not fall into {num_groups} groups of channels for each sample")
    return _build(b, x, Norm.GROUP, eps, num_groups, optional(weight), optional(bias))


@function(F.instance_norm)
def _instance_norm(
    b: Builder, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    x = _channels(input, "instance normalisation")
    if not use_input_stats:
        raise Cannot("instance normalisation by running statistics is not fused")
    if len(x.shape) < 2:
        raise Cannot(f"instance normalisation takes a batch [N, C, ...], got {x}")
    return _group_norm(b, x, x.shape[0], weight, bias, eps)


@function(F.layer_norm, torch.layer_norm)
def _layer_norm(
    b: Builder, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    """Over the last dimensions. Over a whole image it is the normalisation of one group, which leaves it an image."""
    x = _channels(input, "layer normalisation")
    over = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if any(isinstance(size, BatchSize) for size in over) or x.shape[len(x.shape) - len(over) :] != over:
        raise Cannot(f"it normalises {list(over)}, its input is {x}")
    scale, shift = optional(weight), optional(bias)
    if len(over) == 1:
        return _build(b, x, Norm.LAYER, eps, 1, scale, shift)
    if x.image and over == x.shape:
        out = _build(b, x, Norm.GROUP, eps, 1, None, None)
    else:
        kept = x.shape[: len(x.shape) - len(over)]
        flat = b.reshape(x, x.lead, (*kept, math.prod(over)))
        out = b.reshape(_build(b, flat, Norm.LAYER, eps, 1, None, None), x.lead, x.shape)
    out = out if scale is None else b.elementwise(Op.MUL, out, scale)
    return out if shift is None else b.elementwise(Op.ADD, out, shift)


@function(F.rms_norm, torch.rms_norm)
def _rms_norm(b: Builder, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    x, scale = _channels(input, "normalisation by root mean square"), optional(weight)
    over = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if any(isinstance(size, BatchSize) for size in over) or x.shape[len(x.shape) - len(over) :] != over:
        raise Cannot(f"it normalises {list(over)}, its input is {x}")
    own = -1.0 if eps is None else float(eps)
    if len(over) == 1:
        return _build(b, x, Norm.RMS, own, 1, scale, None)
    flat = b.reshape(x, x.lead, (*x.shape[: len(x.shape) - len(over)], math.prod(over)))
    out = b.reshape(_build(b, flat, Norm.RMS, own, 1, None, None), x.lead, x.shape)
    return out if scale is None else b.elementwise(Op.MUL, out, scale)


@function(F.normalize)
def _normalize(b: Builder, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    x = _channels(input, "normalize")
    if p != 2 or out is not None:
        raise Cannot("only the normalisation to a Euclidean length of 1 is fused (p=2)")
    source, image = rows_along(b, x, dim)
    form = b.node(source)
    node = Node(Op.NORM, a=source, b=int(Norm.UNIT), rows=form.rows, features=form.features)
    return b.value(b.emit(Draft(node, constants=(float(eps), 1.0))), x.shape, x.lead, image=image)


@function(F.batch_norm)
def _functional_batch_norm(
    b: Builder, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    return _batch_norm(b, input, running_mean, running_var, weight, bias, training, eps)


@function(torch.batch_norm)
def _torch_batch_norm(
    b: Builder, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: Any,
    eps: float, cudnn_enabled: bool,
) -> Any:  # fmt: skip
    return _batch_norm(b, input, running_mean, running_var, weight, bias, training, eps)


def _affine(m: Any, weights: Weights) -> tuple[Value | None, Value | None]:
    return None if m.weight is None else weights(m.weight), None if m.bias is None else weights(m.bias)


def _check_dims(input: Any, dims: Sequence[int]) -> None:
    """A layer for images takes no sequences."""
    value = tensor(input)
    if value.ndim not in dims:
        raise Cannot(f"it takes a batch with {' or '.join(map(str, dims))} dimensions, got {value}")


def _batch_norm_layer(*dims: int) -> Handler:
    def call(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
        _check_dims(input, dims)
        if m.training and m.track_running_stats and m.running_mean is not None:
            raise Cannot("batch_norm='track': it updates running statistics, which only the general path does")
        if m.training or m.running_mean is None:
            return _batch_norm(b, input, None, None, *_affine(m, weights), True, m.eps)
        statistics = weights(m.running_mean), weights(m.running_var)
        return _batch_norm(b, input, *statistics, *_affine(m, weights), False, m.eps)

    return call


def _instance_norm_layer(dims: int) -> Handler:
    def call(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
        _check_dims(input, (dims,))
        use_input_stats = m.training or not m.track_running_stats
        return _instance_norm(b, input, None, None, *_affine(m, weights), use_input_stats, eps=m.eps)

    return call


layer(nn.BatchNorm1d)(_batch_norm_layer(2, 3))
layer(nn.BatchNorm2d)(_batch_norm_layer(4))
layer(nn.InstanceNorm1d)(_instance_norm_layer(3))
layer(nn.InstanceNorm2d)(_instance_norm_layer(4))


@layer(PerStepBatchNorm)
def _per_step_layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    return _batch_norm(b, input, None, None, *_affine(m, weights), True, m.eps)


@layer(nn.GroupNorm)
def _group_norm_layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    return _group_norm(b, input, m.num_groups, *_affine(m, weights), m.eps)


@layer(nn.LayerNorm)
def _layer_norm_layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    return _layer_norm(b, input, m.normalized_shape, *_affine(m, weights), m.eps)


@layer(nn.RMSNorm)
def _rms_norm_layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    return _rms_norm(b, input, m.normalized_shape, None if m.weight is None else weights(m.weight), m.eps)
