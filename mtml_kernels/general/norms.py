"""Normalisations written from mean and variance, for every order of derivative.

PyTorch's own layer_norm, batch_norm and instance_norm are wrong from the third order on (pytorch#186256, #175754), and
under vmap with a weight from the second: their derivative formulas take the mean and the deviation that the forward
returned for constants. Each function here has the signature of the one that it stands for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
    """torch.layer_norm."""
    out, _, _ = _layer_norm(input, normalized_shape, weight, bias, eps)
    wide = input.device.type == "cuda" and torch.is_autocast_enabled("cuda")  # which gives float32 for this one
    return out if wide else out.to(input.dtype)


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensors:
    """torch.native_layer_norm: the result, mean and 1 / sqrt(variance + eps)."""
    out, mean, scale = _layer_norm(input, normalized_shape, weight, bias, eps)
    return out.to(input.dtype), mean, scale


class _Given(NamedTuple):
    """The arguments of PyTorch's batch_norm and instance_norm."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool  # use_input_stats of an instance_norm
    momentum: float
    eps: float
    cudnn_enabled: bool = True

    def standardised(self, dims: list[int], kernel: Callable[..., Any], *rest: Any) -> Tensors:
        """The result, mean and scale; the kernel, given everything up to eps and the rest, updates the statistics."""
        if self.running_mean is not None:
            with updating():
                kernel(self.input.detach(), *self[1:8], *rest)
        shape = [1, -1, *(1 for _ in self.input.shape[2:])]
        x, mean, scale = _standardise(self.input, dims, self.eps)
        return _affine(x, self.weight, self.bias, shape).to(self.input.dtype), mean, scale


def native_batch_norm(*args: Any, **named: Any) -> Tensors:
    """torch.native_batch_norm: the result, mean [C] and 1 / sqrt(variance + eps) [C]."""
    given = _Given(*args, **named)
    if not given.training:  # running statistics are constants, for which PyTorch's own derivatives are right
        result: Tensors = torch.native_batch_norm(*given[:8])
        return result
    dims = [0, *range(2, given.input.ndim)]
    out, mean, scale = given.standardised(dims, torch.native_batch_norm)
    return out, mean.flatten(), scale.flatten()


def batch_norm(*args: Any, **named: Any) -> Tensor:
    """torch.batch_norm."""
    given = _Given(*args, **named)
    result: Tensor = native_batch_norm(*given[:8])[0] if given.training else torch.batch_norm(*given)
    return result


def _legit(input: Tensor, weight: Any, bias: Any, *rest: Any) -> Tensors:
    """_native_batch_norm_legit, with running statistics or, in its overload no_stats, without."""
    statistics = rest[:2] if len(rest) == 5 else (None, None)
    training, momentum, eps = rest[-3:]
    return native_batch_norm(input, weight, bias, statistics[0], statistics[1], training, momentum, eps)


def instance_norm(*args: Any, **named: Any) -> Tensor:
    """torch.instance_norm."""
    given = _Given(*args, **{"training" if name == "use_input_stats" else name: v for name, v in named.items()})
    if not given.training:
        result: Tensor = torch.instance_norm(*given)
        return result
    return given.standardised(list(range(2, given.input.ndim)), torch.instance_norm, given.cudnn_enabled)[0]


NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "native_layer_norm": native_layer_norm,
    "batch_norm": batch_norm,
    "native_batch_norm": native_batch_norm,
    "_native_batch_norm_legit": _legit,
    "instance_norm": instance_norm,
}
