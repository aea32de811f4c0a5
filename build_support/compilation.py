"""From sources to the module: one command a file, only those that are out of date."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_support.configuration import Configuration, parallel_jobs
from build_support.cuda import LINK_FLAGS
from build_support.host import isa_of, supported_isas
from build_support.messages import fail

__all__ = ["Compilation", "knows_cuda", "sources"]

CSRC = Path("csrc")
HEADERS = {".h", ".hpp", ".inc", ".inl", ".cuh"}
INCLUDES = (f"-I{CSRC / 'include'}", f"-I{CSRC}", f"-I{CSRC / 'cpu'}")
CUDA_BINDINGS = "cuda_"  # a file of csrc/bindings whose name begins so is for builds with CUDA
CUDA_AWARE = "module.cpp"  # of the other bindings, the one that is another with CUDA


def sources(isas: tuple[str, ...] = supported_isas(), cuda: bool = False, root: Path = Path()) -> list[Path]:
    """Translation units, those that take longest first: the parallel compilation ends sooner."""
    csrc = root / CSRC
    found = [path for path in sorted((csrc / "cpu").rglob("*.cpp")) if isa_of(path) in {None, *isas}]
    bindings = sorted((csrc / "bindings").glob("*.cpp"))
    device = sorted((csrc / "cuda").rglob("*.cu")) if cuda else []
    bindings = [path for path in bindings if cuda or not path.name.startswith(CUDA_BINDINGS)]
    return [*device, *sorted(found, key=lambda path: isa_of(path) is None), *bindings]


def knows_cuda(source: Path) -> bool:
    """Whether its object depends on the list of GPUs."""
    return source.suffix == ".cu" or source.name == CUDA_AWARE or source.name.startswith(CUDA_BINDINGS)


def newest(paths: Iterable[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


class Compilation:
    """Compiles the translation units whose object is older than they are or than what they include, and links them.

    What knows nothing of CUDA lies in a folder of its own: no list of GPUs makes it out of date.
    """

    def __init__(self, config: Configuration, builds: Path = Path("build")) -> None:
        self.config = config
        self.host_folder = builds / config.host.key / "objects"
        self.folder = builds / config.key / "objects"
        self.units = sources(tuple(config.host.isa_flags), cuda=config.cuda is not None)
        headers = [path for path in CSRC.rglob("*") if path.suffix in HEADERS]
        # This file composes the commands, from flags that the folders are keyed by.
        composing = Path(__file__)
        self.newest_header = newest([composing, *headers])
        self.newest_host_header = newest([composing, *(path for path in headers if CSRC / "cuda" not in path.parents)])

    def build(self, target: Path) -> None:
        with ThreadPoolExecutor(parallel_jobs()) as pool:
            objects = list(pool.map(self.compile, self.units))
        target.parent.mkdir(parents=True, exist_ok=True)
        host, cuda = self.config.host, self.config.cuda
        libraries = cuda.link_flags() if cuda else []
        self.run([*host.compiler, *map(str, sorted(objects)), *host.link_flags, *libraries], target)

    def compile(self, source: Path) -> Path:
        cuda = knows_cuda(source)
        target = (self.folder if cuda else self.host_folder) / source.with_suffix(".o")
        changed = max(source.stat().st_mtime, self.newest_header if cuda else self.newest_host_header)
        if not target.exists() or target.stat().st_mtime <= changed:
            target.parent.mkdir(parents=True, exist_ok=True)
            command = self.nvcc_command(source) if source.suffix == ".cu" else self.host_command(source)
            self.run([*command, "-c", str(source)], target)
        return target

    def host_command(self, source: Path) -> list[str]:
        host, isa = self.config.host, isa_of(source)
        built = [f"-DMTMLK_HAVE_{name.upper()}" for name in host.isa_flags]
        command = [*host.compiler, *host.flags, *INCLUDES, *built]
        if isa is not None:
            command += host.isa_flags[isa]
        if source.parent.name == "bindings":
            import pybind11  # the one build requirement besides setuptools; a source archive is made without it

            command += [f"-I{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
        return [*command, *self.cuda_macros()] if knows_cuda(source) else command

    def cuda_macros(self) -> list[str]:
        """What the bindings know of the CUDA part."""
        cuda = self.config.cuda
        return ["-DMTMLK_HAVE_CUDA", f'-DMTMLK_CUDA_ARCHS="{" ".join(cuda.codes)}"'] if cuda else []

    def nvcc_command(self, source: Path) -> list[str]:
        cuda = self.config.cuda
        assert cuda is not None, source
        files = sum(unit.suffix == ".cu" for unit in self.units)
        threads = max(1, parallel_jobs() // files)  # over architectures, within one file
        compiler = [str(cuda.nvcc.path), "-ccbin", self.config.host.compiler_program]
        return [*compiler, *cuda.flags, *INCLUDES, f"--threads={threads}"]

    def run(self, command: list[str], target: Path) -> None:
        """Runs a command that writes `target`, under another name first: half a file is never taken for a whole one."""
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.stdout or done.stderr:
            print(done.stdout + done.stderr, file=sys.stderr)
        if done.returncode != 0:
            way_out = "; MTML_CUDA=0 builds for the CPU alone" if self.needs_cuda(command) else ""
            raise fail(f"exit status {done.returncode} from: {shlex.join(command)}{way_out}")
        partial.replace(target)

    def needs_cuda(self, command: list[str]) -> bool:
        cuda = self.config.cuda
        return cuda is not None and (command[0] == str(cuda.nvcc.path) or set(LINK_FLAGS) <= set(command))
