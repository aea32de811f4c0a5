"""The doctor on the CUDA part: which code serves which GPU, and what to do where none does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mtml_kernels.doctor import cuda as doctor_cuda
from mtml_kernels.doctor import probes
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.native import cuda_device

REBUILD = "MTML_CUDA=1 MTML_CUDA_ARCHS=90 pip install --no-build-isolation --force-reinstall --no-deps ."
H200 = SimpleNamespace(
    name="NVIDIA H200", capability=(9, 0), multiprocessors=132, shared_bytes=232448, memory_bytes=150_000_000_000
)


class NoDeviceCode(RuntimeError):
    pass


def module(archs: str, devices: list[Any], ran: int | Exception = 90) -> SimpleNamespace:
    """A compiled module on a machine with these GPUs."""

    def probe(index: int) -> int:
        if isinstance(ran, Exception):
            raise ran
        return ran

    return SimpleNamespace(
        cuda_archs=archs,
        cuda_versions=lambda: (13010, 13000),
        cuda_devices=lambda: devices,
        cuda_probe=probe,
        NoDeviceCode=NoDeviceCode,
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(found: SimpleNamespace, ran: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(cuda_device, "engine", lambda: found)
        monkeypatch.setattr(doctor_cuda, "in_a_process", lambda name: ran)
        return doctor_cuda.cuda()

    return install


@pytest.mark.parametrize(
    ("codes", "capability", "expected"),
    [
        ("sm_80 sm_90", (9, 0), "sm_90"),
        ("sm_80", (8, 9), "sm_80"),  # native code runs on later chips of its major number
        ("sm_89", (8, 6), None),
        ("sm_80", (9, 0), None),
        ("sm_80 compute_80", (9, 0), "compute_80"),
        ("sm_80 compute_80 compute_90", (12, 0), "compute_90"),
        ("sm_80 compute_90", (8, 6), "sm_80"),
        ("compute_90", (8, 0), None),
        ("sm_90a", (9, 0), "sm_90a"),
        ("sm_100a", (10, 3), None),  # a: that chip alone
        ("compute_100a", (10, 3), None),
        ("sm_100f", (10, 3), "sm_100f"),
        ("sm_100f", (12, 0), None),
        ("compute_100f", (12, 0), None),  # not even as PTX
        ("sm_103f sm_100", (10, 0), "sm_100"),
        ("sm_75 sm_80 sm_86 sm_89 sm_90 compute_90 sm_100f sm_120f", (11, 0), "compute_90"),
        ("sm_75 sm_80 sm_86 sm_89 sm_90 compute_90 sm_100f sm_120f", (12, 1), "sm_120f"),
        ("sm_75 sm_80 sm_86 sm_89 sm_90 compute_90 sm_100f sm_120f", (8, 7), "sm_86"),
        ("", (9, 0), None),
    ],
)
def test_which_code_serves_a_gpu(codes: str, capability: tuple[int, int], expected: str | None) -> None:
    assert doctor_cuda.serving_code(codes.split(), capability) == expected


def test_codes_are_checked() -> None:
    with pytest.raises(ValueError, match="code: expected sm_<number> or compute_<number>, got 'lto_90'"):
        doctor_cuda.serving_code(["lto_90"], (9, 0))


def test_a_gpu_with_code_of_its_own(installed: Any) -> None:
    found = installed(module("sm_80 sm_90", [H200]), {"0": {"architecture": 90}})
    (device,) = found["devices"]
    assert (found["built"], found["runtime"], found["driver"]) == (["sm_80", "sm_90"], "13.0", "13.1")
    assert (device["name"], device["capability"], device["shared_bytes"]) == ("NVIDIA H200", "9.0", 232448)
    assert device["ok"] and device["verdict"] == "runs sm_90; a kernel of 90 ran"


def test_a_gpu_that_has_to_compile(installed: Any) -> None:
    (device,) = installed(module("compute_80", [H200]), {"0": {"architecture": 80}})["devices"]
    assert device["ok"] and "PTX, which the driver compiles when it is first used" in device["verdict"]


@pytest.mark.parametrize("ran", [{"0": {"error": "broken"}}, {"error": "the process died of SIGSEGV"}, {}])
def test_the_kernel_decides_not_the_list(installed: Any, ran: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed(module("sm_90", [H200]), ran)
    assert not found["devices"][0]["ok"]
    healthy = {"package": {"compiled_modules": ["_C"]}, "threads": {"openmp_runtimes": []}, "self_test": {}}
    monkeypatch.setattr(
        probes, "PROBES", {name: lambda n=name: (healthy | {"cuda": found})[n] for name in (*healthy, "cuda")}
    )
    (problem,) = probes.report()["problems"]
    assert problem.startswith("GPU 0: runs sm_90; a kernel there: ")


def test_a_build_without_cuda_says_how(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cuda, "_torch_devices", lambda: [(9, 0)])
    found = installed(SimpleNamespace(), {})
    assert found["built"] == [] and REBUILD in found["build"]
    monkeypatch.setattr(doctor_cuda, "_torch_devices", list)
    assert "MTML_CUDA=1 pip install" in installed(SimpleNamespace(), {})["build"]


def test_no_gpu_is_no_problem(installed: Any) -> None:
    assert installed(module("sm_90", []), {})["devices"] == []


def test_no_code_for_a_gpu_is_one_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device"
    found = module("sm_80 sm_100f", [H200], NoDeviceCode(reason))
    monkeypatch.setattr(cuda_device, "engine", lambda: found)
    with pytest.raises(BackendUnavailable) as error:
        cuda_device.probe(0)
    message = "GPU 0 (NVIDIA H200) has compute capability 9.0, and this build has code for sm_80, sm_100f"
    assert str(error.value) == f"{message} ({reason}); in a checkout: {REBUILD}"


def test_what_else_cuda_complains_of_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "engine", lambda: module("sm_90", [H200], RuntimeError("cudaErrorUnknown: x")))
    with pytest.raises(RuntimeError, match="cudaErrorUnknown"):
        cuda_device.probe(0)


def test_a_build_without_cuda_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "engine", lambda: SimpleNamespace())
    assert cuda_device.built_codes() == () and cuda_device.devices() == []
    with pytest.raises(BackendUnavailable, match="this build has no CUDA code; in a checkout: MTML_CUDA=1 pip install"):
        cuda_device.probe(0)


def test_the_command_names_each_gpu_once() -> None:
    assert "MTML_CUDA_ARCHS=90,120 " in cuda_device.rebuild_command([(12, 0), (9, 0), (12, 0)])
