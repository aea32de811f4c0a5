"""Compiles the Triton kernels for GPUs that need not be there; run as a script, without TRITON_INTERPRET.

    python multihead_loss.py 80 90      # prints JSON, {"80": [{name, warps, shared, usage: {REG, STACK, LOCAL}}]}

usage is null where triton comes without cuobjdump.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtml_kernels.triton.multihead_loss import SCALE_BLOCK, kernels
from mtml_kernels.triton.multihead_loss.table import FINISH_BLOCK, NORM_BLOCK, REGISTERS, TILES, VOCABULARY

TABLE = {"table": "*i64", "heads": "i32"}
ALL = sum(1 << tile for tile in range(len(TILES)) if tile != VOCABULARY)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Name, kernel, types of the run-time arguments, constants, warps."""
    yield "norm", kernels.norm_kernel, TABLE | {"norms": "*fp32"}, {"BLOCK": NORM_BLOCK}, 4
    finish = {"table": "*i64", "partial": "*fp32", "losses": "*fp32"}
    yield "finish", kernels.finish_kernel, finish, {"BLOCK": FINISH_BLOCK}, 4
    loss = TABLE | {"options": "*fp64", "norms": "*fp32", "partial": "*fp32"}
    scale = {"TYPE": tl.float16, "IN_PLACE": True, "BLOCK": SCALE_BLOCK}
    yield "scale", kernels.scale_kernel, TABLE | {"cotangents": "*fp32"}, scale, 8
    for name, used, dtype in (("heads", ALL, tl.float32), ("vocabulary", 1 << VOCABULARY, tl.bfloat16)):
        constants = {"TYPE": dtype, "USED": used, "ALIGNED": used != ALL, "WANT_GRAD": True}
        yield name, kernels.loss_kernel, loss, constants, TILES[VOCABULARY].warps if used != ALL else 4


def usage(cubin: bytes) -> dict[str, int] | None:
    """Registers of a thread and bytes spilled to its local memory, where triton brings cuobjdump along."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*"), None)
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK", "LOCAL")}


def compile_for(capability: int) -> list[dict[str, Any]]:
    """Every kernel's needs on a GPU of this compute capability."""
    found = []
    for name, kernel, types, constants, warps in variants():
        signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        if kernel is kernels.loss_kernel:
            options["maxnreg"] = REGISTERS
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found.append(
            {"name": name, "warps": warps, "shared": built.metadata.shared, "usage": usage(built.asm["cubin"])}
        )
    return found


if __name__ == "__main__":
    print(json.dumps({name: compile_for(int(name)) for name in sys.argv[1:]}))
