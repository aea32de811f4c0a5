"""The Omniglot loader, on a small set of drawings in the standard layout that the tests make themselves."""

import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from cases.omniglot_files import ALPHABETS, CHARACTERS, DRAWINGS, drawing, make_omniglot, zip_parts
from PIL import Image

from mtml.tasks import DataError, ImageEpisodes, Omniglot
from mtml.tasks.digits import load_digits
from mtml.tasks.omniglot import rotations, split_omniglot
from mtml.tasks.omniglot_source import read_omniglot


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_omniglot(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestReading:
    def test_folder(self, folder):
        images, names = read_omniglot(folder)
        assert images.shape == (CHARACTERS, DRAWINGS, 784) and images.dtype == np.uint8
        assert names[0] == "Aleph/character01" and names == sorted(names)

    def test_ink_is_bright_and_the_picture_upright(self, folder):
        images, names = read_omniglot(folder)
        first = images[names.index("Aleph/character01"), 0].reshape(28, 28)
        assert first.max() > 200 and first[:, 20:].max() < 20
        assert first[4:14, 2:4].mean() > 100  # the vertical stroke, upper left
        assert first[23:25, 4:12].mean() > 100  # the horizontal one, below

    def test_grey_levels_survive_the_reduction(self, folder):
        values = np.unique(read_omniglot(folder).images)
        assert len(values) > 10  # nearest-pixel scaling of one-bit drawings would leave two

    @pytest.mark.parametrize("layout", ["zips", "mixed", "below torchvision's folder", "flat", "one zip", "one part"])
    def test_other_layouts_give_the_same(self, folder, tmp_path, layout):
        expected = read_omniglot(folder)
        parts = list(ALPHABETS)
        if layout == "zips":
            source = zip_parts(folder, tmp_path / "zips")
        elif layout == "mixed":
            source = zip_parts(folder, tmp_path / "zips")
            (source / f"{parts[0]}.zip").unlink()
            shutil.copytree(folder / parts[0], source / parts[0])
        elif layout == "below torchvision's folder":
            source = tmp_path / "torchvision"
            shutil.copytree(folder, source / "omniglot-py")
        elif layout == "flat":
            source = tmp_path / "flat"
            for part in parts:
                shutil.copytree(folder / part, source, dirs_exist_ok=True)
        else:
            one = zip_parts(folder, tmp_path / "zips") / f"{parts[0]}.zip"
            source = one if layout == "one zip" else folder / parts[0]
            expected = expected._replace(images=expected.images[:13], names=expected.names[:13])
        found = read_omniglot(source)
        assert found.names == expected.names
        assert np.array_equal(found.images, expected.images)

    def test_fewer_drawings_of_one_character(self, copy, caplog):
        next((copy / "images_background/Beth/character03").iterdir()).unlink()
        with caplog.at_level(logging.WARNING, "mtml"):
            assert read_omniglot(copy).images.shape[1] == DRAWINGS - 1
        assert "Beth/character03 has only 5 drawings" in caplog.text


class TestCache:
    def test_second_call_decodes_nothing(self, folder, cache, monkeypatch):
        first = read_omniglot(folder)
        assert len(list(cache.glob("*.npz"))) == 1 and not list(cache.glob(".*"))
        monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        assert np.array_equal(read_omniglot(folder).images, first.images)

    def test_changed_source_is_decoded_again(self, copy):
        before = read_omniglot(copy)
        file = next((copy / "images_background/Beth/character01").iterdir())
        drawing(20, 0).save(file)
        os.utime(file, ns=(1, 1))
        assert not np.array_equal(read_omniglot(copy).images, before.images)

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file"])
    def test_broken_cache_is_replaced(self, folder, cache, damage, caplog):
        first = read_omniglot(folder)
        stored = next(cache.glob("*.npz"))
        stored.write_bytes(damage)
        assert np.array_equal(read_omniglot(folder).images, first.images)
        assert "decoding the drawings again" in caplog.text
        assert stored.stat().st_size > 100

    def test_works_without_a_place_for_it(self, folder, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MTML_CACHE", str(tmp_path / "file" / "below"))
        assert len(read_omniglot(folder).images) == CHARACTERS
        assert "cannot cache" in caplog.text


class TestErrors:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere does not exist; expected a folder with images_background"):
            read_omniglot(tmp_path / "nowhere")

    def test_folder_without_drawings(self, tmp_path):
        with pytest.raises(DataError, match="no drawings in"):
            read_omniglot(tmp_path)

    def test_empty_part(self, tmp_path):
        (tmp_path / "images_background").mkdir()
        with pytest.raises(DataError, match="no drawings in"):
            read_omniglot(tmp_path)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_truncated_zip(self, folder, tmp_path, share):
        zips = zip_parts(folder, tmp_path / "zips")
        whole = (zips / "images_evaluation.zip").read_bytes()
        (zips / "images_evaluation.zip").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"images_evaluation.zip is not a whole zip file .* download it again"):
            read_omniglot(zips)

    def test_damage_inside_a_zip(self, folder, tmp_path):
        zips = zip_parts(folder, tmp_path / "zips")
        data = bytearray((zips / "images_background.zip").read_bytes())
        place = data.find(b"IDAT", len(data) // 3)
        data[place + 8 : place + 16] = bytes(8)
        (zips / "images_background.zip").write_bytes(bytes(data))
        with pytest.raises(DataError, match=r"images_background.zip"):
            read_omniglot(zips)

    def test_truncated_drawing(self, copy):
        file = next((copy / "images_evaluation/Gimel/character02").iterdir())
        file.write_bytes(file.read_bytes()[:60])
        with pytest.raises(DataError, match=r"Gimel/character02/.* is not a whole picture"):
            read_omniglot(copy)

    def test_something_else_named_png(self, copy):
        next((copy / "images_evaluation/Gimel/character02").iterdir()).write_text("hello")
        with pytest.raises(DataError, match="is not a whole picture"):
            read_omniglot(copy)

    def test_too_few_classes_or_drawings(self, folder):
        with pytest.raises(DataError, match=r"\(test\): 6 ways need 6 classes, but there are 5"):
            Omniglot(folder, ways=6, split="test")
        with pytest.raises(DataError, match=r"5 shots \+ 2 queries need 7 drawings of every class, but there are 6"):
            Omniglot(folder, shots=5, queries=2)

    def test_unknown_split(self, folder):
        with pytest.raises(ValueError, match="split: expected one of train, validation, test"):
            Omniglot(folder, split="exam")


class TestSplit:
    def test_published_proportion_rotations_and_no_overlap(self, folder):
        split = split_omniglot(folder)
        assert split.train.shape == (13 * 4, DRAWINGS, 784)
        assert len(split.test) == 5 and len(split.validation) == 0
        seen = {image.tobytes() for image in split.train.reshape(-1, 784)}
        assert not any(image.tobytes() in seen for image in split.test.reshape(-1, 784))

    def test_validation_comes_out_of_training(self, folder):
        split, with_validation = split_omniglot(folder), split_omniglot(folder, validation=3)
        assert len(with_validation.train) == 10 * 4 and len(with_validation.validation) == 3
        assert np.array_equal(split.test, with_validation.test)
        with pytest.raises(DataError, match="validation"):
            split_omniglot(folder, validation=13)

    def test_seed_decides(self, folder):
        assert np.array_equal(split_omniglot(folder).test, split_omniglot(folder).test)
        assert not np.array_equal(split_omniglot(folder).test, split_omniglot(folder, seed=1).test)

    def test_background_split_is_by_part(self, folder, tmp_path):
        for source in (folder, zip_parts(folder, tmp_path / "zips")):
            split = split_omniglot(source, split="background", validation=3)
            assert split.train.shape == (10 * 4, DRAWINGS, 784) and len(split.validation) == 3
            assert split.test_names == tuple(f"Gimel/character{i:02d}" for i in range(1, 6))
            assert not any(name.startswith("Gimel") for name in split.validation_names)
            assert np.array_equal(split.test, read_omniglot(folder).images[13:])

    def test_names_are_those_of_the_images(self, folder):
        split, (images, names) = split_omniglot(folder, validation=2), read_omniglot(folder)
        for got, called in ((split.test, split.test_names), (split.validation, split.validation_names)):
            assert np.array_equal(got, images[[names.index(name) for name in called]])

    def test_background_split_needs_both_parts(self, folder, copy):
        with pytest.raises(DataError, match=r"images_evaluation .*found only images_background; the split 'maml'"):
            split_omniglot(folder / "images_background", split="background")
        shutil.rmtree(copy / "images_evaluation")
        with pytest.raises(DataError, match="found only images_background"):
            split_omniglot(copy, split="background")
        with pytest.raises(ValueError, match="split: expected one of maml, background; got 'lake'"):
            split_omniglot(folder, split="lake")

    def test_rotations(self):
        square = np.arange(4, dtype=np.uint8).reshape(1, 1, 4)
        turned = rotations(square).reshape(4, 2, 2).tolist()
        assert turned == [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]

    def test_stream(self, folder):
        batch = next(Omniglot(folder, ways=5, shots=1, queries=2, tasks=3))
        assert batch.sx.shape == (3, 5, 784) and batch.qx.shape == (3, 10, 784)
        assert batch.sx.max() > 0.8 and batch.sx.min() == 0


class TestEpisodes:
    IMAGES = (np.arange(9)[:, None, None] * 20 + np.arange(4)[None, :, None] + np.zeros(16)).astype(np.uint8)

    def test_classes_are_those_of_the_batch(self):
        episodes = ImageEpisodes(self.IMAGES, ways=3, shots=1, queries=2, tasks=50, seed=1)
        for index in (0, 7):
            batch, classes = episodes.batch(index), episodes.classes(index)
            assert classes.shape == (50, 3) and len({tuple(row) for row in classes}) > 20
            pixels = (batch.qx[..., 0] * 255).round().int().numpy()
            assert np.array_equal(pixels // 20, np.take_along_axis(classes, batch.qy.numpy(), 1))

    def test_shape(self):
        rows, images = (ImageEpisodes(self.IMAGES, 3, shape=shape) for shape in (None, (1, 4, 4)))
        assert images.batch(2).qx.shape == (32, 3, 1, 4, 4)
        assert np.array_equal(images.batch(2).sx.flatten(2), rows.batch(2).sx)
        with pytest.raises(ValueError, match=r"shape: expected the 16 pixels of an image, got \(1, 5, 5\)"):
            ImageEpisodes(self.IMAGES, 3, shape=(1, 5, 5))


def test_digits_are_divided_by_drawing():
    pytest.importorskip("sklearn")
    split = load_digits()
    assert split.train.shape == (10, 130, 64) and split.test.shape == (10, 44, 64)
    assert split.train.max() == 255


def test_in_memory_png_is_one_bit():
    """The drawings made here are stored like Omniglot's own."""
    file = io.BytesIO()
    drawing(0, 0).save(file, "png")
    assert Image.open(file).mode == "1"
