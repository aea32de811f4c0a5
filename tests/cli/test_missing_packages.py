"""Packages that are not installed, or broken."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from cases.command_line import DIGITS, SINUSOID, START, raising

from mtml.train.loop import Loop

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
        monkeypatch.setattr(Loop, "_train", raising(ImportError("libstdc++.so.6: version not found", name="some")))
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
