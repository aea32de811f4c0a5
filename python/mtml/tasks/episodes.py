"""Few-shot episodes over any labelled dataset, and how tasks become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mtml.tasks.errors import DataError
from mtml.tasks.stream import check_counts, entropy
from mtml.tasks.task_batch import TaskBatch

__all__ = ["EpisodeDataset", "collate", "split_support_query"]


def split_support_query(x: Tensor, y: Tensor, shots: int) -> TaskBatch:
    """Divide the samples of a task into support and query, in the order they come.

    Class ids (integer y): the first `shots` samples of every class are the support set, the rest the query set.
    ``x [N, ...], y [N]`` give one task without a task dimension, which `collate` takes; ``x [T, N, ...], y [T, N]``
    give T tasks at once. Other targets (floating y): the first `shots` samples of ``x [N, ...], y [N, ...]``.

    Raises:
        ValueError: where x and y disagree, or where a class (or the task) has no sample left for the query set.

    Example:
        >>> import torch
        >>> from mtml.tasks import split_support_query
        >>> task = split_support_query(torch.arange(6.0)[:, None], torch.tensor([0, 1, 0, 1, 0, 1]), shots=1)
        >>> task.sx.flatten().tolist(), task.qy.tolist()
        ([0.0, 1.0], [0, 1, 0, 1])
    """
    check_counts(shots=shots)
    if x.shape[: y.ndim if _is_class_ids(y) else 1] != y.shape[: y.ndim if _is_class_ids(y) else 1]:
        raise ValueError(f"y: expected one target per sample of x {tuple(x.shape)}, got {tuple(y.shape)}")
    if not _is_class_ids(y):
        if len(y) <= shots:
            raise ValueError(f"shots: expected fewer than the {len(y)} samples of the task, got {shots}")
        return TaskBatch(x[:shots], y[:shots], x[shots:], y[shots:])
    if y.ndim == 2:
        return collate([split_support_query(x[t], y[t], shots) for t in range(len(y))])
    rank = _rank_within_class(y)
    if (short := torch.bincount(y).lt(shots + 1) & torch.bincount(y).gt(0)).any():
        raise ValueError(
            f"shots: expected more than {shots} samples of every class, so that some are left to be the query; "
            f"got {int(torch.bincount(y)[short][0])} of class {int(short.nonzero()[0])}"
        )
    support = rank < shots
    return TaskBatch(x[support], y[support], x[~support], y[~support])


def _is_class_ids(y: Tensor) -> bool:
    return not (y.is_floating_point() or y.is_complex())


def _rank_within_class(y: Tensor) -> Tensor:
    """For every sample, how many of its class come before it: [N]."""
    order = torch.argsort(y, stable=True)
    counts = torch.bincount(y)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(y)) - starts[y[order]]
    return rank


def _pad(values: Sequence[Tensor]) -> Tensor:
    """Stack along a new task dimension, filling short tasks with zeros at the end."""
    longest = max(len(value) for value in values)
    if all(len(value) == longest for value in values):
        return torch.stack(list(values))
    out = values[0].new_zeros(len(values), longest, *values[0].shape[1:])
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out


def _pad_any(values: Sequence[Any]) -> Any:
    """`_pad` through tuples and dicts of tensors."""
    first = values[0]
    if isinstance(first, Tensor):
        return _pad(values)
    if isinstance(first, dict):
        return {key: _pad_any([value[key] for value in values]) for key in first}
    return type(first)(_pad_any(items) for items in zip(*values, strict=True))


def _mask(y: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor | None:
    """[T, N] weights: the tasks' own, 1 without, 0 for padding; None where that would be all ones."""
    if all(mask is None for mask in masks) and len({len(value) for value in y}) == 1:
        return None
    return _pad([torch.ones(len(v)) if m is None else m for v, m in zip(y, masks, strict=True)])


def collate(tasks: Sequence[TaskBatch | Sequence[Any]]) -> TaskBatch:
    """Stack tasks into one batch; tasks of different sizes are padded with zeros and masked.

    Each task is a TaskBatch without the task dimension, or its first four fields: ``sx [S, ...], sy [S, ...],
    qx [Q, ...], qy [Q, ...]``. The result has shapes ``[T, S, ...]`` and so on, with S and Q the largest; its masks are
    None where nothing was padded and no task brought a mask. Made for ``DataLoader(collate_fn=collate)``.

    Raises:
        ValueError: where there are no tasks, or where a task has not four to six fields.

    Example:
        >>> import torch
        >>> from mtml.tasks import collate
        >>> def task(n):
        ...     y = torch.zeros(n, dtype=torch.long)
        ...     return torch.ones(n, 2), y, torch.ones(3, 2), torch.tensor([0, 0, 0])
        >>> batch = collate([task(1), task(2)])
        >>> tuple(batch.sx.shape), batch.support_mask.tolist(), batch.query_mask
        ((2, 2, 2), [[1.0, 0.0], [1.0, 1.0]], None)
    """
    if not tasks:
        raise ValueError("tasks: expected at least one task, got none")
    if any(not 4 <= len(task) <= 6 for task in tasks):
        raise ValueError(
            f"tasks: expected (sx, sy, qx, qy[, masks]) each, got {sorted({len(t) for t in tasks})} fields"
        )
    rows = [TaskBatch(*task) for task in tasks]
    sx, sy, qx, qy = (_pad_any([row[i] for row in rows]) for i in range(4))
    support = _mask([row.sy for row in rows], [row.support_mask for row in rows])
    query = _mask([row.qy for row in rows], [row.query_mask for row in rows])
    return TaskBatch(sx, sy, qx, qy, support, query)


def _is_pair(dataset: Any) -> bool:
    """Whether this is (x, y) as a whole, not a sequence of samples."""
    return isinstance(dataset, tuple) and len(dataset) == 2


def _labels(dataset: Any) -> np.ndarray:
    """The class id of every sample, from the dataset's own table where it has one, else by reading every sample."""
    if _is_pair(dataset):
        table = dataset[1]
    elif isinstance(dataset, TensorDataset):
        table = dataset.tensors[1]
    else:
        table = next((t for n in ("targets", "labels") if (t := getattr(dataset, n, None)) is not None), None)
        if table is None:
            table = [int(dataset[i][1]) for i in range(len(dataset))]
    labels = np.asarray(table)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"dataset: expected one integer class id per sample, got {labels.dtype} {labels.shape}")
    return labels


class EpisodeDataset(Dataset[TaskBatch]):
    """Seeded N-way K-shot tasks from a labelled dataset; each item is one task, a TaskBatch without the task dimension.

    `dataset` is a pair ``(x, y)`` of tensors or arrays, a TensorDataset, or anything indexable with a length that
    gives ``(x, y)`` with class id y; its ``targets`` or ``labels`` are used where it has them, else every sample is
    read once. Task i has `ways` distinct classes, relabelled 0..ways-1, with `shots` support and `queries` query
    samples each, all distinct. It depends on the seed, the epoch and i alone. Use it with ``DataLoader(...,
    batch_size=T, collate_fn=collate)``; call ``set_epoch`` before each pass, which otherwise sees the same tasks again.
    Iterating over the dataset itself gives its tasks in order.

    Args:
        dataset: the samples.
        ways: classes per task.
        shots: support samples per class.
        queries: query samples per class.
        seed: of the sampling.
        episodes: the length, tasks per epoch.

    Raises:
        DataError: where the dataset has too few classes with enough samples.
        ValueError: where a count is not a positive int.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from mtml.tasks import EpisodeDataset, collate
        >>> data = torch.randn(60, 3), torch.arange(60) % 6
        >>> loader = DataLoader(EpisodeDataset(data, ways=5, shots=1, queries=2), batch_size=4, collate_fn=collate)
        >>> batch = next(iter(loader))
        >>> tuple(batch.sx.shape), tuple(batch.qy.shape)
        ((4, 5, 3), (4, 10))
    """

    def __init__(
        self, dataset: Any, ways: int, shots: int, queries: int, seed: int = 0, *, episodes: int = 1000
    ) -> None:
        check_counts(ways=ways, shots=shots, queries=queries, episodes=episodes)
        self.dataset, self.ways, self.shots, self.queries = dataset, ways, shots, queries
        self.seed, self.episodes, self.epoch = seed, episodes, 0
        labels = _labels(dataset)
        order = np.argsort(labels, kind="stable")
        classes, starts = np.unique(labels[order], return_index=True)
        members = dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))
        self._members = [m for m in members.values() if len(m) >= shots + queries]
        if len(self._members) < ways:
            raise DataError(
                f"dataset: expected {ways} classes (ways) of {shots + queries} samples (shots + queries) each; "
                f"got {len(self._members)} such among {len(members)} classes. Ask for fewer, or bring more data."
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw other tasks from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, index: int) -> TaskBatch:
        if not 0 <= index < self.episodes:
            raise IndexError(f"index: expected 0..{self.episodes - 1}, got {index}")
        rng = np.random.default_rng(entropy(self.seed, self.epoch, index))
        chosen = rng.choice(len(self._members), self.ways, replace=False)
        drawn = np.stack([rng.choice(self._members[c], self.shots + self.queries, replace=False) for c in chosen])
        support, query = drawn[:, : self.shots].ravel(), drawn[:, self.shots :].ravel()
        classes = torch.arange(self.ways)
        return TaskBatch(
            self._samples(support),
            classes.repeat_interleave(self.shots),
            self._samples(query),
            classes.repeat_interleave(self.queries),
        )

    def __iter__(self) -> Iterator[TaskBatch]:
        return (self[i] for i in range(self.episodes))

    def _samples(self, indices: np.ndarray) -> Tensor:
        """The inputs of the given samples, stacked: [n, ...]."""
        if _is_pair(self.dataset):
            x = self.dataset[0]
            return x[torch.from_numpy(indices)] if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x)[indices])
        if isinstance(self.dataset, TensorDataset):
            return self.dataset.tensors[0][torch.from_numpy(indices)]
        return torch.stack([torch.as_tensor(self.dataset[i][0]) for i in indices.tolist()])
