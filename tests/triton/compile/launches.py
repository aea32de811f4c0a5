"""The launches of functions that need not run: as their launcher specialises them, compiled for any GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import triton
from multihead_loss import usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).resolve().parents[3]))  # bench/ is not installed
from bench.sass.recording import Recorded, recorded

__all__ = ["Recorded", "needs", "recorded"]


def needs(launch: Recorded, capability: int) -> dict[str, Any]:
    """What a program of a launch takes on a GPU of this compute capability."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return {"name": launch.kernel.__name__, "shared": built.metadata.shared, "usage": usage(built.asm["cubin"])}
