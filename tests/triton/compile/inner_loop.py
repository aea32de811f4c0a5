"""Compiles launches of the schedule for GPUs that need not be there; run as multihead_loss.py is.

With the launcher's own specialisation: its text for contiguous planes, addresses divisible by 16, its options.
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

import torch
import triton
from multihead_loss import usage
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[2]))
from schedule.test_schedule import workload

from mtml_kernels.schedule.build import Plan
from mtml_kernels.triton.inner_loop import bound
from mtml_kernels.triton.inner_loop.jobs import Job
from mtml_kernels.triton.inner_loop.launching import LaunchKernel, options_of

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int16: "*i16",
}
# The first distinct launches, about a second each: of a small network, also in TF32, and of one with convolutions.
VARIANTS = {("sinusoid", "highest"): 14, ("sinusoid", "medium"): 3, ("omniglot_conv", "highest"): 10}
# And one of each form that pools, stores shares of sums, or cuts a gradient's depth into pieces, of this one.
FORMS = "mini_conv"


def launches(name: str) -> Iterator[tuple[LaunchKernel, list[Tensor]]]:
    """The launches of a meta-step, each with tensors that have its planes' layout."""
    plan = Plan.of(workload(name))
    trip = plan.trip(plan.usually)
    for schedule in (trip.there, trip.back):
        for kernel, _, reads, writes, _ in bound(schedule).steps:
            if isinstance(kernel, LaunchKernel):
                planes = [kernel.planes[i] for i in (*reads, *writes)]
                yield kernel, [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in planes]


def compile_for(capability: int) -> list[dict[str, Any]]:
    """Every launch's needs on a GPU of this compute capability."""
    found = []
    for (name, matmul), most in VARIANTS.items():
        torch.set_float32_matmul_precision(matmul)
        seen: set[str] = set()
        for kernel, tensors in launches(name):
            text, _ = kernel.text(tensors)
            if text not in seen and len(seen) < most:
                seen.add(text)
                found.append(
                    compiled(kernel, tensors, capability) | {"precision": "ieee" if matmul == "highest" else matmul}
                )
    torch.set_float32_matmul_precision("highest")
    found += [compiled(*launch, capability) | {"precision": "ieee"} for launch in weight_gradients("omniglot_conv")]
    forms = {form: launch for *launch, form in ((*pair, form_of(pair[0])) for pair in launches(FORMS)) if form}
    return found + [compiled(*launch, capability) | {"precision": "ieee"} for launch in forms.values()]


def weight_gradients(name: str) -> list[tuple[LaunchKernel, list[Tensor]]]:
    """The launches that find most pixels: distinct ones with the gradient of a convolution's weights."""
    found: dict[str, tuple[LaunchKernel, list[Tensor]]] = {}
    for kernel, tensors in launches(name):
        terms = [term for job in kernel.launch.jobs if job.product is not None for term in job.product.terms]
        if any(term.right.way == "patch_by_weight" for term in terms):
            found.setdefault(kernel.text(tensors)[0], (kernel, tensors))
    return list(found.values())[:6]


def form_of(kernel: LaunchKernel) -> tuple[str, ...]:
    """What is fused in a launch that pools or stores shares, or what it cuts into pieces; nothing for others."""
    jobs = kernel.launch.jobs
    if any(job.pieces > 1 for job in jobs):
        return tuple(sorted({pieces_form(job) for job in jobs if job.pieces > 1}))
    if not any(job.shares or job.pool or any(part.kernel == "pool.backward" for part in job.parts) for job in jobs):
        return ()
    parts = [part for job in jobs for part in (*job.parts, *([job.pool] if job.pool else ()))]
    shares = [f"{job.product is not None} {share.part.kernel}" for job in jobs for share in job.shares]
    return (*(part.kernel for part in parts), *shares)


def pieces_form(job: Job) -> str:
    """Terms of a product whose depth is cut, and the side of its tile; or that a sum is."""
    if job.product is None:
        return f"sum {job.of_shares}"
    return f"{len(job.product.terms)} terms {job.space.cols}"


def compiled(kernel: LaunchKernel, tensors: list[Tensor], capability: int) -> dict[str, Any]:
    """Shared memory, registers, and which arithmetic its products use."""
    function, _ = kernel.kernel(tensors)
    signature = {name: TYPES[t.dtype] for name, t in zip(function.arg_names, tensors, strict=True)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))}
    source = ASTSource(function, signature, {}, aligned)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options_of(kernel.launch))
    products = sum(job.product is not None and bool(job.product.terms) for job in kernel.launch.jobs)
    mma, fma = arithmetic(built.asm["cubin"])
    return {
        "name": [f"{list(job.space.shape)}" for job in kernel.launch.jobs],
        "products": products,
        "shared": built.metadata.shared,
        "usage": usage(built.asm["cubin"]),
        "mma": mma,
        "fma": fma,
    }


def arithmetic(cubin: bytes) -> tuple[int, int]:
    """Instructions of the matrix units, and fused multiply-adds of float32."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|QGMMA)\b", text)), len(re.findall(r"\bFFMA2?\b", text))


if __name__ == "__main__":
    print(json.dumps({name: compile_for(int(name)) for name in sys.argv[1:]}))
