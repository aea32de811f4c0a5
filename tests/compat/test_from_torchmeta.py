"""What docs/from_torchmeta.md shows runs as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "from_torchmeta.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)


@pytest.fixture
def names_restored() -> Iterator[None]:
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchmeta"]:
        del sys.modules[name]


@pytest.mark.parametrize("code", EXAMPLES, ids=["loop", "one line"])
@pytest.mark.usefixtures("names_restored")
def test_examples_run(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    assert names["loss"].isfinite()  # type: ignore[attr-defined]
