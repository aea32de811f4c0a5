"""The examples run as a user runs them: a few steps each, and whole, where they have to beat their baselines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = {"fields": ["--side", "8"], "federated": ["--clients", "3"]}
NUMBER = r"(-?[\d.]+)%?"
# What each says at its end: its score, and its baseline's.
SAID = {
    "characters": rf"new tasks: accuracy {NUMBER} \(nearest drawing {NUMBER}\)\nover (\d+) characters",
    "fields": rf"new images: {NUMBER} dB after 3 steps \(an image's mean colour {NUMBER} dB",
    "federated": rf"accuracy after \d+ rounds: {NUMBER} \(of a client's weights, not averaged, {NUMBER}",
    "image_and_text": rf"text: accuracy {NUMBER} \(linear {NUMBER}\)",
    "kinds": rf"ratings: R2 {NUMBER} \(before adaptation {NUMBER}\)",
    "policy": rf"new goals: distance {NUMBER} \(before adapting {NUMBER}\)",
    "regression": rf"MAML: MSE \S+ after 1 step, {NUMBER} after \d+ \(never adapted {NUMBER}\)",
    "segmentation": rf"sum: accuracy {NUMBER}, macro F1 \S+, mean IoU \S+",
    "shared_and_own": rf"new tasks, 10 points: MSE {NUMBER} after \d+ steps \(from a fresh network {NUMBER}\)",
    "transfer": rf" 1 images a digit: transfer {NUMBER} \(from scratch {NUMBER}\)",
    "whole_road": rf"new tasks: accuracy {NUMBER} \(linear {NUMBER}\)",
}
LESS_IS_BETTER = {"policy", "regression", "shared_and_own"}
REACHED = {"segmentation": 60.0}  # per cent, of three kinds; its two ways are equally good


def run(name: str, options: list[str], folder: Path) -> tuple[str, ...]:
    """The numbers that the example says at its end."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    out = folder / f"{name}.png"
    done = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / f"{name}.py"), *options, "--out", str(out)],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr  # no fallback to a slower path
    assert out.stat().st_size > 5000
    said = re.search(SAID[name], done.stdout)
    assert said, done.stdout
    return said.groups()


def test_every_example_is_here_and_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAID)
    for name in SAID:
        assert f"python examples/{name}.py" in readme
        assert (EXAMPLES / "thumbnails" / f"{name}.png").stat().st_size < 30_000


@pytest.mark.parametrize("name", SAID)
def test_example_runs(name: str, tmp_path: Path) -> None:
    run(name, ["--steps", "2", *SHORT.get(name, [])], tmp_path)


def test_characters_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    from cases.omniglot_files import make_omniglot, zip_parts

    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))
    zips = zip_parts(make_omniglot(tmp_path / "folders"), tmp_path / "zips")
    *_, tested = run("characters", ["--steps", "2", "--data", str(zips)], tmp_path)
    assert tested == "5"


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_example_beats_its_baseline(name: str, tmp_path: Path) -> None:
    own, *base = map(float, run(name, [], tmp_path))
    assert (own < base[0]) if name in LESS_IS_BETTER else own > (base[0] if base else REACHED[name])
