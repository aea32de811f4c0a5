"""CUDA sources, compiled for whatever a list asks for, and what of them ends up in the module."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases.gpu_architectures import fake_cuda_home

import mtml_kernels
from mtml_kernels import native
from mtml_kernels.native import cuda_device

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(
    str(ROOT)
)  # build_support/ is not installed; last, so that the installed packages are the ones under test

from build_support.compilation import Compilation, knows_cuda  # noqa: E402
from build_support.configuration import Configuration  # noqa: E402

DEVICE = Path("csrc/cuda/device.cu")
RECORD = json.loads((Path(mtml_kernels.__file__).parent / "_build.json").read_text())
VARIABLES = ("MTML_CUDA", "MTML_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS", "NVCC_APPEND_FLAGS")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def configured(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Configuration:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = Configuration.detect()
    config.check()
    return config


def real_nvcc(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Configuration:
    config = configured(monkeypatch, NVCC_APPEND_FLAGS="-Werror all-warnings", **variables)
    if config.cuda is None:
        pytest.skip(config.no_cuda)
    return config


def test_a_build_with_cuda_has_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = str(fake_cuda_home(tmp_path))
    build = Compilation(configured(monkeypatch, CUDA_HOME=home, MTML_CUDA_ARCHS="80;90a", MAX_JOBS="6"))
    bindings = Path("csrc/bindings/cuda_device.cpp")
    assert {DEVICE, bindings} <= set(build.units)
    command = build.nvcc_command(DEVICE)
    assert command[0] == f"{home}/bin/nvcc"
    assert {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"} <= set(command)
    threads = 6 // len([unit for unit in build.units if unit.suffix == ".cu"])
    assert f"--threads={max(1, threads)}" in command
    assert {"-DMTMLK_HAVE_CUDA", '-DMTMLK_CUDA_ARCHS="sm_80 sm_90a"'} <= set(build.host_command(bindings))


def test_a_build_without_cuda_has_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Compilation(configured(monkeypatch, MTML_CUDA="0"))
    assert [unit for unit in build.units if "cuda" in str(unit)] == []
    assert not any("CUDA" in word for word in build.host_command(Path("csrc/bindings/module.cpp")))
    assert build.folder == build.host_folder


def test_build_folder_is_keyed_by_what_nvcc_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_cuda_home(tmp_path)))

    def key(name: str, value: str) -> str:
        with monkeypatch.context() as patch:
            return configured(patch, **{name: value}).key

    assert key("MTML_CUDA_ARCHS", "90;80") == key("TORCH_CUDA_ARCH_LIST", "8.0 9.0") == key("CUDAARCHS", "80-real,90")
    assert key("MTML_CUDA_ARCHS", "") == key("MTML_CUDA", "1")
    others = [("MTML_CUDA", "auto"), ("MTML_CUDA", "0"), ("NVCC_APPEND_FLAGS", "-G"), ("CXXFLAGS", "-g")]
    others += [("MTML_CUDA_ARCHS", archs) for archs in ("90", "90a", "90+PTX", "80;90", "100", "100f")]
    assert len({key(name, value) for name, value in others}) == len(others)


def test_another_list_of_gpus_keeps_the_objects_of_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = str(fake_cuda_home(tmp_path))
    lists = ("80", "80;90", "90")
    builds = [Compilation(configured(monkeypatch, CUDA_HOME=home, MTML_CUDA_ARCHS=archs)) for archs in lists]
    assert len({build.host_folder for build in builds}) == 1
    assert len({build.folder for build in builds}) == len(lists)


def test_files_that_cuda_changes_are_known() -> None:
    """Another one would lie in the folder that all lists share."""
    macros = re.compile("MTMLK_HAVE_CUDA|MTMLK_CUDA_ARCHS")
    aware = {path for path in Path("csrc").rglob("*") if path.is_file() and macros.search(path.read_text())}
    assert aware == {Path("csrc/bindings/module.cpp"), Path("csrc/bindings/cuda_device.cpp")}
    assert all(knows_cuda(path) for path in (*aware, DEVICE))
    assert not knows_cuda(Path("csrc/bindings/task_linear.cpp"))


def test_the_host_compiler_of_nvcc_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cxx = shutil.which("g++") or pytest.skip("no g++")
    monkeypatch.setenv("CXX", f"/usr/bin/env {cxx} -m64")
    assert Configuration.detect().host.compiler_program == "/usr/bin/env"
    monkeypatch.setenv("CXX", f"/opt/ccache {cxx} -m64")
    assert Configuration.detect().host.compiler_program == cxx


def test_the_module_needs_no_driver() -> None:
    """The CUDA run-time library is within it, and out of sight: torch may bring another one."""
    module = str(native.engine().__file__)
    for tool in ("ldd", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert not re.search("libcuda|libcudart", needed)
    names = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in names.splitlines() if "cuda" in line.lower()}
    own = {f"mtmlk_cuda_{name}" for name in ("versions", "device_count", "device", "probe")}
    assert {name for name in exported if not name.startswith("mtmlk_")} == set()
    assert (own <= exported) if RECORD["cuda_archs"] else (exported == set())


# A library with the driver's name and nothing of its functions, which tells when it is loaded.
WITNESS = """
#include <unistd.h>
__attribute__((constructor)) static void tell() { if (write(1, "asked ", 6) != 6) _exit(1); }
"""


def test_import_asks_no_driver(tmp_path: Path) -> None:
    if not cuda_device.built_codes():
        pytest.skip("built without CUDA")
    compiler = shutil.which("g++") or pytest.skip("no g++")
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, input=WITNESS, text=True, check=True)
    code = "import mtml_kernels._C as m; print('imported ', end='', flush=True); m.cuda_versions()"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["imported", "asked"]


def test_devices_are_told_without_a_gpu_too() -> None:
    assert all(device.shared_bytes > 0 for device in cuda_device.devices())
    if not cuda_device.built_codes():
        pytest.skip("built without CUDA")
    driver, runtime = cuda_device.versions()
    assert RECORD["nvcc_version"].startswith(runtime)
    assert driver is not None or cuda_device.devices() == []


@pytest.mark.gpu
def test_this_build_runs_on_every_gpu_here() -> None:
    devices = cuda_device.devices()
    if not devices:
        pytest.skip("no GPU, or built without CUDA")
    for index, device in enumerate(devices):
        assert 50 <= cuda_device.probe(index) <= 10 * device.capability[0] + device.capability[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "archs", ["90", "90a", "9.0a", "100f", "12.0+PTX", "Hopper", "", "80;80", "100;100f;100+PTX", "all-major"]
)
def test_cuda_sources_compile_without_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archs: str) -> None:
    build = Compilation(real_nvcc(monkeypatch, MTML_CUDA_ARCHS=archs, MAX_JOBS="1"), tmp_path)
    # minutes for every list; tests/cuda/test_persistent_compiles.py has them
    large = ("in_float", "in_double", "in_tf32", "part_")
    for source in (unit for unit in build.units if unit.suffix == ".cu" and not unit.name.startswith(large)):
        assert build.compile(source).stat().st_size > 0


@pytest.mark.slow
def test_another_list_leaves_no_stale_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = Path(str(pytest.importorskip("triton").__file__)).parent
    cuobjdump = next(triton.glob("backends/nvidia/bin/cuobjdump*"), None)
    if cuobjdump is None:
        pytest.skip("this triton comes without cuobjdump")

    def codes_of(archs: str) -> set[str]:
        config = real_nvcc(monkeypatch, MTML_CUDA_ARCHS=archs, MAX_JOBS="1")
        found = str(Compilation(config, tmp_path).compile(DEVICE))
        shown = subprocess.run(
            [str(cuobjdump), "--list-elf", "--list-ptx", found], capture_output=True, text=True
        ).stdout
        return set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", shown))

    assert codes_of("80") == {"sm_80"}
    assert codes_of("90;86") == {"sm_86", "sm_90"}
    assert codes_of("80") == {"sm_80"}


@pytest.mark.slow
def test_what_nvcc_cannot_compile_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = Compilation(real_nvcc(monkeypatch, MTML_CUDA_ARCHS="90"), tmp_path)
    broken = tmp_path / "broken.cu"
    broken.write_text("no code\n")
    with pytest.raises(SystemExit, match=r"exit status \d+ from: .*broken\.cu.*; MTML_CUDA=0 builds for the CPU alone"):
        build.compile(broken)
