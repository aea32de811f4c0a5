"""Multi-head losses on a GPU: forward and backward of PyTorch eager and compiled, Liger, QuACK, and the Triton kernels.

    python -m bench.gpu.multihead_loss                                        # all cases and providers, float32
    python -m bench.gpu.multihead_loss vocab segmentation --dtype bfloat16 --providers eager,compile,mtml --seconds 2
    python -m bench.gpu.multihead_loss linear_vocab linear_vocab_128k linear_many --dtype bfloat16   # and products

Needs an NVIDIA GPU; Liger (pip install liger-kernel) and QuACK (pip install quack-kernels) run where they are
installed, and PyTorch's own linear cross-entropy by chunks (`torch:chunked`) where PyTorch has it. LIGER_KERNEL_IMPL
chooses Liger's kernels, as ever. Every provider's losses and gradients are first compared with eager
PyTorch's in float64. A row gives the time; the rate at which the logits are read once and their gradients written once,
or that of the three products of linear heads; by how much a step raises the peak of allocated memory; and the ratio to
the fastest peer. PyTorch runs compiled whole, and with CUDA graphs too (`compile:graphs`). Nothing was recorded yet: no
figure of this project comes from here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import timing
from bench.measure.gate import within, worst
from bench.workloads.heads import Draw
from mtml_kernels import linear_multihead_loss
from mtml_kernels.losses import HeadLoss
from mtml_kernels.reference.multihead_loss import head_loss

PROVIDERS = ("eager", "compile", "compile:graphs", "liger", "quack", "torch:chunked", "mtml")
PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "quack": ("quack", "quack-kernels")}
"""Of peers: what is imported, and what is installed."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Heads:
    """A case's heads. leaves: their logits; or, where they are `linear`, features that they share and their weights."""

    leaves: list[Tensor]
    targets: list[Tensor]
    specs: list[HeadLoss]
    linear: bool = False

    def logits(self) -> list[Tensor]:
        """Every head's logits."""
        return [F.linear(self.leaves[0], w) for w in self.leaves[1:]] if self.linear else self.leaves

    def copy(self, dtype: torch.dtype) -> Heads:
        """The same heads with leaves of their own in another dtype."""
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in self.leaves]
        targets = [y.to(dtype) if y.is_floating_point() else y for y in self.targets]
        return Heads(leaves, targets, self.specs, self.linear)

    def work(self, ms: float) -> str:
        """At what rate a step of that time does what it must."""
        if self.linear:
            products = 2 * sum(self.leaves[0].numel() * len(w) for w in self.leaves[1:])
            return f"{3 * products / ms / 1e9:7.1f} TFLOP/s"
        return f"{2 * sum(z.nbytes for z in self.leaves) / ms / 1e6:7.0f} GB/s"


def vocab(draw: Draw) -> Heads:
    """Cross-entropy of logits [2048, 32000]."""
    return Heads([draw.leaf(2048, 32000)], [draw.labels(32000, 2048)], [HeadLoss()])


def vocab_128k(draw: Draw) -> Heads:
    """Cross-entropy of logits [2048, 128256]."""
    return Heads([draw.leaf(2048, 128256)], [draw.labels(128256, 2048)], [HeadLoss()])


def segmentation(draw: Draw) -> Heads:
    """Per-pixel cross-entropy of logits [16, 21, 128, 128] with an ignored class."""
    return Heads([draw.leaf(16, 21, 128, 128)], [draw.labels(21, 16, 128, 128)], [HeadLoss(ignore_index=0)])


def many_small(draw: Draw) -> Heads:
    """64 heads of 10 classes on 32 samples each."""
    return Heads([draw.leaf(32, 10) for _ in range(64)], [draw.labels(10, 32) for _ in range(64)], [HeadLoss()] * 64)


def long_narrow(draw: Draw) -> Heads:
    """Cross-entropy of logits [1000000, 10]."""
    return Heads([draw.leaf(1000000, 10)], [draw.labels(10, 1000000)], [HeadLoss()])


def mixed(draw: Draw) -> Heads:
    """16 heads on 4096 samples: 8 of 10 to 80 classes, 4 of 100 binary labels, 4 regressions of 16 outputs."""
    classes = [10 * (i + 1) for i in range(8)]
    logits = [draw.leaf(4096, c) for c in (*classes, *(100,) * 4, *(16,) * 4)]
    targets = [draw.labels(c, 4096) for c in classes]
    targets += [draw.labels(2, 4096, 100).to(draw.dtype) for _ in range(4)]
    targets += [draw.leaf(4096, 16).detach() for _ in range(4)]
    kinds = ["cross_entropy"] * 8 + ["bce_with_logits"] * 4 + ["huber"] * 4
    return Heads(logits, targets, [HeadLoss(kind) for kind in kinds])


def linear_heads(draw: Draw, rows: int, features: int, *classes: int) -> Heads:
    """Cross-entropy of linear heads of these classes on shared features [rows, features]."""
    leaves = [draw.leaf(rows, features), *(draw.leaf(c, features, scale=features**-0.5) for c in classes)]
    return Heads(leaves, [draw.labels(c, rows) for c in classes], [HeadLoss()] * len(classes), linear=True)


def linear_vocab(draw: Draw) -> Heads:
    """Cross-entropy of a linear head of 32000 words on features [8192, 2048]."""
    return linear_heads(draw, 8192, 2048, 32000)


def linear_vocab_128k(draw: Draw) -> Heads:
    """Cross-entropy of a linear head of 128256 words on features [4096, 4096]."""
    return linear_heads(draw, 4096, 4096, 128256)


def linear_many(draw: Draw) -> Heads:
    """16 linear heads of 10..160 classes on features [512, 256]."""
    return linear_heads(draw, 512, 256, *(10 * (i + 1) for i in range(16)))


LINEAR = (linear_vocab, linear_vocab_128k, linear_many)
CASES: dict[str, Callable[[Draw], Heads]] = {
    f.__name__: f for f in (vocab, vocab_128k, segmentation, many_small, long_narrow, mixed, *LINEAR)
}


def pytorch_loss(z: Tensor, y: Tensor, spec: HeadLoss) -> Tensor:
    """PyTorch's own loss of a head."""
    if spec.kind == "cross_entropy":
        return F.cross_entropy(z, y, ignore_index=spec.ignore_index)
    if spec.kind == "bce_with_logits":
        return F.binary_cross_entropy_with_logits(z, y)
    return head_loss(z, y, spec)


class _Ours(torch.autograd.Function):
    """The kernels alone, with the least of autograd around them."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, *logits: Tensor) -> Tensor:
        from mtml_kernels.triton.multihead_loss import forward

        losses, ctx.gradients = forward(logits, heads.targets, heads.specs)
        return losses

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor | None, ...]:
        from mtml_kernels.triton.multihead_loss import call_hand_out

        return (None, *call_hand_out(ctx.gradients, cotangents, [1] * len(cotangents)))


def liger_loss() -> Callable[[Tensor, Tensor, HeadLoss], Tensor]:
    """Liger's cross-entropy of rows [N, C]. It writes the gradient over the logits it is given."""
    module = importlib.import_module("liger_kernel.transformers")

    def loss(z: Tensor, y: Tensor, spec: HeadLoss) -> Tensor:
        rows = z.movedim(1, -1).flatten(0, -2) if z.ndim > 2 else z
        value: Tensor = module.LigerCrossEntropyLoss(ignore_index=spec.ignore_index)(rows, y.flatten())
        return value

    return loss


def quack_loss() -> Callable[[Tensor, Tensor, HeadLoss], Tensor]:
    """QuACK's cross-entropy of rows [N, C]."""
    module = importlib.import_module("quack.cross_entropy")

    def loss(z: Tensor, y: Tensor, spec: HeadLoss) -> Tensor:
        rows = z.movedim(1, -1).flatten(0, -2) if z.ndim > 2 else z
        value: Tensor = module.cross_entropy(
            rows.contiguous(), y.flatten(), ignore_index=spec.ignore_index, reduction="mean"
        )
        return value

    return loss


Linear = Callable[[Tensor, Tensor, Tensor, HeadLoss], Tensor]
"""A fused loss of features, a head's weight, target and specification."""


def liger_linear() -> Linear:
    """Liger's linear cross-entropy; it sums the weight's gradient in float32, as the others do."""
    module = importlib.import_module("liger_kernel.transformers")

    def loss(x: Tensor, w: Tensor, y: Tensor, spec: HeadLoss) -> Tensor:
        fused = module.LigerFusedLinearCrossEntropyLoss(ignore_index=spec.ignore_index, accum_dtype=torch.float32)
        value: Tensor = fused(w, x, y)
        return value

    return loss


def quack_linear() -> Linear:
    """QuACK's linear cross-entropy by chunks of rows."""
    module = importlib.import_module("quack.linear_cross_entropy")

    def loss(x: Tensor, w: Tensor, y: Tensor, spec: HeadLoss) -> Tensor:
        value: Tensor = module.chunked_linear_cross_entropy(x, w, y, ignore_index=spec.ignore_index, reduction="mean")
        return value

    return loss


def torch_linear() -> Linear:
    """PyTorch's own linear cross-entropy by chunks of rows."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Tensor, w: Tensor, y: Tensor, spec: HeadLoss) -> Tensor:
        return F.linear_cross_entropy(x, w, y, ignore_index=spec.ignore_index, options=options)

    return loss


def unavailable(provider: str, heads: Heads) -> str | None:
    """Why a provider cannot run these heads, or None."""
    if provider == "torch:chunked":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        if not heads.linear:
            return "it is for linear heads"
    elif provider not in PACKAGES:
        return None
    elif importlib.util.find_spec(PACKAGES[provider][0]) is None:
        module, package = PACKAGES[provider]
        return f"{module} is not installed (pip install {package})"
    return None if all(s.kind == "cross_entropy" for s in heads.specs) else "it has cross_entropy alone"


def fused(provider: str, heads: Heads) -> Callable[[], Tensor] | None:
    """The losses [H] of linear heads by a provider that takes features and weights, None for the others."""
    x, weights = heads.leaves[0], heads.leaves[1:]
    if provider == "mtml":
        return lambda: linear_multihead_loss(x, weights, None, heads.targets, heads.specs, backend="triton")
    makers = {"liger": liger_linear, "quack": quack_linear, "torch:chunked": torch_linear}
    if provider not in makers:
        return None
    one = makers[provider]()
    return lambda: torch.stack([one(x, *head) for head in zip(weights, heads.targets, heads.specs, strict=True)])


def losses_by(provider: str, heads: Heads) -> Callable[[], Tensor]:
    """The provider's losses [H], of no arguments."""
    direct = fused(provider, heads) if heads.linear else None
    if direct is not None:
        return direct
    if provider == "mtml":
        return lambda: _Ours.apply(heads, *heads.leaves)
    makers = {"liger": liger_loss, "quack": quack_loss}
    one = makers[provider]() if provider in makers else pytorch_loss

    def all_heads() -> Tensor:
        return torch.stack([one(*head) for head in zip(heads.logits(), heads.targets, heads.specs, strict=True)])

    if provider.startswith("compile"):
        mode = "reduce-overhead" if provider.endswith("graphs") else None
        return torch.compile(all_heads, fullgraph=True, mode=mode)
    return all_heads


def step(provider: str, heads: Heads) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """One forward and backward: (losses, gradients of their sum)."""
    losses = losses_by(provider, heads)

    def run() -> tuple[Tensor, list[Tensor]]:
        value = losses()
        return value.detach(), list(torch.autograd.grad(value.sum(), heads.leaves))

    return run


def error(found: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]]) -> float:
    """The worse of the losses' and the gradients' relative l2 errors."""
    pairs = [(found[0], truth[0]), *zip(found[1], truth[1], strict=True)]
    squares = [(float((a.double() - b).square().sum()), float(b.square().sum())) for a, b in pairs]
    off, size = (sum(column) for column in zip(*squares[1:], strict=True))
    return worst([(squares[0][0] / squares[0][1]) ** 0.5, (off / size) ** 0.5])


def peak(run: Callable[[], Any], device: str) -> float:
    """MiB by which a step raises the peak of allocated memory, its results included (0 on the CPU)."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def mismatch(run: Callable[[], Any], truth: tuple[Tensor, list[Tensor]], limit: float) -> str | None:
    """What is wrong with a provider's results, or None; one that fails does not end the others' run."""
    try:
        found = error(run(), truth)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return f"mismatch: error {found:.1e}, limit {limit:.1e}" if not within(found, limit) else None


def run_case(name: str, providers: Sequence[str], dtype: torch.dtype, device: str, seconds: float) -> bool:
    """Compare and time the providers on one case, and print a line for each; False where ours was not timed."""
    own = CASES[name](Draw(dtype, device, 0))
    # the truth is that of the rounded leaves: a provider answers for its own rounding alone
    truth = step("eager", own.copy(torch.float64))()
    limit = 4 * error(step("eager", own)(), truth) + 1e-6
    runs: dict[str, Callable[[], Any]] = {}
    for provider in providers:
        reason = unavailable(provider, own)
        if reason is None:
            run = step(provider, own.copy(dtype))  # leaves of its own, for Liger writes over logits
            reason = mismatch(run, truth, limit)
            runs |= {provider: run} if reason is None else {}
        if reason is not None:
            print(f"{name:17s} {provider:14s} not timed: {reason}")
    del truth
    memory = {provider: peak(run, device) for provider, run in runs.items()}
    report(name, own, timing.interleave(runs, seconds, device), memory)
    return "mtml" in runs or "mtml" not in providers


def report(name: str, heads: Heads, times: dict[str, timing.Timing], memory: dict[str, float]) -> None:
    """A line a provider, the fastest first."""
    peers = [t.ms for p, t in times.items() if p != "mtml"]
    for provider, t in sorted(times.items(), key=lambda item: item[1].ms):
        ratio = f"{min(peers) / t.ms:5.2f} x the fastest peer" if peers and provider == "mtml" else ""
        print(f"{name:17s} {provider:14s} {t.ms:8.4f} ms  {heads.work(t.ms)}  {memory[provider]:7.0f} MiB  {ratio}")


def main() -> int:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.gpu.multihead_loss", description="Multi-head losses on a GPU.")
    p.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {' '.join(CASES)}")
    p.add_argument("--providers", default=",".join(PROVIDERS))
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    p.add_argument("--seconds", type=float, default=2.0, help="time budget per provider (default %(default)s)")
    args = p.parse_args()
    names, providers = args.cases or list(CASES), args.providers.split(",")
    unknown = [n for n in names if n not in CASES] + [n for n in providers if n not in PROVIDERS]
    if unknown:
        p.error(f"expected cases of {', '.join(CASES)} and providers of {', '.join(PROVIDERS)}, got {unknown[0]!r}")
    if not torch.cuda.is_available():
        p.error("no NVIDIA GPU that PyTorch can use")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}")
    done = [run_case(name, providers, DTYPES[args.dtype], "cuda", args.seconds) for name in names]
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
