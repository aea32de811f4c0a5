"""The Triton head_inner_loop: computed by Triton's interpreter, compiled for GPUs that are not here, its place."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from cases.triton_process import CAPABILITIES, MARKS, SHARED_KB, compiled_by, interpret

from mtml_kernels.errors import BackendUnavailable, FallbackWarning
from mtml_kernels.registry import Backend, Registry
from mtml_kernels.triton.backends import HEAD_INNER_LOOP
from mtml_kernels.triton.head_inner_loop.policy import launch_of, refusal

pytest.importorskip("triton", reason="triton is required on Linux only")


@pytest.mark.parametrize("marked", MARKS)
def test_through_the_interpreter(marked: str) -> None:
    interpret("head_inner_loop.py", marked)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    kernels = compiled_by("head_inner_loop.py", capability, tmp_path)
    names = {"products", "chain", "sums", "few_shot", *(("widest",) if capability in (80, 120) else ())}
    assert {k["name"] for k in kernels} == names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_KB[capability] * 1024, kernel
        if kernel["usage"] is not None:  # else this triton comes without cuobjdump
            assert kernel["usage"]["STACK"] <= 64 and kernel["usage"]["LOCAL"] == 0, kernel


def test_the_launch_policy() -> None:
    assert launch_of(25, 5, 4) == (32, 8, 16, 4, True, True)
    assert launch_of(0, 1, 4) == (16, 8, 16, 4, True, True)
    assert launch_of(28, 5, 4) == (32, 8, 16, 4, True, False)  # 33 columns of products
    assert launch_of(20, 9, 4) == (32, 16, 16, 4, True, False)
    assert launch_of(33, 5, 4) == (64, 8, 16, 4, False, False)
    assert launch_of(25, 5, 8) == (32, 8, 16, 4, False, False)
    assert launch_of(100, 20, 4) == (128, 32, 16, 16, False, False)
    assert refusal(128, 32, 4) is None and refusal(256, 16, 4) is None
    assert "got S = 129, C = 32: 256 x 32" in str(refusal(129, 32, 4)) and refusal(128, 32, 8) is not None
    with pytest.raises(ValueError, match=r"features_support: expected S x C of at most 4096.*Way out: backend='ref"):
        launch_of(500, 20, 4)


def test_registers_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry = Registry("head_inner_loop")
    registry.register(HEAD_INNER_LOOP)
    registry.register(Backend("reference", lambda: None, lambda *a: None, lambda *a: None))
    with pytest.raises(BackendUnavailable, match="triton"):
        registry.resolve("triton", "cpu", torch.float32)
    supports = registry.named("triton").supports
    assert supports("cuda", torch.float32) is None and supports("cuda", torch.float64) is None
    assert "float32 and float64" in str(supports("cuda", torch.bfloat16))
    assert "'cpu'" in str(supports("cpu", torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports("cpu", torch.float32) is None


def test_what_does_not_fit_takes_the_reference_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTML_BACKEND", raising=False)
    registry = Registry("some_op")
    with pytest.warns(FallbackWarning, match=r"some_op runs on the plain PyTorch reference.*triton: too wide"):
        assert registry.instead("auto", "triton", "too wide") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.instead(None, "triton", "too wide") == "reference"  # it was said once
    with pytest.raises(BackendUnavailable, match="some_op: backend 'triton' cannot run this: too wide"):
        registry.instead("triton", "triton", "too wide")
    monkeypatch.setenv("MTML_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="too wide"):
        registry.instead("auto", "triton", "too wide")
