"""A vectorised N-way K-shot sampler over images that are held as one array of bytes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtml.tasks.errors import DataError
from mtml.tasks.stream import TaskStream, check_counts, entropy
from mtml.tasks.task_batch import TaskBatch

__all__ = ["ImageEpisodes", "distinct"]


def distinct(rng: np.random.Generator, rows: int, count: int, total: int) -> np.ndarray:
    """`rows` independent uniform draws of `count` distinct ids below `total`: [rows, count], without a Python loop."""
    if total <= 4 * count:
        return rng.random((rows, total), dtype=np.float32).argsort(axis=1)[:, :count]
    drawn = rng.integers(total, size=(rows, count))
    while True:  # drawing a whole row again where it repeats an id leaves the rest uniform over distinct rows
        ordered = np.sort(drawn, axis=1)
        repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(repeated):
            return drawn
        drawn[repeated] = rng.integers(total, size=(len(repeated), count))


def _windows(images: np.ndarray, shift: int) -> np.ndarray:
    """Every image at every shift as views of the padded images: [C * D, 2 shift + 1, 2 shift + 1, side, side]."""
    side = math.isqrt(images.shape[2])
    if side * side != images.shape[2] or shift < 0:
        raise ValueError(f"shift: expected 0 or more, and square images for more than 0; got {shift}, {images.shape}")
    padded = np.pad(images.reshape(-1, side, side), ((0, 0), (shift, shift), (shift, shift)))
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))


class ImageEpisodes(TaskStream):
    """An endless, seeded stream of classification tasks: sx [T, N*K, F], sy [T, N*K], qx [T, N*queries, F], qy.

    Every task has N distinct classes of the array and, of each, K + queries distinct drawings. Samples are sorted by
    class and classes numbered 0..N-1. Pixels become float32 in [0, 1]. Batch i depends on (seed, stream, i) alone.

    Args:
        images: uint8 [classes, drawings, F]; 255 becomes 1.
        ways: N, classes per task.
        shots: K, support samples per class.
        queries: query samples per class.
        tasks: T, tasks per meta-batch.
        seed: of all randomness.
        shift: move every sample by up to so many pixels each way, at random (square images; what is empty stays 0).
        stream: number of the independent stream under this seed.
        shape: of one sample, where a network takes images, as (1, 28, 28); None: F pixels in a row.
        source: what the images are, for error messages.

    Raises:
        DataError: where the array has too few classes or drawings for the tasks asked.
        ValueError: where a count is not a positive int, `shift` is asked of images that are not square, or `shape` has
            another number of pixels than they have.

    Example:
        >>> import numpy as np
        >>> from mtml.tasks import ImageEpisodes
        >>> images = np.zeros((8, 20, 784), np.uint8)
        >>> batch = next(ImageEpisodes(images, ways=5, shots=1, queries=3, tasks=2))
        >>> tuple(batch.sx.shape), tuple(batch.qx.shape), batch.sy[0].tolist()
        ((2, 5, 784), (2, 15, 784), [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        images: np.ndarray,
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        tasks: int = 32,
        seed: int = 0,
        *,
        shift: int = 0,
        stream: int = 0,
        shape: tuple[int, ...] | None = None,
        source: str = "images",
    ) -> None:
        check_counts(ways=ways, shots=shots, queries=queries, tasks=tasks)
        if shape is not None and math.prod(shape) != images.shape[2]:
            raise ValueError(f"shape: expected the {images.shape[2]} pixels of an image, got {shape}; None keeps a row")
        classes, drawings = images.shape[:2]
        if classes < ways:
            raise DataError(f"{source}: {ways} ways need {ways} classes, but there are {classes}. Ask for fewer ways.")
        if drawings < shots + queries:
            raise DataError(
                f"{source}: {shots} shots + {queries} queries need {shots + queries} drawings of every class, "
                f"but there are {drawings}. Ask for fewer shots or queries."
            )
        self.images = np.ascontiguousarray(images)
        self._windows = _windows(images, shift) if shift else None  # [classes * drawings, dy, dx, side, side], a view
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.seed, self.stream = seed, stream
        self.shape = (images.shape[2],) if shape is None else tuple(shape)

    def classes(self, index: int) -> np.ndarray:
        """Which class of `images` each way of each task of batch `index` is: int64 [T, N]."""
        return self._draw_classes(self._generator(index))

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng(entropy(self.seed, self.stream, index))

    def _draw_classes(self, rng: np.random.Generator) -> np.ndarray:
        """The first thing drawn for a batch, so that it can be drawn again without the rest."""
        return distinct(rng, self.tasks, self.ways, len(self.images))

    def batch(self, index: int) -> TaskBatch:
        """Meta-batch number `index`."""
        rng = self._generator(index)
        drawings = self.images.shape[1]
        classes = self._draw_classes(rng)  # [T, N]
        drawn = distinct(rng, self.tasks * self.ways, self.shots + self.queries, drawings)  # [T * N, K + queries]
        flat = classes.reshape(-1, 1) * drawings + drawn
        return TaskBatch(
            self._pixels(flat[:, : self.shots], rng),
            self._classes(self.shots),
            self._pixels(flat[:, self.shots :], rng),
            self._classes(self.queries),
        )

    def _pixels(self, flat: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Gather bytes first and make floats of them last: a quarter of the memory traffic. [T, N * n, *shape]"""
        size, rows = self.images.shape[2], flat.reshape(-1)
        if self._windows is None:
            gathered = self.images.reshape(-1, size)[rows]
        else:
            down, right = rng.integers(self._windows.shape[1], size=(2, len(rows)))
            gathered = self._windows[rows, down, right]
        scaled = np.multiply(gathered, np.float32(1 / 255), dtype=np.float32)
        return torch.from_numpy(scaled.reshape(self.tasks, -1, *self.shape))

    def _classes(self, count: int) -> Tensor:
        """[T, N * count]"""
        return torch.arange(self.ways).repeat_interleave(count).repeat(self.tasks, 1)
