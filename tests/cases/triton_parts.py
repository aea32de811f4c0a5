"""Parts that have no kernel of their own, one by one: each as the launch that a call of it alone is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane, Schedule
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.triton.inner_loop.fusing import Fused
from mtml_kernels.triton.inner_loop.jobs import Launch
from mtml_kernels.triton.inner_loop.launching import LaunchKernel
from mtml_kernels.triton.inner_loop.pool import POOLS

__all__ = ["LAUNCHED", "launched"]


def launched(part: Part, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """The results, of the shapes and types that the kernel in PyTorch has."""
    types = [None if t is None or t.is_floating_point() else torch.int64 for t in operands]
    like = [
        None if t is None else torch.empty_like(t, dtype=kind, device="meta")
        for t, kind in zip(operands, types, strict=True)
    ]
    tensors = [*operands, *TORCH[part.kernel](part, *like)][: len(operands) + len(part.writes)]
    planes = tuple(Plane((), torch.float32, "") if t is None else Plane(tuple(t.shape), t.dtype, "") for t in tensors)
    reads = tuple(ABSENT if t is None else i for i, t in enumerate(operands))
    writes = tuple(len(reads) + i if want else ABSENT for i, want in enumerate(part.wants))
    call = Call((Part(part.kernel, reads, writes, part.constants),), "here")
    fused = Fused(Schedule(planes, (call,), writes))
    ((launch, _),) = fused.steps
    assert isinstance(launch, Launch)
    kernel = LaunchKernel(launch, fused.planes, sorted(launch.makes))
    found = dict(zip(kernel.writes, kernel(kernel.part, *(operands[i] for i in kernel.reads)), strict=True))  # type: ignore[misc]
    return tuple(None if plane == ABSENT else found[plane].to(planes[plane].dtype) for plane in writes)


LAUNCHED: dict[str, Any] = dict.fromkeys(sorted(POOLS), launched)
