"""Omniglot's tasks (Vinyals et al., 2016; Finn, Abbeel, Levine, 2017)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from mtml.compat.learn2learn.data import transforms
from mtml.compat.learn2learn.data.meta_dataset import FilteredMetaDataset, MetaDataset
from mtml.compat.learn2learn.vision.datasets.full_omniglot import FullOmniglot
from mtml.compat.learn2learn.vision.transforms import RandomClassRotation

__all__ = ["omniglot_tasksets"]

CHARACTERS, TRAIN, VALIDATION = 1623, 1100, 100
Part = tuple[MetaDataset, list[Any]]


def omniglot_tasksets(
    ways: tuple[int, int, int], samples: tuple[int, int, int], root: str | Path, device: Any = None
) -> list[Part]:
    """(data set, task transforms) to train, validate and test, each over its own characters.

    Args:
        ways, samples: of the three, as of `get_tasksets`.
        root, device: as of `get_tasksets`.
    """
    drawings = FullOmniglot(root)
    images = torch.from_numpy(drawings.images).to(device).float().div_(255).unsqueeze(1)
    dataset = MetaDataset(TensorDataset(images, torch.tensor(drawings.targets, device=device)))
    classes = list(dataset.labels)
    random.shuffle(classes)
    scale = len(classes) / CHARACTERS
    first, second = round(TRAIN * scale), round((TRAIN + VALIDATION) * scale)
    parts = classes[:first], classes[first:second], classes[second:]
    return [_part(dataset, labels, n, k) for labels, n, k in zip(parts, ways, samples, strict=True)]


def _part(dataset: MetaDataset, labels: list[int], ways: int, samples: int) -> Part:
    own = FilteredMetaDataset(dataset, labels)
    return own, [
        transforms.FusedNWaysKShots(own, n=ways, k=samples),
        transforms.LoadData(own),
        transforms.RemapLabels(own),
        transforms.ConsecutiveLabels(own),
        RandomClassRotation(own, [0.0, 90.0, 180.0, 270.0]),
    ]
