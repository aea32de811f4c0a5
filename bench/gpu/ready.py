"""Before ``python -m bench gpu`` measures: the package is built where it is not, with CUDA code for this GPU where nvcc
is, and its tests pass on the GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROBE = "import mtml; from mtml_kernels import native; native.info()"
BUILD = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--editable")
TRITON, CUDA = ROOT / "tests" / "triton", ROOT / "tests" / "cuda"  # what holds the tests of a backend
NONE_RAN = "no GPU test ran"
TAIL = 40  # lines of what failed that are shown


class Done(NamedTuple):
    """What a command said, and whether all is well; ``why`` says what is not."""

    ok: bool
    why: str
    output: str = ""

    def tail(self) -> str:
        """The end of what it said."""
        return "\n".join(self.output.splitlines()[-TAIL:])


def _run(command: Sequence[str], cwd: Path, seconds: float, more: Mapping[str, str] | None = None) -> Done:
    """A command's standard output and error together, with more variables. It is stopped where it takes longer."""
    environment = os.environ | (more or {})
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=max(seconds, 1),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return Done(False, f"not done after {seconds:.0f} s", said)
    return Done(done.returncode == 0, f"exit status {done.returncode}", done.stdout)


def built(seconds: float = 60) -> bool:
    """Whether another process finds the package with its compiled module, wherever it lies."""
    with tempfile.TemporaryDirectory() as elsewhere:  # from the root, the source folder would hide an installed package
        return _run((sys.executable, "-c", PROBE), Path(elsewhere), seconds).ok


def cuda_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Of a build with CUDA code for the GPUs of this machine, where there is an nvcc; what is set already stays."""
    from build_support.nvcc import find_nvcc

    try:
        find_nvcc(environment)
    except LookupError:
        return {}
    own = {"MTML_CUDA": "1", "MTML_CUDA_ARCHS": "native"}
    return {name: value for name, value in own.items() if not environment.get(name)}


def build(seconds: float, root: Path = ROOT) -> Done:
    """Install this checkout in place, without a network, where the package is not found built already."""
    if built(seconds):
        return Done(True, "found built")
    done = _run((sys.executable, *BUILD, str(root)), root, seconds, cuda_variables())
    if done.ok and not built(seconds):
        return Done(False, "installed, and still not found with its compiled module", done.output)
    return done._replace(why="built in place" if done.ok else f"the build failed: {done.why}")


def gate_command(report: Path, folder: Path) -> tuple[str, ...]:
    """pytest on what is marked `gpu` in a folder. A machine without hypothesis leaves out what conftest.py sets up."""
    conftest = () if importlib.util.find_spec("hypothesis") else ("--noconftest",)
    options = ("-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", f"--junitxml={report}", *conftest)
    return (sys.executable, "-P", "-m", "pytest", str(folder), *options)


def counts(report: Path) -> dict[str, int]:
    """How many tests a JUnit report has, and how many of them failed, raised or were skipped."""
    suite = ElementTree.parse(report).getroot()
    suite = suite if suite.tag == "testsuite" else suite[0]
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def gate(out: Path, seconds: float, folder: Path = TRITON, name: str = "gate") -> Done:
    """The GPU tests. Not ok either where none of them ran: a skipped test has shown nothing."""
    report = (out / f"{name}.xml").resolve()
    report.unlink(missing_ok=True)
    done = _run(gate_command(report, folder), ROOT / "tests", seconds)
    (out / f"{name}.txt").write_text(done.output)
    if not done.ok:
        return done._replace(why=f"the GPU tests failed: {done.why}")
    found = counts(report)
    passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
    if passed <= 0:
        return done._replace(ok=False, why=f"{NONE_RAN} ({found['skipped']} of {found['tests']} were skipped)")
    return done._replace(why=f"{passed} GPU tests passed, {found['skipped']} skipped")
