"""Normalisations written from mean and variance, for every order of derivative.

PyTorch's own layer_norm, batch_norm and instance_norm are wrong from the third order on (pytorch#186256, #175754), and
under vmap with a weight from the second: their derivative formulas take the mean and the deviation that the forward
returned for constants. Each function here has the signature of the one that it stands for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["NATIVE_NORMS", "NORMS", "only_updates"]

Tensors = tuple[Tensor, Tensor, Tensor]

# what runs below autograd where a norm was not replaced, by the operator's name
NATIVE_NORMS = {
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}


_here = threading.local()


@contextmanager
def updating() -> Iterator[None]:
    """Within it, a kernel runs for what it leaves in the running statistics alone."""
    _here.updating = True
    try:
        with torch.no_grad():
            yield
    finally:
        _here.updating = False


def only_updates() -> bool:
    """Is this thread within `updating`?"""
    return getattr(_here, "updating", False)


def _standardise(x: Tensor, dims: list[int], eps: float) -> Tensors:
    """(x - mean) / sqrt(variance + eps) over `dims`, the mean, 1 / sqrt(variance + eps); half precision in float32."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] | None = None) -> Tensor:
    if weight is not None:
        x = x * (weight if shape is None else weight.reshape(shape))
    if bias is not None:
        x = x + (bias if shape is None else bias.reshape(shape))
    return x


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensors:
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if list(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"layer_norm: expected an input [*, {', '.join(map(str, shape))}], got {list(input.shape)}")
    x, mean, scale = _standardise(input, list(range(-len(shape), 0)), eps)
    return _affine(x, weight, bias), mean, scale


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    out, _, _ = _layer_norm(input, normalized_shape, weight, bias, eps)
    wide = input.device.type == "cuda" and torch.is_autocast_enabled("cuda")  # which gives float32 for this one
    return out if wide else out.to(input.dtype)


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensors:
    out, mean, scale = _layer_norm(input, normalized_shape, weight, bias, eps)
    return out.to(input.dtype), mean, scale


def native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensors:
    if not training:  # running statistics are constants, for which PyTorch's own derivatives are right
        result: Tensors = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        return result
    if running_mean is not None:
        with updating():
            torch.native_batch_norm(input.detach(), weight, bias, running_mean, running_var, True, momentum, eps)
    shape = [1, -1, *(1 for _ in input.shape[2:])]
    x, mean, scale = _standardise(input, [0, *range(2, input.ndim)], eps)
    return _affine(x, weight, bias, shape).to(input.dtype), mean.flatten(), scale.flatten()


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not training:
        result: Tensor = torch.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
        )
        return result
    return native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


def _legit(input: Tensor, weight: Any, bias: Any, *rest: Any) -> Tensors:
    """_native_batch_norm_legit, with running statistics or, in its overload no_stats, without."""
    statistics = rest[:2] if len(rest) == 5 else (None, None)
    training, momentum, eps = rest[-3:]
    return native_batch_norm(input, weight, bias, statistics[0], statistics[1], training, momentum, eps)


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    rest = (running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)
    if not use_input_stats:
        result: Tensor = torch.instance_norm(input, weight, bias, *rest)
        return result
    if running_mean is not None:
        with updating():
            torch.instance_norm(input.detach(), weight, bias, *rest)
    x, _, _ = _standardise(input, list(range(2, input.ndim)), eps)
    return _affine(x, weight, bias, [1, -1, *(1 for _ in input.shape[2:])]).to(input.dtype)


NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "native_layer_norm": native_layer_norm,
    "batch_norm": batch_norm,
    "native_batch_norm": native_batch_norm,
    "_native_batch_norm_legit": _legit,
    "instance_norm": instance_norm,
}
