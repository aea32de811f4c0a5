"""The documents name files that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "bench/LADDER.md", "bench/results/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
FOLDERS = (".ci", "bench", "benchmarks", "csrc", "docs", "examples", "mtml_kernels", "python", "tests")


def paths_in(text: str) -> Iterator[str]:
    """What stands in backquotes and begins with a folder of the root."""
    for path in re.findall(r"`([\w./<>*-]+)`", text):
        if "/" in path and path.split("/")[0] in FOLDERS:
            yield path


def exists(path: str) -> bool:
    """A path, or a pattern with * or <any name> that at least one file fits."""
    return any(ROOT.glob(re.sub(r"<[^>]*>", "*", path).rstrip("/")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    assert [path for path in paths_in((ROOT / document).read_text()) if not exists(path)] == []


def test_paths_are_found_and_missing_ones_noticed() -> None:
    named = list(paths_in((ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 20 and "mtml_kernels/ops/<op>.py" in named
    assert not exists("mtml_kernels/no_such_file.py") and not exists("csrc/cpu/<op>/no_such_file.h")
