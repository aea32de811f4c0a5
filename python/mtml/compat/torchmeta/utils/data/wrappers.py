"""All samples of a set of tasks as one ordinary data set."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mtml.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from mtml.compat.torchmeta.utils.data.task import Transform
from mtml_kernels.checks import shown

__all__ = ["NonEpisodicWrapper"]


class NonEpisodicWrapper(Dataset[Any]):
    """The images of a `CombinationMetaDataset`, for plain training: (image, (name, number of the augmentation)).

    Its class data set has `labels` (names, or lists whose parts a slash joins), `data` {name: images}, `transform`.

    Raises:
        ValueError: `dataset` is no CombinationMetaDataset.
        IndexError: beyond the last sample.
    """

    def __init__(self, dataset: CombinationMetaDataset, target_transform: Transform | None = None) -> None:
        if not isinstance(dataset, CombinationMetaDataset):
            raise ValueError(f"dataset: expected a CombinationMetaDataset, got {shown(dataset)}")
        self.dataset, self.target_transform = dataset, target_transform
        self.classes = _with_samples(dataset.dataset)
        self._labels = ["/".join(name) if isinstance(name, list | tuple) else name for name in self.classes.labels]
        self._ends = np.cumsum([len(self.classes.data[name]) for name in self._labels])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        augmentation, place = divmod(index, self.num_samples)
        number = int(np.searchsorted(self._ends, place, side="right"))
        name = self._labels[number]
        image = _image(self.classes.data[name][place - self._ends[number]])  # counted from the class's end
        transform = self.classes.get_transform(self.classes.num_classes * augmentation + number, self.classes.transform)
        label: Any = (name, augmentation)
        return (
            image if transform is None else transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )

    @property
    def num_samples(self) -> int:
        """Without augmentations."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_classes(self) -> int:
        """With augmentations."""
        return len(self._labels) * (len(self.classes.class_augmentations) + 1)

    def __len__(self) -> int:
        return self.num_samples * (len(self.classes.class_augmentations) + 1)


def _with_samples(classes: Any) -> Any:
    """Whatever its kind, it has labels, data and transform."""
    return classes


def _image(array: np.ndarray) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(array.tobytes())) if array.ndim < 2 else Image.fromarray(array)
