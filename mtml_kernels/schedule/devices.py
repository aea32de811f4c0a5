"""GPUs by their numbers: all that predictions know of them, each number with its source.

[D] the vendor's data sheet or white paper. [M] measured on one machine. [A] assumed, and first to be replaced by a
measurement. Peaks of tensor cores are those of dense matrices; data sheets print twice that, with sparsity.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

__all__ = ["DEVICES", "LAUNCH_SECONDS", "PRECISIONS", "SHARE", "Device", "Precision", "device_named"]

Precision = Literal["fp32", "tf32", "3xtf32", "fp64"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "3xtf32", "fp64")

# [A] The share of the peak that the products of a good kernel reach where they fill the chip. 3xTF32 takes three
# products of TF32 for one of float32.
SHARE: dict[Precision, float] = {"fp32": 0.6, "tf32": 0.4, "3xtf32": 0.5 / 3, "fp64": 0.6}
# From one kernel's start to the next one's within a CUDA graph: [M] on an H200, [A] elsewhere.
LAUNCH_SECONDS = 2.2e-6


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU. FLOPs and bytes a second; `l2_bytes` is the size of the L2 cache."""

    name: str
    pattern: str  # of what PyTorch calls it
    processors: int  # streaming multiprocessors
    hertz: float  # boost
    fp32: float
    tf32: float
    fp64: float
    bandwidth: float
    l2_bytes: int
    l2_bandwidth: float
    shared_bytes: int  # shared memory of a multiprocessor; one block may ask for all but 1 KiB of it

    def peak(self, precision: Precision) -> float:
        """FLOPs a second at most, of the unit that this precision runs on."""
        return {"fp32": self.fp32, "fp64": self.fp64}.get(precision, self.tf32)


_KIB, _MIB = 1 << 10, 1 << 20

# Shared memory, of all: [D] CUDA C++ Programming Guide, table of technical specifications per compute capability.
DEVICES: dict[str, Device] = {
    # H200 SXM. [D] data sheet: 67 TFLOP/s, TF32 989 with sparsity, FP64 34, 4.8 TB/s. [M] copies reach 4.3 TB/s, 132
    # multiprocessors and 60 MiB of L2 are reported. [D] 1.98 GHz follows from the 67 TFLOP/s. L2: [A] 28 bytes a clock
    # and multiprocessor, as micro-benchmarks of the H100 find (chipsandcheese.com, 2023: some 5.5 TB/s of 114).
    "h200": Device("H200", r"\bH200\b", 132, 1.98e9, 67e12, 494e12, 34e12, 4.3e12, 60 * _MIB, 7.3e12, 228 * _KIB),
    # A100 SXM, 80 GB. [D] data sheet: 19.5 TFLOP/s, TF32 156, FP64 9.7, 2039 GB/s; white paper: 108 multiprocessors,
    # 1.41 GHz, 40 MB of L2. [A] copies reach 90 % of the bandwidth, as the H200's do; L2 as above.
    "a100": Device("A100", r"\bA100\b", 108, 1.41e9, 19.5e12, 156e12, 9.7e12, 1.83e12, 40 * _MIB, 4.3e12, 164 * _KIB),
    # GeForce RTX 4090. [D] Ada white paper: 82.6 TFLOP/s, TF32 165 with sparsity, 1008 GB/s, 128 multiprocessors,
    # 2.52 GHz, 72 MB of L2; FP64 is a 64th of FP32. [A] 90 % of the bandwidth; L2: 16 bytes a clock and multiprocessor.
    "rtx4090": Device(
        "RTX 4090", r"\bRTX 4090$", 128, 2.52e9, 82.6e12, 82.6e12, 1.29e12, 0.91e12, 72 * _MIB, 5.2e12, 100 * _KIB
    ),
    # L4. [D] data sheet: 30.3 TFLOP/s, TF32 120 with sparsity, 300 GB/s; from these 58 multiprocessors at 2.04 GHz;
    # 48 MB of L2 (Ada white paper, AD104); FP64 a 64th. [A] bandwidths as above. Its 72 W do not hold the boost clock.
    "l4": Device("L4", r"\bL4$", 58, 2.04e9, 30.3e12, 60e12, 0.47e12, 0.27e12, 48 * _MIB, 1.9e12, 100 * _KIB),
}


def device_named(reported: str) -> Device | None:
    """The device that `torch.cuda.get_device_name` reports so, where its numbers are known.

    Example:
        >>> device_named("NVIDIA A100-SXM4-80GB").name
        'A100'
        >>> device_named("NVIDIA L40S") is None
        True
    """
    return next((device for device in DEVICES.values() if re.search(device.pattern, reported)), None)
