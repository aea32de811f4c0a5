"""Announces the Triton backends to the ops' registries, without importing triton before one of them runs."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from mtml_kernels.ops._backends import Backend, Registry

__all__ = ["register_multihead_loss"]

LOSS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if torch.cuda.is_available() else "no NVIDIA GPU that PyTorch can use"


def _supports_loss(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {device_type!r}"
    if dtype not in LOSS_DTYPES:
        return f"it takes float32, float16 and bfloat16, the logits are {dtype}"
    return None


def _loss_forward(*args: Any) -> Any:
    from mtml_kernels.triton.multihead_loss import call_forward

    return call_forward(*args)


def _loss_backward(*args: Any) -> Any:
    from mtml_kernels.triton.multihead_loss import call_backward

    return call_backward(*args)


def register_multihead_loss(registry: Registry) -> None:
    """Adds "triton" for CUDA tensors to the registry of `mtml::multihead_loss`.

    forward(call, tensors, differentiate), backward(gradients, cotangent, counts) as the op's other backends have them.
    Labels out of range make a head's loss NaN there: an error would have to wait for the device.
    """
    registry.register(Backend("triton", _available, _loss_forward, _loss_backward, _supports_loss))
