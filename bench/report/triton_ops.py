"""The ops of ``bench triton-report``: their axes, their providers, and a gated call at one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu import multihead_loss as heads
from bench.gpu.losses import Admission
from bench.measure import flops, runner
from bench.workloads import WORKLOADS
from bench.workloads.heads import Draw
from mtml_kernels import HeadLoss, linear_multihead_loss, multihead_loss


@dataclass(frozen=True)
class Point:
    """One provider at one shape: its call, or ``why`` there is none; and the FLOPs of a call."""

    what: str
    run: Callable[[], Any] | None
    why: str
    flops: float


PointOf = Callable[[str, str, str, Mapping[str, int]], Point]
"""A point of (provider, workload, device, sizes)."""


@dataclass(frozen=True)
class Op:
    """``sizes``: what can be an axis; ``values``: of each; ``providers``: by device; ``workloads``: to start from."""

    sizes: tuple[str, ...]
    axis: str
    values: Mapping[str, tuple[int, ...]]
    providers: Mapping[str, tuple[str, ...]]
    point: PointOf
    workloads: tuple[str, ...] = ()


def _meta_step(default: str, provider: str, workload: str, device: str, sizes: Mapping[str, int]) -> Point:
    name = workload or default
    numbers: dict[str, Any] = dict(sizes)
    w = replace(WORKLOADS[name], **numbers)
    options = runner.Options(threads=torch.get_num_threads(), device=device)
    prepared, row = runner.admit(w, provider, options, runner.gate_for(w, options))
    what = f"{provider} at {dict(sizes)}"
    return Point(what, None if prepared is None else prepared.run, row.note, flops.meta_step(w, "all"))


def inner_loop(provider: str, workload: str, device: str, sizes: Mapping[str, int]) -> Point:
    """A meta-step of a workload whose tasks, samples or steps are others."""
    return _meta_step("sinusoid", provider, workload, device, sizes)


def head_inner_loop(provider: str, workload: str, device: str, sizes: Mapping[str, int]) -> Point:
    """A linear head's meta-step."""
    return _meta_step("anil_head", provider, workload, device, sizes)


def _step(provider: str, own: heads.Heads) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """As ``heads.step``, ours by the functions that users call, on any device."""
    if provider != "mtml":
        return heads.step(provider, own)

    def losses() -> Tensor:
        if own.linear:
            return linear_multihead_loss(own.leaves[0], own.leaves[1:], None, own.targets, own.specs)
        return multihead_loss(own.leaves, own.targets, own.specs)

    def run() -> tuple[Tensor, list[Tensor]]:
        value = losses()
        return value.detach(), list(torch.autograd.grad(value.sum(), own.leaves))

    return run


def _losses(name: str, build: Callable[[Draw], heads.Heads], work: float, provider: str, device: str) -> Point:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    run, row = Admission(name, build, dtype, device, _step).admit(provider)
    return Point(f"{provider} at {name}", run, row.note, work)


def logits_loss(provider: str, workload: str, device: str, sizes: Mapping[str, int]) -> Point:
    """Cross-entropy of logits [rows, classes]."""
    rows, classes = sizes.get("rows", 2048), sizes.get("classes", 32000)

    def build(draw: Draw) -> heads.Heads:
        return heads.Heads([draw.leaf(rows, classes)], [draw.labels(classes, rows)], [HeadLoss()])

    return _losses(f"[{rows}, {classes}]", build, 0.0, provider, device)


def linear_loss(provider: str, workload: str, device: str, sizes: Mapping[str, int]) -> Point:
    """Cross-entropy of a linear head [classes, features] on features [rows, features]."""
    rows, features, classes = sizes.get("rows", 4096), sizes.get("features", 1024), sizes.get("classes", 32000)
    name = f"[{rows}, {features}] x {classes}"
    work = 6.0 * rows * features * classes
    return _losses(name, lambda draw: heads.linear_heads(draw, rows, features, classes), work, provider, device)


_META: dict[str, tuple[str, ...]] = {
    "cuda": ("mtml:triton", "mtml:torch", "vmap", "compile", "compile:graphs"),
    "cpu": ("mtml", "loop", "vmap"),
}
_HEADS: dict[str, tuple[str, ...]] = {
    "cuda": ("mtml", "eager", "compile", "liger", "quack"),
    "cpu": ("mtml", "eager"),
}
_SAMPLES = {"tasks": (1, 8, 64, 512, 4096), "support": (1, 5, 25, 100), "query": (15, 75, 300)}
_CLASSES = {"classes": (1000, 8000, 32000, 128256), "rows": (256, 1024, 4096, 16384)}
OPS: dict[str, Op] = {
    "inner_loop": Op(
        ("steps", *_SAMPLES), "steps", {"steps": (1, 2, 5, 10), **_SAMPLES}, _META, inner_loop, tuple(WORKLOADS)
    ),
    "head_inner_loop": Op(
        ("steps", *_SAMPLES), "steps", {"steps": (1, 5, 10, 20), **_SAMPLES}, _META, head_inner_loop, ("anil_head",)
    ),
    "multihead_loss": Op(("classes", "rows"), "classes", _CLASSES, _HEADS, logits_loss),
    "linear_multihead_loss": Op(
        ("classes", "rows", "features"), "classes", {**_CLASSES, "features": (256, 1024, 4096)}, _HEADS, linear_loss
    ),
}
