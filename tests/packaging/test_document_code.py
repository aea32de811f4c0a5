"""What README and the pages of docs/ show runs as it stands."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = [page for page in PAGES if page.name.startswith("from_")]  # tests/compat/ runs those, with what they need
BESIDE = "# before: "  # how two columns of code begin, which no one can run
BLOCKS = [
    pytest.param(page, code, id=f"{page.stem}-{i}")
    for page in (ROOT / "README.md", *(page for page in PAGES if page not in ELSEWHERE))
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    if not code.startswith(BESIDE)
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_code_runs(page: Path, code: str) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, str(page), "exec"), names)
    loss = names.get("loss")
    assert loss is None or math.isfinite(loss.item())  # type: ignore[attr-defined]


def test_there_is_code() -> None:
    pages = {param.values[0] for param in BLOCKS}
    assert {ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "what_it_computes.md"} <= pages


@pytest.mark.parametrize("page", ELSEWHERE, ids=[page.stem for page in ELSEWHERE])
def test_code_about_other_libraries_runs_in_their_tests(page: Path) -> None:
    tests = [test.read_text() for test in (ROOT / "tests" / "compat").glob("test_*.py")]
    assert any(f'"{page.name}"' in text for text in tests)
