"""The examples run as a user runs them, a few steps each, and write their figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fields", ["--steps", "2", "--side", "8"], "dB after 3 steps"),
        ("federated", ["--steps", "2", "--clients", "3"], "accuracy after 2 rounds"),
    ],
)
def test_example_runs(name: str, options: list[str], said: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"{name}.png"
    command = [sys.executable, "-P", str(EXAMPLES / f"{name}.py"), *options, "--out", str(out)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "a plain loop" in done.stdout
    assert out.stat().st_size > 5000
    assert "Warning" not in done.stderr, done.stderr  # no fallback to a slower path
