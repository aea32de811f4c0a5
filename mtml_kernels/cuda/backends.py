"""The CUDA backends as the ops register them. Nothing of CUDA is touched before one of them runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mtml_kernels import native
from mtml_kernels.native.cuda_device import built_codes, rebuild_command
from mtml_kernels.native.tensors import read_call
from mtml_kernels.registry import Backend, imported
from mtml_kernels.schema.inner_loop_lane import FastLane

__all__ = ["FORMS", "INNER_LOOP"]

# By name: how many products of TF32, on matrix units, stand for a large one of float32; 0: none.
FORMS = {"cuda": 0, "cuda:tf32": 1, "cuda:tf32x3": 3}


def _available() -> str | None:
    if reason := native.availability():
        return reason
    if not built_codes():
        return f"this build has no CUDA code; in a checkout: {rebuild_command()}"
    return None if torch.cuda.is_available() else "no NVIDIA GPU that PyTorch can use"


def _supports(form: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {device_type!r}"
    known = (torch.float32,) if FORMS[form] else (torch.float32, torch.float64)
    if dtype not in known:
        return f"it computes in {' and '.join(map(_name, known))}, the parameters are {dtype}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_of_form = imported("mtml_kernels.cuda.inner_loop.device", "of_form")


def _backend(form: str) -> Backend:
    def forward(*arguments: Any) -> Any:
        return _of_form(form)[0].forward(*arguments)

    def backward(*arguments: Any) -> Any:
        return _of_form(form)[0].backward(*arguments)

    def make(*arguments: Any) -> Any:
        return _of_form(form)[1].make(*arguments)

    lane = FastLane(read_call, make)
    return Backend(form, _available, forward, backward, partial(_supports, form), fast_lane=lane)


INNER_LOOP = tuple(map(_backend, FORMS))
