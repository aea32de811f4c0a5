"""Which functions, methods, operators and layers the layer program knows, and the nodes each becomes.

A handler takes the builder and the call's arguments under PyTorch's names; it returns a Value, a plain Python object
(a size), or raises Cannot with the reason.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mtml_kernels.batch_norm import PerStepBatchNorm
from mtml_kernels.program import Act
from mtml_kernels.program.builder import Builder
from mtml_kernels.program.values import BatchSize, Cannot, SameType, Value, without_lead
from mtml_kernels.program.vocabulary import images, shapes

Handler = Callable[..., Any]


class InPlace(NamedTuple):
    """A result that overwrites the operation's first tensor."""

    value: Value


def _is_number(x: object) -> bool:
    return isinstance(x, numbers.Real)


def _tensor(x: object) -> Value:
    if isinstance(x, Value):
        return x
    if isinstance(x, BatchSize):
        raise Cannot("the batch size enters the computation")
    raise Cannot(f"an operand is a {type(x).__name__}, not a tensor")


def _written(value: Value, inplace: bool) -> Value | InPlace:
    return InPlace(value) if inplace else value


# Arithmetic


def add(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    if _is_number(other):
        return b.affine(_tensor(input), 1.0, float(alpha) * float(other))
    if _is_number(input):
        return b.affine(_tensor(other), float(alpha), float(input))
    other = _tensor(other) if alpha == 1 else b.affine(_tensor(other), float(alpha), 0.0)
    return b.add(_tensor(input), other)


def sub(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return add(b, input, other, alpha=-alpha)


def rsub(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return sub(b, other, input, alpha=alpha)


def mul(b: Builder, input: Any, other: Any) -> Any:
    if isinstance(input, BatchSize) or isinstance(other, BatchSize):
        return _scaled_batch(input, other)
    if _is_number(input):
        input, other = other, input
    if _is_number(other):
        return b.affine(_tensor(input), float(other), 0.0)
    return b.mul(_tensor(input), _tensor(other))


def _scaled_batch(a: Any, b: Any) -> BatchSize:
    size, factor = (a, b) if isinstance(a, BatchSize) else (b, a)
    if isinstance(factor, int) and factor > 0:
        return BatchSize(size.times * factor)
    raise Cannot("the batch size enters the computation")


def floordiv(b: Builder, input: Any, other: Any) -> Any:
    if isinstance(input, BatchSize) and isinstance(other, int) and other > 0 and input.times % other == 0:
        return BatchSize(input.times // other)
    raise Cannot("floor division is not fused")


def div(b: Builder, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise Cannot("division with rounding is not fused")
    if not _is_number(other) or other == 0:
        raise Cannot("division by a tensor is not fused (by a Python number it is)")
    return b.affine(_tensor(input), 1.0 / float(other), 0.0)


def neg(b: Builder, input: Any) -> Any:
    return b.affine(_tensor(input), -1.0, 0.0)


def pos(b: Builder, input: Any) -> Any:
    return _tensor(input)


def square(b: Builder, input: Any) -> Any:
    return b.mul(_tensor(input), input)


def power(b: Builder, input: Any, exponent: Any) -> Any:
    x = _tensor(input)
    if not _is_number(exponent) or exponent not in (2, 3):
        raise Cannot("only the powers 2 and 3 are fused")
    return b.mul(x, x) if exponent == 2 else b.mul(b.mul(x, x), x)


def addcmul(b: Builder, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return add(b, input, b.mul(_tensor(tensor1), _tensor(tensor2)), alpha=value)


def equal(b: Builder, left: Any, right: Any) -> bool:
    if isinstance(left, BatchSize | SameType) and left == right:
        return True
    raise Cannot("a comparison of tensors, or of the batch size with a number, is not fused")


def unequal(b: Builder, left: Any, right: Any) -> bool:
    return not equal(b, left, right)


def linear(b: Builder, input: Any, weight: Any, bias: Any = None) -> Any:
    return b.linear(_tensor(input), _tensor(weight), None if bias is None else _tensor(bias))


def matmul(b: Builder, input: Any, other: Any) -> Any:
    x, w = _tensor(input), _tensor(other)
    if w.transposed:
        return b.linear(x, b.param(w.param))
    if x.param and not x.transposed and len(x.shape) == 2 and not w.batched and len(w.shape) == 1:
        return b.linear(w, x)  # W @ z: a layer on one unbatched row
    if w.param:
        raise Cannot(f"the parameter {w.param} is stored as [in, out]; store [out, in] and use F.linear or x @ w.T")
    raise Cannot("a product of two computed tensors is not fused")


def addmm(b: Builder, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise Cannot("addmm with beta or alpha is not fused")
    return b.add(_tensor(input), matmul(b, mat1, mat2))


# Activations


def relu(b: Builder, input: Any, inplace: bool = False) -> Any:
    return _written(b.act(Act.RELU, _tensor(input)), inplace)


def leaky_relu(b: Builder, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return _written(b.act(Act.LEAKY_RELU, _tensor(input), float(negative_slope)), inplace)


def silu(b: Builder, input: Any, inplace: bool = False) -> Any:
    return _written(b.act(Act.SILU, _tensor(input)), inplace)


def gelu(b: Builder, input: Any, approximate: str = "none") -> Any:
    return b.act(Act.GELU_TANH if approximate == "tanh" else Act.GELU, _tensor(input))


def softplus(b: Builder, input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return b.act(Act.SOFTPLUS, _tensor(input), float(beta), float(threshold))


def _pointwise(kind: Act) -> Handler:
    return lambda b, input: b.act(kind, _tensor(input))


tanh, sigmoid = _pointwise(Act.TANH), _pointwise(Act.SIGMOID)
sin, cos = _pointwise(Act.SIN), _pointwise(Act.COS)


def dropout(b: Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise Cannot(f"dropout with p={p} is active in training mode; call eval() or set p=0")
    return _tensor(input)


def embedding(
    b: Builder, input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if max_norm is not None:
        raise Cannot("an embedding with max_norm is not fused: it changes its weight in forward")
    if scale_grad_by_freq or sparse:
        option = "scale_grad_by_freq" if scale_grad_by_freq else "sparse"
        raise Cannot(f"an embedding with {option}=True is not fused")
    ids, table = _tensor(input), _tensor(weight)
    padding = -1 if padding_idx is None else padding_idx + (table.shape[0] if padding_idx < 0 else 0)
    return b.embed(ids, table, padding)


def _torch_embedding(
    b: Builder, weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:  # fmt: skip
    padding = padding_idx if padding_idx >= 0 else None  # -1 is none to this function
    return embedding(b, indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


# Images and normalisation, under PyTorch's names and orders of arguments


def conv1d(
    b: Builder, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    return images.conv(b, 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    b: Builder, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    return images.conv(b, 2, input, weight, bias, stride, padding, dilation, groups)


def _max_pool(dims: int) -> Handler:
    def pool(
        b: Builder, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        return images.max_pool(b, dims, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    return pool


def _with_indices(b: Builder, input: Any, *args: Any, **kwargs: Any) -> Any:
    raise Cannot("max pooling with return_indices=True is not fused")


def _avg_pool(dims: int) -> Handler:
    def pool(
        b: Builder, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        parts = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return images.avg_pool(b, dims, input, *parts)

    return pool


def _adaptive_avg_pool(dims: int) -> Handler:
    return lambda b, input, output_size: images.adaptive_avg_pool(b, dims, input, output_size)


max_pool1d, max_pool2d = _max_pool(1), _max_pool(2)
avg_pool1d, avg_pool2d = _avg_pool(1), _avg_pool(2)
adaptive_avg_pool1d, adaptive_avg_pool2d = _adaptive_avg_pool(1), _adaptive_avg_pool(2)


def batch_norm(
    b: Builder, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    return images.batch_norm(b, input, running_mean, running_var, weight, bias, training, eps)


def _torch_batch_norm(
    b: Builder, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: Any,
    eps: float, cudnn_enabled: bool,
) -> Any:  # fmt: skip
    return images.batch_norm(b, input, running_mean, running_var, weight, bias, training, eps)


def group_norm(
    b: Builder, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    return images.group_norm(b, input, num_groups, weight, bias, eps)


def layer_norm(
    b: Builder, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    return images.layer_norm(b, input, normalized_shape, weight, bias, eps)


def instance_norm(
    b: Builder, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    return images.instance_norm(b, input, weight, bias, use_input_stats, eps)


# Joining and repeating


def cat(b: Builder, tensors: Any, dim: int = 0, *, axis: int | None = None) -> Any:
    values = [_tensor(t) for t in tensors]
    return b.cat(values, shapes.dimension(values[0], dim if axis is None else axis))


def stack(b: Builder, tensors: Any, dim: int = 0) -> Any:
    values = [_tensor(t) for t in tensors]
    at = shapes.dimension(values[0], dim, extra=1)
    return b.cat([shapes.unsqueeze(b, value, at) for value in values], at)


def expand(b: Builder, input: Any, *size: Any) -> Any:
    value, sizes = _tensor(input), shapes.listed(size)
    if value.batched:
        if len(sizes) == value.ndim and all(s in (-1, have) for s, have in zip(sizes, value.sizes(), strict=True)):
            return value
        raise Cannot("expanding a value of each sample is not fused; addition and multiplication broadcast it")
    if sizes and isinstance(sizes[0], BatchSize):
        tail = (1,) * (len(sizes) - 1 - value.ndim) + without_lead(value, len(sizes))
        wanted = [have if s == -1 else shapes.as_int(s) for s, have in zip(sizes[1:], tail, strict=True)]
        return b.expand(value, sizes[0].times, tuple(wanted))
    return _expand_unbatched(b, value, sizes)


def _expand_unbatched(b: Builder, value: Value, sizes: Sequence[Any]) -> Value:
    tail = (1,) * (len(sizes) - value.ndim) + value.shape
    if len(tail) != len(sizes) or any(s not in (-1, have) for s, have in zip(sizes, tail, strict=True)):
        raise Cannot("expanding a parameter to a fixed size is not fused; + and * broadcast, x.shape[0] expands")
    return b.reshape(value, 0, tail)


def expand_as(b: Builder, input: Any, other: Any) -> Any:
    return expand(b, input, *_tensor(other).sizes())


def repeat(b: Builder, input: Any, *repeats: Any) -> Any:
    value, times = _tensor(input), shapes.listed(repeats)
    have = [1] * (len(times) - value.ndim) + list(value.sizes())
    sizes: list[Any] = []
    for size, n in zip(have, times, strict=True):
        if n != 1 and size != 1:
            raise Cannot("repeating a tensor along a dimension longer than 1 is not fused")
        sizes.append(size if n == 1 else n)
    return b.copy(expand(b, value, *sizes))


def copy(b: Builder, input: Any, *, memory_format: Any = None) -> Any:
    return b.copy(_tensor(input))


def same(b: Builder, input: Any, *, memory_format: Any = None) -> Any:
    return _tensor(input)


def convert(b: Builder, input: Any, *to: Any, **options: Any) -> Any:
    """`.to(x.dtype)`, `.to(x.device)`, `.type_as(x)`: the tensors of a fused call agree in both."""
    changes = [x for x in (*to, *options.values()) if not isinstance(x, SameType | Value | bool)]
    if changes:
        raise Cannot(f"a conversion to {changes[0]} is not fused (to another tensor's dtype or device it is)")
    return _tensor(input)


# Calls by what they are in the graph. In-place methods and operators are listed once, as what they compute.

METHODS: dict[str, Handler] = {
    "add": add, "sub": sub, "subtract": sub, "mul": mul, "multiply": mul, "div": div, "divide": div,
    "true_divide": div, "neg": neg, "negative": neg, "positive": pos, "square": square, "pow": power,
    "addcmul": addcmul, "matmul": matmul, "mm": matmul, "mv": matmul, "addmm": addmm,
    "relu": relu, "tanh": tanh, "sigmoid": sigmoid, "sin": sin, "cos": cos,
    "expand": expand, "expand_as": expand_as, "repeat": repeat, "clone": copy, "contiguous": same,
    "to": convert, "type_as": convert,
    "view": shapes.view, "reshape": shapes.view, "view_as": shapes.view_as, "reshape_as": shapes.view_as,
    "flatten": shapes.flatten, "unflatten": shapes.unflatten, "squeeze": shapes.squeeze,
    "unsqueeze": shapes.unsqueeze, "permute": shapes.permute, "transpose": shapes.transpose,
    "swapaxes": shapes.transpose, "t": shapes.t, "size": shapes.size, "dim": shapes.ndim, "numel": shapes.numel,
    "nelement": shapes.numel, "mean": images.mean,
}  # fmt: skip
ATTRIBUTES: dict[str, Handler] = {
    "shape": shapes.size,
    "ndim": shapes.ndim,
    "T": shapes.t,
    "mT": shapes.t,
    "dtype": lambda b, x: SameType(),
    "device": lambda b, x: SameType(),
}
_NOT_METHODS_OF_TORCH = {"view", "view_as", "reshape_as", "expand", "expand_as", "repeat", "contiguous", "to",
                         "type_as", "size", "dim", "nelement"}  # fmt: skip
_IN_PLACE_OPERATORS: dict[Any, Handler] = {
    operator.iadd: add,
    operator.isub: sub,
    operator.imul: mul,
    operator.itruediv: div,
}
FUNCTIONS: dict[Any, Handler] = {
    operator.add: add,
    operator.sub: sub,
    operator.mul: mul,
    operator.truediv: div,
    operator.floordiv: floordiv,
    operator.neg: neg,
    operator.pos: pos,
    operator.pow: power,
    operator.matmul: matmul,
    operator.getitem: shapes.getitem,
    operator.eq: equal,
    operator.ne: unequal,
    **{getattr(torch, name): handler for name, handler in METHODS.items() if name not in _NOT_METHODS_OF_TORCH},
    torch.rsub: rsub,
    torch.cat: cat,
    torch.concat: cat,
    torch.concatenate: cat,
    torch.stack: stack,
    torch.broadcast_to: expand,
    torch.dropout: lambda b, input, p, train: dropout(b, input, p, train),
    torch.special.expit: sigmoid,
    F.relu: relu,
    F.leaky_relu: leaky_relu,
    F.silu: silu,
    F.gelu: gelu,
    F.softplus: softplus,
    F.linear: linear,
    F.embedding: embedding,
    torch.embedding: _torch_embedding,
    F.conv1d: conv1d,
    F.conv2d: conv2d,
    F.max_pool1d: max_pool1d,
    F.max_pool2d: max_pool2d,
    F.max_pool1d_with_indices: _with_indices,
    F.max_pool2d_with_indices: _with_indices,
    torch.max_pool1d: max_pool1d,
    torch.max_pool2d: max_pool2d,
    F.avg_pool1d: avg_pool1d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool1d: adaptive_avg_pool1d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.batch_norm: batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.instance_norm: instance_norm,
    F.dropout: dropout,
    F.dropout1d: dropout,
    F.dropout2d: dropout,
    F.dropout3d: dropout,
    F.alpha_dropout: dropout,
    F.feature_alpha_dropout: dropout,
}


def in_place(handler: Handler) -> Handler:
    """The handler of the variant that overwrites its first tensor."""

    @functools.wraps(handler)  # the tracer checks arguments against the signature
    def overwrite(*args: Any, **kwargs: Any) -> InPlace:
        return InPlace(_tensor(handler(*args, **kwargs)))

    return overwrite


_OVERWRITING = ("add", "sub", "mul", "div", "neg", "square", "pow", "relu", "tanh", "sigmoid", "sin", "cos")
FUNCTIONS.update({getattr(torch, f"{n}_"): in_place(METHODS[n]) for n in _OVERWRITING if hasattr(torch, f"{n}_")})
METHODS.update({f"{name}_": in_place(METHODS[name]) for name in _OVERWRITING})
FUNCTIONS[F.leaky_relu_] = in_place(leaky_relu)
FUNCTIONS.update({function: in_place(handler) for function, handler in _IN_PLACE_OPERATORS.items()})


# Layers, by exact type: the module is given as well


def _linear_layer(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
    return linear(b, input, weights(m.weight), None if m.bias is None else weights(m.bias))


def _embedding_layer(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
    options = (m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
    return embedding(b, input, weights(m.weight), *options)


def _layer(function: Handler, *attributes: str) -> Handler:
    """A layer that is a function of its input and of some of its attributes."""

    def call(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
        return function(b, input, *(getattr(m, name) for name in attributes))

    return call


def _conv_layer(dims: int) -> Handler:
    def call(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
        if m.padding_mode != "zeros":
            raise Cannot(f"padding_mode={m.padding_mode!r} is not fused (zeros are)")
        bias = None if m.bias is None else weights(m.bias)
        parts = (m.stride, m.padding, m.dilation, m.groups)
        return images.conv(b, dims, input, weights(m.weight), bias, *parts)

    return call


def _affine(m: Any, weights: Callable[[Any], Value]) -> tuple[Value | None, Value | None]:
    return None if m.weight is None else weights(m.weight), None if m.bias is None else weights(m.bias)


def _batch_norm_layer(*dims: int) -> Handler:
    def call(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
        _check_dims(input, dims)
        if m.training and m.track_running_stats and m.running_mean is not None:
            raise Cannot("batch_norm='track': it updates running statistics, which only the general path does")
        if m.training or m.running_mean is None:
            return images.batch_norm(b, input, None, None, *_affine(m, weights), True, m.eps)
        statistics = weights(m.running_mean), weights(m.running_var)
        return images.batch_norm(b, input, *statistics, *_affine(m, weights), False, m.eps)

    return call


def _per_step_layer(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
    return images.batch_norm(b, input, None, None, *_affine(m, weights), True, m.eps)


def _instance_norm_layer(dims: int) -> Handler:
    def call(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
        _check_dims(input, (dims,))
        use_input_stats = m.training or not m.track_running_stats
        return images.instance_norm(b, input, *_affine(m, weights), use_input_stats, m.eps)

    return call


def _check_dims(input: Any, dims: Sequence[int]) -> None:
    """A layer for images takes no sequences."""
    value = _tensor(input)
    if value.ndim not in dims:
        raise Cannot(f"it takes a batch with {' or '.join(map(str, dims))} dimensions, got {value}")


def _group_norm_layer(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
    return images.group_norm(b, input, m.num_groups, *_affine(m, weights), m.eps)


def _layer_norm_layer(b: Builder, m: Any, weights: Callable[[Any], Value], input: Any) -> Any:
    return images.layer_norm(b, input, m.normalized_shape, *_affine(m, weights), m.eps)


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_dropout_layer = _layer(dropout, "p", "training")

LAYERS: dict[type[nn.Module], Handler] = {
    nn.Linear: _linear_layer,
    nn.Embedding: _embedding_layer,
    nn.Conv1d: _conv_layer(1),
    nn.Conv2d: _conv_layer(2),
    nn.BatchNorm1d: _batch_norm_layer(2, 3),
    nn.BatchNorm2d: _batch_norm_layer(4),
    PerStepBatchNorm: _per_step_layer,
    nn.GroupNorm: _group_norm_layer,
    nn.LayerNorm: _layer_norm_layer,
    nn.InstanceNorm1d: _instance_norm_layer(3),
    nn.InstanceNorm2d: _instance_norm_layer(4),
    nn.MaxPool1d: _layer(max_pool1d, *_MAX),
    nn.MaxPool2d: _layer(max_pool2d, *_MAX),
    nn.AvgPool1d: _layer(avg_pool1d, *_AVG),
    nn.AvgPool2d: _layer(avg_pool2d, *_AVG, "divisor_override"),
    nn.AdaptiveAvgPool1d: _layer(adaptive_avg_pool1d, "output_size"),
    nn.AdaptiveAvgPool2d: _layer(adaptive_avg_pool2d, "output_size"),
    nn.Identity: _layer(pos),
    nn.ReLU: _layer(relu, "inplace"),
    nn.LeakyReLU: _layer(leaky_relu, "negative_slope", "inplace"),
    nn.SiLU: _layer(silu, "inplace"),
    nn.GELU: _layer(gelu, "approximate"),
    nn.Softplus: _layer(softplus, "beta", "threshold"),
    nn.Tanh: _layer(tanh),
    nn.Sigmoid: _layer(sigmoid),
    nn.Flatten: _layer(shapes.flatten, "start_dim", "end_dim"),
    nn.Unflatten: _layer(shapes.unflatten, "dim", "unflattened_size"),
    nn.Dropout: _dropout_layer,
    nn.Dropout1d: _dropout_layer,
    nn.Dropout2d: _dropout_layer,
    nn.Dropout3d: _dropout_layer,
    nn.AlphaDropout: _dropout_layer,
    nn.FeatureAlphaDropout: _dropout_layer,
}

_MIXES = "it reduces over dimensions, possibly over the samples of the batch"
REASONS = {
    **dict.fromkeys(("sum", "var", "std", "prod", "max", "min", "norm", "logsumexp", "amax", "amin"), _MIXES),
    "softmax": "softmax is not fused; give the logits to a cross-entropy loss",
    "log_softmax": "log_softmax is not fused; give the logits to a cross-entropy loss",
    "detach": "it hides a part of the gradient",
    "data": "reading .data hides a part of the gradient",
    "item": "a value of a tensor steers the Python code",
    "chunk": "slices of a tensor are not fused; use one layer per part",
    "split": "slices of a tensor are not fused; use one layer per part",
    "bernoulli": "it is random",
    "rand_like": "it is random",
    "randn_like": "it is random",
}
