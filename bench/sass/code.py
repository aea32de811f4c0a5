"""A launch compiled for a chip that need not be here: its SASS and PTX, registers and shared memory, kept on disk.

The disassembler is the one that triton's wheel brings along. Distinct codes are compiled once; a second run reads them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.sass.recording import Recorded

__all__ = ["Code", "cache_folder", "code_of"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code(NamedTuple):
    """What a launch's kernel is compiled to. `sass`: nvdisasm's text, with source lines and where they were inlined."""

    sass: str
    ptx: str
    registers: int
    shared: int
    warps: int

    @property
    def used(self) -> frozenset[int]:
        """Numbers of the parameters that it reads."""
        return frozenset(int(at) for at in re.findall(r"\[\w+_param_(\d+)\]", self.ptx))


def cache_folder() -> Path:
    """Where codes are kept: under XDG_CACHE_HOME, by default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mtml-kernels" / "sass"


def _run(tool: str, *options: str) -> str:
    path = _TOOLS / tool
    if not path.exists():
        raise RuntimeError(f"this triton comes without {tool}, which reads SASS ({path}); its wheel for Linux has it")
    return subprocess.run([path, *options], capture_output=True, text=True, check=True).stdout


def _compiled(launch: Recorded, capability: int) -> Code:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        sass = _run("nvdisasm", "-gi", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return Code(sass, built.asm["ptx"], registers, built.metadata.shared, built.metadata.num_warps)


def code_of(launch: Recorded, capability: int, folder: Path) -> Code:
    """From the folder, or compiled now and kept there."""
    name = hashlib.sha256(f"{triton.__version__} {capability} {launch.key()}".encode()).hexdigest()
    path = folder / f"{name}.json.gz"
    if path.exists():
        return Code(**json.loads(gzip.decompress(path.read_bytes())))
    code = _compiled(launch, capability)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")  # another process may write the same
    beside.write_bytes(gzip.compress(json.dumps(code._asdict()).encode()))
    beside.replace(path)
    return code
