"""No damage to a file that a run reads again is believed, and no crash while one is written leaves anything behind.

The files are checkpoints, the cache of decoded drawings, and the temporary files of everything that is written.
"""

import fcntl
import io
import itertools
import multiprocessing
import os
import random
import re
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mtml.tasks import DataError
from mtml.tasks.files import atomic_write
from mtml.tasks.seal import sealed
from mtml.train.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from mtml.train.loop import Budget, Loop

CONFIG = {"experiment": "sinusoid", "shots": 5, "seed": 0}
FLIPS = 400


def state() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in (("weight", (20, 3)), ("bias", (20,)))}
    return {"model": tensors, "tasks": {"position": 17}, "progress": {"iteration": 17, "seconds": 0.25}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint.pt", state(), CONFIG)
    return tmp_path / "checkpoint.pt"


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def refusal(path: Path, config: dict[str, object] | None = None) -> str:
    with pytest.raises(DataError) as raised:
        load_checkpoint(path, CONFIG if config is None else config)
    text = str(raised.value)
    assert "\n" not in text and str(path) in text and re.search("start without --resume|name its folder", text), text
    return text


def flipped(data: bytes, count: int, seed: int = 0) -> list[bytes]:
    """`data` with one bit turned, at `count` places all over it, the first and the last hundred bytes among them."""
    draw = random.Random(seed)
    size = 8 * len(data)
    ends = [*range(0, 800, 8), *range(size - 800, size, 8)]
    chosen = draw.sample(ends, count // 4) + [draw.randrange(size) for _ in range(count - count // 4)]
    found = []
    for bit in chosen:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        found.append(bytes(changed))
    return found


class TestDamage:
    def test_every_flipped_bit_is_refused(self, checkpoint):
        whole = checkpoint.read_bytes()
        for changed in flipped(whole, FLIPS):
            checkpoint.write_bytes(changed)
            refusal(checkpoint)
        checkpoint.write_bytes(whole)
        assert equal(load_checkpoint(checkpoint, CONFIG), state())

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, "seal", "newline"])
    def test_every_truncation_is_refused(self, checkpoint, share):
        whole = checkpoint.read_bytes()
        keep = {"seal": whole.rindex(b"\nmtml "), "newline": len(whole) - 1}.get(share) or int(
            float(share) * len(whole)
        )
        checkpoint.write_bytes(whole[:keep])
        assert "it was cut short" in refusal(checkpoint)

    @pytest.mark.parametrize("extra", [b"\n", b"\0", b"x" * 1000])
    def test_what_is_appended_is_refused(self, checkpoint, extra):
        checkpoint.write_bytes(checkpoint.read_bytes() + extra)
        refusal(checkpoint)

    @pytest.mark.parametrize("damage", ["zeros", "halves exchanged", "other checkpoint's tail"])
    def test_larger_damage(self, checkpoint, damage):
        whole = checkpoint.read_bytes()
        half = len(whole) // 2
        if damage == "zeros":  # what some file systems leave after a power failure
            changed = whole[:half] + bytes(64) + whole[half + 64 :]
        elif damage == "halves exchanged":
            changed = whole[half:-150] + whole[:half] + whole[-150:]
        else:
            save_checkpoint(checkpoint, state() | {"tasks": {"position": 18}}, CONFIG)
            changed = whole[:half] + checkpoint.read_bytes()[half:]
        assert changed != whole
        checkpoint.write_bytes(changed)
        assert "is damaged" in refusal(checkpoint)


def _torch_file(content: object) -> bytes:
    memory = io.BytesIO()
    torch.save(content, memory)
    return memory.getvalue()


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"nonsense\n", "has no digest"),
    "another program's": (lambda: _torch_file({"state_dict": {}}), "has no digest"),
    "before digests": (lambda: _torch_file({"format": 1, "config": CONFIG, "state": state()}), "has no digest"),
    "newer": (lambda: sealed(b"...", "checkpoint", FORMAT + 1), f"format {FORMAT + 1} of a newer version"),
    "older": (lambda: sealed(b"...", "checkpoint", FORMAT - 1), f"format {FORMAT - 1} of an older version"),
    "a cache": (lambda: sealed(b"...", "omniglot", 1), "another kind: expected checkpoint, got omniglot"),
    "unknown to this torch": (
        lambda: sealed(b"...", "checkpoint", FORMAT),
        f"torch {re.escape(torch.__version__)} cannot",
    ),
    "code": (lambda: sealed(_torch_file({"config": print}), "checkpoint", FORMAT), "cannot read"),
}


class TestOtherFiles:
    @pytest.mark.parametrize("name", OTHERS)
    def test_is_refused_by_its_own_line(self, tmp_path, name):
        make, message = OTHERS[name]
        (tmp_path / "checkpoint.pt").write_bytes(make())
        assert re.search(message, refusal(tmp_path / "checkpoint.pt"))

    def test_none(self, tmp_path):
        assert "there is no checkpoint" in refusal(tmp_path / "checkpoint.pt")

    def test_folder_of_that_name(self, tmp_path):
        (tmp_path / "checkpoint.pt").mkdir()
        assert "cannot be read" in refusal(tmp_path / "checkpoint.pt")

    def test_another_run(self, checkpoint):
        assert "made with shots 5 (now 7)" in refusal(checkpoint, CONFIG | {"shots": 7})
        other = {"experiment": "omniglot", "ways": 5, "net": "mlp"}
        assert "made with experiment 'sinusoid' (now 'omniglot');" in refusal(checkpoint, other)
        assert " and 6 more differences" in refusal(checkpoint, {f"option{i}": i for i in range(10)})

    @pytest.mark.parametrize("part", [torch.nn.Linear(3, 7), torch.nn.Sequential(torch.nn.Linear(3, 20))])
    def test_another_model(self, checkpoint, part):
        """The same settings, but a network of another shape or other names: torch's own report has many lines."""
        loop = Loop(lambda: torch.zeros(1), {"model": part}, Budget(5), checkpoint.parent, CONFIG)
        with pytest.raises(DataError, match=r"does not fit this run \(.*\); start without --resume") as raised:
            loop.run(resume=True)
        assert "\n" not in str(raised.value)

    def test_torch_itself_opens_it(self, checkpoint):
        """The seal follows what torch.save writes, so that one needs nothing of ours to have the weights back."""
        assert equal(torch.load(checkpoint, weights_only=True)["state"], state())


MOMENTS = ["created", "writing", "fsync", "replace"]


def forked(work: Callable[[], None]) -> int:
    """The process that does `work`: a fork, which has everything imported already."""
    if process := os.fork():
        return process
    try:
        work()
    finally:
        os._exit(1)


def killed(moment: str, target: Path) -> None:
    """Write to `target` in a process that is killed at that moment."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        owner, name = {"created": (fcntl, "flock"), "fsync": (os, "fsync"), "replace": (os, "replace")}.get(
            moment, (None, "")
        )
        if owner is not None:
            setattr(owner, name, die)
        with atomic_write(target) as file:
            file.write(b"new" * 100_000)
            if moment == "writing":
                die()

    status = os.waitpid(forked(work), 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


class TestKilled:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_the_previous_file_stays_and_the_next_write_cleans(self, checkpoint, moment):
        folder = checkpoint.parent
        killed(moment, checkpoint)
        assert len(list(folder.glob(".mtml-*.tmp"))) == 1  # else this test kills too early
        assert equal(load_checkpoint(checkpoint, CONFIG), state())
        with atomic_write(folder / "another file"):
            pass
        assert sorted(p.name for p in folder.iterdir()) == ["another file", "checkpoint.pt"]

    def test_a_run_cleans_its_folder_first_of_all(self, checkpoint):
        killed("writing", checkpoint)
        killed("writing", checkpoint.with_name("log.csv"))
        with pytest.raises(DataError):
            Loop(lambda: torch.zeros(1), {}, Budget(5), checkpoint.parent, {"seed": 1}).run(resume=True)
        assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint.pt"]

    def test_training_killed_at_any_time_goes_on_from_a_whole_checkpoint(self, tmp_path):
        """kill -9 at random moments of a process that does nothing but save."""
        path = tmp_path / "checkpoint.pt"

        def work() -> None:
            for i in itertools.count():
                save_checkpoint(path, {"i": i, "w": torch.full((9999,), i)}, {})

        draw = random.Random(0)
        for _ in range(10):
            path.unlink(missing_ok=True)
            process = forked(work)
            while not path.exists():
                time.sleep(0.001)
            time.sleep(draw.random() / 20)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            found = load_checkpoint(path, {})
            assert torch.equal(found["w"], torch.full((9999,), found["i"]))
            save_checkpoint(path, {}, {})
            assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_a_living_writer_keeps_its_file(self, tmp_path):
        with atomic_write(tmp_path / "slow") as slow:
            slow.write(b"slow")
            with atomic_write(tmp_path / "quick") as quick:
                quick.write(b"quick")
        assert (tmp_path / "slow").read_bytes() == b"slow" and (tmp_path / "quick").read_bytes() == b"quick"

    def test_other_programs_files_are_left_alone(self, tmp_path):
        others = ["x.tmp", ".x.tmp", ".mtml-notes", "mtml-x.tmp"]
        for name in others:
            (tmp_path / name).write_text("")
        with atomic_write(tmp_path / "file"):
            pass
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "file"])


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two characters of two drawings in a zip, small enough to be read hundreds of times."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "images_background.zip", "w") as archive:
        archive.writestr("images_background/", "")
        for character in ("Aleph/character01", "Aleph/character02"):
            for number in (1, 2):
                memory = io.BytesIO()
                image.fromarray(draw.integers(0, 256, (30, 30), dtype=np.uint8)).save(memory, "png")
                archive.writestr(f"images_background/{character}/000{number}.png", memory.getvalue())
    return folder


class TestCache:
    """The cache is made again whatever is in it."""

    @pytest.fixture
    def read(self, drawings, tmp_path):
        from mtml.tasks.omniglot_source import read_omniglot

        return lambda: read_omniglot(drawings, cache=tmp_path)

    @pytest.fixture
    def stored(self, read, tmp_path):
        self.right = read()
        return next(tmp_path.glob("*.npz"))

    def is_made_again(self, read, stored: Path, caplog) -> None:
        caplog.clear()
        whole = self.right
        found = read()
        assert np.array_equal(found.images, whole.images) and found.names == whole.names
        assert caplog.text.count("decoding the drawings again") == 1 and caplog.text.count("\n") == 1
        caplog.clear()
        read()
        assert not caplog.text  # and the new one is good
        assert list(stored.parent.iterdir()) == [stored]

    def test_flipped_bits(self, read, stored, caplog):
        for changed in flipped(stored.read_bytes(), 60):
            stored.write_bytes(changed)
            self.is_made_again(read, stored, caplog)

    @pytest.mark.parametrize("share", [0, 0.3, 0.99, 1.01])
    def test_other_lengths(self, read, stored, share, caplog):
        whole = stored.read_bytes()
        stored.write_bytes((whole + bytes(1000))[: int(share * len(whole))])
        self.is_made_again(read, stored, caplog)

    @pytest.mark.parametrize("case", ["no seal", "version", "kind"])
    def test_other_seals(self, read, stored, case, caplog):
        from mtml.tasks.omniglot_source import CACHE, FORMAT

        content = stored.read_bytes()[: stored.read_bytes().rindex(b"\nmtml ")]
        seals = {
            "no seal": content,
            "version": sealed(content, CACHE, FORMAT + 1),
            "kind": sealed(content, "npz", FORMAT),
        }
        stored.write_bytes(seals[case])
        self.is_made_again(read, stored, caplog)

    @pytest.mark.parametrize(
        ("images", "names"),
        [
            (np.zeros((3, 2, 784), np.uint8), [f"a/{i:02d}" for i in range(20)]),
            (np.zeros((2, 2, 784), np.float32), ["a/1", "a/2"]),
            (np.zeros((2, 2, 100), np.uint8), ["a/1", "a/2"]),
            (np.zeros((2, 784), np.uint8), ["a/1", "a/2"]),
            (np.zeros((0, 2, 784), np.uint8), []),
            (np.zeros((2, 0, 784), np.uint8), ["a/1", "a/2"]),
            (np.zeros((2, 2, 784), np.uint8), ["a/1", "a/1"]),
            (np.zeros((2, 2, 784), np.uint8), ["a/2", "a/1"]),
            (np.zeros((2, 2, 784), np.uint8), [1, 2]),
            (np.zeros((2, 2, 784), np.uint8), np.array(["a/1", None], object)),
            (np.zeros((2, 2, 784), np.uint8), None),
        ],
    )
    def test_arrays_that_do_not_belong_together(self, read, stored, images, names, caplog):
        """Under a right seal: what another program, or a fault in ours, may have put there."""
        from mtml.tasks.omniglot_source import CACHE, FORMAT

        memory = io.BytesIO()
        np.savez_compressed(memory, images=images, **({} if names is None else {"names": np.array(names)}))
        stored.write_bytes(sealed(memory.getvalue(), CACHE, FORMAT))
        self.is_made_again(read, stored, caplog)

    def test_folder_of_that_name(self, read, stored, caplog):
        stored.unlink()
        stored.mkdir()
        found = read()
        assert np.array_equal(found.images, self.right.images)
        assert "decoding the drawings again" in caplog.text and "cannot cache" in caplog.text

    def test_processes_that_make_it_at_once(self, drawings, tmp_path):
        start = multiprocessing.get_context("fork")
        others = [start.Process(target=_read_and_check, args=(drawings, tmp_path)) for _ in range(6)]
        for process in others:
            process.start()
        for process in others:
            process.join(60)
        assert [process.exitcode for process in others] == [0] * 6
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_killed_while_making_it(self, read, stored, moment):
        killed(moment, stored)
        stored.unlink()
        read()
        assert list(stored.parent.iterdir()) == [stored]


def _read_and_check(source: Path, cache: Path) -> None:
    from mtml.tasks.omniglot_source import read_omniglot

    right = read_omniglot(source, cache=cache / str(os.getpid()))
    for path in (cache / str(os.getpid())).iterdir():
        path.unlink()
    (cache / str(os.getpid())).rmdir()
    for _ in range(20):
        for path in cache.glob("*.npz"):
            path.unlink(missing_ok=True)
        found = read_omniglot(source, cache=cache)
        assert np.array_equal(found.images, right.images) and found.names == right.names


def test_damaged_zip_is_one_line_that_names_it_or_changes_nothing(drawings, tmp_path, caplog):
    """A bit of a date is nothing to us; one of a name, a size or a drawing must not give fewer or other drawings."""
    from mtml.tasks.omniglot_source import read_omniglot

    whole = (drawings / "images_background.zip").read_bytes()
    right, refused = read_omniglot(drawings, cache=tmp_path / "cache"), 0
    source = tmp_path / "images_background.zip"
    for number, changed in enumerate(flipped(whole, 300)):
        source.write_bytes(changed)
        os.utime(source, (number, number))
        try:
            found = read_omniglot(tmp_path, cache=tmp_path / "cache" / str(number))
        except DataError as error:
            refused += 1
            assert str(source) in str(error) and "\n" not in str(error) and "download it again" in str(error)
        else:
            assert np.array_equal(found.images, right.images) and found.names == right.names
    assert refused > 200 and not caplog.text
