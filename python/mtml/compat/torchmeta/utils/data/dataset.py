"""Sets of classes, and sets of tasks."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from mtml.compat.torchmeta.compose import Compose, parts_of
from mtml.compat.torchmeta.draws import Draws
from mtml.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from mtml.compat.torchmeta.transforms.target_transforms import DefaultTargetTransform
from mtml.compat.torchmeta.transforms.utils import wrap_transform
from mtml.compat.torchmeta.utils.data.task import ConcatTask, Transform
from mtml_kernels.checks import shown

__all__ = ["ClassDataset", "CombinationMetaDataset", "MetaDataset"]

SPLITS = ("train", "val", "test")


class _Split:
    """Which part of the data: `meta_split`, and a flag for each of its names."""

    meta_train: bool
    meta_val: bool
    meta_test: bool

    def _choose(self, train: bool, val: bool, test: bool, split: str | None) -> None:
        chosen = [name for name, flag in zip(SPLITS, (train, val, test), strict=True) if flag]
        if not chosen and split is None:
            raise ValueError("meta_split: expected one of 'train', 'val', 'test' (or meta_train=True ...), got None")
        if not chosen and split not in SPLITS:
            raise ValueError(f"meta_split: expected one of 'train', 'val', 'test'; got {split!r}")
        if len(chosen) > 1:
            raise ValueError(f"meta_train, meta_val, meta_test: expected one of them, got {' and '.join(chosen)}")
        self.meta_split = chosen[0] if chosen else str(split)
        self.meta_train, self.meta_val, self.meta_test = (self.meta_split == name for name in SPLITS)


class ClassDataset(_Split):
    """Base of sets of classes: item i is the data set of class i. A subclass has ``__getitem__`` and `num_classes`.

    Args:
        meta_train, meta_val, meta_test: which part of the data; one of them is True, or
        meta_split: has its name, "train", "val" or "test".
        class_augmentations: a list of groups (`transforms.Rotation([90, 180])`, ...) of transforms, each of which makes
            another class of every class: class i + k * num_classes is class i under the k-th of them.

    Raises:
        ValueError: no part, or several.
        TypeError: `class_augmentations` is no list.
    """

    def __init__(
        self,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        class_augmentations: list[Iterable[Any]] | None = None,
    ) -> None:
        self._choose(meta_train, meta_val, meta_test, meta_split)
        if class_augmentations is not None and not isinstance(class_augmentations, list):
            raise TypeError(f"class_augmentations: expected a list of transforms, got {shown(class_augmentations)}")
        self.class_augmentations: list[Any] = []
        for transform in (one for group in class_augmentations or () for one in group):
            if transform in self.class_augmentations:
                warnings.warn(f"class_augmentations: {transform!r} comes twice and is taken once", stacklevel=2)
            else:
                self.class_augmentations.append(transform)

    def get_class_augmentation(self, index: int) -> Any:
        """What makes class `index` of an original one; None for the original ones."""
        number = index // self.num_classes
        return self.class_augmentations[number - 1] if number else None

    def get_transform(self, index: int, transform: Transform | None = None) -> Transform | None:
        """For the inputs of class `index`: its augmentation, then `transform`."""
        augmentation = self.get_class_augmentation(index)
        if augmentation is None or transform is None:
            return transform if augmentation is None else augmentation
        return Compose([augmentation, transform])

    def get_target_transform(self, index: int) -> FixedCategory:
        """For the targets of class `index`: label -> (label, augmentation)."""
        return FixedCategory(self.get_class_augmentation(index))

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected __getitem__(index) -> data set of that class")

    @property
    def num_classes(self) -> int:
        """Without augmentations."""
        raise NotImplementedError(f"{type(self).__name__}: expected a property num_classes")

    def __len__(self) -> int:
        return self.num_classes * (len(self.class_augmentations) + 1)


class MetaDataset(Draws, _Split):
    """Base of sets of tasks: item i is task i. A subclass has ``__getitem__`` and ``__len__``.

    Args:
        meta_train, meta_val, meta_test, meta_split: as of `ClassDataset`.
        target_transform: of each target.
        dataset_transform: of each task, such as `transforms.ClassSplitter`.

    Raises:
        ValueError: no part of the data, or several.
    """

    def __init__(
        self,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Any = None,
    ) -> None:
        self._choose(meta_train, meta_val, meta_test, meta_split)
        self.target_transform, self.dataset_transform = target_transform, dataset_transform
        self.seed()

    def seed(self, seed: int | None = None) -> None:
        """Start the random numbers of the set, and of its `dataset_transform`, anew."""
        super().seed(seed)
        for transform in parts_of(self.dataset_transform) or [self.dataset_transform]:
            if hasattr(transform, "seed"):
                transform.seed(seed)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def sample_task(self) -> Any:
        """A random task."""
        return self[int(self.stream().randint(len(self)))]

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected __getitem__(index) -> task")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__}: expected __len__")

    def _transformed(self, task: Any) -> Any:
        return task if self.dataset_transform is None else self.dataset_transform(task)


class CombinationMetaDataset(MetaDataset):
    """Classification tasks of every combination of `num_classes_per_task` classes: ``dataset[(3, 1, 4)]`` is a task.

    Args:
        dataset: a `ClassDataset`.
        num_classes_per_task: N.
        target_transform: of (label, augmentation); a `transforms.Categorical` numbers the classes of each task anew.
        dataset_transform: of each task, such as `transforms.ClassSplitter`.

    Raises:
        TypeError: `num_classes_per_task` is no int.
        ValueError: an index that is no tuple of N class indices.

    Example:
        >>> import torch
        >>> from mtml.compat.torchmeta.transforms import Categorical
        >>> from mtml.compat.torchmeta.utils.data import ClassDataset, CombinationMetaDataset, Dataset
        >>> class Points(Dataset):
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, i):
        ...         return torch.tensor([float(self.index)]), self.target_transform(f"class {self.index}")
        >>> class Classes(ClassDataset):
        ...     num_classes = 6
        ...     def __getitem__(self, i):
        ...         return Points(i, target_transform=self.get_target_transform(i))
        >>> tasks = CombinationMetaDataset(Classes(meta_train=True), 2, target_transform=Categorical(2))
        >>> task = tasks[(4, 0)]
        >>> len(task), task[0][0].item(), sorted(task[i][1] for i in range(8))
        (8, 4.0, [0, 0, 0, 0, 1, 1, 1, 1])
    """

    def __init__(
        self,
        dataset: ClassDataset,
        num_classes_per_task: int,
        target_transform: Transform | None = None,
        dataset_transform: Any = None,
    ) -> None:
        if not isinstance(num_classes_per_task, int):
            raise TypeError(f"num_classes_per_task: expected an int, got {shown(num_classes_per_task)}")
        self.dataset, self.num_classes_per_task = dataset, num_classes_per_task
        if target_transform is None:
            target_transform = DefaultTargetTransform(dataset.class_augmentations)
        super().__init__(
            meta_split=dataset.meta_split, target_transform=target_transform, dataset_transform=dataset_transform
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in combinations(range(len(self.dataset)), self.num_classes_per_task))

    def sample_task(self) -> Any:
        chosen = self.stream().choice(len(self.dataset), size=self.num_classes_per_task, replace=False)
        return self[tuple(chosen.tolist())]

    def __getitem__(self, index: Sequence[int]) -> Any:
        if not isinstance(index, tuple | list) or len(index) != self.num_classes_per_task:
            some = ", ".join(map(str, range(self.num_classes_per_task)))
            raise ValueError(
                f"index: expected the {self.num_classes_per_task} classes of a task, as dataset[({some})]; got "
                f"{shown(index)}; sample_task() draws them"
            )
        transform = wrap_transform(self.target_transform, self._for_task, Categorical)
        return self._transformed(
            ConcatTask([self.dataset[i] for i in index], self.num_classes_per_task, target_transform=transform)
        )

    def _for_task(self, transform: Categorical) -> Categorical:
        """A copy that numbers the classes of one task."""
        transform.reset()
        if transform.num_classes is None:
            transform.num_classes = self.num_classes_per_task
        return copy.deepcopy(transform)

    def __len__(self) -> int:
        length = math.comb(len(self.dataset), self.num_classes_per_task)
        if length > sys.maxsize:
            warnings.warn(
                f"len(dataset): C({len(self.dataset)}, {self.num_classes_per_task}) tasks are more than an int holds; "
                f"the length is taken to be {sys.maxsize}",
                stacklevel=2,
            )
        return min(length, sys.maxsize)
