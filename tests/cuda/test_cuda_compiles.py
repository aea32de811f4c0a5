"""The kernels that run on the CPU compile for GPUs from the same source, without a warning, and run there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases.cuda_host import run
from cases.cuda_kernels import CASES, MAIN
from cases.nvcc import compile_for
from cases.triton_process import CAPABILITIES


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_warnings(capability: int, tmp_path: Path) -> None:
    compile_for(capability, MAIN, tmp_path / "main.o", "-c")


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel() { int unused; }\n")
    with pytest.raises(AssertionError, match="never referenced"):
        compile_for(90, source, tmp_path / "unused.o", "-c")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_give_the_same_on_a_gpu(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    compile_for(10 * major + minor, MAIN, tmp_path / "main")
    names = [n for n in CASES if n != "side_by_side" and (major >= 9 or not n.startswith("clusters"))]
    for name in names:
        assert run(tmp_path / "main", name).report["error"] <= CASES[name], name
