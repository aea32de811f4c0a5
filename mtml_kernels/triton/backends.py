"""Announces the Triton backends to the ops' registries, without importing triton before one of them runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from mtml_kernels.registry import Backend, Registry

__all__ = ["linear_heads", "register_head_inner_loop", "register_multihead_loss"]

LOSS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DTYPES = (torch.float32, torch.float64)


def _interpreted() -> bool:
    """Whether Triton computes on the CPU, in its interpreter: for tests."""
    return os.environ.get("TRITON_INTERPRET", "") not in {"", "0"}


def _available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if _interpreted() or torch.cuda.is_available() else "no NVIDIA GPU that PyTorch can use"


def _wrong_device(device_type: str) -> str | None:
    if device_type == "cuda" or (device_type == "cpu" and _interpreted()):
        return None
    return f"it runs on NVIDIA GPUs, the tensors are on {device_type!r}"


def _supports_loss(device_type: str, dtype: torch.dtype) -> str | None:
    wrong_dtype = f"it takes float32, float16 and bfloat16, the logits are {dtype}"
    return _wrong_device(device_type) or (None if dtype in LOSS_DTYPES else wrong_dtype)


def _loss_forward(*args: Any) -> Any:
    from mtml_kernels.triton.multihead_loss import call_forward

    return call_forward(*args)


def _loss_backward(*args: Any) -> Any:
    from mtml_kernels.triton.multihead_loss import call_backward

    return call_backward(*args)


def _loss_hand_out(*args: Any) -> Any:
    from mtml_kernels.triton.multihead_loss import call_hand_out

    return call_hand_out(*args)


def register_multihead_loss(registry: Registry) -> None:
    """Adds "triton" for CUDA tensors to the registry of `mtml::multihead_loss`.

    forward(call, tensors, differentiate), backward(gradients, cotangent, counts) and hand_out (the same arguments) as
    the op's other backends have them. Labels out of range make a head's loss NaN there: an error would have to wait for
    the device.
    """
    backend = Backend("triton", _available, _loss_forward, _loss_backward, _supports_loss, hand_out=_loss_hand_out)
    registry.register(backend)


def _supports_head(device_type: str, dtype: torch.dtype) -> str | None:
    wrong_dtype = f"it computes in float32 and float64, the weight is {dtype}"
    return _wrong_device(device_type) or (None if dtype in HEAD_DTYPES else wrong_dtype)


def _head_forward(*args: Any) -> Any:
    from mtml_kernels.triton.head_inner_loop import forward

    return forward(*args)


def _head_backward(*args: Any) -> Any:
    from mtml_kernels.triton.head_inner_loop import backward

    return backward(*args)


def register_head_inner_loop(registry: Registry) -> None:
    """Adds "triton" for CUDA tensors to the registry of `mtml::head_inner_loop`.

    Labels out of range make a task's results NaN there: an error would have to wait for the device.
    """
    registry.register(Backend("triton", _available, _head_forward, _head_backward, _supports_head))


def linear_heads(*args: Any) -> Any:
    """`triton.linear_multihead_loss.Problem` of these arguments: tensors that the losses' backend "triton" takes."""
    from mtml_kernels.triton.linear_multihead_loss import Problem

    return Problem(*args)
