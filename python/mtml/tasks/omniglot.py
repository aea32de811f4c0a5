"""Omniglot as few-shot tasks: the published split, rotations as classes, and a stream of meta-batches."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtml.tasks.errors import DataError
from mtml.tasks.image_episodes import ImageEpisodes
from mtml.tasks.omniglot_source import PARTS, Characters, read_omniglot

__all__ = ["SPLITS", "Omniglot", "OmniglotSplit", "rotations", "split_omniglot"]

SPLITS = ("maml", "background")
CHARACTERS, TRAIN_CHARACTERS = 1623, 1200
STREAMS = {"train": 0, "validation": 1, "test": 2}


class OmniglotSplit(NamedTuple):
    """uint8 [classes, drawings, pixels] each; no character is in two of them. Names of the classes tested on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    test_names: tuple[str, ...] = ()
    validation_names: tuple[str, ...] = ()


def rotations(images: np.ndarray) -> np.ndarray:
    """[C, D, F] -> [4 C, D, F]: every class turned by 0, 90, 180 and 270 degrees, each angle a class of its own."""
    side = round(images.shape[2] ** 0.5)
    square = images.reshape(*images.shape[:2], side, side)
    turned = np.stack([np.rot90(square, turn, axes=(2, 3)) for turn in range(4)], axis=1)  # [C, 4, D, side, side]
    return np.ascontiguousarray(turned).reshape(-1, *images.shape[1:])


def split_omniglot(
    path: str | Path,
    *,
    split: str = "maml",
    seed: int = 0,
    validation: int = 0,
    rotate: bool = True,
    cache: Path | None = None,
) -> OmniglotSplit:
    """The drawings below `path`, divided by characters into those to train and those to test on.

    "maml", the split of the MAML paper: 1200 characters to train, the other 423 to test. Characters of both files are
    sorted by name and shuffled with `seed`, without regard to their alphabets; the first 1200 (with other numbers of
    characters: the same share) train. "background", that of the data's authors: the 964 characters of
    images_background train, the 659 of images_evaluation test; no alphabet is in both, which makes it harder.

    `validation` characters are taken out of the training ones, as the MAML paper's code does with 100, so that settings
    can be chosen without looking at the test. With `rotate` every training character also counts as three more classes,
    turned by 90, 180 and 270 degrees.

    Raises:
        DataError: as `read_omniglot`, where `validation` leaves nothing to train on, and where the split "background"
            finds only one of the two parts.
        ValueError: where `split` has another name.

    Paper: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", 2015.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
    training, testing = (_maml if split == "maml" else _background)(path, seed, cache)
    held = len(training.names) - validation
    if not (validation >= 0 and held > 0):
        count = len(training.names)
        raise DataError(f"validation: expected 0..{count - 1} of the {count} training characters, got {validation}")
    kept = training.images[:held]
    return OmniglotSplit(
        rotations(kept) if rotate else kept,
        training.images[held:],
        testing.images,
        tuple(testing.names),
        tuple(training.names[held:]),
    )


def _maml(path: str | Path, seed: int, cache: Path | None) -> tuple[Characters, Characters]:
    """All characters shuffled, the first 1200 to train."""
    characters = read_omniglot(path, cache=cache)
    total = len(characters.names)
    training = TRAIN_CHARACTERS if total == CHARACTERS else round(total * TRAIN_CHARACTERS / CHARACTERS)
    shuffled = _shuffled(characters, seed)
    return (
        Characters(shuffled.images[:training], shuffled.names[:training]),
        Characters(shuffled.images[training:], shuffled.names[training:]),
    )


def _background(path: str | Path, seed: int, cache: Path | None) -> tuple[Characters, Characters]:
    """Each part by itself; shuffled, so that validation characters come from all alphabets."""
    training, testing = (read_omniglot(path, part=part, cache=cache) for part in PARTS)
    drawings = min(training.images.shape[1], testing.images.shape[1])
    training, testing = (part._replace(images=part.images[:, :drawings]) for part in (training, testing))
    return _shuffled(training, seed), testing


def _shuffled(characters: Characters, seed: int) -> Characters:
    order = np.random.default_rng(seed).permutation(len(characters.names))
    return Characters(characters.images[order], [characters.names[i] for i in order])


class Omniglot(ImageEpisodes):
    """An endless, seeded stream of Omniglot tasks: sx [T, N*K, 784], sy [T, N*K], qx, qy alike; ink = 1, paper = 0.

    Args:
        path: a folder with images_background/ and images_evaluation/ or their zip files, or alphabet/character/*.png.
        ways, shots, queries, tasks, seed: as for `ImageEpisodes`; the seed draws tasks, not the split.
        split: "train" (1200 characters x 4 rotations), "validation" or "test" (423 characters).
        validation: characters kept out of the training ones.

    Raises:
        DataError: where data are missing, broken, or too few for the tasks asked.
        ValueError: where a count is not a positive int or the split has another name.
    """

    def __init__(
        self,
        path: str | Path,
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        tasks: int = 32,
        seed: int = 0,
        *,
        split: str = "train",
        validation: int = 0,
        cache: Path | None = None,
    ) -> None:
        if split not in STREAMS:
            raise ValueError(f"split: expected one of {', '.join(STREAMS)}; got {split!r}")
        images = getattr(split_omniglot(path, validation=validation, cache=cache), split)
        super().__init__(images, ways, shots, queries, tasks, seed, stream=STREAMS[split], source=f"{path} ({split})")
