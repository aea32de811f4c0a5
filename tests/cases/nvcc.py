"""CUDA sources compiled for GPUs that need not be there, and what ptxas says of their kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from cases.cuda_host import INCLUDE


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=os.pathsep.join([str(Path(home) / "bin"), os.environ.get("PATH", "")]))
    return found or pytest.skip("no nvcc")


def compile_for(capability: int, source: Path, target: Path, *flags: str) -> str:
    """What the compiler says; a warning is an error."""
    chip = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    command = [nvcc(), "-std=c++17", "-Werror", "all-warnings", *INCLUDE, chip, *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Usage(NamedTuple):
    """Of a kernel, or of a function that kernels call (which has no registers of its own). Bytes: of a thread's stack,
    of what was spilled, of named shared arrays.
    """

    name: str
    registers: int | None
    stack: int
    spilled: int
    shared: int


_PROPERTIES = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"(?:\s+ptxas info\s+: Used (\d+) registers(.*))?"
)


def usage(verbose: str) -> list[Usage]:
    """Of every function, from what `-Xptxas -v` prints."""
    found = []
    for name, stack, stores, loads, registers, rest in _PROPERTIES.findall(verbose):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0
        found.append(Usage(name, int(registers) if registers else None, *numbers))
    return found
