"""A script that imports higher alone trains with mtml.compat, and what the documents show runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "higher_fewshot.py"
EXAMPLES = [
    pytest.param(path, code, id=f"{path.stem}-{i}")
    for path in (ROOT / "docs" / "from_higher.md", ROOT / "docs" / "from_torch_func.md")
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


def test_a_script_for_higher_trains() -> None:
    command = [sys.executable, "-m", "mtml.compat", str(SCRIPT), "--iterations", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("train")]
    before, after = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("test"))
    assert len(losses) == 16 and after < 0.85 * before
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4])


@pytest.mark.parametrize(("path", "code"), EXAMPLES)
def test_documents_run(path: Path, code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(path), "exec"), names)
    assert names["loss"].item() < 10.0  # type: ignore[attr-defined]


def test_both_documents_have_examples() -> None:
    assert {param.values[0].stem for param in EXAMPLES} == {"from_higher", "from_torch_func"}  # type: ignore[attr-defined]
