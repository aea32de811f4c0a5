"""What a multiprocessor does in a clock, beside what `mtml_kernels.schedule.devices` knows of a chip.

[D] NVIDIA's CUDA C++ programming guide: the tables of throughput by instruction and of limits by compute capability.
[A] assumed: published micro-benchmarks of these chips, rounded (dependent arithmetic every 4 clocks since Volta; shared
memory 23 to 33, L2 200 to 290, memory 470 to 700 clocks). None was measured by this project.
"""

from __future__ import annotations

from typing import NamedTuple

from mtml_kernels.schedule.devices import DEVICES, Device

__all__ = ["CHIPS", "Chip", "Latencies"]

SCHEDULERS = 4  # [D] of a multiprocessor, each issues one instruction of a warp in a clock
ALU_LANES = 64  # [D] integer and logic, comparisons, and multiply-adds of integers
SPECIAL_LANES = 16  # [D] roots, exponentials, conversions
MEMORY_WORDS = 32  # [D] words of 32 bits that shared memory, or L1, moves in a clock
RESERVED_SHARED = 1024  # [D] bytes of each program that the system takes
REGISTERS = 65536  # [D]
REGISTER_UNIT = 256  # [D] registers are given to a warp in pieces of so many


class Latencies(NamedTuple):
    """Clocks until a result can be used. [A]"""

    arithmetic: int = 4
    special: int = 20
    constant: int = 30
    shared: int = 30
    shuffle: int = 24
    barrier: int = 30
    matrix: int = 18
    special_register: int = 20
    l2: int = 270
    memory: int = 600


class Chip(NamedTuple):
    """One chip: its numbers, its compute capability, and its multiprocessors' limits. [D]"""

    device: Device
    capability: int
    shared: int
    warps: int
    programs: int
    # [A] The share of the peak that mma.sync reaches: 62 % on an H100 (micro-benchmarks in arXiv 2402.13499).
    synchronous: float = 1.0
    latencies: Latencies = Latencies()

    @property
    def fma_lanes(self) -> float:
        """Of a multiprocessor: what its peak means."""
        return round(self.device.fp32 / (2 * self.device.processors * self.device.hertz))

    @property
    def matrix_macs(self) -> float:
        """Of a multiprocessor in a clock, in TF32."""
        return self.device.tf32 / (2 * self.device.processors * self.device.hertz)

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that a multiprocessor holds at once."""
        of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_shared = self.shared // (shared + RESERVED_SHARED)
        return max(1, min(self.programs, self.warps // warps, REGISTERS // (of_warp * warps), by_shared))


_KB = 1024
CHIPS: dict[str, Chip] = {
    "h200": Chip(DEVICES["h200"], 90, 228 * _KB, 64, 32, synchronous=0.62),
    "a100": Chip(DEVICES["a100"], 80, 164 * _KB, 64, 32),
    "rtx4090": Chip(DEVICES["rtx4090"], 89, 100 * _KB, 48, 24),
    "l4": Chip(DEVICES["l4"], 89, 100 * _KB, 48, 24),
}
