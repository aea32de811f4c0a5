"""The C++ compiler, and the flags of the code that runs on the CPU."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from build_support.messages import fail

__all__ = ["Host", "isa_of", "key_of", "supported_isas"]

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-DNDEBUG",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
# A file csrc/cpu/isa/isa_<name>.cpp or isa_<name>_<part>.cpp is compiled with the flags of <name>, all others with none
# of them: which body runs is decided at run time, so every flag here needs its test of the CPU in the dispatcher.
ISA_FLAGS = {
    "base": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mprefer-vector-width=512",
    ),
}
# What may stand before the compiler in CXX: nvcc is to know the compiler itself.
LAUNCHERS = {"ccache", "distcc", "sccache"}


def isa_of(source: Path) -> str | None:
    """The instruction set a source file is compiled for, None for the files that all share."""
    if not source.name.startswith("isa_"):
        return None
    name = source.stem.split("_")[1]
    if name not in ISA_FLAGS:
        raise fail(f"{source}: expected isa_<name>.cpp with <name> one of {', '.join(ISA_FLAGS)}, got {name!r}")
    return name


def supported_isas() -> tuple[str, ...]:
    """Instruction sets the compiler is asked for; what the CPU at run time has is the dispatcher's business."""
    return tuple(ISA_FLAGS) if platform.machine().lower() in {"x86_64", "amd64"} else ("base",)


def find_compiler() -> tuple[str, ...]:
    if os.environ.get("CXX"):
        return tuple(shlex.split(os.environ["CXX"]))
    return next(((name,) for name in ("g++", "clang++", "c++") if shutil.which(name)), ("g++",))


def compiler_version(compiler: tuple[str, ...]) -> str:
    """First line of ``CXX --version``; empty where the compiler does not run (a source archive is made without one)."""
    try:
        shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return shown.strip().split("\n")[0]


def pybind11_version() -> str:
    try:
        return metadata.version("pybind11")
    except metadata.PackageNotFoundError:
        return ""


def key_of(python: str, *facts: object) -> str:
    """The name of a build folder: equal facts, equal name."""
    text = json.dumps(facts, sort_keys=True)
    return f"{python}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Host:
    """All that decides what the objects of the CPU engine contain: their folder is keyed by it."""

    compiler: tuple[str, ...]
    compiler_version: str
    flags: tuple[str, ...]
    isa_flags: dict[str, tuple[str, ...]]
    link_flags: tuple[str, ...]
    machine: str
    python: str
    pybind11: str

    @classmethod
    def detect(cls) -> Host:
        compiler = find_compiler()
        user = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
        shared = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
        return cls(
            compiler=compiler,
            compiler_version=compiler_version(compiler),
            flags=(*COMMON_FLAGS, *user),
            isa_flags={name: ISA_FLAGS[name] for name in supported_isas()},
            link_flags=(*shared, "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))),
            machine=platform.machine(),
            python=sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag,
            pybind11=pybind11_version(),
        )

    @cached_property
    def key(self) -> str:
        return key_of(self.python, asdict(self))

    @property
    def compiler_program(self) -> str:
        """The compiler without what may stand before or behind it in CXX."""
        return next((word for word in self.compiler if Path(word).name not in LAUNCHERS), self.compiler[0])
