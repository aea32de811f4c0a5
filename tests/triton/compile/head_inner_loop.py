"""Compiles the kernel of head_inner_loop for GPUs that need not be there; run as multihead_loss.py is."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl
from multihead_loss import usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtml_kernels.losses import KINDS
from mtml_kernels.triton.head_inner_loop.kernel import head_kernel
from mtml_kernels.triton.head_inner_loop.policy import launch_of
from mtml_kernels.triton.head_inner_loop.steps import APART, SHARED

SIZES = ("tasks", "S", "Q", "C", "K", "carry_size")
GRADS = ("HAS_GRAD_LOSS", "HAS_GRAD_LOGITS", "HAS_GRAD_LOSSES", "HAS_GRAD_COEFFICIENTS")
TRAINING = ("MEAN", "QUERY_MEAN", "TARGETS", "OUTPUTS", "CARRY", "OWN_LOSS")
EVERYTHING = ("MEAN", "QUERY_MEAN", "TARGETS", "OUTPUTS", "CARRY", "MASKED", "QUERY_MASKED", "DECAYS", *GRADS)
# 5 classes of 5 shots as they are trained, and what needs most registers at 2048 words: 7 s each, so not everywhere
VARIANTS = {"few_shot": (25, 5, SHARED, TRAINING), "widest": (128, 16, APART, EVERYTHING)}
WIDEST_ON = (80, 120)


def constants(support: int, classes: int, shift: Any, flags: tuple[str, ...]) -> dict[str, Any]:
    plan = launch_of(support, classes, 4)
    kind = KINDS.index("cross_entropy")
    named = {"TYPE": tl.float32, "KIND": kind, "QUERY_KIND": kind, "SHIFT": shift.value, "ON_CHIP": plan.on_chip}
    named |= {"SP": plan.support, "CP": plan.classes, "BLOCK": plan.block}
    switches = {p.name for p in head_kernel.params if p.is_constexpr} - set(named)
    assert switches >= set(flags)
    return named | {name: name in flags for name in switches}


def type_of(name: str, constant: bool) -> str:
    if constant or name in SIZES:
        return "constexpr" if constant else "i32"
    number = name.removesuffix("_low") in ("smoothing", "query_smoothing", "decay", "proximal")
    return "fp32" if number else "*i64" if "labels" in name else "*fp32"


def compile_for(capability: int) -> list[dict[str, Any]]:
    """Every variant's needs on a GPU of this compute capability."""
    found = []
    for name, (support, classes, shift, flags) in VARIANTS.items():
        if name == "widest" and capability not in WIDEST_ON:
            continue
        values = constants(support, classes, shift, flags)
        signature = {n: type_of(n, n in values) for n in head_kernel.arg_names}
        warps = launch_of(support, classes, 4).warps
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(ASTSource(head_kernel, signature, values), target=target, options=options)
        found.append(
            {"name": name, "warps": warps, "shared": built.metadata.shared, "usage": usage(built.asm["cubin"])}
        )
    return found


if __name__ == "__main__":
    print(json.dumps({name: compile_for(int(name)) for name in sys.argv[1:]}))
