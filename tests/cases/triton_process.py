"""Other processes for the tests of Triton kernels: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}  # of a program, by compute capability


def python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=300)


def interpret(name: str) -> None:
    """Runs a file of tests/triton/interpreted through Triton's interpreter."""
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", TESTS.parent)
    done = python("-P", "-m", "pytest", TESTS / "triton" / "interpreted" / name, *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def compiled_by(name: str, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """What the kernels of a script in tests/triton/compile take on every GPU, all compiled by one process."""
    done = python(TESTS / "triton" / "compile" / name, *map(str, SHARED_KB), TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found
