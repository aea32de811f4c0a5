"""The examples of the API reference run and print what they say."""

from __future__ import annotations

import doctest
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mtml.compat import LIBRARIES

API = Path(__file__).parents[2] / "docs" / "api"
NAMES = [name for page in sorted(API.glob("*.md")) for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]


def examples() -> Iterator[doctest.DocTest]:
    for name in NAMES:
        module, _, last = name.rpartition(".")
        value = getattr(import_module(module), last)
        home = sys.modules.get(getattr(value, "__module__", ""))
        yield from (test for test in doctest.DocTestFinder().find(value, name, module=home) if test.examples)


EXAMPLES = list(examples())


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_example(example: doctest.DocTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])  # mtml.compat.install adds to it
    loaded = set(sys.modules)
    torch.manual_seed(0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(
        example, out=report.append
    )
    for name in [name for name in sys.modules if name not in loaded and name.partition(".")[0] in LIBRARIES]:
        del sys.modules[name]
    assert result.failed == 0, "".join(report)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 50
