"""A small Omniglot in the standard layout, as folders and as zip files."""

import zipfile
from pathlib import Path

from PIL import Image, ImageDraw

ALPHABETS = {"images_background": (("Aleph", 7), ("Beth", 6)), "images_evaluation": (("Gimel", 5),)}
DRAWINGS, CHARACTERS = 6, 18


def drawing(character: int, number: int) -> Image.Image:
    """A 105x105 one-bit drawing: black strokes, whose place tells the character, on white."""
    image = Image.new("1", (105, 105), 1)
    pen = ImageDraw.Draw(image)
    pen.line((10 + 4 * character, 8, 10 + 4 * character, 60), fill=0, width=4)
    pen.line((10, 90 - number, 50, 90 - number), fill=0, width=4)
    return image


def make_omniglot(root: Path) -> Path:
    character = 0
    for part, alphabets in ALPHABETS.items():
        for alphabet, count in alphabets:
            for index in range(count):
                folder = root / part / alphabet / f"character{index + 1:02d}"
                folder.mkdir(parents=True)
                for number in range(DRAWINGS):
                    drawing(character, number).save(folder / f"{character:04d}_{number + 1:02d}.png")
                character += 1
    return root


def zip_parts(root: Path, target: Path) -> Path:
    """The two parts as zip files, with entries for folders and the files that some tools add."""
    target.mkdir(exist_ok=True)
    for part in ALPHABETS:
        with zipfile.ZipFile(target / f"{part}.zip", "w") as archive:
            archive.writestr(f"{part}/", "")
            archive.writestr(f"__MACOSX/{part}/Aleph/character01/._0001_01.png", "not a picture")
            for file in sorted((root / part).rglob("*.png"), reverse=True):
                archive.write(file, str(file.relative_to(root)))
    return target
