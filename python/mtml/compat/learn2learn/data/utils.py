"""Loaders that do not end, data sets in memory, and tasks in two parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from mtml_kernels.checks import shown

__all__ = ["InfiniteIterator", "OnDeviceDataset", "column", "partition_task"]


class InfiniteIterator:
    """A loader over and over: ``next(iterator)`` never ends.

    Raises:
        ValueError: the loader is empty.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader
        self.iterator = iter(dataloader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for _ in range(2):  # what is left, then from the beginning
            for batch in self.iterator:
                return batch
            self.iterator = iter(self.dataloader)
        raise ValueError("dataloader: expected at least one batch, got none")


def column(labels: Tensor) -> Tensor:
    """Labels [N], of [N] or of a column [N, 1]; ValueError for several numbers a sample."""
    if labels.numel() != len(labels):
        raise ValueError(f"labels: expected one number for each sample, [N] or [N, 1], got {shown(labels)}")
    return labels.reshape(-1)


def partition_task(data: Tensor, labels: Tensor, shots: int = 1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Divide a task: the first `shots` samples of every class to adapt on, the others to be judged on, class by class.

    Args:
        data: [N, ...].
        labels: [N], or in a column [N, 1], every class with equally many samples.

    Returns:
        (support data, support labels), (query data, query labels), sorted by label.

    Raises:
        ValueError: data and labels of different lengths, labels of several numbers, classes of different sizes, or too
            few samples.

    Example:
        >>> import torch
        >>> support, query = partition_task(torch.arange(6.0), torch.tensor([1, 0, 1, 0, 1, 0]), shots=1)
        >>> support[0].tolist(), query[0].tolist(), query[1].tolist()
        ([1.0, 0.0], [3.0, 5.0, 2.0, 4.0], [0, 0, 1, 1])
    """
    if len(data) != len(labels):
        raise ValueError(f"labels: expected one for each of the {len(data)} samples of data, got {shown(labels)}")
    ids = column(labels)
    classes, counts = ids.unique(return_counts=True)
    if bool((counts != counts[:1]).any()):
        raise ValueError(f"labels: expected equally many samples of every class, got {counts.tolist()}")
    each = int(counts[0]) if len(counts) else 0
    if not 0 <= shots <= each:
        raise ValueError(f"shots: expected at most the {each} samples of a class, got {shots}")
    order = ids.argsort(stable=True).view(len(classes), each)
    parts = [order[:, :shots].flatten(), order[:, shots:].flatten()]
    support, query = ((data[rows.to(data.device)], labels[rows]) for rows in parts)
    return support, query


class OnDeviceDataset(TensorDataset):
    """A whole data set as two tensors on a device (in pinned memory for the CPU of a machine with CUDA).

    Args:
        dataset: of samples (tensor, label).
        device: where to; None: where the samples are.
        transform: of each sample's tensor, when it is taken.
    """

    def __init__(self, dataset: Any, device: Any = None, transform: Callable[[Tensor], Any] | None = None) -> None:
        samples = [dataset[i] for i in range(len(dataset))]
        data = torch.stack([x for x, _ in samples]).to(device)
        labels = torch.as_tensor([int(y) for _, y in samples]).to(device)
        if data.device.type == "cpu" and torch.cuda.is_available():
            data, labels = data.pin_memory(), labels.pin_memory()
        super().__init__(data, labels)
        self.transform = transform
        if hasattr(dataset, "_bookkeeping_path"):
            self._bookkeeping_path = dataset._bookkeeping_path

    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        x, y = super().__getitem__(index)
        return (x if self.transform is None else self.transform(x)), y

    def sample_labels(self) -> list[int]:
        """The label of every sample."""
        return self.tensors[1].tolist()
