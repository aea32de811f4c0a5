"""`multihead_loss` for Hugging Face's `kernels benchmark`: several heads' losses and gradients, against PyTorch.

As with benchmark_inner_loop.py: `python -m bench export --format hf-kernels --out DIR`, then `kernels benchmark DIR`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch import Tensor


class MultiheadLoss(Benchmark):
    """Cross-entropy of heads; `out` is every loss and every gradient in one row."""

    seed = 0

    def _heads(self, rows: int, *classes: int) -> None:
        self.logits = [torch.randn(rows, c, device=self.device, requires_grad=True) for c in classes]
        self.targets = [torch.randint(c, (rows,), device=self.device) for c in classes]

    def _row(self, losses: Callable[[], Tensor]) -> Tensor:
        """The gradients are those of the sum: of a mean over rows they would all lie below any tolerance."""
        each = losses()
        grads = torch.autograd.grad(each.sum() * len(self.targets[0]), self.logits)
        return torch.cat([each.detach(), *(g.reshape(-1) for g in grads)])

    def _ours(self) -> Tensor:
        return self._row(lambda: self.kernel.multihead_loss(self.logits, self.targets))

    def _plain(self) -> Tensor:
        pairs = zip(self.logits, self.targets, strict=True)
        return self._row(lambda: torch.stack([F.cross_entropy(z, y) for z, y in pairs]))

    def setup_vocabulary(self) -> None:
        """One head of 32000 classes on 512 rows."""
        self._heads(512, 32000)

    def benchmark_vocabulary(self) -> None:
        self.out = self._ours()

    def verify_vocabulary(self) -> Tensor:
        return self._plain()

    def setup_many(self) -> None:
        """64 heads of 10 classes on 32 rows."""
        self._heads(32, *[10] * 64)

    def benchmark_many(self) -> None:
        self.out = self._ours()

    def verify_many(self) -> Tensor:
        return self._plain()
