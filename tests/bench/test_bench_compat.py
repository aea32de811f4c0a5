"""``python -m bench compat``: what it compares, prints and refuses; nothing here measures speed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

import mtml.compat.learn2learn as l2l  # noqa: E402
from bench import compat, compat_learn2learn  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.measure.timing import Timing  # noqa: E402


def comparison(error: float, *names: str) -> compat.Comparison:
    times = {name: Timing(8.0 / (i + 1), 6.0 / (i + 1), 7, 1, 0.1) for i, name in enumerate(names)}
    return compat.Comparison("learn2learn", times, error, 5)


def test_report() -> None:
    text = "\n".join(comparison(1e-15, compat.ORIGINAL, compat.OURS, compat.ENGINE).lines())
    assert "learn2learn: sinusoid, 25 tasks, 5 steps; gradients within 1.0e-15, match" in text
    assert "mtml.compat" in text and "2.00x as fast" in text and "3.00x" in text and "--original" not in text
    assert "not installed: name its source tree by --original" in "\n".join(comparison(0.0, compat.OURS).lines())


@pytest.mark.parametrize("error", [1e-6, float("nan")])
def test_other_gradients_show(error: float) -> None:
    found = comparison(error, compat.OURS)
    assert not found.ok and "THEY DIFFER" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "library: expected one of"),
        (["learn2learn", "--steps", "0"], "steps: expected at least 1"),
        (["learn2learn", "--original", "/nowhere"], "original: expected a folder"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compat", *words]) == 2 and message in capsys.readouterr().err


def test_loop_and_engine_have_the_same_gradients() -> None:
    ways = {"loop": (compat_learn2learn.step, l2l), "engine": (compat_learn2learn.engine, l2l)}
    ways["floor"] = (compat.floor, None)
    assert compat.error_of(ways, 2) < 1e-12


def test_other_gradients_are_found() -> None:
    class FirstOrder(l2l.algorithms.MAML):
        def __init__(self, model: torch.nn.Module, lr: float) -> None:
            super().__init__(model, lr, first_order=True)

    wrong: Any = SimpleNamespace(algorithms=SimpleNamespace(MAML=FirstOrder))
    assert (
        compat.error_of({"right": (compat_learn2learn.step, l2l), "wrong": (compat_learn2learn.step, wrong)}, 2) > 1e-3
    )


def test_the_original_is_loaded_from_its_source_tree(tmp_path: Path) -> None:
    tree = tmp_path / "learn2learn"
    for folder in ("", "nn", "optim", "utils"):
        (tree / folder).mkdir()
        (tree / folder / "__init__.py").write_text("clone_module = len\n" if folder else "raise ImportError('gym')\n")
    (tree / "algorithms.py").write_text("import learn2learn\nMAML = learn2learn.clone_module\n")
    before = {name for name in sys.modules if name.partition(".")[0] == "learn2learn"}
    try:
        assert compat_learn2learn.original(tmp_path).algorithms.MAML is len
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "learn2learn" and n not in before]:
            del sys.modules[name]
