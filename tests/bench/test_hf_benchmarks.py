"""``benchmarks/`` and its kernel folder, as Hugging Face's ``kernels benchmark`` (0.17) goes about them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

import mtml_kernels  # noqa: E402
from bench.__main__ import main  # noqa: E402

SCRIPTS = sorted((ROOT / "benchmarks").glob("benchmark*.py"))


class Benchmark:
    """What scripts derive from there: a kernel, an output and a device are set by the runner."""

    seed: int | None = None
    device = "cpu"

    def __init__(self) -> None:
        self.kernel: Any = None
        self.out: Any = None

    def setup(self) -> None:
        pass


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("kernels.benchmark")
    module.Benchmark = Benchmark  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    monkeypatch.setitem(sys.modules, "kernels.benchmark", module)


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classes(script: Path) -> list[type[Benchmark]]:
    found = vars(load(script, "benchmark_module")).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, Benchmark) and c is not Benchmark]


def ready(kind: type[Benchmark], name: str, kernel: object = mtml_kernels) -> Any:
    """An instance at the point where a workload is timed."""
    instance = kind()
    instance.kernel = kernel
    assert instance.seed is not None
    torch.manual_seed(instance.seed)
    getattr(instance, f"setup_{name}", instance.setup)()
    return instance


def workloads() -> Iterator[tuple[str, str]]:
    """(script, workload), by their text: the base class is not there when tests are collected."""
    for script in SCRIPTS:
        for line in script.read_text().splitlines():
            if line.startswith("    def benchmark_"):
                yield script.name, line.removeprefix("    def benchmark_").partition("(")[0]


CASES = list(workloads())


def test_there_are_both_ops() -> None:
    assert [s.name for s in SCRIPTS] == ["benchmark_inner_loop.py", "benchmark_multihead_loss.py"] and len(CASES) == 4


@pytest.mark.parametrize(
    ("script", "name"),
    [pytest.param(*case, marks=pytest.mark.slow if case[1] == "vocabulary" else ()) for case in CASES],
)
def test_workloads_match_their_reference(script: str, name: str) -> None:
    (kind,) = classes(ROOT / "benchmarks" / script)
    instance = ready(kind, name)
    for _ in range(2):  # as it is timed: again and again
        getattr(instance, f"benchmark_{name}")()
        want = getattr(instance, f"verify_{name}")()
        assert instance.out.shape == want.shape and not instance.out.requires_grad
        assert torch.allclose(instance.out, want, atol=1e-2)  # the command's own comparison


@pytest.mark.parametrize("name", [name for script, name in CASES if "inner_loop" in script])
def test_first_order_gradients_do_not_match(name: str) -> None:
    """The command's tolerance is absolute: what is compared must be large beside it."""

    def first_order(*args: Any, **options: Any) -> Any:
        return mtml_kernels.inner_loop(*args, first_order=True, **options)

    (kind,) = classes(ROOT / "benchmarks" / "benchmark_inner_loop.py")
    kernel = SimpleNamespace(trace=mtml_kernels.trace, inner_loop=first_order)
    instance = ready(kind, name, kernel)
    getattr(instance, f"benchmark_{name}")()
    assert not torch.allclose(instance.out, getattr(instance, f"verify_{name}")(), atol=1e-2)


def test_the_kernel_folder(tmp_path: Path) -> None:
    assert main(["export", "--format", "hf-kernels", "--out", str(tmp_path)]) == 0
    copies = sorted((tmp_path / "benchmarks").iterdir())
    assert [p.read_bytes() for p in copies] == [p.read_bytes() for p in SCRIPTS]
    for backend in ("cpu", "cuda"):
        variant = tmp_path / "build" / f"torch-{backend}"
        data = json.loads((variant / "metadata.json").read_text())
        assert data.keys() == {"id", "name", "version", "license", "python-depends", "backend"}
        assert data["backend"] == {"type": backend} and isinstance(data["version"], int)
        assert data["id"].isidentifier() and data["name"].replace("-", "_").isidentifier()
        kernel = load(variant / "__init__.py", data["id"])
        assert all(getattr(kernel, name) is getattr(mtml_kernels, name) for name in kernel.__all__)
