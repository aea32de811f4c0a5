"""The list of GPUs that a build is for: every spelling, against what nvcc knows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from cases.gpu_architectures import NVCC, codes, fake_cuda_home

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(
    str(ROOT)
)  # build_support/ is not installed; last, so that the installed packages are the ones under test

from build_support import native_gpus  # noqa: E402
from build_support.cuda import Cuda, detect_cuda  # noqa: E402
from build_support.gpu_names import Target, parse_target  # noqa: E402
from build_support.gpu_targets import TargetList, requested  # noqa: E402
from build_support.nvcc import Nvcc, find_nvcc  # noqa: E402

NEWEST = "13.0.88"


def no_gpu() -> list[tuple[int, int]]:
    raise LookupError("no driver")


def resolve(text: str, nvcc: str = NEWEST, devices=no_gpu) -> str:
    """The codes that a list asks for."""
    return " ".join(target.code for target in TargetList("MTML_CUDA_ARCHS", nvcc, codes(nvcc), devices).targets(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", "sm_90"),
        ("90a", "sm_90a"),
        ("9.0a", "sm_90a"),
        ("80;90a", "sm_80 sm_90a"),
        ("8.0 9.0a 12.0+PTX", "sm_80 sm_90a sm_120 compute_120"),
        ("9.0,10.0", "sm_90 sm_100"),
        (" 12.0 ;, 8.0\t", "sm_80 sm_120"),
        ("100f", "sm_100f"),
        ("10.0F", "sm_100f"),
        ("12.0f+ptx", "sm_120f compute_120f"),
        ("sm_90", "sm_90"),
        ("SM90", "sm_90"),
        ("compute_90", "compute_90"),
        ("90-real", "sm_90"),
        ("90a-virtual", "compute_90a"),
        ("90-real;90-virtual", "sm_90 compute_90"),
        ("80;80", "sm_80"),
        ("80 8.0 sm_80 80-real", "sm_80"),
        ("Turing", "sm_75"),
        ("Ampere", "sm_80 sm_86"),
        ("Ampere+Tegra", "sm_87"),
        ("Ada", "sm_89"),
        ("Hopper", "sm_90"),
        ("hopper+PTX", "sm_90 compute_90"),
        ("Blackwell", "sm_100f sm_120f"),
        ("Blackwell+PTX", "sm_100f compute_120 sm_120f"),
        ("Hopper;Blackwell", "sm_90 sm_100f sm_120f"),
        ("100;100f", "sm_100f"),  # nvcc refuses the pair
        ("100;100a", "sm_100 sm_100a"),
        ("100f;100+PTX", "compute_100 sm_100f"),
        ("all-major", "sm_75 sm_80 sm_90 sm_100 sm_110 sm_120 compute_120"),
        ("", "sm_75 sm_80 sm_86 sm_89 sm_90 compute_90 sm_100f sm_120f"),
        (" ; ", "sm_75 sm_80 sm_86 sm_89 sm_90 compute_90 sm_100f sm_120f"),
    ],
)
def test_every_spelling(text: str, expected: str) -> None:
    assert resolve(text) == expected


def test_order_does_not_matter() -> None:
    assert resolve("90;80;120f;100a") == resolve("100a,120f 80 90") == "sm_80 sm_90 sm_100a sm_120f"


@pytest.mark.parametrize(
    ("nvcc", "text", "expected"),
    [
        ("12.4.131", "", "sm_75 sm_80 sm_86 sm_89 sm_90 compute_90"),
        ("12.8.93", "", "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
        ("12.8.93", "Blackwell", "sm_100 sm_120"),
        ("12.8.93", "101", "sm_101"),
        ("12.4.131", "Volta", "sm_70"),
        ("12.4.131", "all-major", "sm_50 sm_60 sm_70 sm_80 sm_90 compute_90"),
    ],
)
def test_other_releases_of_nvcc(nvcc: str, text: str, expected: str) -> None:
    assert resolve(text, nvcc) == expected


def test_all_is_every_plain_one() -> None:
    plain = [f"sm_{arch}" for arch in NVCC[NEWEST].split() if arch.isdigit()]
    assert sorted(resolve("all").split()) == sorted([*plain, "compute_121"])


@pytest.mark.parametrize(
    "word",
    ["101", "70", "Volta", "Hoper", "9", "9.0b", "90f", "+PTX", "sm_90-virtual", "compute_90-real", "lto_90", "9.0.0"],
)
def test_an_unknown_one_is_one_line(word: str) -> None:
    with pytest.raises(SystemExit) as stop:
        resolve(f"80;{word}")
    message = str(stop.value)
    assert "\n" not in message
    assert message.startswith(f"mtml-kernels: MTML_CUDA_ARCHS: {word!r} is no GPU architecture that nvcc 13.0.88 knows")
    assert "it knows 75, 80, 86, 87, 88, 89, 90, 90a, 100, 100a, 100f" in message


def test_native_is_what_the_driver_tells() -> None:
    assert resolve("native", devices=lambda: [(9, 0), (8, 6), (9, 0)]) == "sm_86 sm_90"
    assert resolve("native;120+PTX", devices=lambda: [(9, 0)]) == "sm_90 sm_120 compute_120"


def test_native_without_a_gpu_is_one_line() -> None:
    message = "'native' asks for the GPUs of this machine, and there is none \\(no driver\\); name the architecture"
    with pytest.raises(SystemExit, match=message):
        resolve("native")


def test_native_on_a_gpu_that_nvcc_does_not_know_names_it() -> None:
    with pytest.raises(SystemExit, match=r"has a GPU of architecture 103, which nvcc 12\.4\.131 does not know"):
        resolve("native", "12.4.131", devices=lambda: [(10, 3)])


def test_a_machine_without_a_driver() -> None:
    with pytest.raises(LookupError, match=r"no driver: libno-such-cuda\.so cannot be loaded"):
        native_gpus.capabilities("libno-such-cuda.so")


def test_gencode() -> None:
    assert Target(90, "a").gencode == "-gencode=arch=compute_90a,code=sm_90a"
    assert Target(90, ptx=True).gencode == "-gencode=arch=compute_90,code=compute_90"
    assert parse_target("nothing") == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MTML_CUDA_ARCHS": "90", "TORCH_CUDA_ARCH_LIST": "8.0", "CUDAARCHS": "75"}, ("MTML_CUDA_ARCHS", "90")),
        ({"MTML_CUDA_ARCHS": " ", "TORCH_CUDA_ARCH_LIST": "8.0"}, ("TORCH_CUDA_ARCH_LIST", "8.0")),
        ({"CUDAARCHS": "75"}, ("CUDAARCHS", "75")),
        ({}, ("MTML_CUDA_ARCHS", "")),
    ],
)
def test_which_variable_decides(environment: dict[str, str], expected: tuple[str, str]) -> None:
    assert requested(environment) == expected


def test_what_nvcc_lists_is_found_in_its_help(tmp_path: Path) -> None:
    nvcc = Nvcc.at(find_nvcc({"CUDA_HOME": str(fake_cuda_home(tmp_path))}))
    assert nvcc.version == NEWEST
    assert nvcc.codes == codes(NEWEST)
    assert nvcc.library_flags() == ["-L/a folder/lib"]


def test_the_nvcc_of_this_machine_is_understood() -> None:
    try:
        nvcc = Nvcc.at(find_nvcc(os.environ))
    except LookupError as reason:
        pytest.skip(str(reason))
    assert {"sm_80", "compute_80", "sm_90a"} <= nvcc.codes
    assert any(flag.startswith("-L") for flag in nvcc.library_flags())
    if nvcc.version == NEWEST:
        assert nvcc.codes == codes(NEWEST)


def test_places_of_nvcc(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="CUDA_PATH=/nowhere has no bin/nvcc"):
        find_nvcc({"CUDA_PATH": "/nowhere"})
    home = fake_cuda_home(tmp_path)
    assert find_nvcc({"PATH": str(home / "bin")}) == find_nvcc({"CUDA_HOME": str(home)}) == home / "bin" / "nvcc"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\nexit 1\n", "--version ends with status 1"),
        ("#!/bin/sh\necho 3\n", "does not answer as nvcc does"),
        ("#!/no/such/shell\n", "does not run"),
    ],
)
def test_an_nvcc_that_is_broken_is_a_reason(script: str, reason: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    assert reason in detect_cuda({"CUDA_HOME": str(tmp_path)})
    with pytest.raises(SystemExit, match=reason):
        detect_cuda({"CUDA_HOME": str(tmp_path), "MTML_CUDA": "1"})


def test_auto_one_and_zero(tmp_path: Path) -> None:
    here = {"CUDA_HOME": str(fake_cuda_home(tmp_path)), "MTML_CUDA_ARCHS": "9.0+PTX"}
    for wish in ({}, {"MTML_CUDA": ""}, {"MTML_CUDA": "auto"}, {"MTML_CUDA": "1"}):
        found = detect_cuda(here | wish)
        assert isinstance(found, Cuda) and found.codes == ("sm_90", "compute_90")
    assert detect_cuda(here | {"MTML_CUDA": "0"}) == "MTML_CUDA=0"
    assert detect_cuda({"CUDA_HOME": "/nowhere"}) == "CUDA_HOME=/nowhere has no bin/nvcc"
    assert detect_cuda({"CUDA_HOME": "/nowhere", "MTML_CUDA_ARCHS": "Hoper"}) == "CUDA_HOME=/nowhere has no bin/nvcc"
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: 'Hoper' is no GPU architecture"):
        detect_cuda({"CUDA_HOME": here["CUDA_HOME"], "TORCH_CUDA_ARCH_LIST": "Hoper"})


@pytest.mark.parametrize(("version", "compressed"), [("12.8.93", False), ("13.0.88", True)])
def test_flags(version: str, compressed: bool, tmp_path: Path) -> None:
    home = fake_cuda_home(tmp_path, version)
    variables = {"CUDA_HOME": str(home), "MTML_CUDA_ARCHS": "80;80;90a", "NVCC_APPEND_FLAGS": "-Werror all-warnings"}
    found = detect_cuda(variables)
    assert isinstance(found, Cuda)
    gencodes = [flag for flag in found.flags if flag.startswith("-gencode")]
    assert gencodes == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    assert ("--compress-mode=size" in found.flags) == compressed
    assert "-Werror" not in found.flags  # nvcc reads that variable itself
    assert found.facts()["nvcc_flags"][-2:] == ("-Werror", "all-warnings")
    assert not any(flag == "-lcuda" for flag in found.link_flags())
