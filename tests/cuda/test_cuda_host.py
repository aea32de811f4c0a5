"""CUDA kernels on the CPU: what CUDA promises holds there, in any order of the threads and under the sanitizers."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases.cuda_host import ORDERS, build
from cases.cuda_kernels import CASES, KERNELS, case


@pytest.mark.parametrize("name", CASES)
def test_results_are_right_in_every_order(name: str) -> None:
    reports = [case(name, order=order).report for order in ORDERS]
    assert max(report["error"] for report in reports) <= CASES[name]
    assert len({report["bits"] for report in reports}) == 1


def test_tf32_is_rounded_and_three_products_mend_it() -> None:
    once, thrice = (case(name).report["error"] for name in ("tf32", "tf32_thrice"))
    assert 100 * thrice < once > 1e-4


@pytest.mark.parametrize("flavour", ["thread", "address"])
@pytest.mark.parametrize("name", CASES)
def test_sanitizers_have_nothing_to_say(name: str, flavour: str) -> None:
    done = case(name, flavour)
    assert done.errors == ""
    assert done.report["error"] <= CASES[name]


def test_fibers_switch_by_ucontext_as_well() -> None:
    for name, most in CASES.items():
        assert case(name, "ucontext").report["error"] <= most


def test_launches_that_a_device_refuses_get_its_codes() -> None:
    value, configuration = "1", "9"  # cudaErrorInvalidValue, cudaErrorInvalidConfiguration
    done = case("refusals")
    assert done.output.split() == [value] + [configuration] * 4


def test_an_order_that_is_none_is_refused() -> None:
    done = case("rotation", order=-1)
    assert done.status < 0 and "MTML_HOST_ORDER: expected 0, 1, 2 ..., got -1" in done.errors


def test_threads_of_another_language_launch_side_by_side() -> None:
    function = ctypes.CDLL(str(build(KERNELS / "library.cu", "plain", "-shared"))).add_neighbours_in_order
    x = np.arange(96, dtype=np.float32)

    def call(order: int) -> np.ndarray:
        y = np.full_like(x, np.nan)
        assert function(x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), len(x), order) == 0
        return y

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(call, [*ORDERS] * 40))
    assert all((y == x + np.roll(x, 1)).all() for y in results)


@pytest.mark.slow
def test_a_barrier_is_cheap() -> None:
    """Of 128 threads, in time of the CPU: whole meta-steps run on fibers."""
    assert case("barrier_time").report["microseconds"] < 3
