"""The schedule in Triton: computed by Triton's interpreter, compiled for GPUs that are not here, its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.triton_process import CAPABILITIES, MARKS, SHARED_KB, compiled_by, interpret

pytest.importorskip("triton", reason="triton is required on Linux only")


@pytest.mark.parametrize("marked", MARKS)
def test_through_the_interpreter(marked: str) -> None:
    interpret("inner_loop.py", marked)


def test_building_blocks_through_the_interpreter() -> None:
    interpret("task_layers.py", "not slow")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    kernels = compiled_by("inner_loop.py", capability, tmp_path)
    assert len(kernels) >= 20
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_KB[capability] * 1024, kernel
        if kernel["usage"] is not None:  # else this triton comes without cuobjdump
            assert kernel["usage"]["STACK"] <= 64 and kernel["usage"]["LOCAL"] == 0, kernel
        if kernel["precision"] == "ieee" and kernel["products"]:
            assert not kernel["mma"] and kernel["fma"], kernel
        if kernel["precision"] != "ieee" and kernel["products"]:
            assert kernel["mma"], kernel
