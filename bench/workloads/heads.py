"""Multi-head loss workloads: several heads' losses, forward and backward, and their providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers.base import OWN, Prepared, Result, Unavailable
from mtml_kernels import HeadLoss, linear_multihead_loss, multihead_loss

PROVIDERS = ("eager", "compile", OWN)
Loss = Callable[[], Tensor]
Case = tuple[Loss, Loss, list[Tensor]]
"""PyTorch's loss and this project's, of no arguments, and the leaves its gradient is taken for."""


class Draw:
    """Random leaves and labels: equal values for equal seeds whatever the dtype."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(3 + seed)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype).requires_grad_()

    def labels(self, classes: int, *shape: int) -> Tensor:
        return torch.randint(0, classes, shape, generator=self.generator).to(self.device)


def linear_ce(draw: Draw) -> Case:
    """16 heads of 10..160 classes on shared features [512, 256], uncertainty weights."""
    classes = [10 * (i + 1) for i in range(16)]
    features = draw.leaf(512, 256)
    weights = [draw.leaf(c, 256, scale=0.05) for c in classes]
    biases, log_vars = [draw.leaf(c, scale=0.0) for c in classes], draw.leaf(16, scale=0.0)
    targets = [draw.labels(c, 512) for c in classes]

    def weighted(each: Tensor) -> Tensor:
        return (torch.exp(-log_vars) * each + log_vars / 2).sum()

    def loss() -> Tensor:
        heads = zip(weights, biases, targets, strict=True)
        return weighted(torch.stack([F.cross_entropy(F.linear(features, w, b), y) for w, b, y in heads]))

    return (
        loss,
        (lambda: weighted(linear_multihead_loss(features, weights, biases, targets))),
        [features, log_vars, *weights, *biases],
    )


def vocab_ce(draw: Draw) -> Case:
    """Cross-entropy of logits [2048, 32000]."""
    logits, target = draw.leaf(2048, 32000), draw.labels(32000, 2048)
    return (lambda: F.cross_entropy(logits, target)), (lambda: multihead_loss([logits], [target])[0]), [logits]


def segmentation(draw: Draw) -> Case:
    """Per-pixel cross-entropy of logits [16, 21, 128, 128] with an ignored class."""
    logits, target = draw.leaf(16, 21, 128, 128), draw.labels(21, 16, 128, 128)
    kind = HeadLoss("cross_entropy", ignore_index=0)

    def loss() -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=0)

    return loss, (lambda: multihead_loss([logits], [target], kind)[0]), [logits]


def many_small(draw: Draw) -> Case:
    """64 heads of 10 classes on 32 samples each."""
    logits = [draw.leaf(32, 10) for _ in range(64)]
    targets = [draw.labels(10, 32) for _ in range(64)]

    def loss() -> Tensor:
        return torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, targets, strict=True)]).sum()

    return loss, (lambda: multihead_loss(logits, targets).sum()), logits


def many_stacked(draw: Draw) -> Case:
    """The same heads in one tensor [64, 32, 10]: PyTorch's is one cross-entropy with a mean for each head."""
    logits, targets = draw.leaf(64, 32, 10), draw.labels(10, 64, 32)

    def loss() -> Tensor:
        rows = F.cross_entropy(logits.view(2048, 10), targets.view(2048), reduction="none")
        return rows.view(64, 32).mean(1).sum()

    return loss, (lambda: multihead_loss(logits, targets).sum()), [logits]


@dataclass(frozen=True)
class HeadsWorkload:
    """One multi-head loss. ``macs``: the multiply-adds of one product of its linear heads (0: logits are given)."""

    name: str
    build: Callable[[Draw], Case]
    macs: int
    elements: int
    what: str = ""

    @property
    def flops(self) -> int:
        """Forward, dW and dX."""
        return 3 * 2 * self.macs

    def bytes(self, itemsize: int = 4) -> int:
        """Every leaf read once, every gradient written once."""
        return 2 * self.elements * itemsize


_LINEAR = (512 * 256 * 1360, 512 * 256 + 1360 * 257 + 16)
WORKLOADS: dict[str, HeadsWorkload] = {
    w.name: w
    for w in (
        HeadsWorkload(
            "heads_linear_ce", linear_ce, *_LINEAR, "16 linear heads of 10..160 classes, features [512, 256]"
        ),
        HeadsWorkload("heads_vocab_ce", vocab_ce, 0, 2048 * 32000, "logits [2048, 32000]"),
        HeadsWorkload("heads_segmentation", segmentation, 0, 16 * 21 * 128 * 128, "logits [16, 21, 128, 128]"),
        HeadsWorkload("heads_many_small", many_small, 0, 64 * 32 * 10, "64 heads [32, 10], a tensor each"),
        HeadsWorkload("heads_many_stacked", many_stacked, 0, 64 * 32 * 10, "the same in one tensor [64, 32, 10]"),
    )
}


def prepare(w: HeadsWorkload, provider: str, dtype: torch.dtype, device: str, seed: int) -> Prepared:
    """Bind a provider to a workload. Raises Unavailable for a provider that has no multi-head loss."""
    if provider not in PROVIDERS:
        raise Unavailable(f"no multi-head loss in this provider (there are {', '.join(PROVIDERS)})")
    loss, own, leaves = w.build(Draw(dtype, device, seed))
    fn = torch.compile(loss) if provider == "compile" else own if provider == OWN else loss

    def run() -> Result:
        value = fn()
        return value.detach(), list(torch.autograd.grad(value, leaves))

    return Prepared(run)
