"""The API reference has every public name, once."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

API = Path(__file__).parents[2] / "docs" / "api"
WRITTEN = [name for page in sorted(API.glob("*.md")) for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
MODULES = [
    *("mtml", "mtml.balance", "mtml.distributed", "mtml.inner", "mtml.tasks", "mtml.weighting", "mtml.compat"),
    "mtml_kernels",
]


def found(name: str) -> object:
    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(module: str) -> None:
    written = [found(name) for name in WRITTEN]
    public = {name: getattr(import_module(module), name) for name in import_module(module).__all__}
    missing = [
        name
        for name, value in public.items()
        if f"{module}.{name}" not in MODULES and name != "__version__" and not any(value is other for other in written)
    ]
    assert missing == []


def test_names_are_written_once() -> None:
    assert len(WRITTEN) == len(set(WRITTEN)) > 50
    assert all(getattr(found(name), "__doc__", None) for name in WRITTEN)
