"""The Triton backends as the ops register them. Triton is not imported before one of them runs.

They are for CUDA tensors. Labels out of range make results NaN there: an error would have to wait for the device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from mtml_kernels.registry import Backend, imported
from mtml_kernels.schema.dtypes import FLOATING

__all__ = [
    "HEAD_INNER_LOOP",
    "INNER_LOOP",
    "MULTIHEAD_LOSS",
    "TASK_CONV2D",
    "TASK_LINEAR",
    "interpreted",
    "linear_problem",
]


def interpreted() -> bool:
    """Whether Triton computes on the CPU, in its interpreter: for tests."""
    return os.environ.get("TRITON_INTERPRET", "") not in {"", "0"}


def _available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if interpreted() or torch.cuda.is_available() else "no NVIDIA GPU that PyTorch can use"


def _supports(wrong_dtype: str, *dtypes: torch.dtype) -> Callable[[str, torch.dtype], str | None]:
    def supports(device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cuda" and not (device_type == "cpu" and interpreted()):
            return f"it runs on NVIDIA GPUs, the tensors are on {device_type!r}"
        return None if dtype in dtypes else f"{wrong_dtype} {dtype}"

    return supports


_LOSSES = "mtml_kernels.triton.multihead_loss"
MULTIHEAD_LOSS = Backend(
    "triton",
    _available,
    forward=imported(_LOSSES, "call_forward"),
    backward=imported(_LOSSES, "call_backward"),
    hand_out=imported(_LOSSES, "call_hand_out"),
    supports=_supports(
        "it takes float32, float16 and bfloat16, the logits are", torch.float32, torch.float16, torch.bfloat16
    ),
)

_HEAD = "mtml_kernels.triton.head_inner_loop"
HEAD_INNER_LOOP = Backend(
    "triton",
    _available,
    forward=imported(_HEAD, "forward"),
    backward=imported(_HEAD, "backward"),
    supports=_supports("it computes in float32 and float64, the weight is", torch.float32, torch.float64),
)


def _floating(module: str, prefix: str = "") -> Backend:
    """Of a module's forward and backward, for every floating dtype."""
    path = f"mtml_kernels.triton.{module}"
    return Backend(
        "triton",
        _available,
        forward=imported(path, f"{prefix}forward"),
        backward=imported(path, f"{prefix}backward"),
        supports=_supports("it computes in floating point, not", *FLOATING),
    )


INNER_LOOP = _floating("inner_loop")
TASK_UPDATE = _floating("task_update")
TASK_LINEAR = _floating("task_layers", "linear_")
TASK_CONV2D = _floating("task_layers", "conv_")

# `Problem` of tensors that `MULTIHEAD_LOSS` takes: (features, heads, large).
linear_problem = imported("mtml_kernels.triton.linear_multihead_loss", "Problem")
