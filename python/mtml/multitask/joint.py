"""Plain multi-task learning: the losses of all tasks of all groups at the start, in one operation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mtml.multitask.features import as_rows
from mtml.multitask.group import Group
from mtml.multitask.targets import check_set, mask_rows, target_rows
from mtml.tasks.task_batch import TaskBatch
from mtml_kernels.functional.linear_multihead_loss import linear_multihead_loss

__all__ = ["joint_losses"]


def joint_losses(groups: Mapping[str, Group], batches: Mapping[str, TaskBatch]) -> dict[str, Tensor]:
    """{group: [T]}, the loss of every query set without an inner loop. Every task is a head to the engine."""
    entries = [entry for name, group in groups.items() for entry in _entries(group, batches[name])]
    if not entries:
        return {}
    layers = [group.layer for name, group in groups.items() for _ in range(batches[name].tasks)]
    rows, targets, weights = (list(column) for column in zip(*entries, strict=True))
    losses = linear_multihead_loss(
        rows,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        targets,
        [layer.head.spec for layer in layers],
        sample_weights=weights,
        class_weights=[layer.class_weights for layer in layers],
        pos_weights=[layer.pos_weight for layer in layers],
    )
    return dict(zip(groups, losses.split([batches[name].tasks for name in groups]), strict=True))


def _entries(group: Group, batch: TaskBatch) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows of features [R, D], a target and weights, for every task."""
    head, y = group.layer.head, batch.qy
    features = group.model.features(batch.qx)[0]
    check_set(f"{group.name}.qy", head, features, y, batch.query_mask)
    masks = mask_rows(head, y, batch.query_mask)
    weights = [None] * batch.tasks if masks is None else masks.unbind()
    return list(zip(as_rows(head, features).unbind(), target_rows(head, y).unbind(), weights, strict=True))
