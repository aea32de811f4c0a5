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

from mtml_kernels.triton.multihead_loss import SCALE_BLOCK, SCALE_EACH, kernels
from mtml_kernels.triton.multihead_loss.table import LABELS, NORM_BLOCK, REGISTERS, TILES, VOCABULARY

TABLE = {"table": "*i64", "heads": "i32"}
ALL = sum(1 << tile for tile in range(len(TILES)) if tile % LABELS != VOCABULARY)
ALL_LABELS = ALL >> LABELS << LABELS


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Name, kernel, types of the run-time arguments, constants, warps."""
    yield "norm", kernels.norm_kernel, TABLE | {"norms": "*fp32"}, {"BLOCK": NORM_BLOCK}, 4
    yield "empty", kernels.empty_kernel, {"table": "*i64", "losses": "*fp32"}, {}, 1
    loss = TABLE | {"options": "*fp64", "norms": "*fp32", "partial": "*fp32", "losses": "*fp32"}
    scale = {"TYPE": tl.float16, "IN_PLACE": True, "BLOCK": SCALE_BLOCK, "EACH": SCALE_EACH}
    yield "scale", kernels.scale_kernel, TABLE | {"cotangents": "*fp32"}, scale, 8
    words, label_words = VOCABULARY, VOCABULARY + LABELS
    cases = {"heads": ALL, "labels": ALL_LABELS, "vocabulary": 1 << words, "vocabulary_labels": 1 << label_words}
    for name, used in cases.items():
        wide = used in (1 << words, 1 << label_words)
        constants = {"TYPE": tl.bfloat16 if wide else tl.float32, "USED": used, "ALIGNED": wide, "WANT_GRAD": True}
        yield name, kernels.loss_kernel, loss, constants, TILES[used.bit_length() - 1].warps


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
