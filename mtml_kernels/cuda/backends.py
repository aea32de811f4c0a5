"""The CUDA backends as the ops register them. Nothing of CUDA is touched before one of them runs."""

from __future__ import annotations

import torch

from mtml_kernels import native
from mtml_kernels.native.cuda_device import built_codes, rebuild_command
from mtml_kernels.native.tensors import read_call
from mtml_kernels.registry import Backend, imported
from mtml_kernels.schema.inner_loop_lane import FastLane

__all__ = ["INNER_LOOP"]


def _available() -> str | None:
    if reason := native.availability():
        return reason
    if not built_codes():
        return f"this build has no CUDA code; in a checkout: {rebuild_command()}"
    return None if torch.cuda.is_available() else "no NVIDIA GPU that PyTorch can use"


def _supports(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {device_type!r}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, the parameters are {dtype}"
    return None


_MODULE = "mtml_kernels.cuda.inner_loop.device"
INNER_LOOP = Backend(
    "cuda", _available, forward=imported(_MODULE, "forward"), backward=imported(_MODULE, "backward"),
    supports=_supports, fast_lane=FastLane(read_call, imported(_MODULE, "make")),
)  # fmt: skip
