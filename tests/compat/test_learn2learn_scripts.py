"""A script for learn2learn trains as it is, and what the guide shows runs."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mtml.compat
import mtml.compat.learn2learn as l2l

SCRIPT = Path(__file__).parent / "scripts" / "learn2learn_few_shot.py"
GUIDE = Path(__file__).parents[2] / "docs" / "from_learn2learn.md"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import learn2learn` finds mtml's, and afterwards what it found before."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "learn2learn"]:
        monkeypatch.delitem(sys.modules, name)
    mtml.compat.install("learn2learn", replace=True)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "learn2learn"]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_by_learn2learns_own_name() -> None:
    import learn2learn
    from learn2learn.algorithms import MAML
    from learn2learn.optim.transforms import MetaCurvatureTransform
    from learn2learn.vision.models.cnn4 import CNN4

    assert learn2learn is l2l and MAML is l2l.algorithms.MAML
    assert MetaCurvatureTransform is l2l.optim.MetaCurvatureTransform and CNN4 is l2l.vision.models.CNN4


@pytest.mark.usefixtures("installed")
def test_the_script_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--iterations", "60"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _, _ in lines] == ["maml", "meta_sgd", "gbml"]
    for name, first, last in lines:
        assert float(last) < 0.95 * float(first), name


@pytest.mark.usefixtures("installed")
def test_the_guides_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for code in blocks:
        exec(compile(code, str(GUIDE), "exec"), names)
    assert names["batched"].mean().item() < names["loss"].item()  # after one step of the optimiser
