"""A batch of tasks as one tuple, the unit that every meta-learning call of mtml takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TaskBatch"]


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor of a tensor, a tuple, a list or a dict of such; None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map(item, function) for item in value)
    raise TypeError(f"TaskBatch: expected a tensor, or a tuple, list or dict of tensors; got {type(value).__name__}")


class TaskBatch(NamedTuple):
    """T tasks, each with a support set to adapt on and a query set to be judged on.

    Shapes: ``sx [T, S, ...]`` (a tensor, or a tuple or dict of such), ``sy [T, S]`` class ids or whatever the loss
    takes, ``qx [T, Q, ...]``, ``qy [T, Q, ...]``; ``support_mask [T, S]`` and ``query_mask [T, Q]`` weigh the samples
    and are None where all count alike.

    Raises:
        TypeError: from `to` and `pin_memory`, when a field holds something other than tensors.

    Example:
        >>> import torch
        >>> from mtml.tasks import TaskBatch
        >>> x, y = torch.zeros(4, 5, 2), torch.zeros(4, 5, 1)
        >>> batch = TaskBatch(sx=x, sy=y, qx=x, qy=y).to(torch.float64)
        >>> batch.sx.dtype, len(batch), batch.tasks
        (torch.float64, 6, 4)
    """

    sx: Any
    sy: Any
    qx: Any
    qy: Any
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        first = self.sx
        while not isinstance(first, Tensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        return first.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> TaskBatch:
        """The same batch elsewhere; arguments as for ``Tensor.to``. A dtype changes floating-point tensors only."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)

        def move(value: Tensor) -> Tensor:
            wanted = dtype if value.is_floating_point() else None
            return value.to(device, wanted, non_blocking, memory_format=memory_format or torch.preserve_format)

        return TaskBatch(*(_map(field, move) for field in self))

    def pin_memory(self) -> TaskBatch:
        """The same batch in page-locked memory; DataLoader calls this when it is asked to pin."""
        return TaskBatch(*(_map(field, Tensor.pin_memory) for field in self))
