"""Other processes for the tests of Triton kernels: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}  # of a program, by compute capability
# One chip in every run, the others behind the marker: a compilation takes seconds.
CAPABILITIES = [90, *(pytest.param(chip, marks=pytest.mark.slow) for chip in SHARED_KB if chip != 90)]
MARKS = ["not slow", pytest.param("slow", marks=pytest.mark.slow)]


def python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=900)


def interpret(name: str, marked: str) -> None:
    """Runs a file of tests/triton/interpreted through Triton's interpreter: what is `marked` so (pytest's -m)."""
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", TESTS.parent, "-m", marked)
    done = python("-P", "-m", "pytest", TESTS / "triton" / "interpreted" / name, *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def compiled_by(name: str, capability: int, cache: Path) -> list[dict[str, Any]]:
    """What the kernels of a script in tests/triton/compile take on a GPU of this compute capability."""
    done = python(TESTS / "triton" / "compile" / name, str(capability), TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)[str(capability)]
    return found
