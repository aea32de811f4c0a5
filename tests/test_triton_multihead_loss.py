"""The Triton losses: computed by Triton's interpreter, compiled for GPUs that are not here, announced to registries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.ops._backends import Backend, Registry
from mtml_kernels.triton._register import register_multihead_loss

pytest.importorskip("triton", reason="triton is required on Linux only")

HERE = Path(__file__).parent
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}
REGISTERS, RESIDENT = 65536, {"heads": 4, "vocabulary": 2}  # programs a multiprocessor must hold: see tile_of


def python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=300)


def test_through_the_interpreter() -> None:
    """The variable counts when triton is imported, so these tests have a process of their own."""
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", HERE.parent)
    done = python("-P", "-m", "pytest", HERE / "triton_interpreted.py", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every kernel takes on every GPU, all compiled by one process."""
    cache = str(tmp_path_factory.mktemp("triton"))
    done = python(HERE / "triton_compile.py", *map(str, SHARED_KB), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("capability", SHARED_KB)
def test_compiles_without_a_gpu(capability: int, compiled: dict[str, list[dict[str, Any]]]) -> None:
    kernels = compiled[str(capability)]
    assert {k["name"] for k in kernels} == {"norm", "finish", "scale", "heads", "vocabulary"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_KB[capability] * 1024, kernel
        if kernel["usage"] is None:  # this triton comes without cuobjdump
            continue
        assert kernel["usage"]["STACK"] <= 64 and kernel["usage"]["LOCAL"] == 0, kernel
        programs = RESIDENT.get(kernel["name"], 1)
        assert kernel["usage"]["REG"] * 32 * kernel["warps"] * programs <= REGISTERS, kernel


def test_registers_for_gpus_alone_and_without_importing_triton() -> None:
    registry = Registry("multihead_loss")
    register_multihead_loss(registry)
    registry.register(Backend("reference", lambda: None, lambda *a: None, lambda *a: None))
    with pytest.raises(BackendUnavailable, match="triton"):
        registry.resolve("triton", "cpu", torch.float32)
    backend = registry.named("triton")
    assert backend.supports("cuda", torch.bfloat16) is None
    assert "float64" in str(backend.supports("cuda", torch.float64))
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import mtml_kernels.triton._register\n"
        "assert 'triton' not in set(sys.modules) - before"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
