"""The predicted time of a call is the formula at the head of predict.py, and what bounds it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtml_kernels.schedule.cost import Cost, Product
from mtml_kernels.schedule.describe import device_of
from mtml_kernels.schedule.devices import DEVICES, LAUNCH_SECONDS, PRECISIONS, SHARE, Device, device_named
from mtml_kernels.schedule.predict import BOUNDS, by_bound, occupancy, predict

# 100 multiprocessors of 1 GHz, 10 TFLOP/s, 100 of TF32, 1 TB/s, 10 MB of L2 at 10 TB/s.
GPU = Device("a GPU", r"^a GPU$", 100, 1e9, 10e12, 100e12, 5e12, 1e12, 10_000_000, 10e12, 228 << 10)
LARGE = Product(10, 640, 640, 10 * 640 * 640 * 1000)  # 1000 tiles of 64 x 64


def product(batch: int, rows: int, cols: int, depth: int) -> Product:
    return Product(batch, rows, cols, batch * rows * cols * depth)


def test_arithmetic_bytes_and_launch() -> None:
    busy = predict(Cost((LARGE,), 0, 0, 0), GPU)
    assert busy.arithmetic == pytest.approx(LARGE.flops / 6e12) and busy.bound == "arithmetic"
    assert busy.seconds == busy.arithmetic + LAUNCH_SECONDS
    moving = predict(Cost((), 0, 60_000_000, 40_000_000), GPU)
    assert moving.memory == pytest.approx(100e-6) and moving.bound == "bytes"
    assert moving.seconds == pytest.approx(100e-6 + LAUNCH_SECONDS)
    small = predict(Cost((), 1000, 1000, 1000), GPU)
    assert small.bound == "launch" and small.seconds == pytest.approx(LAUNCH_SECONDS, rel=0.2)
    both = predict(Cost((LARGE,), 0, 60_000_000, 40_000_000), GPU)
    assert both.seconds == LAUNCH_SECONDS + max(busy.arithmetic, moving.memory)  # beside each other


def test_what_fits_the_second_level_cache_comes_from_it() -> None:
    fits, not_quite = (predict(Cost((), 0, size, 0), GPU).memory for size in (10_000_000, 10_000_001))
    assert fits == pytest.approx(1e-6) and not_quite == pytest.approx(10e-6, rel=1e-3)


def test_precisions() -> None:
    flops = LARGE.flops
    by_name = {name: predict(Cost((LARGE,), 0, 0, 0), GPU, name).arithmetic for name in PRECISIONS}
    assert by_name["fp32"] == pytest.approx(flops / 6e12) and by_name["fp64"] == pytest.approx(flops / 3e12)
    assert by_name["tf32"] == pytest.approx(flops / 40e12)
    assert by_name["3xtf32"] == pytest.approx(flops / (100e12 * 0.5 / 3))
    # what is no product has no tensor core
    assert predict(Cost((), 10**9, 0, 0), GPU, "tf32").arithmetic == predict(Cost((), 10**9, 0, 0), GPU).arithmetic


@pytest.mark.parametrize(
    ("products", "share"),
    [
        ((), 1.0),
        ((LARGE,), 1.0),
        ((product(50, 64, 64, 100),), 0.5),  # 50 tiles for 100 multiprocessors
        ((product(200, 64, 48, 100),), 0.75),  # a quarter of each tile is padding
        ((product(200, 10, 64, 100),), 10 / 16),  # a tile of 16 rows
        ((product(25, 10, 1, 40),), 0.25 * 10 / 256),
        ((product(10, 64, 64, 1024),), 0.4),  # the k-loop cut in four
        ((product(10, 64, 64, 100_000),), 1.0),
        ((product(30, 64, 64, 100), product(20, 64, 64, 100)), 0.5),  # both results of a backward
    ],
)
def test_occupancy(products: tuple[Product, ...], share: float) -> None:
    assert occupancy(products, GPU) == pytest.approx(share)


def test_a_long_loop_over_k_has_a_latency() -> None:
    short, long = (predict(Cost((product(100, 16, 16, depth),), 0, 0, 0), GPU, "tf32") for depth in (40, 256))
    assert short.latency == pytest.approx((220 + 33 * 10) / 1e9)
    assert long.latency == pytest.approx((220 + 33 * 64) / 1e9) and long.bound == "latency"


def test_a_schedule_is_the_sum_of_its_calls() -> None:
    calls = [predict(Cost((LARGE,), 0, 0, 0), GPU), *[predict(Cost((), 0, 0, 0), GPU)] * 3]
    split = by_bound(calls)
    assert tuple(split) == BOUNDS and sum(split.values()) == pytest.approx(sum(call.seconds for call in calls))
    assert (split["arithmetic"], split["bytes"]) == (calls[0].seconds, 0)
    assert not any(by_bound([]).values())


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3", None),
        ("Tesla V100", None),
    ],
)
def test_devices_by_the_name_that_pytorch_reports(reported: str, name: str | None) -> None:
    assert device_named(reported) == (None if name is None else DEVICES[name])


def test_where_tensors_lie_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of(torch.device("cpu")) == (DEVICES["h200"], False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert device_of(torch.device("cuda", 1)) == (DEVICES["l4"], True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert device_of(torch.device("cuda", 1)) == (DEVICES["h200"], False)


@pytest.mark.parametrize("name", DEVICES)
def test_constants_are_in_their_units(name: str) -> None:
    """A zero too many is seen: FP32 peaks are two FLOPs of 64 or 128 lanes a clock and multiprocessor."""
    device = DEVICES[name]
    lanes = device.fp32 / (2 * device.processors * device.hertz)
    assert min(abs(lanes - 64), abs(lanes - 128)) < 1.5
    assert device.fp32 <= device.tf32 <= 10 * device.fp32 and device.fp64 < device.fp32
    assert 0.2e12 < device.bandwidth < device.l2_bandwidth < 10 * device.bandwidth
    assert 40 << 20 <= device.l2_bytes <= 72 << 20
    assert set(SHARE) == set(PRECISIONS) and all(0 < share < 1 for share in SHARE.values())


def test_a_faster_device_is_faster() -> None:
    cost = Cost((LARGE,), 0, 60_000_000, 0)
    for slower in (replace(GPU, fp32=5e12), replace(GPU, bandwidth=0.01e12)):
        assert predict(cost, slower).seconds > 1.5 * predict(cost, GPU).seconds
