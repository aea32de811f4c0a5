"""The kernels that run on the CPU compile for GPUs from the same source, without a warning, and run there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases.cuda_host import INCLUDE, run
from cases.cuda_kernels import CASES, MAIN
from cases.triton_process import CAPABILITIES


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=os.pathsep.join([str(Path(home) / "bin"), os.environ.get("PATH", "")]))
    return found or pytest.skip("no nvcc")


def compile_for(capability: int, source: Path, target: Path, *flags: str) -> None:
    chip = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    command = [nvcc(), "-std=c++17", "-Werror", "all-warnings", *INCLUDE, chip, *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
