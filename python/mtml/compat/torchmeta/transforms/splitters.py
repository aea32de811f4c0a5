"""Tasks split into a set to adapt on and a set to be judged on."""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mtml.compat.rate import count as whole
from mtml.compat.torchmeta.draws import Draws
from mtml.compat.torchmeta.transforms.utils import apply_wrapper
from mtml.compat.torchmeta.utils.data.task import ConcatTask, SubsetTask, Task
from mtml_kernels.checks import check_number, shown

__all__ = ["ClassSplitter", "ClassSplitter_", "Splitter", "WeightedClassSplitter", "WeightedClassSplitter_"]

Count = int | Mapping[str, int] | None


class Splitter(Draws):
    """Base: task -> {name of the part: SubsetTask}. A subclass has `get_indices_task` and `get_indices_concattask`.

    Args:
        splits: the names of the parts, and what a subclass wants to know of each.
        random_state_seed: of `np_random`.
    """

    def __init__(self, splits: Mapping[str, Any], random_state_seed: int = 0) -> None:
        self.splits, self.random_state_seed = splits, random_state_seed
        self.seed(random_state_seed)

    def get_indices(self, task: Task) -> Mapping[str, Sequence[int]]:
        """{name: indices of its samples in the task}; ValueError for what is no task."""
        if isinstance(task, ConcatTask):
            return self.get_indices_concattask(task)
        if isinstance(task, Task):
            return self.get_indices_task(task)
        raise ValueError(f"task: expected a Task, got {shown(task)}")

    def get_indices_task(self, task: Task) -> Mapping[str, Sequence[int]]:
        """`get_indices` of a task that is one data set."""
        raise NotImplementedError(f"{type(self).__name__}: expected get_indices_task(task) -> {{part: indices}}")

    def get_indices_concattask(self, task: ConcatTask) -> Mapping[str, Sequence[int]]:
        """`get_indices` of a task that has a data set for every class."""
        raise NotImplementedError(f"{type(self).__name__}: expected get_indices_concattask(task) -> {{part: indices}}")

    def __call__(self, task: Task) -> OrderedDict[str, SubsetTask]:
        indices = self.get_indices(task)
        return OrderedDict((name, SubsetTask(task, indices[name])) for name in self.splits)

    def __len__(self) -> int:
        return len(self.splits)


class _BySize(Splitter, abc.ABC):
    """So many samples of every class to each part; no sample is in two.

    Which samples of a class go to which part depends on the task's index and `random_state_seed` alone, so that no
    sample of a task is trained on once and tested on another time; their order is drawn anew each time.

    Raises:
        ValueError: for a task of fewer samples a class than the parts need, or without targets.
    """

    def __init__(self, splits: Mapping[str, Any], random_state_seed: int, shuffle: bool) -> None:
        super().__init__(splits, random_state_seed)
        self.shuffle = shuffle

    def get_indices_task(self, task: Task) -> OrderedDict[str, list[int]]:
        return self._divided(task, list(_classes(task)))

    def get_indices_concattask(self, task: ConcatTask) -> OrderedDict[str, list[int]]:
        return self._divided(task, list(_classes(task)))

    def _divided(self, task: Task, classes: list[tuple[int, Sequence[int]]]) -> OrderedDict[str, list[int]]:
        sizes, draws = self._sizes([len(members) for _, members in classes]), self.stream()
        indices: OrderedDict[str, list[int]] = OrderedDict((name, []) for name in self.splits)
        for (seed, members), (count, wanted) in zip(classes, sizes, strict=True):
            order = self._order(hash(task) + seed, count)
            start = 0
            for name, size in wanted.items():
                chosen = order[start : start + size]
                start += size
                if self.shuffle:
                    draws.shuffle(chosen)
                indices[name].extend(members[i] for i in chosen.tolist())
        return indices

    def _order(self, seed: int, count: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return np.random.RandomState((seed + self.random_state_seed) % 2**32).permutation(count)

    @abc.abstractmethod
    def _sizes(self, counts: list[int]) -> list[tuple[int, dict[str, int]]]:
        """For each class of so many samples: how many of them to draw from, and how many go to each part."""


def _classes(task: Task) -> Iterator[tuple[int, Sequence[int]]]:
    """(seed, indices) of every class of the task."""
    if isinstance(task, ConcatTask):
        start = 0
        for dataset in task.datasets:
            count = len(dataset)  # type: ignore[arg-type]
            yield hash(dataset), range(start, start + count)
            start += count
    elif task.num_classes is None:
        yield 0, range(len(task))  # type: ignore[arg-type]
    else:
        yield from enumerate(_by_target(task))


def _by_target(task: Task) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for index in range(len(task)):  # type: ignore[arg-type]
        sample = task[index]
        if not isinstance(sample, tuple) or len(sample) < 2:
            raise ValueError(f"task: expected samples (input, ..., target), got {shown(sample)}")
        found.setdefault(_label(sample[-1]), []).append(index)
    if len(found) != task.num_classes:
        raise ValueError(f"task: expected the {task.num_classes} classes of its num_classes, got {len(found)}")
    return list(found.values())


def _label(target: Any) -> Any:
    """What equal labels share: arrays and tensors, scalars and columns [1], by the values that they hold."""
    if not isinstance(target, Tensor | np.ndarray):
        return target
    values = target.reshape(-1).tolist()
    return values[0] if len(values) == 1 else tuple(values)


def _named(
    given: Mapping[str, Any] | None, train: Any, test: Any, support: Any, query: Any, argument: str
) -> OrderedDict[str, Any]:
    """The parts by name; ValueError where there is none."""
    if given is None:
        pairs = [("train", train) if train is not None else ("support", support)]
        pairs += [("test", test) if test is not None else ("query", query)]
        given = {name: value for name, value in pairs if value is not None}
    if not given:
        raise ValueError(f"{argument}: expected at least one part, as train or support and test or query; got none")
    return OrderedDict(given)


def _enough(counts: list[int], needed: int) -> None:
    if counts and min(counts) < needed:
        raise ValueError(f"task: expected at least {needed} samples of every class for all parts, got {min(counts)}")


class ClassSplitter_(_BySize):
    """What `ClassSplitter` makes."""

    def __init__(
        self,
        shuffle: bool = True,
        num_samples_per_class: Mapping[str, int] | None = None,
        num_train_per_class: int | None = None,
        num_test_per_class: int | None = None,
        num_support_per_class: int | None = None,
        num_query_per_class: int | None = None,
        random_state_seed: int = 0,
    ) -> None:
        given = num_train_per_class, num_test_per_class, num_support_per_class, num_query_per_class
        parts = _named(num_samples_per_class, *given, "num_samples_per_class")
        for name, samples in parts.items():
            parts[name] = whole(f"num_samples_per_class[{name!r}]", samples, least=0)
        super().__init__(parts, random_state_seed, shuffle)

    def _sizes(self, counts: list[int]) -> list[tuple[int, dict[str, int]]]:
        _enough(counts, sum(self.splits.values()))
        return [(count, dict(self.splits)) for count in counts]


class WeightedClassSplitter_(_BySize):
    """What `WeightedClassSplitter` makes."""

    def __init__(
        self,
        shuffle: bool = True,
        min_num_samples: Count = 1,
        max_num_samples: Count = None,
        weights: Mapping[str, float] | None = None,
        train_weights: float | None = None,
        test_weights: float | None = None,
        support_weights: float | None = None,
        query_weights: float | None = None,
        force_equal_per_class: bool = False,
        random_state_seed: int = 0,
    ) -> None:
        parts = _named(weights, train_weights, test_weights, support_weights, query_weights, "weights")
        for name, share in parts.items():
            check_number(f"weights[{name!r}]", share, least=0)
        if sum(parts.values()) > 1:
            raise ValueError(f"weights: expected a sum of at most 1, got {shown(dict(parts))}")
        super().__init__(parts, random_state_seed, shuffle)
        self.force_equal_per_class = force_equal_per_class
        self.min_num_samples = _bounds("min_num_samples", min_num_samples or 0, parts)
        self.max_num_samples = None if max_num_samples is None else _bounds("max_num_samples", max_num_samples, parts)

    def _sizes(self, counts: list[int]) -> list[tuple[int, dict[str, int]]]:
        _enough(counts, sum(self.min_num_samples.values()))
        found = [min(counts) if self.force_equal_per_class else count for count in counts]
        return [(count, {name: self._size(name, count) for name in self.splits}) for count in found]

    def _size(self, name: str, count: int) -> int:
        size = max(self.min_num_samples[name], int(self.splits[name] * count))
        return size if self.max_num_samples is None else min(size, self.max_num_samples[name])


def _bounds(argument: str, value: Any, parts: Mapping[str, Any]) -> dict[str, int]:
    """{name of the part: bound}"""
    if isinstance(value, int):
        return dict.fromkeys(parts, value)
    if not isinstance(value, Mapping) or any(name not in value for name in parts):
        raise TypeError(f"{argument}: expected an int, or {{part: int}} for {', '.join(parts)}; got {shown(value)}")
    return dict(value)


def ClassSplitter(task: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Split tasks by fixed numbers of samples of every class (of the task, for regression).

    Args:
        task: a task to split; a set of tasks, which splits its tasks from now on and is returned; None for the
            splitter itself, to be a `dataset_transform`.
        shuffle: draw which samples go where; otherwise the first ones are the first part's.
        num_samples_per_class: {name of the part: samples}, or
        num_train_per_class, num_test_per_class: for parts "train" and "test", or
        num_support_per_class, num_query_per_class: for parts "support" and "query".
        random_state_seed: of which samples go where.

    Raises:
        ValueError: no part; or, for a task, too few samples of a class.

    Example:
        >>> from mtml.compat.torchmeta.toy import Sinusoid
        >>> tasks = ClassSplitter(Sinusoid(20), num_train_per_class=5, num_test_per_class=15)
        >>> {name: len(part) for name, part in tasks[0].items()}
        {'train': 5, 'test': 15}
    """
    return apply_wrapper(ClassSplitter_(*args, **kwargs), task)


def WeightedClassSplitter(task: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Split tasks by shares of the samples of every class.

    Args:
        task, shuffle, random_state_seed: as of `ClassSplitter`.
        min_num_samples, max_num_samples: of a class in a part: an int, or {name: int}.
        weights: {name of the part: share}, at most 1 together, or
        train_weights, test_weights, support_weights, query_weights: the same by argument.
        force_equal_per_class: shares of the smallest class, for all classes.

    Raises:
        ValueError, TypeError: as of `ClassSplitter`; shares above 1 together; bounds of the wrong type.
    """
    return apply_wrapper(WeightedClassSplitter_(*args, **kwargs), task)
