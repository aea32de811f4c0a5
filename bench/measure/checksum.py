"""``python -m bench checksum``: sha256 of loss and gradients, for refactorings that must not change a bit.

A line each workload, dtype and instruction set. Two checkouts agree where ``diff`` of their lines is empty:

    python -m bench checksum > before; git checkout ...; make build; python -m bench checksum | diff before -

Two machines may differ with the same code: what PyTorch computes of a step, it computes by its own instruction set.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bench.measure.runner import find, outcome, prepare
from bench.workloads.inner import WORKLOADS as INNER
from bench.workloads.inner import tiny
from mtml_kernels import native

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64)


def checksum(workload: str, dtype: torch.dtype) -> tuple[str, float]:
    """sha256 (its first 16 digits) of the loss and all gradients of one meta-step by ``mtml``, and the loss.

    Inner-loop workloads run at their small size: whole, some take minutes on the baseline instruction set.
    """
    w = tiny(workload) if workload in INNER else find(workload)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which path runs is not the question here
        loss, grads = outcome(prepare(w, "mtml", dtype, "cpu"))
    digest = hashlib.sha256()
    for t in (loss, *grads):
        digest.update(t.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16], float(loss)


def lines(workloads: Iterable[str], threads: int) -> Iterator[str]:
    """The lines of the instruction set that this process has chosen."""
    torch.set_num_threads(threads)
    isa = native.info()["isa"]
    for name in workloads:
        for dtype in DTYPES:
            digest, loss = checksum(name, dtype)
            yield f"{isa:8s} {name:20s} {str(dtype).removeprefix('torch.'):8s} {digest}  {loss:.9g}"


def every_instruction_set(workloads: Iterable[str], threads: int) -> Iterator[str]:
    """The lines of every instruction set here: the kernels are chosen once, so each is a process of its own."""
    command = [sys.executable, "-m", "bench", "checksum", "--here", "--threads", str(threads), *workloads]
    for isa in native.info()["available"]:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MTML_CPU_ISA": isa}, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"checksums of {isa}: {done.stderr.strip()}")
        yield from done.stdout.splitlines()
