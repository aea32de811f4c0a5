"""A script that imports higher alone trains with mtml.compat, and what the documents show runs."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

from mtml.compat.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "higher_fewshot.py"
EXAMPLES = [
    pytest.param(path, code, id=f"{path.stem}-{i}")
    for path in (ROOT / "docs" / "from_higher.md", ROOT / "docs" / "from_torch_func.md")
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


def test_a_script_for_higher_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mtml.compat", str(SCRIPT), "--iterations", "16"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(sys.modules, "higher", raising=False)
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(words[2]) for words in lines if words[0] == "train"]
    before, after = (float(words[1]) for words in lines if words[0] == "test")
    assert len(losses) == 16 and after < 0.85 * before
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4])


@pytest.mark.parametrize(("path", "code"), EXAMPLES)
def test_documents_run(path: Path, code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(path), "exec"), names)
    assert names["loss"].item() < 10.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["", ".utils", ".patch", ".optim", ".optimizer", ".settings", ".batched"])
def test_examples_of_docstrings(module: str) -> None:
    done = doctest.testmod(importlib.import_module(f"mtml.compat.higher{module}"), optionflags=doctest.ELLIPSIS)
    assert done.attempted and not done.failed


def test_both_documents_have_examples() -> None:
    assert {param.values[0].stem for param in EXAMPLES} == {"from_higher", "from_torch_func"}  # type: ignore[attr-defined]
