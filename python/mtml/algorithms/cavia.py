"""CAVIA: the inner loop changes a few context parameters alone; functa's latents are such."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from mtml.algorithms.learner import LearnerOptions, Rate
from mtml.algorithms.maml import MAML
from mtml.params import ParamsArg, select

__all__ = ["CAVIA", "Context"]


class Context(nn.Module):
    """Appends the context parameters to every sample: [N, D] -> [N, D + size].

    They are the buffer ``context`` [size], zeros, which `CAVIA` adapts to each task.

    Example:
        >>> import torch, mtml
        >>> mtml.Context(3)(torch.ones(2, 1)).tolist()
        [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """

    context: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.register_buffer("context", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.context.expand(x.shape[0], -1)), 1)

    def extra_repr(self) -> str:
        return str(self.context.shape[0])


class CAVIA(MAML):
    """Fast Context Adaptation via Meta-Learning: `MAML` that adapts context parameters phi, and meta-trains the rest.

        phi_0 = 0;   phi_{k+1} = phi_k - lr * grad_phi L_s(theta, phi_k);   theta learns from L_q(theta, phi_K)

    Few numbers describe a task: ``adapt_tasks(sx, sy).params`` are {name: [T, *shape]}, to store, compare or give back
    by ``adapt_tasks(sx, sy, steps=0, start=...)``. Exact to second order.

    functa's latents are contexts of a neural field that shift its sines, with a learned rate for every entry:
    ``CAVIA(siren, mtml.InnerLR(siren, 0.05, per="element", params="latent", min=0, max=1), "latent", steps=3,
    loss="mse")``; examples/fields.py trains one.

    Args:
        model: reads its context from buffers, such as `Context` makes, or from a frozen parameter.
        lr, first_order and the keyword arguments: as of `MAML`.
        context: names or patterns of those tensors.

    Raises:
        ValueError: `context` matches nothing, or tensors that require grad, which would be meta-trained; else as
            `MAML`.

    Example:
        >>> import torch, mtml
        >>> layers = mtml.Context(4), torch.nn.Linear(5, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)
        >>> cavia = mtml.CAVIA(torch.nn.Sequential(*layers), lr=1.0, steps=2, loss="mse")
        >>> x, y = torch.randn(8, 10, 1), torch.randn(8, 10, 1)
        >>> cavia.meta_loss(x, y, x, y).mean().backward()
        >>> {name: tuple(t.shape) for name, t in cavia.adapt_tasks(x, y).params.items()}
        {'0.context': (8, 4)}

    Papers: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, "Fast Context Adaptation via Meta-Learning", 2019
    (arXiv:1810.03642); Dupont et al., "From data to functa", 2022 (arXiv:2201.12204).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate,
        context: ParamsArg = "*context",
        first_order: bool = False,
        **options: Unpack[LearnerOptions],
    ) -> None:
        if context is None:
            raise TypeError("context: expected names or patterns of the context parameters, got None")
        super().__init__(model, lr, first_order, params=context, **options)
        trained = dict(model.named_parameters())
        learnt = [name for name in select(self.module, context) if name in trained and trained[name].requires_grad]
        if learnt:
            raise ValueError(
                f"context: expected buffers or frozen parameters, but {', '.join(map(repr, learnt[:5]))} require grad; "
                "make them buffers (register_buffer), or use mtml.MAML(params=...), which learns where they start"
            )
