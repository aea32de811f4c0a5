"""A script whose only library is torchopt, run as it stands; and what docs/from_torchopt.md shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtml.compat import torchopt

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "from_torchopt.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)


def test_a_script_trains_unchanged(tmp_path: Path) -> None:
    script = HERE / "scripts" / "torchopt_sinusoid.py"
    command = [sys.executable, "-P", "-m", "mtml.compat", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss ([\d.]+) before, ([\d.]+) after", done.stdout)
    assert found and float(found[2]) < 0.75 * float(found[1]), done.stdout


def test_what_the_document_shows_runs_with_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: in float32 rounding grows through ten steps of Adam to 1.1e-4 on one machine."""
    monkeypatch.setitem(sys.modules, "torchopt", torchopt)
    assert len(BLOCKS) == 3
    losses = []
    torch.set_default_dtype(torch.float64)
    try:
        for code in BLOCKS:
            names: dict[str, object] = {}
            exec(compile(code, str(DOCUMENT), "exec"), names)
            losses.append(names["loss"].item())  # type: ignore[attr-defined]
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], rel=1e-9)
