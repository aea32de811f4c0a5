"""Makes the development environment: `python .ci/devenv.py .venv --extras train,test`.

Needs nothing but the standard library of Python >= 3.11. The environment is pinned by constraints-dev.txt. Where the
interpreter already has a PyTorch the package accepts, that one is reused (the environment then sees the interpreter's
packages); otherwise PyTorch is installed, the CPU build where there is no NVIDIA GPU and pip is configured to find one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints-dev.txt"
OLDEST_TORCH = (2, 11)  # as in pyproject.toml
MINIMUM_PYTHON = (3, 11)

# Prints, for the interpreter that runs it: its version, what is installed outside its own prefix, its torch, and the
# packages whose version that torch dictates.
PROBE = """
import importlib.metadata as metadata, json, re, sys
from pathlib import Path
outside = [d.name for d in metadata.distributions() if not Path(str(d.locate_file(""))).is_relative_to(sys.prefix)]
try:
    torch = metadata.distribution("torch")
    exact = [m[0] for r in torch.requires or [] if (m := re.match(r"[A-Za-z0-9_.-]+", r)) and "==" in r.split(";")[0]]
    found = {"torch": torch.version, "dictated": exact}
except metadata.PackageNotFoundError:
    found = {"torch": None, "dictated": []}
print(json.dumps({"python": list(sys.version_info[:2]), "outside": outside, **found}))
"""


def say(message: str) -> None:
    print(f"devenv: {message}", flush=True)


def fail(message: str) -> SystemExit:
    return SystemExit(f"devenv: {message}")


def probe(python: str | Path) -> dict[str, Any]:
    done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def accepted(torch_version: str | None) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", torch_version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST_TORCH


def runs(*command: str | Path) -> bool:
    return (
        subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
        == 0
    )


def create(folder: Path) -> Path:
    """The environment's interpreter; makes the environment unless a working one is there."""
    python = folder / "bin" / "python"
    if python.exists() and runs(python, "-m", "pip", "--version"):
        have = probe(python)["python"]
        if have != list(sys.version_info[:2]):
            raise fail(
                f"{folder} is an environment of Python {have[0]}.{have[1]}, but this is {sys.version.split()[0]};"
                " remove it, or name another with `make VENV=.venv-other`"
            )
        return python
    # A virtual environment sees the packages of the interpreter below it, so that is the one to ask.
    below = getattr(sys, "_base_executable", sys.executable)
    reused = probe(below)["torch"]
    reuse = accepted(reused) and runs(below, "-c", "import torch")
    say(f"creating {folder}" + (f", with the PyTorch {reused} of {below}" if reuse else ""))
    flags = ["--clear", *(["--system-site-packages"] if reuse else [])]
    if subprocess.run([sys.executable, "-m", "venv", *flags, str(folder)]).returncode != 0:
        raise fail("python -m venv failed; on Debian and Ubuntu install python3-venv")
    if reuse:  # Python 3.11 puts an old setuptools into a new environment, which would hide the interpreter's own
        runs(python, "-m", "pip", "uninstall", "--yes", "setuptools")
    return python


def pip_install(python: Path, *arguments: str) -> bool:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    say("pip install " + shlex.join(arguments))
    return subprocess.run(command).returncode == 0


def pins(without: set[str]) -> list[str]:
    """The lines of constraints-dev.txt, less those of some packages (names normalised)."""
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines()]
    return [line for line in lines if line and line[0] != "#" and normalised(line.split("==")[0]) not in without]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write_constraints(folder: Path, without: set[str]) -> str:
    path = folder / "constraints.txt"
    path.write_text("\n".join(pins(without)) + "\n")
    return str(path)


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def install_torch(python: Path, folder: Path) -> None:
    """Installs the pinned PyTorch, or what TORCH_INSTALL (arguments to pip install) says."""
    requested = shlex.split(os.environ.get("TORCH_INSTALL", ""))
    if accepted(probe(python)["torch"]) and not requested:
        return
    constraints = ["-c", write_constraints(folder, {"torch", "triton"})]
    pinned = next(line for line in pins(set()) if line.startswith("torch=="))
    if requested:
        done = pip_install(python, *requested, *constraints)
    elif has_nvidia_gpu() or sys.platform != "linux":
        done = pip_install(python, pinned, *constraints)
    else:
        done = pip_install(python, f"{pinned}+cpu", *constraints)
        if not done:
            say(
                "pip is not configured to find a CPU build of PyTorch: taking the default one, which on Linux carries"
                " CUDA (several GB); see TORCH_INSTALL in CONTRIBUTING.md"
            )
            done = pip_install(python, pinned, *constraints)
    if not done:
        raise fail("PyTorch could not be installed; TORCH_INSTALL takes other arguments for pip, see CONTRIBUTING.md")


def requirements(extras: list[str]) -> list[str]:
    """What the package needs at run time and for the extras, and to be built in this environment."""
    import tomllib  # new in Python 3.11: an older one gets as far as being told so

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        wanted += optional[extra]
    return sorted(set(wanted))


def main() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        raise fail(
            f"Python >= 3.11 is needed, this is {sys.version.split()[0]}; `make PYTHON=python3.12` takes another"
        )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", default="train,bench,test,dev", help="extras of pyproject.toml to install")
    options = parser.parse_args()

    folder = options.folder.absolute()
    python = create(folder)
    install_torch(python, folder)
    seen = probe(python)
    constraints = write_constraints(folder, {normalised(name) for name in [*seen["outside"], *seen["dictated"]]})
    if not pip_install(python, "-c", constraints, *requirements(options.extras.split(","))):
        raise fail("the development environment could not be installed; the lines above are pip's")
    say(f"{folder} is ready (torch {seen['torch']})")


if __name__ == "__main__":
    main()
