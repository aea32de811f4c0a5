"""Omniglot (Lake, Salakhutdinov, Tenenbaum, 2015), all 1623 characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mtml.tasks import DataError
from mtml.tasks.omniglot_source import PARTS, read_omniglot

__all__ = ["FullOmniglot"]


class FullOmniglot(Dataset[Any]):
    """Images of characters and their numbers: those of images_background first, then those of images_evaluation.

    Characters are sorted by alphabet and name. An image is a PIL image, black ink on white paper, scaled to
    `side` x `side` once for all (the files have 105 x 105).

    Args:
        root: the folder that has images_background/ and images_evaluation/ (or their zip files), or has them in
            omniglot-py/, where torchvision puts them.
        transform, target_transform: of images and of numbers.
        download: nothing is downloaded: where the files are absent, the error says where they come from.

    Raises:
        DataError: no such files, broken files, or no Pillow to read them.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        download: bool = False,
        *,
        side: int = 28,
    ) -> None:
        self.root, self.transform, self.target_transform = Path(root).expanduser(), transform, target_transform
        inner = self.root / "omniglot-py"
        folder = inner if inner.is_dir() else self.root
        try:
            parts = [read_omniglot(folder, side=side, part=part).images for part in PARTS]
        except DataError as error:
            if not download:
                raise
            raise DataError(
                f"{error}. download=True: nothing is downloaded here; put images_background.zip and "
                f"images_evaluation.zip of https://github.com/brendenlake/omniglot (python/) into {self.root}"
            ) from error
        drawings = [part.reshape(-1, side, side) for part in parts]
        self.images = np.concatenate(drawings)  # uint8 [characters * drawings, side, side], ink = 255
        starts = np.cumsum([0, *(len(part) for part in parts)])
        numbers = [np.arange(len(part)) + start for part, start in zip(parts, starts, strict=False)]
        repeated = [n.repeat(part.shape[1]) for n, part in zip(numbers, parts, strict=True)]
        self.targets: list[int] = np.concatenate(repeated).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        from PIL import Image

        image: Any = Image.fromarray(255 - self.images[item])
        return (image if self.transform is None else self.transform(image)), self._target(self.targets[item])

    def _target(self, number: int) -> Any:
        return number if self.target_transform is None else self.target_transform(number)

    def sample_labels(self) -> list[Any]:
        """The label of every sample, without reading its image."""
        return [self._target(number) for number in self.targets]
