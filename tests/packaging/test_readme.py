"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
COMPLETE = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if code.startswith("import")]


@pytest.mark.parametrize("code", COMPLETE, ids=[f"example-{i}" for i in range(len(COMPLETE))])
def test_complete_examples_run(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["loss"].item() < 10.0  # type: ignore[attr-defined]


def test_there_is_one() -> None:
    assert COMPLETE
