"""The kernels of a workload's meta-step by backend `triton`, in their order: recorded on tensors without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bench.report.predict import meta_step
from bench.sass.recording import Move, Recorded, started
from bench.workloads import Workload
from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schedule.devices import Precision
from mtml_kernels.triton.backends import interpreted
from mtml_kernels.triton.inner_loop import backward, forward

__all__ = ["PRECISIONS", "kernels_of"]

PRECISIONS: dict[Precision, str] = {"fp32": "highest", "3xtf32": "high", "tf32": "medium"}
"""As torch.set_float32_matmul_precision names them."""


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kernels_of(w: Workload, precision: Precision) -> list[Recorded | Move]:
    """All of the way there and of the way back. Raises ValueError for a precision that has no launches, or where Triton
    interprets its kernels instead of compiling them.
    """
    if interpreted():
        raise ValueError("TRITON_INTERPRET: expected not to be set, for interpreted kernels are not compiled")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    a = meta_step(w)
    with _precision(PRECISIONS[precision]):
        given = plan_of(a).usually
        with started() as found:
            loss, output, support, _, carry = forward(a)
        outputs = zip((loss, output, support), given[:3], strict=True)
        of_loss, of_output, of_support = (t if there else None for t, there in outputs)
        with started() as back:
            backward(of_loss, of_output, of_support, [None] * len(given.adapted), a, carry)
    return found + back
