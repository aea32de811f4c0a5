"""Data sets that know which samples each class has."""

from __future__ import annotations

import io
import logging
import pickle
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mtml.compat.learn2learn.data.utils import OnDeviceDataset, column
from mtml.tasks.files import atomic_write
from mtml_kernels.checks import shown

__all__ = ["FilteredMetaDataset", "MetaDataset", "UnionMetaDataset", "together"]

log = logging.getLogger("mtml")
Label = Hashable


class MetaDataset(Dataset[Any]):
    """A classification data set with `labels_to_indices`, `indices_to_labels` and `labels`.

    They are made by reading the label of every sample once (at once, from a TensorDataset), unless one of the two maps
    is given. Where the data set has an attribute `_bookkeeping_path`, they are kept in that file.

    Args:
        dataset: of samples (x, label), the label a number, a string or a tensor of one number.
        labels_to_indices: {label: indices of its samples}.
        indices_to_labels: {index: label}.

    Raises:
        TypeError: `dataset` is no torch Dataset.
        ValueError: a label is a tensor of several numbers.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = MetaDataset(TensorDataset(torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])))
        >>> data.labels, data.labels_to_indices[2]
        ([0, 1, 2], [2, 5])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        labels_to_indices: Mapping[Label, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Label] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset: expected a torch.utils.data.Dataset, got {shown(dataset)}")
        self.dataset: Any = dataset
        path = getattr(dataset, "_bookkeeping_path", None)
        if path is not None:
            self.load_bookkeeping(path)
        else:
            self.create_bookkeeping(labels_to_indices, indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[item]

    def __len__(self) -> int:
        return len(self.dataset)

    def create_bookkeeping(
        self,
        labels_to_indices: Mapping[Label, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Label] | None = None,
    ) -> None:
        """Make the maps anew."""
        if labels_to_indices is not None:
            indices_to_labels = {i: label for label, indices in labels_to_indices.items() for i in indices}
            self._keep(labels_to_indices, indices_to_labels)
            return
        self._keep_labels(dict(enumerate(_labels(self.dataset))) if indices_to_labels is None else indices_to_labels)

    def load_bookkeeping(self, path: str) -> None:
        """The maps in this file; they are made, and written to it, where it is absent or of other data."""
        found = _read(Path(path))
        if found is None or len(found["indices_to_labels"]) != len(self):
            self.create_bookkeeping()
            self.serialize_bookkeeping(path)
        else:
            self._keep(found["labels_to_indices"], found["indices_to_labels"])

    def serialize_bookkeeping(self, path: str) -> None:
        """Write the maps to this file."""
        with atomic_write(Path(path)) as file:
            pickle.dump(self._bookkeeping, file)

    def together(self, indices: Sequence[int]) -> tuple[Tensor, ...] | None:
        """As the function of this name; None for subclasses, which may give other samples."""
        return together(self.dataset, indices) if type(self) is MetaDataset else None

    def _keep_labels(self, indices_to_labels: Mapping[int, Label]) -> None:
        found: dict[Label, list[int]] = {}
        for index, label in indices_to_labels.items():
            found.setdefault(label, []).append(index)
        self._keep(found, indices_to_labels)

    def _keep(self, labels_to_indices: Mapping[Any, Sequence[int]], indices_to_labels: Mapping[int, Any]) -> None:
        self.labels_to_indices, self.indices_to_labels = labels_to_indices, indices_to_labels
        self.labels = list(labels_to_indices)
        self._bookkeeping = {
            "labels_to_indices": labels_to_indices,
            "indices_to_labels": indices_to_labels,
            "labels": self.labels,
        }


def together(dataset: Any, indices: Sequence[int]) -> tuple[Tensor, ...] | None:
    """The samples of these indices as whole tensors; None where they have to be read one by one."""
    if isinstance(dataset, MetaDataset):
        return dataset.together(indices)
    if type(dataset) is TensorDataset or (type(dataset) is OnDeviceDataset and dataset.transform is None):
        rows = torch.as_tensor(indices)
        return tuple(tensor[rows.to(tensor.device)] for tensor in dataset.tensors)
    return None


def _labels(dataset: Any) -> list[Label]:
    """Of every sample."""
    if hasattr(dataset, "sample_labels"):
        return dataset.sample_labels()
    if type(dataset) is TensorDataset:
        return column(dataset.tensors[1]).tolist()
    return [_scalar(dataset[i][1]) for i in range(len(dataset))]


def _scalar(label: Any) -> Any:
    if not hasattr(label, "item"):
        return label
    try:
        return label.item()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"dataset: expected labels of one number, got {shown(label)}") from error


class _Unpickler(pickle.Unpickler):
    """Reads maps and nothing that runs."""

    ALLOWED = frozenset({"collections.defaultdict", "builtins.int", "builtins.list", "numpy.dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self.ALLOWED or (module.startswith("numpy") and name == "scalar"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of it")


def _read(path: Path) -> dict[str, Any] | None:
    """What is in the file; None where there is none, or something else."""
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        return {name: found[name] for name in ("labels_to_indices", "indices_to_labels")}
    except FileNotFoundError:
        return None
    except Exception as error:  # pickle raises a dozen kinds
        log.warning("%s is not what a MetaDataset writes (%s); it is made again", path, error)
        return None


def _meta(dataset: Any) -> MetaDataset:
    return dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)


class UnionMetaDataset(MetaDataset):
    """Several data sets as one, one after another; classes are numbered anew, so that none is in two of them.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> half = TensorDataset(torch.zeros(4, 1), torch.tensor([7, 7, 8, 8]))
        >>> both = UnionMetaDataset([half, half])
        >>> both.labels, both[7][1]
        ([0, 1, 2, 3], 3)
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = [_meta(dataset) for dataset in datasets]
        self._ends = list(accumulate(len(dataset.indices_to_labels) for dataset in self.datasets))
        found: dict[int, int] = {}
        classes = 0
        for start, dataset in zip([0, *self._ends], self.datasets, strict=False):
            number = {label: classes + i for i, label in enumerate(dataset.labels)}
            found |= {start + index: number[label] for index, label in dataset.indices_to_labels.items()}
            classes += len(number)
        self._keep_labels(found)

    def __getitem__(self, item: int) -> Any:
        if not 0 <= item < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {item}")
        part = bisect_right(self._ends, item)
        sample = list(self.datasets[part][item - (self._ends[part - 1] if part else 0)])
        sample[1] = self.indices_to_labels[item]
        return sample

    def __len__(self) -> int:
        return len(self.indices_to_labels)


class FilteredMetaDataset(MetaDataset):
    """The samples of some labels of a data set, which keep them.

    Raises:
        ValueError: the data set has no such label.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(4.0), torch.tensor([7, 8, 7, 9]))
        >>> some = FilteredMetaDataset(data, [9, 7])
        >>> [some[i][0].item() for i in range(len(some))]
        [3.0, 0.0, 2.0]
    """

    def __init__(self, dataset: Any, labels: Sequence[Label]) -> None:
        self.dataset = _meta(dataset)
        if absent := [label for label in labels if label not in self.dataset.labels_to_indices]:
            raise ValueError(f"labels: expected labels of the data set, got {absent[0]!r}, of which it has no sample")
        members = [(index, label) for label in labels for index in self.dataset.labels_to_indices[label]]
        self.to_true_indices = [index for index, _ in members]
        self._keep_labels({i: label for i, (_, label) in enumerate(members)})

    def __getitem__(self, item: int) -> Any:
        return self.dataset[self.to_true_indices[item]]

    def __len__(self) -> int:
        return len(self.to_true_indices)

    def together(self, indices: Sequence[int]) -> tuple[Tensor, ...] | None:
        if type(self) is not FilteredMetaDataset:
            return None
        return together(self.dataset, [self.to_true_indices[i] for i in indices])
