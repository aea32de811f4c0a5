"""Compiles the kernel of head_inner_loop for GPUs that need not be there; run as multihead_loss.py is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from multihead_loss import usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtml_kernels.losses import KINDS
from mtml_kernels.triton.head_inner_loop.features import chain_kernel, products_kernel, sums_kernel
from mtml_kernels.triton.head_inner_loop.kernel import head_kernel
from mtml_kernels.triton.head_inner_loop.policy import launch_of
from mtml_kernels.triton.head_inner_loop.steps import APART, SHARED

SIZES = ("tasks", "S", "Q", "C", "K", "carry_size", "gram_task", "zs_task", "cross_task", "zq_task", "wide", "narrow")
GRADS = ("HAS_GRAD_LOSS", "HAS_GRAD_LOGITS", "HAS_GRAD_LOSSES", "HAS_GRAD_COEFFICIENTS")
TRAINING = ("MEAN", "QUERY_MEAN", "TARGETS", "OUTPUTS", "CARRY", "OWN_LOSS")
EVERYTHING = ("MEAN", "QUERY_MEAN", "TARGETS", "OUTPUTS", "CARRY", "MASKED", "QUERY_MASKED", "DECAYS", "RATES", *GRADS)
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


def of_features() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """The kernels around the steps of 5 classes of 5 shots: name, kernel, constants, warps."""
    block = {"TYPE": tl.float32, "COLS": 32, "ROWS": 16, "LANES": 32}
    yield "products", products_kernel, block, 4
    asked = dict.fromkeys(("SCALED", "OF_SUPPORT", "OF_QUERY", "OF_WEIGHT"), True)
    chain = {"TYPE": tl.float32, "C": 5, "SP": 32, "CP": 8, "COLS": 64, "BLOCK": 8, "REST": 8}
    yield "chain", chain_kernel, chain | asked, 1
    sums = {"TYPE": tl.float32, "ROWS": 16, "COLS": 128, "OF_BIAS": True, "OF_RATES": True}
    yield "sums", sums_kernel, sums, 4


def compile_features(target: GPUTarget) -> Iterator[dict[str, Any]]:
    """What they need."""
    for name, kernel, values, warps in of_features():
        signature = {n: "constexpr" if n in values else "i32" for n in kernel.arg_names}
        tensors = ("support", "query", "weight", "products", "carry", "scale", "shares")
        signature |= {n: "*fp32" for n in signature if n in tensors or (n[0] == "d" and n not in values)}
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        built = triton.compile(ASTSource(kernel, signature, values), target=target, options=options)
        needs = usage(built.asm["cubin"])
        yield {"name": name, "warps": warps, "shared": built.metadata.shared, "usage": needs}


def compile_for(capability: int) -> list[dict[str, Any]]:
    """Every variant's needs on a GPU of this compute capability."""
    found = list(compile_features(GPUTarget("cuda", capability, 32)))
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
