"""`task_update` in Triton: the schedule's kernels of update rules, a launch for all tensors of all tasks."""

from __future__ import annotations

from mtml_kernels.schedule.task_update import Update
from mtml_kernels.triton.inner_loop import PARTS

__all__ = ["backward", "forward"]

_update = Update(PARTS)
forward, backward = _update.forward, _update.backward
