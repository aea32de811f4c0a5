"""The Triton kernels of rows and sums of the inner loop: computed by Triton's interpreter, compiled for absent GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.triton_process import CAPABILITIES, MARKS, SHARED_KB, compiled_by, interpret

pytest.importorskip("triton", reason="triton is required on Linux only")

KERNELS = {
    *("moments_kernel", "rstd_kernel", "column_kernel", "means_kernel", "row_stats_kernel", "row_means_kernel"),
    *("element_kernel", "class_kernel", "mean_kernel", "weights_kernel", "weights_back_kernel"),
    *("softmax_kernel", "softmax_back_kernel", "sum_kernel", "lookup_kernel", "segment_kernel"),
    *("step_kernel", "rule_kernel", "adjoint_kernel", "rates_kernel", "sums_kernel", "clip_kernel", "unclip_kernel"),
    "launched",  # poolings
}
REGISTERS = 128  # of a thread, so that four programs of four warps stand on a multiprocessor


@pytest.mark.parametrize("marked", MARKS)
def test_through_the_interpreter(marked: str) -> None:
    interpret("inner_loop_rows.py", marked)


def test_faults_are_found() -> None:
    interpret("watch.py", "not slow")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    kernels = compiled_by("inner_loop_rows.py", capability, tmp_path)
    assert {k["name"] for k in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_KB[capability] * 1024, kernel
        if kernel["usage"] is not None:  # else this triton comes without cuobjdump
            assert kernel["usage"]["STACK"] <= 64 and kernel["usage"]["LOCAL"] == 0, kernel
            assert kernel["usage"]["REG"] <= REGISTERS, kernel
