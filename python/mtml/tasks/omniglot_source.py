"""Reads Omniglot's standard layout, alphabet/character/drawing.png, from folders or zip files, and caches it."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtml.tasks.errors import DataError
from mtml.tasks.files import atomic_write, cache_folder
from mtml.tasks.seal import sealed, unsealed

__all__ = ["PARTS", "Characters", "read_omniglot"]

log = logging.getLogger("mtml")
PARTS = ("images_background", "images_evaluation")
CACHE = "omniglot"  # what its seal says
FORMAT = 2  # of the cache and part of its key: raise it when what is stored changes
LAYOUT = (
    "expected a folder with images_background/ and images_evaluation/ (or their .zip files, not unpacked), one of the "
    "two, or a folder alphabet/character/drawing.png"
)


class Characters(NamedTuple):
    """Every character in order of its name "alphabet/character": images uint8 [C, D, side * side] with ink = 255."""

    images: np.ndarray
    names: list[str]


class _Drawing(NamedTuple):
    character: str  # "alphabet/character"
    name: str
    read: Callable[[], bytes]


def read_omniglot(
    path: str | Path, *, side: int = 28, part: str | None = None, cache: Path | None = None
) -> Characters:
    """All drawings below `path`, or those of one `part` of `PARTS`, scaled to side x side, ink bright on dark.

    The 105x105 one-bit drawings are made grey first and then reduced with Pillow's LANCZOS filter, which averages over
    the pixels that fall together (for one-bit images Pillow silently takes the nearest one, which tears thin strokes).
    The decoded array is kept in `cache` (default: the user's cache folder) under a key made of the source's names,
    sizes and times; a second call takes milliseconds.

    Raises:
        DataError: where the folder is missing or has another layout, a zip or a drawing is broken, Pillow is missing.
    """
    sources = _sources(Path(path))
    if part is not None:
        sources = _of_part(sources, part)
    key = hashlib.sha256(repr((FORMAT, side, [_fingerprint(s) for s in sources])).encode()).hexdigest()[:16]
    stored = (cache or cache_folder()) / f"omniglot-{side}-{key}.npz"
    if (found := _load_cache(stored, side)) is not None:
        return found
    characters = _decode(sources, side)
    memory = io.BytesIO()
    np.savez_compressed(memory, images=characters.images, names=np.array(characters.names))
    try:
        with atomic_write(stored) as file:
            file.write(sealed(memory.getvalue(), CACHE, FORMAT))
    except OSError as error:  # a read-only home is no reason not to train
        log.warning("cannot cache the decoded drawings at %s: %s", stored, error)
    return characters


def _sources(path: Path) -> list[Path]:
    """The folders and zip files to read."""
    if not path.exists():
        raise DataError(f"data: {path} does not exist; {LAYOUT}")
    if path.is_file():
        return [path]
    roots = [path, path / "omniglot-py"]  # the second is how torchvision lays it down
    for root in roots:
        found = [next((p for p in (root / n, root / f"{n}.zip") if p.exists()), None) for n in PARTS]
        if any(found):
            return [p for p in found if p is not None]
    if next(path.glob("*/*/*.png"), None) is not None:
        return [path]
    raise DataError(f"data: no drawings in {path}; {LAYOUT}")


def _of_part(sources: list[Path], part: str) -> list[Path]:
    """Those of the sources that are this part."""
    if found := [source for source in sources if source.name in (part, f"{part}.zip")]:
        return found
    raise DataError(
        f"data: expected a folder that holds {' and '.join(PARTS)} (folders or .zip files), found only "
        f"{', '.join(source.name for source in sources)}; the split 'maml' takes any layout"
    )


def _fingerprint(source: Path) -> tuple[object, ...]:
    """What changes when the source does, cheap to find out."""
    if source.is_file():
        stat = source.stat()
        return source.name, stat.st_size, stat.st_mtime_ns
    drawings = sorted(source.glob("*/*/*.png"))
    return source.name, [(str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns) for p in drawings]


def _load_cache(stored: Path, side: int) -> Characters | None:
    """What is cached; None where there is nothing, or anything but what was written."""
    try:
        content = unsealed(stored.read_bytes(), CACHE, FORMAT)
        with np.load(io.BytesIO(content)) as data:
            return _checked(data["images"], data["names"], side)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds
        why = " ".join(str(error).split())
        log.warning("the cache %s cannot be used (%s); decoding the drawings again", stored, why)
        return None


def _checked(images: np.ndarray, names: np.ndarray, side: int) -> Characters:
    """The arrays of a cache, if they are what `_decode` makes: one that another program made may have any content."""
    found = Characters(images, names.tolist())
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape or images.shape[2] != side * side:
        raise ValueError(
            f"expected uint8 [characters, drawings, {side * side}], got {images.dtype} {list(images.shape)}"
        )
    if names.dtype.kind != "U" or names.shape != images.shape[:1]:
        raise ValueError(f"expected {len(images)} names, got {names.dtype} {list(names.shape)}")
    if found.names != sorted(set(found.names)):
        raise ValueError("expected sorted names, each once")
    return found


def _drawings(source: Path) -> Iterator[_Drawing]:
    """Every drawing of one source, unread."""
    if source.is_dir():
        for file in source.glob("*/*/*.png"):
            yield _Drawing(f"{file.parent.parent.name}/{file.parent.name}", file.name, file.read_bytes)
        return
    with zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            parts = entry.filename.split("/")
            if entry.filename.endswith(".png") and len(parts) >= 3 and "__MACOSX" not in parts:
                yield _Drawing("/".join(parts[-3:-1]), parts[-1], partial(archive.read, entry))
            elif not entry.is_dir():
                archive.read(entry)  # raises where it is a drawing whose name is damaged


def _decode(sources: list[Path], side: int) -> Characters:
    """Read, scale and sort everything."""
    by_character: dict[str, list[tuple[str, np.ndarray]]] = {}
    for source in sources:
        try:
            for drawing in _drawings(source):
                pixels = _pixels(drawing, side, source)
                by_character.setdefault(drawing.character, []).append((drawing.name, pixels))
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"data: {source} cannot be read: {error}; check the disk, or download it again") from error
        except Exception as error:  # of zipfile and zlib, which raise a dozen kinds
            why = " ".join(str(error).split())
            raise DataError(
                f"data: {source} is not a whole zip file ({why}); it was probably cut short: download it again"
            ) from error
    if not by_character:
        raise DataError(f"data: no drawings in {', '.join(map(str, sources))}; {LAYOUT}")
    names = sorted(by_character)
    fewest = min(len(drawings) for drawings in by_character.values())
    if fewest < max(len(drawings) for drawings in by_character.values()):
        short = next(name for name in names if len(by_character[name]) == fewest)
        log.warning("%s has only %d drawings: as many are used of every character", short, fewest)
    stacked = [np.stack([pixels for _, pixels in sorted(by_character[n], key=lambda d: d[0])[:fewest]]) for n in names]
    return Characters(np.stack(stacked), names)


def _pixels(drawing: _Drawing, side: int, source: Path) -> np.ndarray:
    """One drawing as uint8 [side * side], ink = 255."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('reading drawings needs Pillow: pip install "mtml-kernels[train]"') from error
    data = drawing.read()
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow's readers raise what they meet
        where, why = f"{drawing.character}/{drawing.name} in {source}", " ".join(str(error).split())
        raise DataError(f"data: {where} is not a whole picture ({why}); unpack or download it again") from error
    return 255 - np.asarray(grey, dtype=np.uint8).reshape(-1)
