"""Whether and how this build compiles CUDA code."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from build_support.gpu_names import Target
from build_support.gpu_targets import TargetList, requested
from build_support.messages import fail
from build_support.native_gpus import capabilities
from build_support.nvcc import Nvcc, find_nvcc

__all__ = ["LINK_FLAGS", "Cuda", "detect_cuda"]

FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
# A third of the size; from 13 on, since drivers older than CUDA 12.4's cannot read it.
COMPRESSION, COMPRESSION_SINCE = "--compress-mode=size", 13
# The CUDA runtime within the module, out of sight of one that torch brings; never the driver's library: the module is
# imported on machines without a driver too.
LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,libcudart_static.a")
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # nvcc itself reads them


@dataclass(frozen=True)
class Cuda:
    """All that decides what the objects of CUDA sources contain."""

    nvcc: Nvcc
    targets: tuple[Target, ...]
    own_flags: tuple[str, ...]  # the user's

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(target.code for target in self.targets)

    @property
    def flags(self) -> tuple[str, ...]:
        """Of every compilation. What the user adds is nvcc's to read: it stands here for the record."""
        compression = (COMPRESSION,) if self.nvcc.major >= COMPRESSION_SINCE else ()
        return (*FLAGS, *compression, *(target.gencode for target in self.targets))

    def facts(self) -> dict[str, tuple[str, ...] | str]:
        """What the build record and the key of the build folder know; no path of this machine."""
        flags = (*self.flags, *self.own_flags)
        return {"nvcc_version": self.nvcc.version, "nvcc_flags": flags, "cuda_archs": self.codes}

    def link_flags(self) -> list[str]:
        return [*self.nvcc.library_flags(), *LINK_FLAGS]


def detect_cuda(environment: Mapping[str, str]) -> Cuda | str:
    """What MTML_CUDA and the list of architectures ask for; without CUDA, the reason.

    Raises:
        SystemExit: they ask for what this machine cannot build.
    """
    wish = environment.get("MTML_CUDA") or "auto"
    if wish not in {"auto", "0", "1"}:
        raise fail(f"MTML_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return "MTML_CUDA=0"
    try:
        nvcc = Nvcc.at(find_nvcc(environment))
    except LookupError as reason:
        if wish == "1":
            raise fail(f"MTML_CUDA=1: {reason.args[0]}; install the CUDA toolkit or set CUDA_HOME to it") from None
        return str(reason.args[0])
    source, text = requested(environment)
    targets = TargetList(source, nvcc.version, nvcc.codes, capabilities).targets(text)
    own = (word for name in NVCC_VARIABLES for word in shlex.split(environment.get(name, "")))
    return Cuda(nvcc, targets, tuple(own))
