"""Files that cannot be written: all that a command writes, all reasons of a disk, also during training; no memory."""

import errno
import math
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from cases.command_line import REASONS, SINUSOID, START, Steps, raising, refuse, run_of

from mtml.cli import main
from mtml.tasks import files
from mtml.train import loop as loops
from mtml.train.checkpoint import load_checkpoint
from mtml.train.failures import line_of
from mtml.train.log import CsvLog
from mtml.train.loop import Budget, Loop

# Files that each command writes, in the order in which it does.
WRITTEN = {
    "sinusoid": ["log.csv", "checkpoint.pt", "sinusoid.png", "results.json"],
    "omniglot": [
        *("log.csv", "checkpoint.pt", "digits.png", "tasks.png", "characters.png", "characters.csv", "results.json")
    ],
}
EACH = [(command, name) for command, names in WRITTEN.items() for name in names]


def check_left(folder: Path, command: str, name: str, line: str) -> None:
    """Everything written before is there, what was trained above all, and nothing else."""
    before = WRITTEN[command][: WRITTEN[command].index(name)]
    assert {p.name for p in folder.iterdir() if p.name != name} == set(before)
    if "checkpoint.pt" in before:
        assert load_checkpoint(folder / "checkpoint.pt", {})["progress"]["iteration"] in (4, 30)
        assert "--resume` goes on from there" in line


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("command", "name"), EACH)
def test_file_that_cannot_be_written(fails, monkeypatch, folder, command, name):
    number = list(REASONS)[EACH.index((command, name)) % len(REASONS)]
    refuse(monkeypatch, name, number)
    line = fails(*START[command], "--out", folder / "run")
    assert str(folder / "run" / name) in line and REASONS[number] in line
    check_left(folder / "run", command, name, line)


@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("call", ["mkdir", "mkstemp", "write", "fsync", "chmod", "replace"])
def test_every_reason_at_every_call(monkeypatch, folder, call, number):
    """Whichever call fails, and whatever name it gives or none, the line has the name of the file that was to be."""
    path = folder / "below" / "file"
    unnamed = call in ("write", "fsync")
    error = (
        OSError(number, os.strerror(number))
        if unnamed
        else OSError(number, os.strerror(number), f"{path.parent}/.mtml-x")
    )
    owner = {"mkdir": Path, "mkstemp": files.tempfile}.get(call, os)
    with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
        if call != "write":
            patch.setattr(owner, call, raising(error))
        with files.atomic_write(path) as file:
            file.write(b"some")
            raise error
    assert line_of(raised.value).startswith(f"{path}: {os.strerror(number)}") and REASONS[number] in line_of(
        raised.value
    )
    assert not path.parent.exists() or not list(path.parent.iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("command", "name"), EACH)
def test_folder_where_a_file_goes(fails, folder, command, name):
    (folder / "run" / name).mkdir(parents=True)
    line = fails(*START[command], "--out", folder / "run")
    assert str(folder / "run" / name) in line and "is a folder where a file is needed" in line
    if name == "checkpoint.pt":  # found before anything is trained for nothing
        assert [p.name for p in (folder / "run").iterdir()] == [name]
    else:
        check_left(folder / "run", command, name, line)


@pytest.mark.parametrize("command", ["sinusoid", "omniglot"])
@pytest.mark.parametrize("out", ["file", "file/below", "file/below/that"])
def test_out_that_is_a_file(fails, folder, command, out):
    (folder / "file").write_text("mine")
    assert re.search(
        r"error: \S*file\S*: .*choose another place, or move the file", fails(*START[command], "--out", out)
    )
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["sinusoid", "omniglot"])
def test_no_memory(fails, monkeypatch, folder, command):
    for error in (MemoryError("Unable to allocate 8 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(Loop, "_train", raising(error))
        assert re.search("not enough memory .*; nothing was saved yet", fails(*START[command]))


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(Loop, "_train", raising(RuntimeError("an index that cannot be")))
    with pytest.raises(RuntimeError, match="an index that cannot be"):
        main(SINUSOID)


class TestFullDiskInTraining:
    """The log's rows are written while training goes on; the checkpoint every 20 seconds."""

    @pytest.fixture
    def full_log(self, monkeypatch):
        if not os.path.exists("/dev/full"):
            pytest.skip("this system has no device that is always full")
        make = CsvLog.__init__

        def full(self: CsvLog, *arguments: object) -> None:
            make(self, *arguments)
            self._file.close()
            self._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115

        monkeypatch.setattr(CsvLog, "__init__", full)

    def test_log(self, fails, full_log, folder):
        line = fails(*SINUSOID, "--out", "run")
        assert "error: run/log.csv: No space left on device: free some space" in line
        assert "run/checkpoint.pt holds iteration 30, from which --resume continues" in line

    def test_not_a_diverged_state(self, full_log, folder):
        steps = Steps({})
        loop = Loop(lambda: steps() * math.nan, {"steps": steps}, Budget(25), folder, {}, log_every=10)
        with pytest.raises(loops.Diverged):
            loop.run()
        assert not (folder / "checkpoint.pt").exists()

    def test_checkpoint_and_then_room_again(self, monkeypatch, folder):
        with monkeypatch.context() as patch:
            refuse(patch, "checkpoint.pt", errno.ENOSPC)
            with pytest.raises(OSError, match=r"checkpoint\.pt") as raised:
                run_of(Steps({}), folder, save_seconds=0.0).run()
        assert raised.value.__notes__ == ["nothing was saved yet"] and not list(folder.glob(".*"))
        assert run_of(Steps({}), folder, 30).run().iteration == 30

    def test_half_a_row_is_no_row(self, folder):
        log = CsvLog(folder / "log.csv", ["iteration", "loss"])
        for i in (10, 200):
            log.write(iteration=i, loss=0.25)
        log.close()
        whole = (folder / "log.csv").read_bytes()
        for cut in range(1, len(b"200,0.25\n") + 1):
            (folder / "log.csv").write_bytes(whole[:-cut])
            CsvLog(folder / "log.csv", ["iteration", "loss"], keep_until=1000).close()
            assert (folder / "log.csv").read_text() == "iteration,loss\n10,0.25\n"

    @pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\0", b"iteration,loss\n\xff,1\n10,1\n"])
    def test_log_that_is_no_text_is_begun_anew(self, folder, content):
        (folder / "log.csv").write_bytes(content)
        CsvLog(folder / "log.csv", ["iteration", "loss"], keep_until=1000).close()
        assert (folder / "log.csv").read_text().splitlines()[0] == "iteration,loss"
