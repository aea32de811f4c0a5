"""Tests of the command line run in an empty folder each.

What goes wrong with the command line, the installation or the machine is one line on stderr, never a traceback, and
costs nothing that was trained: `fails` asks for that line.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mtml.cli import main


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
    from matplotlib.figure import Figure  # not above: where it is missing, the tests are left out by their own files

    from mtml.train import plots
    from mtml.train.compare import Comparison
    from mtml.train.omniglot import OmniglotRun
    from mtml.train.sinusoid import SinusoidRun

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
