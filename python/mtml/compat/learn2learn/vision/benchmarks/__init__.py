"""Sets of training, validation and test tasks as papers have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mtml.compat.absent import Absent
from mtml.compat.learn2learn.data.task_dataset import Taskset
from mtml.compat.learn2learn.vision.benchmarks.omniglot_benchmark import omniglot_tasksets
from mtml.compat.learn2learn.vision.datasets import WAY_OUT

__all__ = ["BenchmarkTasksets", "get_tasksets", "list_tasksets"]

ABSENT = ("mini-imagenet", "tiered-imagenet", "fc100", "cifarfs")


class BenchmarkTasksets(NamedTuple):
    """No class is in two of them."""

    train: Taskset
    validation: Taskset
    test: Taskset


def list_tasksets() -> list[str]:
    """The names that `get_tasksets` takes."""
    return ["omniglot"]


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: str | Path = "~/data",
    device: Any = None,
    **kwargs: Any,
) -> BenchmarkTasksets:
    """The tasks of a benchmark: for "omniglot" [ways * samples, 1, 28, 28], ink = 1, and class ids 0..ways-1.

    Characters are shuffled by Python's `random`; 1100 are to train, 100 to validate, 423 to test, each class of a task
    turned by a multiple of 90 degrees.

    Args:
        train_ways, train_samples: classes of a training task, and samples of each class, support and query together.
        test_ways, test_samples: of a validation or test task.
        num_tasks: as of `Taskset`.
        root: as of `datasets.FullOmniglot`.
        device: where the images go, whole.

    Raises:
        DataError: a benchmark whose data the original downloads; or as `datasets.FullOmniglot`.
        ValueError: no such benchmark.
    """
    if name in ABSENT:
        Absent(name, WAY_OUT)()
    if name not in list_tasksets():
        raise ValueError(f"name: expected one of {', '.join(list_tasksets())}, got {name!r}")
    ways, samples = (train_ways, test_ways, test_ways), (train_samples, test_samples, test_samples)
    parts = omniglot_tasksets(ways, samples, root, device)
    return BenchmarkTasksets(*(Taskset(dataset, transforms, num_tasks) for dataset, transforms in parts))
