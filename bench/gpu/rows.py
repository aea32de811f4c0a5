"""Rows of a run on a GPU: those of ``bench run``, and what a device adds to them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report.record import NAN, Record


@dataclass(frozen=True)
class GpuRecord(Record):
    """One provider of one workload. ``ms`` is wall time; ``gflops``, ``gbs`` and ``share_of_peak`` go by it.

    turn: "quick", or "slow" for what is compiled first; ours runs in both, beside the others.
    hot_ms, cold_ms: device time by CUDA events, with L2 as the call before left it, and flushed before every call.
    kernel_ms, launches: the kernels' own times added up, by the profiler, and how many there are.
    mbytes: that the calls of the schedule read and write (of losses: the least there is to read and write).
    tflops, tbs: ``gflop`` and ``mbytes`` over ``hot_ms``.
    predicted_ms, predicted_launches: of our schedule on this GPU, as ``bench predict`` says; no peer has them.
    compiled_ms, compiled_launches: of our Triton kernels as they are compiled, as ``bench predict --sass`` says.
    peak_mib: by how much a call raises the peak of allocated memory.
    """

    turn: str = ""
    hot_ms: float = NAN
    hot_iqr_ms: float = NAN
    cold_ms: float = NAN
    cold_iqr_ms: float = NAN
    kernel_ms: float = NAN
    launches: int = 0
    mbytes: float = NAN
    tflops: float = NAN
    tbs: float = NAN
    predicted_ms: float = NAN
    predicted_launches: int = 0
    compiled_ms: float = NAN
    compiled_launches: int = 0
    peak_mib: float = NAN


def line(r: GpuRecord) -> str:
    """A row in one printed line."""
    if not r.ok:
        return f"{r.workload:20s} {r.provider:16s} {r.status}: {r.note}"
    wall = f"wall {1e3 * r.ms:9.1f} us (IQR {1e3 * r.iqr_ms:.1f})"
    device = f"device hot {1e3 * r.hot_ms:9.1f} cold {1e3 * r.cold_ms:9.1f}"
    kernels = f"kernels {1e3 * r.kernel_ms:9.1f} in {r.launches:4d}"
    predicted = f"  predicted {1e3 * r.predicted_ms:.1f} in {r.predicted_launches}" if r.predicted_launches else ""
    rates = f"{r.tflops:7.3f} TFLOP/s {r.tbs:6.3f} TB/s"
    note = f"  ({r.note})" if r.note else ""
    return f"{r.workload:20s} {r.provider:16s} {wall}  {device}  {kernels}{predicted}  {rates}{note}"
