"""What goes wrong with the command line, the installation or the machine is one line on stderr, never a traceback, and
costs nothing that was trained. The tests range over all options, all files that are written, all libraries."""

import errno
import io
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
import typer.models
from matplotlib.figure import Figure

from mtml.cli import main
from mtml.tasks import _files
from mtml.train import commands, plots
from mtml.train import loop as loops
from mtml.train.checkpoint import load_checkpoint
from mtml.train.compare import Comparison
from mtml.train.failures import line_of
from mtml.train.log import CsvLog, read_log
from mtml.train.loop import Budget, Loop
from mtml.train.omniglot import OmniglotRun
from mtml.train.sinusoid import SinusoidRun

SINUSOID = ["train", "sinusoid", "--meta-batch", "2", "--plain-seconds", "0.1", "--iterations", "30"]
DIGITS = ["train", "omniglot", "--meta-batch", "2", "--plain-seconds", "0.1", "--iterations", "4", "--test-tasks", "20"]
START = {"sinusoid": SINUSOID, "omniglot": DIGITS, "record": ["record", "run", "kept/run"], "plot": ["plot", "log.csv"]}
HUGE = str(10**30)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; commands that set the number of threads do so for their test only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes long and is tested elsewhere: drawing the pictures, measuring the speed."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"png"))
    for name in ("_draw_task", "_draw_image"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    agreed = Comparison(2.0, 1.0, 0.0, 0.0)
    for run in (SinusoidRun, OmniglotRun):
        monkeypatch.setattr(run, "compare", lambda _: agreed)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with the status, and gives the one line that it leaves on stderr."""

    def run(*arguments: object, status: int = 2) -> str:
        with pytest.raises(SystemExit) as raised:
            main([str(a) for a in arguments])
        errors = re.sub(r"[^\n]*\r", "", capfd.readouterr().err)  # the progress bar overwrites itself
        lines = [line for line in errors.splitlines() if line and not line.startswith("training:")]
        assert raised.value.code == status, errors
        assert "Traceback" not in errors and len(lines) == 1 and lines[0].startswith("error: "), errors
        return lines[0]

    return run


def options() -> Iterator[tuple[str, str, str]]:
    """(command, option, bad value): names that do not exist, numbers out of every range, and what is no number."""
    for registered in (*commands.train.registered_commands, *commands.app.registered_commands):
        function = registered.callback
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            if name == "return" or not hasattr(hint.__metadata__[0], "callback"):
                continue
            kinds = {hint.__origin__, *typing.get_args(hint.__origin__)}
            if isinstance(hint.__metadata__[0], typer.models.ArgumentInfo) or kinds & {bool, Path}:
                continue
            bad = BAD[next(iter(kinds & set(BAD)))]
            option = f"--{name.replace('_', '-')}"
            yield from (
                (function.__name__, option, value) for value in bad if (option, value) != ("--iterations", HUGE)
            )


BAD = {str: ["nonsense", ""], int: ["x", "1.5", "-1", HUGE], float: ["x", "nan", "inf", "-inf"]}
FOUND = list(options())


def test_options_are_all_looked_at():
    assert {command for command, *_ in FOUND} == {"sinusoid", "omniglot", "record"}
    assert {"--backend", "--init", "--tasks", "--net", "--preset", "--split", "--norm", "--learn-lr", "--minutes"} <= {
        name for _, name, _ in FOUND
    }
    assert len(FOUND) > 100


@pytest.mark.parametrize(("command", "option", "value"), FOUND)
def test_bad_option(fails, folder, command, option, value):
    line = fails(*START[command], option, value)
    assert option.lstrip("-") in line, line
    assert "expected" in line or "--help` lists" in line
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["train", "nothing"], ["doctor", "--yaml"], ["record", "only"], ["plot", "a", "b"], ["--nothing"]],
)
def test_bad_command(fails, arguments):
    assert "--help` lists what there is" in fails(*arguments)


@pytest.mark.parametrize("command", ["sinusoid", "omniglot"])
def test_unknown_backend_in_the_environment(fails, monkeypatch, command):
    monkeypatch.setenv("MTML_BACKEND", "gpu")
    assert "the variable MTML_BACKEND: expected one of auto, cpu" in fails(*START[command])


def test_backend_that_is_not_here(fails):
    assert "backend" in fails(*SINUSOID, "--backend", "cuda")


def test_as_a_module(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["python -m mtml", *SINUSOID, "--backend", "gpu"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("mtml", run_name="__main__")
    output, errors = capfd.readouterr()
    assert not output and re.fullmatch(r"error: .*--backend.*expected one of auto, cpu.*got 'gpu'.*\n", errors)


# Files that each command writes, in the order in which it does.
WRITTEN = {
    "sinusoid": ["log.csv", "checkpoint.pt", "sinusoid.png", "results.json"],
    "omniglot": [
        *("log.csv", "checkpoint.pt", "digits.png", "tasks.png", "characters.png", "characters.csv", "results.json")
    ],
}
EACH = [(command, name) for command, names in WRITTEN.items() for name in names]
REASONS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use",
    errno.EIO: os.strerror(errno.EIO),
}


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Make writing a file of that name fail, where a disk does: when what was written is to reach it."""
    replace = os.replace

    def refusing(source: str, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), source, None, str(target))
        replace(source, target)

    monkeypatch.setattr(_files.os, "replace", refusing)


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
    owner = {"mkdir": Path, "mkstemp": _files.tempfile}.get(call, os)
    with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
        if call != "write":
            patch.setattr(owner, call, _raising(error))
        with _files.atomic_write(path) as file:
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
        monkeypatch.setattr(Loop, "_train", _raising(error))
        assert re.search("not enough memory .*; nothing was saved yet", fails(*START[command]))


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(Loop, "_train", _raising(RuntimeError("an index that cannot be")))
    with pytest.raises(RuntimeError, match="an index that cannot be"):
        main(SINUSOID)


def _raising(error: BaseException) -> Callable[..., None]:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising


class TestRecordAndPlot:
    @pytest.fixture
    def run(self, folder):
        run = folder / "run"
        run.mkdir()
        (run / "results.json").write_text("{}")
        (run / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")
        (run / "sinusoid.png").write_bytes(b"png")
        (folder / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")
        return run

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("results.json", None),
            ("results.json", b""),
            ("results.json", b'{"half": '),
            ("results.json", b"\xff\xfe\0"),
            ("log.csv", None),
            ("log.csv", b""),
            ("log.csv", b"iteration,seconds,loss\n"),
            ("log.csv", b"\xff\xfe\0\1"),
            ("log.csv", b"iteration,loss\n1,x\n"),
        ],
    )
    def test_broken_run(self, fails, folder, run, name, content):
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
        assert name in fails("record", run, "kept/run")
        assert not (folder / "kept").exists()

    @pytest.mark.parametrize("prefix", [".", "..", "run/log", "run/../run/other", "/"])
    def test_prefix_that_names_no_files_or_the_run_itself(self, fails, run, prefix):
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        assert "prefix: expected" in fails("record", run, prefix)
        assert {p.name: p.read_bytes() for p in run.iterdir()} == before

    def test_folder_that_is_a_file(self, fails, folder, run):
        assert "results.json in" in fails("record", "log.csv", "kept/run")

    @pytest.mark.parametrize("name", ["run.json", "run.png", "run.csv"])
    @pytest.mark.parametrize("number", REASONS)
    def test_full_disk(self, fails, monkeypatch, folder, run, name, number):
        refuse(monkeypatch, name, number)
        line = fails("record", run, "kept/run")
        assert f"kept/{name}" in line and REASONS[number] in line
        assert not list((folder / "kept").glob(".*"))

    @pytest.mark.parametrize("name", ["kept", "kept/run.json"])
    def test_in_the_way(self, fails, folder, run, name):
        if name == "kept":
            (folder / name).write_text("mine")
        else:
            (folder / name).mkdir(parents=True)
        assert f"error: {name}: " in fails("record", run, "kept/run")

    @pytest.mark.parametrize("content", [b"", b"iteration\n", b"\xff\0", b"iteration,loss\n1,x\n", b"a,b\n1,2\n"])
    def test_plot_of_no_log(self, fails, folder, content):
        (folder / "log.csv").write_bytes(content)
        assert "log.csv" in fails("plot", "log.csv")

    @pytest.mark.parametrize("log", ["missing.csv", ".", "/", "log.csv/below"])
    def test_plot_of_nothing(self, fails, run, log):
        assert "is not a log of" in fails("plot", log)

    def test_plot_over_its_log(self, fails, folder, run):
        before = (folder / "log.csv").read_bytes()
        assert "out: expected another file" in fails("plot", "log.csv", "--out", folder / "log.csv")
        assert (folder / "log.csv").read_bytes() == before

    @pytest.mark.parametrize("out", ["run", "log.csv/below.png"])
    def test_plot_to_no_place(self, fails, run, quick, out):
        assert "choose another place" in fails("plot", "log.csv", "--out", out)

    @pytest.mark.parametrize("number", REASONS)
    def test_plot_to_a_full_disk(self, fails, monkeypatch, folder, run, quick, number):
        refuse(monkeypatch, "log.png", number)
        assert REASONS[number] in fails("plot", "log.csv") and not list(folder.glob(".*"))


class TestStandardOutput:
    COMMANDS = (
        SINUSOID,
        DIGITS,
        ["plot", "log.csv"],
        ["doctor"],
        ["doctor", "--json"],
        ["--help"],
        ["train", "--help"],
    )

    @pytest.fixture(autouse=True)
    def prepared(self, folder, monkeypatch, quick):
        from mtml_kernels.doctor import probes as doctor

        monkeypatch.setattr(doctor, "PROBES", {"cpu": doctor._cpu})
        (folder / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_full(self, fails, monkeypatch, command):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert "output: No space left on device" in fails(*command)

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_reader_that_has_left(self, monkeypatch, capfd, command):
        reader, writer = os.pipe()
        os.close(reader)
        with suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:  # closing it tries once more
            monkeypatch.setattr(sys, "stdout", pipe)
            with pytest.raises(SystemExit, match="1"):
                main(command)
        assert not capfd.readouterr().err

    def test_narrow_alphabet(self, monkeypatch, folder):
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", narrow)
        main(SINUSOID)
        narrow.seek(0)
        assert "95 % interval" in narrow.read()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
    def test_doctor_by_itself(self, folder):
        code = "from mtml_kernels.doctor import probes; probes.PROBES = {'cpu': probes._cpu}; probes.command()"
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: the report cannot be printed: No space left on device\n"


# Hides the modules named in argv[1] as on a machine that does not have them, then runs the rest of argv.
WITHOUT = """
import importlib.machinery, sys
gone, finder = sys.argv[1].split(","), importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest: None if name.split(".")[0] in gone else find(name, *rest)
import mtml.cli
mtml.cli.main(sys.argv[2:])
"""


class TestMissing:
    @pytest.mark.parametrize("command", START)
    @pytest.mark.parametrize("module", ["numpy", "torch", "typer"])
    def test_before_anything_is_imported(self, folder, module, command):
        run = [sys.executable, "-c", WITHOUT, module, *START[command]]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr == f'error: {module} is needed and not installed: pip install "mtml-kernels[train]"\n'

    @pytest.mark.parametrize(
        ("module", "package", "commands"),
        [
            ("matplotlib", "matplotlib", ["sinusoid", "omniglot", "plot"]),
            ("tqdm", "tqdm", ["sinusoid", "omniglot"]),
            ("sklearn", "scikit-learn", ["omniglot"]),
        ],
    )
    def test_before_training(self, fails, monkeypatch, folder, module, package, commands):
        (folder / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")
        self.hide(monkeypatch, module)
        for command in commands:
            assert re.search(
                rf"{package} is needed and not installed: pip install .*mtml-kernels", fails(*START[command])
            )
        assert not (folder / "runs").exists()

    def test_pillow(self, fails, monkeypatch, folder):
        drawing = folder / "data" / "images_background" / "Aleph" / "character01" / "0001_01.png"
        drawing.parent.mkdir(parents=True)
        drawing.write_bytes(b"")
        self.hide(monkeypatch, "PIL")
        assert 'needs Pillow: pip install "mtml-kernels[train]"' in fails(*DIGITS, "--data", folder / "data")

    def test_library_that_is_broken(self, fails, monkeypatch):
        monkeypatch.setattr(Loop, "_train", _raising(ImportError("libstdc++.so.6: version not found", name="some")))
        assert "cannot be imported: libstdc++.so.6: version not found; `mtml doctor`" in fails(*SINUSOID)

    def test_help_and_errors_without_rich(self):
        code = WITHOUT.replace("mtml.cli.main(", "mtml.cli.main(['--help']); mtml.cli.main(")
        run = [sys.executable, "-c", code, "rich", "train", "sinusoid", "--steps", "0"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 2 and "doctor" in done.stdout
        assert "--steps" in done.stderr and len(done.stderr.splitlines()) == 1

    def test_doctor_reports_what_is_missing(self):
        code = WITHOUT.replace(
            "mtml.cli.main(", "from mtml_kernels.doctor.probes import PROBES; PROBES.pop('self_test')\nmtml.cli.main("
        )
        run = [sys.executable, "-c", code, "numpy,typer,rich,triton", "doctor"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr and "problems" in done.stdout

    def hide(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        for name in [m for m in sys.modules if m.split(".")[0] == module]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, module, None)


class Steps:
    """A model that counts its steps; actions happen in the steps named."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.count, self.actions = 0, actions

    def __call__(self) -> torch.Tensor:
        self.count += 1
        self.actions.get(self.count, lambda: None)()
        return torch.ones(2)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # Python runs a handler between two bytecodes
        pass


def run_of(steps: Steps, folder: Path, iterations: int = 1000, **options: object) -> Loop:
    return Loop(steps, {"steps": steps}, Budget(iterations), folder, {}, log_every=10, **options)


class TestInterrupt:
    def saved(self, folder: Path) -> int:
        state = load_checkpoint(folder / "checkpoint.pt", {})
        assert state["progress"]["iteration"] == state["steps"]["count"]
        return int(state["steps"]["count"])

    def test_second_one_ends_at_once_and_says_what_is_kept(self, folder):
        with pytest.raises(KeyboardInterrupt) as raised:
            run_of(Steps({7: lambda: (interrupt(), interrupt())}), folder).run()
        assert raised.value.__notes__ == ["nothing was saved yet"]
        run_of(Steps({}), folder, 20).run()
        with pytest.raises(KeyboardInterrupt) as raised:
            run_of(Steps({33: lambda: (interrupt(), interrupt())}), folder).run(resume=True)
        assert "checkpoint.pt holds iteration 20, from which --resume continues" in raised.value.__notes__[0]
        assert self.saved(folder) == 20 and {p.name for p in folder.iterdir()} == {"checkpoint.pt", "log.csv"}

    def test_during_a_save_the_save_is_finished(self, folder, monkeypatch):
        save = loops.save_checkpoint

        def interrupted(*arguments: object) -> None:
            monkeypatch.setattr(loops, "save_checkpoint", save)
            interrupt()
            save(*arguments)

        monkeypatch.setattr(loops, "save_checkpoint", interrupted)
        progress = run_of(Steps({}), folder, save_seconds=0.0).run()
        assert progress.stopped and self.saved(folder) == progress.iteration < 1000

    def test_after_the_last_iteration_it_still_counts(self, folder, monkeypatch):
        save = loops.save_checkpoint
        monkeypatch.setattr(loops, "save_checkpoint", lambda *arguments: (save(*arguments), interrupt()))
        assert run_of(Steps({}), folder, 20).run().stopped and self.saved(folder) == 20

    def test_evaluation_is_not_waited_for(self, folder):
        calls = []

        def evaluate() -> dict[str, float]:
            calls.append(1)
            interrupt()
            pytest.fail("the evaluation went on")

        options = {"columns": ("accuracy",), "evaluate": evaluate, "evaluate_seconds": 0.0}
        progress = run_of(Steps({}), folder, **options).run()
        assert progress.stopped and self.saved(folder) == progress.iteration == 10 and len(calls) == 1
        assert [row["iteration"] for row in read_log(folder / "log.csv")] == [10]

    def test_long_iteration_is_announced(self, folder, monkeypatch, capfd):
        monkeypatch.setattr(loops, "PATIENCE", -1.0)
        assert run_of(Steps({7: interrupt}), folder).run().stopped
        assert "stopping after this iteration; Ctrl-C again ends at once" in capfd.readouterr().err

    @pytest.mark.parametrize("where", ["table", "plot", "compare", "save_results"])
    def test_after_training(self, fails, monkeypatch, folder, quick, where):
        monkeypatch.setattr(SinusoidRun, where, _raising(KeyboardInterrupt()))
        line = fails(*SINUSOID, status=130)
        assert "interrupted; what was trained is saved in runs/sinusoid: `mtml train sinusoid --out" in line

    def test_before_training(self, fails, monkeypatch):
        monkeypatch.setattr(SinusoidRun, "__init__", _raising(KeyboardInterrupt()))
        assert fails(*SINUSOID, status=130) == "error: interrupted"

    @pytest.mark.parametrize("command", ["record", "plot", "doctor"])
    def test_other_commands(self, fails, monkeypatch, folder, command):
        import mtml.train.plots
        import mtml.train.record
        from mtml_kernels import doctor

        owner, name = {"record": (mtml.train.record, "record_run"), "plot": (mtml.train.plots, "plot_log")}.get(
            command, (doctor, "report")
        )
        monkeypatch.setattr(owner, name, _raising(KeyboardInterrupt()))
        assert fails(*START.get(command, ["doctor"]), status=130) == "error: interrupted"


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
