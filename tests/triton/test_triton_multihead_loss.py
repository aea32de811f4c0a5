"""The Triton losses: computed by Triton's interpreter, compiled for GPUs that are not here, announced to registries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases.triton_process import CAPABILITIES, MARKS, SHARED_KB, compiled_by, interpret, python

from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.registry import Backend, Registry
from mtml_kernels.triton.backends import MULTIHEAD_LOSS

pytest.importorskip("triton", reason="triton is required on Linux only")

REGISTERS = 65536
# Programs that a multiprocessor must hold: see tile_of.
RESIDENT = {"heads": 4, "labels": 4, "vocabulary": 2, "vocabulary_labels": 2}


@pytest.mark.parametrize("marked", MARKS)
def test_through_the_interpreter(marked: str) -> None:
    interpret("multihead_loss.py", marked)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    kernels = compiled_by("multihead_loss.py", capability, tmp_path)
    assert {k["name"] for k in kernels} == {"norm", "empty", "scale", *RESIDENT}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_KB[capability] * 1024, kernel
        if kernel["usage"] is None:  # this triton comes without cuobjdump
            continue
        # "heads" has every kind of head in one launch: what lives around its tiles is spilled
        stack = 96 if kernel["name"] == "heads" else 0
        assert kernel["usage"]["STACK"] <= stack and kernel["usage"]["LOCAL"] == 0, kernel
        programs = RESIDENT.get(kernel["name"], 1)
        assert kernel["usage"]["REG"] * 32 * kernel["warps"] * programs <= REGISTERS, kernel


def test_registers_for_gpus_alone_and_without_importing_triton() -> None:
    registry = Registry("multihead_loss")
    registry.register(MULTIHEAD_LOSS)
    registry.register(Backend("reference", lambda: None, lambda *a: None, lambda *a: None))
    with pytest.raises(BackendUnavailable, match="triton"):
        registry.resolve("triton", "cpu", torch.float32)
    backend = registry.named("triton")
    assert backend.supports("cuda", torch.bfloat16) is None
    assert "float64" in str(backend.supports("cuda", torch.float64))
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import mtml_kernels.triton.backends\n"
        "assert 'triton' not in set(sys.modules) - before"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
