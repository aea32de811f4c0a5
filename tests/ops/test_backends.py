"""Which backend runs: explicit argument > MTML_BACKEND > automatic, and what is said when one cannot."""

from __future__ import annotations

import pytest
import torch
from cases.inner_loop import make_case

from mtml_kernels.errors import BackendUnavailable, FallbackWarning
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.registry import Backend, Registry


def test_unknown_and_missing_backends_name_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"unknown backend 'cup'.*'reference'"):
        case.call("cup")
    without = Registry("an op")
    without.register(backend_stub("reference"))
    with pytest.raises(BackendUnavailable, match=r"an op has no 'cuda' backend.*'reference'"):
        without.named("cuda")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match=r"'cuda' cannot run here.*'reference'"):
            case.call("cuda")
        with pytest.raises(BackendUnavailable, match=r"'triton'.*no NVIDIA GPU"):
            case.call("triton")
    monkeypatch.setenv("MTML_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        case.call("auto")
    monkeypatch.setenv("MTML_BACKEND", "reference")
    assert BACKENDS.resolve("auto", "cpu", torch.float32).name == "reference"


def backend_stub(name: str, reason: str | None = None) -> Backend:
    return Backend(name, available=lambda: reason, forward=lambda *a: None, backward=lambda *a: None)


def test_explicit_beats_the_variable_beats_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("op")
    for name in ("cpu", "reference"):
        registry.register(backend_stub(name))
    monkeypatch.delenv("MTML_BACKEND", raising=False)
    assert registry.resolve("auto", "cpu", torch.float32).name == "cpu"
    monkeypatch.setenv("MTML_BACKEND", "reference")
    assert registry.resolve(None, "cpu", torch.float32).name == "reference"
    assert registry.resolve("cpu", "cpu", torch.float32).name == "cpu"


def test_auto_falls_back_once_and_loudly(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.delenv("MTML_BACKEND", raising=False)
    registry = Registry("op")
    registry.register(backend_stub("cpu", "not compiled"))
    registry.register(backend_stub("reference"))
    with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run here: not compiled.*'reference'"):
        registry.resolve("cpu", "cpu", torch.float32)
    with pytest.warns(FallbackWarning, match=r"plain PyTorch reference.*cpu: not compiled"):
        assert registry.resolve("auto", "cpu", torch.float32).name == "reference"
    registry.resolve("auto", "cpu", torch.float64)
    assert len(recwarn) == 0
    assert registry.status() == {"cpu": "not compiled", "reference": None}
