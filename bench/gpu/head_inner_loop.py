"""A linear head's inner loop on a GPU: loss and exact gradients by PyTorch, eager or compiled, and by Triton.

    python -m bench.gpu.head_inner_loop                              # all cases and providers
    python -m bench.gpu.head_inner_loop anil_head --providers vmap,compile,mtml --seconds 2
    TRITON_INTERPRET=1 python -m bench.gpu.head_inner_loop tiny --gate --providers vmap,mtml    # without a GPU

Needs an NVIDIA GPU, except for the gate of a small case. Every provider's loss and gradients (of features, weight and
bias) are first compared with those of vmap in float64; --gate ends there. A row gives the time of a meta-step, the rate
at which features are read twice and their gradients written once, and the ratio to the fastest peer. Peers: vmap over
tasks of the loop over weights, eager, compiled whole, compiled with CUDA graphs; and the Gram form in plain PyTorch,
compiled (`compile:gram`: what the kernel adds to the mathematics). Nothing was recorded yet: no figure of this project
comes from here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from bench.measure import timing
from bench.measure.gate import within, worst
from bench.workloads.heads import Draw
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.head_inner_loop import head_inner_loop_call
from mtml_kernels.reference.head_inner_loop import gram_form
from mtml_kernels.schema.head_inner_loop import HeadArgs, HeadOptions, encode_options

PROVIDERS = ("vmap", "compile", "compile:graphs", "compile:gram", "mtml", "mtml:graphs")
MOST_COMPILED = 20  # steps: the compiler unrolls the loop, and its time grows faster than they do
RATE = 0.1
OPTIONS = HeadOptions(LossSpec("cross_entropy"), LossSpec("cross_entropy"))


class Shape(NamedTuple):
    """T tasks of S and Q samples, D features, C classes, K steps."""

    tasks: int
    support: int
    query: int
    features: int
    classes: int
    steps: int


CASES = {
    "anil_head": Shape(32, 25, 75, 1600, 5, 10),
    "anil_head_100": Shape(32, 25, 75, 1600, 5, 100),
    "one_shot": Shape(256, 5, 75, 1600, 5, 10),
    "twenty_way": Shape(16, 20, 300, 64, 20, 5),
    "twenty_way_5": Shape(16, 100, 300, 1600, 20, 5),
    "tiny": Shape(2, 4, 3, 6, 3, 2),
}


class Task(NamedTuple):
    """A case's tensors; the first four are differentiated."""

    support: Tensor  # [T, S, D]
    query: Tensor  # [T, Q, D]
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    labels: Tensor  # [T, S]
    query_labels: Tensor  # [T, Q]
    rates: Tensor  # [1, K, C]

    def double(self) -> Task:
        """The same numbers in float64."""
        exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in self]
        return Task(*exact)


def draw_case(shape: Shape, device: str) -> Task:
    """Random features of unit length, as a trunk with normalisation gives them."""
    draw = Draw(torch.float32, device, 0)
    scale = shape.features**-0.5
    support = draw.leaf(shape.tasks, shape.support, shape.features, scale=scale)
    query = draw.leaf(shape.tasks, shape.query, shape.features, scale=scale)
    weight, bias = draw.leaf(shape.classes, shape.features), draw.leaf(shape.classes)
    labels = [draw.labels(shape.classes, shape.tasks, n) for n in (shape.support, shape.query)]
    rates = torch.full((1, shape.steps, shape.classes), RATE, device=device)
    return Task(support, query, weight, bias, labels[0], labels[1], rates)


def by_weights(case: Task) -> Tensor:
    """Mean query loss by vmap over tasks of the loop over weights."""

    def loss(params: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, *params), y)

    def task(weight: Tensor, bias: Tensor, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        params = (weight, bias)
        for _ in range(case.rates.shape[1]):
            params = tuple(p - RATE * g for p, g in zip(params, grad(loss)(params, sx, sy), strict=True))
        return loss(params, qx, qy)

    sets = (case.support, case.labels, case.query, case.query_labels)
    losses: Tensor = vmap(task, (None, None, 0, 0, 0, 0))(case.weight, case.bias, *sets)
    return losses.mean()


def by_gram(case: Task) -> Tensor:
    """The same in the Gram form, in PyTorch operations."""
    sets = (case.support, case.labels, case.query, case.query_labels)
    return gram_form(*sets, case.weight, case.bias, case.rates, None, None, OPTIONS)[0].mean()


def by_kernel(case: Task) -> Tensor:
    """The same by the Triton kernel."""
    tensors = (case.support, case.query, case.weight, case.bias, case.rates, case.labels, case.query_labels)
    return head_inner_loop_call(HeadArgs(*tensors, None, None, encode_options(OPTIONS), 0), "triton")[0].mean()


def loss_by(provider: str) -> Callable[[Task], Tensor]:
    """The provider's mean query loss."""
    name, _, option = provider.partition(":")
    if name == "vmap":
        return by_weights
    function = by_kernel if name == "mtml" else by_gram if option == "gram" else by_weights
    if provider == "mtml":
        return function
    torch._dynamo.reset()
    compiled: Callable[[Task], Tensor] = torch.compile(
        function, fullgraph=True, mode="reduce-overhead" if option == "graphs" else None
    )
    return compiled


def step(provider: str, case: Task) -> Callable[[], list[Tensor]]:
    """One meta-step: the loss, and the gradients of features, weight and bias."""
    loss = loss_by(provider)

    def run() -> list[Tensor]:
        value = loss(case)
        return [value.detach(), *torch.autograd.grad(value, case[:4])]

    return run


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative l2 error of a tensor."""
    return worst(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def unavailable(provider: str, shape: Shape) -> str | None:
    """Why a provider does not run this case, or None."""
    if provider.startswith("compile") and shape.steps > MOST_COMPILED:
        return f"compiling {shape.steps} steps takes too long"
    return None


def run_case(name: str, providers: Sequence[str], device: str, seconds: float | None) -> bool:
    """Compare the providers on one case and, where there are `seconds`, time them. Whether all of them agree."""
    shape = CASES[name]
    own = draw_case(shape, device)
    truth = step("vmap", own.double())()
    limit = 4 * error(step("vmap", own)(), truth) + 1e-6
    runs: dict[str, Callable[[], Any]] = {}
    agreed = True
    for provider in providers:
        reason = unavailable(provider, shape)
        if reason is None:
            run = step(provider, own)
            found = error(run(), truth)
            agreed = agreed and within(found, limit)
            reason = None if within(found, limit) else f"mismatch: error {found:.1e}, limit {limit:.1e}"
            runs |= {provider: run} if reason is None else {}
            if reason is None and seconds is None:
                print(f"{name:14s} {provider:14s} match: error {found:.1e}, limit {limit:.1e}")
        if reason is not None:
            print(f"{name:14s} {provider:14s} not timed: {reason}")
    if seconds is not None:
        report(name, timing.interleave(runs, seconds, device), 3 * (own.support.nbytes + own.query.nbytes))
    return agreed


def report(name: str, times: dict[str, timing.Timing], nbytes: int) -> None:
    """A line a provider, the fastest first."""
    peers = [t.ms for p, t in times.items() if not p.startswith("mtml")]
    for provider, t in sorted(times.items(), key=lambda item: item[1].ms):
        ratio = f"{min(peers) / t.ms:5.2f} x the fastest peer" if peers and provider.startswith("mtml") else ""
        print(f"{name:14s} {provider:14s} {t.ms:8.4f} ms  {nbytes / t.ms / 1e6:7.0f} GB/s  {ratio}")


def main() -> int:
    """The command line; 1 where a provider's results are wrong."""
    p = argparse.ArgumentParser(prog="python -m bench.gpu.head_inner_loop", description="A linear head on a GPU.")
    p.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {' '.join(CASES)}")
    p.add_argument("--providers", default=",".join(PROVIDERS))
    p.add_argument("--seconds", type=float, default=2.0, help="time budget per provider (default %(default)s)")
    p.add_argument("--gate", action="store_true", help="compare, do not time")
    args = p.parse_args()
    names, providers = args.cases or list(CASES), args.providers.split(",")
    unknown = [n for n in names if n not in CASES] + [n for n in providers if n not in PROVIDERS]
    if unknown:
        p.error(f"expected cases of {', '.join(CASES)} and providers of {', '.join(PROVIDERS)}, got {unknown[0]!r}")
    interpreted = args.gate and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        p.error("no NVIDIA GPU that PyTorch can use; --gate runs small cases with TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'interpreter'}, torch {torch.__version__}, float32")
    agreed = [run_case(name, providers, device, None if args.gate else args.seconds) for name in names]
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
