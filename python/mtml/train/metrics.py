"""Recall and F1 of every class over all test tasks, by scikit-learn."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtml.tasks.errors import DataError
from mtml.tasks.files import atomic_write
from mtml.train.evaluate import Evaluation

__all__ = ["PerClass", "per_class"]


class PerClass(NamedTuple):
    """Of C classes: names, tasks each was in, recall and F1 after adaptation (NaN where it was in none); and the macro
    averages, over the classes that were in a task."""

    names: tuple[str, ...]
    tasks: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    macro_recall: float
    macro_f1: float

    def by_difficulty(self) -> list[int]:
        """The classes that were in a task, hardest first: by F1, then by recall."""
        seen = np.flatnonzero(self.tasks)
        return [int(i) for i in seen[np.lexsort((self.recall[seen], self.f1[seen]))]]

    def write(self, path: Path) -> Path:
        """Write a CSV file, hardest class first; a class that was in no task has no numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["character", "tasks", "recall", "f1"])
        for i in self.by_difficulty():
            writer.writerow([self.names[i], int(self.tasks[i]), f"{self.recall[i]:.4f}", f"{self.f1[i]:.4f}"])
        writer.writerows([self.names[i], 0, "", ""] for i in np.flatnonzero(self.tasks == 0))
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())
        return path


def per_class(found: Evaluation, names: Sequence[str]) -> PerClass:
    """Every query of every task counts once: its true class against the class that the adapted network named.

    A network can only name a class of the task at hand, so a character's recall is that of an N-way task, averaged over
    the company in which it was met.

    Raises:
        DataError: where scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import precision_recall_fscore_support
    except ImportError as error:
        raise DataError('recall and F1 need scikit-learn: pip install "mtml-kernels[train]"') from error
    tasks = np.bincount(found.drawn.ravel(), minlength=len(names))
    seen = np.flatnonzero(tasks)
    true, named = found.true.ravel(), found.named.ravel()
    recall, f1 = np.full(len(names), np.nan), np.full(len(names), np.nan)
    options = {"labels": seen, "zero_division": 0.0}
    _, recall[seen], f1[seen], _ = precision_recall_fscore_support(true, named, **options)
    _, macro_recall, macro_f1, _ = precision_recall_fscore_support(true, named, average="macro", **options)
    return PerClass(tuple(names), tasks, recall, f1, float(macro_recall), float(macro_f1))
