"""The kernel of csrc/cuda/inner_loop compiled for a chip: its instructions and constants, kept on disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.sass.code import cache_folder, run_tool
from bench.sass.emulation.state import Array
from bench.sass.listing import Instruction, instructions
from build_support.cuda import FLAGS
from build_support.nvcc import find_nvcc

__all__ = ["CSRC", "INTERPRETERS", "Code", "Kernel", "kernel_of"]

CSRC = Path(__file__).parents[3] / "csrc"
_SOURCE = """#include "%s"
const void* kernel() { return reinterpret_cast<const void*>(mtmlk::%s); }
"""


class Code(NamedTuple):
    """A kernel by its name in a header of csrc, and the bytes of its parameters."""

    header: str
    name: str
    parameters: int


_SCHEDULE_CALL = 24 + 16 + 192 * 16  # bytes of csrc/cuda/inner_loop/program.h
INTERPRETERS = {
    full: Code("cuda/inner_loop/interpreter.cuh", f"inner_loop_kernel<float, mtmlk::{kind}>", _SCHEDULE_CALL)
    for full, kind in ((False, "kPlainKernel"), (True, "kFullKernel"))
}


class Kernel(NamedTuple):
    """parameters: where they begin in constant bank 0. tables: constant bank 2, of jumps. reserved: bytes of shared
    memory that lie before the block's own.
    """

    listing: list[Instruction]
    registers: int
    parameters: int
    tables: Array
    reserved: int


class _Compiled(NamedTuple):
    sass: str
    usage: str
    tables: str  # in hexadecimal


def _section(elf: bytes, name: str) -> bytes:
    """The contents of the first section whose name begins so; b"" for none."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    names = headers[names_at][4]
    for at, kind, _, _, offset, length in headers:
        label = elf[names + at : elf.index(b"\0", names + at)].decode()
        if label.startswith(name) and kind == 1:
            return elf[offset : offset + length]
    return b""


def _nvcc() -> str:
    try:
        return str(find_nvcc(os.environ))
    except LookupError as why:
        raise RuntimeError(f"predict --backend cuda compiles csrc/cuda: {why}") from why


def _compile(code: Code, capability: int, csrc: Path) -> _Compiled:
    include = [f"-I{csrc}", f"-I{csrc / 'include'}"]
    options = [flag for flag in FLAGS if not flag.startswith("-Xcompiler")]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        source.write_text(_SOURCE % (code.header, code.name))
        command = [
            str(find_nvcc(os.environ)),
            *options,
            "-cubin",
            f"-arch=sm_{capability}",
            *include,
            str(source),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed: {' '.join(command)}\n{done.stderr}")
        sass = run_tool("nvdisasm", "-gi", "-c", str(target))
        usage = run_tool("cuobjdump", "-res-usage", str(target))
        return _Compiled(sass, usage, _section(target.read_bytes(), ".nv.constant2.").hex())


def _key(code: Code, capability: int, csrc: Path) -> str:
    """Of all sources that the kernel may include."""
    text = hashlib.sha256(f"{code} {capability} {FLAGS} {csrc}".encode())
    for path in sorted([*(csrc / "cuda").rglob("*.*h"), *(csrc / "include").rglob("*.h")]):
        text.update(path.read_bytes())
    return text.hexdigest()


def kernel_of(code: Code, capability: int, folder: Path | None = None, csrc: Path = CSRC) -> Kernel:
    """From the folder, or compiled now (half a minute) and kept there."""
    path = (folder or cache_folder()) / f"{_key(code, capability, csrc)}.cuda.json.gz"
    if path.exists():
        compiled = _Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    else:
        compiled = _compile(code, capability, csrc)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(compiled._asdict()).encode()))
    constant, registers = (int(found) for found in _numbers(compiled.usage))
    reserved = 1024 if capability >= 90 else 0
    tables = np.frombuffer(bytes.fromhex(compiled.tables), np.uint32)
    return Kernel(instructions(compiled.sass), registers, constant - code.parameters, tables, reserved)


def _numbers(usage: str) -> tuple[str, str]:
    constant, registers = re.search(r"CONSTANT\[0\]:(\d+)", usage), re.search(r"REG:(\d+)", usage)
    assert constant is not None and registers is not None, usage
    return constant[1], registers[1]
