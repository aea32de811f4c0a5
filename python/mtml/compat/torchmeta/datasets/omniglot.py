"""Omniglot (Lake, Salakhutdinov, Tenenbaum, 2015) from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtml.compat.torchmeta.utils.data.dataset import ClassDataset, CombinationMetaDataset
from mtml.compat.torchmeta.utils.data.task import Dataset, Transform
from mtml.tasks import DataError
from mtml.tasks.omniglot_source import PARTS, read_omniglot

__all__ = ["Omniglot", "OmniglotClassDataset"]

PART = dict(zip(("train", "test"), PARTS, strict=True))


class Omniglot(CombinationMetaDataset):
    """Tasks of `num_classes_per_task` characters; an image is [1, 28, 28] with ink = 1, scaled once for all.

    Args:
        root: the folder that has images_background/ and images_evaluation/ (or their zip files), or has them in
            omniglot/.
        meta_train, meta_val, meta_test, meta_split, class_augmentations: as of `ClassDataset`.
        use_vinyals_split: the split of Vinyals et al., 1028, 172 and 423 characters, by the files that the original
            leaves in the folder, vinyals_{train,val,test}_labels.json: lists of [part, alphabet, character]. Otherwise
            "train" is images_background and "test" images_evaluation.
        transform: of an image, a PIL image [28, 28], in place of making it a tensor.
        download: must be False.

    Raises:
        DataError: no such files, or `download`.
        ValueError: "val" without the split of Vinyals et al.
    """

    def __init__(
        self,
        root: str,
        num_classes_per_task: int | None = None,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        use_vinyals_split: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Any = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        if num_classes_per_task is None:
            raise TypeError("num_classes_per_task: expected an int, got None")
        split: dict[str, Any] = {"meta_train": meta_train, "meta_val": meta_val, "meta_test": meta_test}
        dataset = OmniglotClassDataset(
            root,
            **split,
            meta_split=meta_split,
            use_vinyals_split=use_vinyals_split,
            transform=transform,
            class_augmentations=class_augmentations,
            download=download,
        )
        super().__init__(dataset, num_classes_per_task, target_transform, dataset_transform)


class OmniglotClassDataset(ClassDataset):
    """The characters of `Omniglot`, by its arguments: `labels`; `data` {name: uint8 [drawings, 28, 28], ink = 255}."""

    def __init__(
        self,
        root: str,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        use_vinyals_split: bool = True,
        transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(meta_train, meta_val, meta_test, meta_split, class_augmentations)
        if self.meta_val and not use_vinyals_split:
            raise ValueError(
                "use_vinyals_split: expected True for the part 'val', which only that split has; got False"
            )
        folder = Path(root).expanduser()
        folder = folder / "omniglot" if (folder / "omniglot").is_dir() else folder
        if download:
            raise DataError(
                f"download: expected False, nothing is downloaded here. Put images_background.zip and "
                f"images_evaluation.zip of https://github.com/brendenlake/omniglot (python/) into {folder}"
            )
        self.root, self.transform, self.use_vinyals_split = folder, transform, use_vinyals_split
        self.data: dict[str, np.ndarray] = {}
        for part in PARTS if use_vinyals_split else [PART[self.meta_split]]:
            characters = read_omniglot(folder, part=part)
            images = characters.images.reshape(*characters.images.shape[:2], 28, 28)
            self.data |= {f"{part}/{name}": drawings for name, drawings in zip(characters.names, images, strict=True)}
        self.labels = self._vinyals() if use_vinyals_split else [name.split("/") for name in self.data]

    def _vinyals(self) -> list[list[str]]:
        """[part, alphabet, character] of the split's characters."""
        path = self.root / f"vinyals_{self.meta_split}_labels.json"
        if not path.is_file():
            raise DataError(
                f"use_vinyals_split: expected {path}, a list of [part, alphabet, character] that the original's "
                "download leaves there; pass use_vinyals_split=False for the split of the data's authors, or take "
                "mtml.tasks.Omniglot for the MAML paper's"
            )
        labels: list[list[str]] = json.loads(path.read_text())
        if absent := [label for label in labels if "/".join(label) not in self.data]:
            raise DataError(f"{path}: expected characters that are in {self.root}, got {'/'.join(absent[0])}")
        return labels

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> _Drawings:
        name = "/".join(self.labels[index % self.num_classes])
        transform = self.get_transform(index, self.transform or _tensor)
        return _Drawings(index, self.data[name], name, transform, self.get_target_transform(index))


class _Drawings(Dataset):
    def __init__(
        self, index: int, data: np.ndarray, name: str, transform: Transform | None, target_transform: Transform | None
    ) -> None:
        super().__init__(index, transform, target_transform)
        self.data, self.character_name = data, name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        image: Any = Image.fromarray(self.data[index])
        target: Any = self.character_name
        return (
            image if self.transform is None else self.transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )


def _tensor(image: Any) -> Tensor:
    """[1, 28, 28] in 0..1, as torchvision's ToTensor makes it."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).unsqueeze(0)
