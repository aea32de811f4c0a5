"""The CUDA compiler of this machine: where it is, and what it knows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Nvcc", "codes_in_help", "find_nvcc"]

HOMES = ("CUDA_HOME", "CUDA_PATH")
USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")


def find_nvcc(environment: Mapping[str, str]) -> Path:
    """Of the CUDA that a variable names, else of PATH, else where NVIDIA's installer puts it.

    Raises:
        LookupError: it is not there; the reason.
    """
    for name in HOMES:
        if home := environment.get(name):
            nvcc = Path(home, "bin", "nvcc")
            if not nvcc.is_file():
                raise LookupError(f"{name}={home} has no bin/nvcc")
            return nvcc
    if found := shutil.which("nvcc", path=environment.get("PATH")):
        return Path(found)
    if USUAL_PLACE.is_file():
        return USUAL_PLACE
    raise LookupError(f"nvcc is neither on PATH nor {USUAL_PLACE}, and CUDA_HOME is not set")


def codes_in_help(text: str) -> frozenset[str]:
    """The codes that nvcc can write, as `nvcc --help` lists them; `--list-gpu-code` leaves out those with a or f.

    Example:
        >>> sorted(codes_in_help("--gpu-code <code>,...\\n Allowed values for this option:  'compute_90','sm_90a'."))
        ['compute_90', 'sm_90a']
    """
    section = re.search(r"^--gpu-code\b.*?Allowed values for this option:(.*?)\.\s*$", text, re.DOTALL | re.MULTILINE)
    return frozenset(re.findall(r"'((?:sm|compute)_\d+[af]?)'", section[1])) if section else frozenset()


@dataclass(frozen=True)
class Nvcc:
    """A compiler that runs."""

    path: Path
    version: str
    codes: frozenset[str]

    @classmethod
    def at(cls, path: Path) -> Nvcc:
        """Asks it.

        Raises:
            LookupError: it does not run, or its answers are not those of an nvcc.
        """
        release = re.search(r"\bV(\d+(?:\.\d+)+)", _answer(path, "--version"))
        codes = codes_in_help(_answer(path, "--help"))
        if release is None or not codes:
            raise LookupError(f"{path} does not answer as nvcc does")
        return cls(path, release[1], codes)

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def library_flags(self) -> list[str]:
        """Where its libraries are: nvcc may be a script, or a distribution's, so the path does not tell."""
        shown = re.search(r"^#\$ LIBRARIES=(.*)$", _answer(self.path, "--dryrun", "-c", "none.cu"), re.MULTILINE)
        return shlex.split(shown[1]) if shown else []


def _answer(path: Path, *arguments: str) -> str:
    try:
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise LookupError(f"{path} does not run: {error.strerror}") from None
    if done.returncode != 0:
        raise LookupError(f"{path} {arguments[0]} ends with status {done.returncode}")
    return done.stdout + done.stderr
