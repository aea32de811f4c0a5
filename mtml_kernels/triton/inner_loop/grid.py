"""Which part of a launch a program does."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["task_and_block"]


@triton.jit
def task_and_block(blocks):
    """The task, for offsets in 64 bits, and which of its blocks, of a launch of tasks x blocks programs.

    They share the launch's first dimension: the others end at 65535, and many rows of many features are more blocks.
    """
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks
