"""Where a transform goes: onto a task, or into a set of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtml.compat.torchmeta.compose import Compose, parts_of
from mtml.compat.torchmeta.utils.data.task import Task
from mtml_kernels.checks import shown

__all__ = ["apply_wrapper", "wrap_transform"]


def apply_wrapper(wrapper: Callable[[Any], Any], task_or_dataset: Any = None) -> Any:
    """The wrapper itself for None; applied, for a task; for a set of tasks, the set, which applies it from now on.

    Raises:
        TypeError: for anything else.
    """
    if task_or_dataset is None:
        return wrapper
    if isinstance(task_or_dataset, Task):
        return wrapper(task_or_dataset)
    if not hasattr(task_or_dataset, "dataset_transform"):  # every MetaDataset has one
        raise TypeError(f"task: expected a Task, a MetaDataset or None, got {shown(task_or_dataset)}")
    before = task_or_dataset.dataset_transform
    task_or_dataset.dataset_transform = wrapper if before is None else Compose([before, wrapper])
    return task_or_dataset


def wrap_transform(transform: Any, fn: Callable[[Any], Any], transform_type: type | None = None) -> Any:
    """`fn` of the transform where it has that type, and of those within a Compose; others as they are."""
    if transform_type is None or isinstance(transform, transform_type):
        return fn(transform)
    parts = parts_of(transform)
    return transform if parts is None else Compose([wrap_transform(part, fn, transform_type) for part in parts])
