"""Builds ``mtml_kernels._C``, the compiled module, and writes the build record beside it.

Everything else about the distribution stands in pyproject.toml. PyTorch is never imported here: the C++ sources know
raw pointers and sizes only, so a build needs setuptools, pybind11 and a C++17 compiler with OpenMP, and outlives any
upgrade of PyTorch. Environment: CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, MAX_JOBS, MTML_CUDA.
"""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
MODULE = "mtml_kernels._C"
RECORD = "_build.json"

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
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


def fail(message: str) -> SystemExit:
    return SystemExit(f"mtml-kernels: {message}")


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


@dataclass(frozen=True)
class Configuration:
    """All that decides what the objects contain: the build folder is keyed by it, the build record repeats it."""

    compiler: tuple[str, ...]
    compiler_version: str
    flags: tuple[str, ...]
    isa_flags: dict[str, tuple[str, ...]]
    link_flags: tuple[str, ...]
    machine: str
    python: str
    pybind11: str
    cuda_archs: tuple[str, ...]

    @classmethod
    def detect(cls) -> Configuration:
        compiler = find_compiler()
        user = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
        shared = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
        return cls(
            compiler=compiler,
            compiler_version=compiler_version(compiler),
            flags=(*COMMON_FLAGS, *user),
            isa_flags={name: ISA_FLAGS[name] for name in supported_isas()},
            link_flags=(*shared, "-fopenmp", *shlex.split(os.environ.get("LDFLAGS", ""))),
            machine=platform.machine(),
            python=sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag,
            pybind11=pybind11_version(),
            cuda_archs=(),
        )

    @cached_property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.python}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def record(self) -> str:
        """The build record: no date, no path of the build machine, so equal configurations give equal files."""
        shown = {name: shlex.join(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        shown["isa_flags"] = {name: shlex.join(flags) for name, flags in self.isa_flags.items()}
        return json.dumps({"key": self.key, **shown}, indent=2) + "\n"


def check_environment(config: Configuration) -> None:
    """Says in one line what a build lacks, before the compiler says it in a hundred."""
    cuda = os.environ.get("MTML_CUDA", "auto")
    if cuda not in {"auto", "0", "1"}:
        raise fail(f"MTML_CUDA: expected auto, 0 or 1, got {cuda!r}")
    if cuda == "1":
        raise fail("MTML_CUDA=1: this release has no CUDA sources; leave MTML_CUDA unset (or 0) to build for the CPU")
    if not config.compiler_version:
        command = shlex.join(config.compiler)
        raise fail(f"the C++ compiler {command!r} does not run; install g++ (or clang++) or set CXX to one that does")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        where = sysconfig.get_path("include")
        raise fail(f"Python.h is not in {where}; install Python's development headers (python3-dev on Debian, Ubuntu)")


def parallel_jobs() -> int:
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise fail(f"MAX_JOBS: expected a positive whole number, got {text!r}")
    return int(text)


def sources(isas: tuple[str, ...]) -> list[Path]:
    """Translation units, the per-ISA ones first: they take longest, and the parallel compilation ends sooner."""
    found = [path for path in sorted((CSRC / "cpu").rglob("*.cpp")) if isa_of(path) in {None, *isas}]
    bindings = sorted((CSRC / "bindings").glob("*.cpp"))
    return [*sorted(found, key=lambda path: isa_of(path) is None), *bindings]


def shared_inputs() -> list[Path]:
    """What every object depends on: the headers, and this file, which composes the commands."""
    return [Path("setup.py"), *(path for path in CSRC.rglob("*") if path.suffix in {".h", ".hpp", ".inc", ".inl"})]


class Compilation:
    """Compiles the translation units whose object is older than they are or than a shared input, and links them all."""

    def __init__(self, config: Configuration, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.newest_shared = max(path.stat().st_mtime for path in shared_inputs())

    def build(self, target: Path) -> None:
        units = sources(tuple(self.config.isa_flags))
        with ThreadPoolExecutor(parallel_jobs()) as pool:
            objects = list(pool.map(self.compile, units))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.run([*self.config.compiler, *map(str, sorted(objects)), *self.config.link_flags], target)

    def compile(self, source: Path) -> Path:
        target = self.folder / source.with_suffix(".o")
        newest = max(source.stat().st_mtime, self.newest_shared)
        if not target.exists() or target.stat().st_mtime <= newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.run([*self.config.compiler, *self.flags(source), "-c", str(source)], target)
        return target

    def flags(self, source: Path) -> list[str]:
        isa = isa_of(source)
        built = [f"-DMTMLK_HAVE_{name.upper()}" for name in self.config.isa_flags]
        flags = [*self.config.flags, f"-I{CSRC / 'include'}", f"-I{CSRC}", f"-I{CSRC / 'cpu'}", *built]
        if isa is not None:
            flags += self.config.isa_flags[isa]
        if source.parent.name == "bindings":
            import pybind11  # the one build requirement besides setuptools; a source archive is made without it

            flags += [f"-I{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
        return flags

    def run(self, command: list[str], target: Path) -> None:
        """Runs a command that writes `target`, under another name first: half a file is never taken for a whole one."""
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.stdout or done.stderr:
            print(done.stdout + done.stderr, file=sys.stderr)
        if done.returncode != 0:
            raise fail(f"exit status {done.returncode} from: {shlex.join(command)}")
        partial.replace(target)


class KeyedBuild(build):
    """Keeps one build folder per configuration, and starts its package copy afresh.

    pip builds in the source tree and setuptools reuses what lies in build/, so a module that was switched off, renamed
    or deleted would otherwise travel in the next wheel.
    """

    build_base: str

    def finalize_options(self) -> None:
        if self.build_base == "build":
            self.build_base = str(Path("build", Configuration.detect().key))
        super().finalize_options()

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NativeBuild(build_ext):
    """build_ext with our own compile commands: flags per file, several files at a time, only what is out of date."""

    def build_extension(self, ext: Extension) -> None:
        config = Configuration.detect()
        check_environment(config)
        isas = ", ".join(config.isa_flags)
        print(f"mtml-kernels: {config.compiler_version}; CPU: {isas}; CUDA: none; objects in build/{config.key}")
        target = Path(self.get_ext_fullpath(ext.name))
        # Not in build_temp: for an editable install that is a temporary folder, and every file would compile again.
        Compilation(config, Path("build", config.key, "objects")).build(target)
        target.with_name(RECORD).write_text(config.record())

    def record_mapping(self) -> dict[str, str]:
        """Build record in the build folder -> its place in the source tree (editable installs)."""
        folder = self.get_finalized_command("build_py").get_package_dir(MODULE.rpartition(".")[0])
        built = Path(self.build_lib, *MODULE.split(".")[:-1], RECORD)
        return {str(built): str(Path(folder, RECORD))}

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for built, in_tree in self.record_mapping().items():
            self.copy_file(built, in_tree)

    def get_outputs(self) -> list[str]:
        return sorted({*super().get_outputs(), *self.record_mapping()})

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **(self.record_mapping() if self.inplace else {})}


setup(
    ext_modules=[Extension(MODULE, [str(path) for path in sources(supported_isas())])],
    cmdclass={"build": KeyedBuild, "build_ext": NativeBuild},
)
