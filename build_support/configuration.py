"""What a build is made of: the build folder is keyed by it, the build record repeats it."""

from __future__ import annotations

import json
import os
import shlex
import sysconfig
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from build_support.cuda import Cuda, detect_cuda
from build_support.host import Host, key_of
from build_support.messages import fail

__all__ = ["Configuration", "parallel_jobs"]

NO_CUDA: dict[str, tuple[str, ...] | str] = {"nvcc_version": "", "nvcc_flags": (), "cuda_archs": ()}


@dataclass(frozen=True)
class Configuration:
    """A host compiler and, where CUDA is built, an nvcc.

    Detecting it never fails, since a source archive is made without a compiler: `check` says what a build lacks.
    """

    host: Host
    cuda: Cuda | None
    no_cuda: str  # why there is none
    problem: str = ""  # what ends a build

    @classmethod
    def detect(cls) -> Configuration:
        host = Host.detect()
        try:
            cuda = detect_cuda(os.environ)
        except SystemExit as stop:
            return cls(host, None, "", str(stop))
        return cls(host, None, cuda) if isinstance(cuda, str) else cls(host, cuda, "")

    @cached_property
    def key(self) -> str:
        """That of the host alone without CUDA: another list of GPUs leaves the objects of the CPU engine in use."""
        host = self.host
        return host.key if self.cuda is None else key_of(host.python, asdict(host), self.cuda.facts())

    def facts(self) -> dict[str, Any]:
        return asdict(self.host) | (self.cuda.facts() if self.cuda else NO_CUDA)

    def record(self) -> str:
        """The build record: no date, no path of the build machine, so equal configurations give equal files."""
        shown = {name: shlex.join(value) if isinstance(value, tuple) else value for name, value in self.facts().items()}
        shown["isa_flags"] = {name: shlex.join(flags) for name, flags in self.host.isa_flags.items()}
        return json.dumps({"key": self.key, "cpu_key": self.host.key, **shown}, indent=2) + "\n"

    def summary(self) -> str:
        cuda = f"{' '.join(self.cuda.codes)} (nvcc {self.cuda.nvcc.version})" if self.cuda else f"none ({self.no_cuda})"
        isas = ", ".join(self.host.isa_flags)
        return f"{self.host.compiler_version}; CPU: {isas}; CUDA: {cuda}; objects in build/{self.key}"

    def check(self) -> None:
        """Says in one line what a build lacks, before the compiler says it in a hundred.

        Raises:
            SystemExit: it lacks something.
        """
        if self.problem:
            raise SystemExit(self.problem)
        if not self.host.compiler_version:
            command = shlex.join(self.host.compiler)
            raise fail(
                f"the C++ compiler {command!r} does not run; install g++ (or clang++) or set CXX to one that does"
            )
        where = sysconfig.get_path("include")
        if not Path(where, "Python.h").exists():
            wanted = "install Python's development headers (python3-dev on Debian, Ubuntu)"
            raise fail(f"Python.h is not in {where}; {wanted}")


def parallel_jobs() -> int:
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise fail(f"MAX_JOBS: expected a positive whole number, got {text!r}")
    return int(text)
