"""The machine's measured peaks, taken in the same run as the timings they are compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """A measured arithmetic peak and how it was measured."""

    gflops: float
    source: str


def _native(dtype: torch.dtype, threads: int) -> float | None:
    """The compiled module's FMA probe: independent fused multiply-adds on registers; None where it is not built."""
    try:
        from mtml_kernels import native

        return float(native.fma_peak(str(dtype).removeprefix("torch."), threads))
    except (ImportError, AttributeError, RuntimeError):
        return None


def _matmul(dtype: torch.dtype, device: str, seconds: float) -> float:
    """GFLOP/s of the best large product torch makes in ``seconds``: a lower bound of the peak."""
    size = 8192 if device == "cuda" else 1024  # 1024 is a few tiles for each multiprocessor of a GPU, and its launch
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best, stop = 0.0, time.perf_counter() + seconds
    a @ b
    while best == 0.0 or time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def measure(dtype: torch.dtype, threads: int, device: str = "cpu", seconds: float = 0.3) -> Peak:
    """The arithmetic peak of ``threads`` threads in GFLOP/s.

    >>> measure(torch.float32, threads=1, seconds=0.01).gflops > 0
    True
    """
    native = _native(dtype, threads) if device == "cpu" else None
    if native is not None:
        return Peak(native, "FMA")
    return Peak(_matmul(dtype, device, seconds), "torch matmul")


def higher(a: Peak, b: Peak) -> Peak:
    """The better of two measurements: a peak is what the machine did at its best."""
    return a if a.gflops >= b.gflops else b


def copy_bandwidth(device: str = "cpu", megabytes: int = 256, seconds: float = 0.3) -> float:
    """GB/s of a large copy, read and write counted."""
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.zeros_like(source)  # written once here, so that no page fault is timed
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < stop:
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return best
