"""What a host compiler does not take stands in device_api.h and launch.h alone, or kernels do not run on the CPU."""

from __future__ import annotations

import re

from cases.cuda_host import CSRC

RAW = re.compile(r"__shared__|\basm\b|cooperative_groups|<<<|\bcuda[A-Z]\w+")
# The two bodies of the words, and what asks a device about itself.
OWN = {"device_api.h", "launch.h", "status.h", "device.cu"}


def raw_words(text: str) -> list[str]:
    return RAW.findall(re.sub(r"//.*", "", text))


def test_kernels_are_written_in_words_of_both_compilers() -> None:
    folder = CSRC / "cuda"
    files = [p for p in folder.rglob("*") if p.suffix in {".h", ".cuh", ".cu"} and p.name not in OWN]
    assert len(files) > 10
    assert {str(p.relative_to(folder)): raw_words(p.read_text()) for p in files if raw_words(p.read_text())} == {}


def test_raw_words_are_found() -> None:
    assert raw_words("__shared__ float x[3];  // __shared__") == ["__shared__"]
    assert raw_words('asm volatile("bar.sync 0;"); cudaMalloc(&p, n); f<<<1, 2>>>();') == ["asm", "cudaMalloc", "<<<"]
    assert raw_words((CSRC / "cuda" / "device_api.h").read_text()) != []
