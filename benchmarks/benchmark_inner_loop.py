"""`inner_loop` for Hugging Face's `kernels benchmark`: MAML meta-steps against a plain PyTorch loop.

The command needs a kernel folder around this script: `python -m bench export --format hf-kernels --out DIR`, then
`kernels benchmark DIR`. What it verifies is the mean query loss and the exact second-order meta-gradient.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch import Tensor, nn
from torch.func import functional_call

SCALE = 100.0
"""Of the gradients that are compared: the command lets pass what is off by 0.01, as a first-order gradient is."""


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b), nn.ReLU()] if i < len(sizes) - 2 else [nn.Linear(a, b)]
    return nn.Sequential(*layers)


class InnerLoop(Benchmark):
    """T tasks of S support and Q query samples, K steps; `out` is the loss and all gradients in one row."""

    seed = 0

    def _problem(self, sizes: tuple[int, ...], samples: tuple[int, int, int], steps: int, lr: float, loss: str) -> None:
        """Random data of (tasks, support, query) for an MLP of these sizes."""
        self.net, (tasks, support, query) = mlp(*sizes).to(self.device), samples
        self.params: dict[str, Tensor] = dict(self.net.named_parameters())
        self.steps, self.lr, self.loss = steps, lr, loss
        inputs, outputs = sizes[0], sizes[-1]
        self.program = self.kernel.trace(self.net, [(inputs,)])

        def sets(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(tasks, count, inputs, device=self.device)
            if loss == "cross_entropy":
                return x, torch.randint(outputs, (tasks, count), device=self.device)
            return x, torch.randn(tasks, count, outputs, device=self.device)

        (self.sx, self.sy), (self.qx, self.qy) = sets(support), sets(query)

    def _ours(self) -> Tensor:
        options = {"steps": self.steps, "loss": self.loss, "query_x": self.qx, "query_y": self.qy, "keep": "none"}
        found = self.kernel.inner_loop(self.program, self.params, self.sx, self.sy, self.lr, **options)
        return self._row(found.loss.mean())

    def _plain(self) -> Tensor:
        compare = F.cross_entropy if self.loss == "cross_entropy" else F.mse_loss
        losses = []
        for sx, sy, qx, qy in zip(self.sx, self.sy, self.qx, self.qy, strict=True):
            fast = self.params
            for _ in range(self.steps):
                loss = compare(functional_call(self.net, fast, (sx,)), sy)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - self.lr * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            losses.append(compare(functional_call(self.net, fast, (qx,)), qy))
        return self._row(torch.stack(losses).mean())

    def _row(self, loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, list(self.params.values()))
        return torch.cat([loss.detach().reshape(1), *(SCALE * g.reshape(-1) for g in grads)])

    def setup_sinusoid(self) -> None:
        """Finn et al. 2017: 1-40-40-1, 25 tasks of 10 + 10 samples, 5 steps."""
        self._problem((1, 40, 40, 1), (25, 10, 10), 5, 0.01, "mse")

    def benchmark_sinusoid(self) -> None:
        self.out = self._ours()

    def verify_sinusoid(self) -> Tensor:
        return self._plain()

    def setup_omniglot(self) -> None:
        """784-256-128-64-64-5, 32 tasks of 5 + 75 samples, one step."""
        self._problem((784, 256, 128, 64, 64, 5), (32, 5, 75), 1, 0.4, "cross_entropy")

    def benchmark_omniglot(self) -> None:
        self.out = self._ours()

    def verify_omniglot(self) -> Tensor:
        return self._plain()
