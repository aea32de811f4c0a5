"""higher by its own names: inner loops written with a patched module and a differentiable optimiser, task by task.

>>> import torch, mtml.compat.higher as higher
>>> net = torch.nn.Linear(2, 1)
>>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
>>> x, y = torch.randn(8, 2), torch.randn(8, 1)
>>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fnet, diffopt):
...     diffopt.step((fnet(x) - y).square().mean())
...     (fnet(x) - y).square().mean().backward()
[...]
>>> net.weight.grad.shape
torch.Size([1, 2])

`meta_loss`, which the original has not, runs that loop for a whole batch of tasks as one operation. What differs from
the original stands in docs/from_higher.md. Grefenstette et al., "Generalized Inner Loop Meta-Learning", 2019
(arXiv:1910.01727).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mtml.compat.higher import optim, patch, utils
from mtml.compat.higher.batched import meta_loss
from mtml.compat.higher.optim import (
    DifferentiableOptimizer,
    Override,
    create_diff_optim,
    get_diff_optim,
    register_optim,
)
from mtml.compat.higher.patch import FunctionalModule, monkeypatch

__all__ = [
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "meta_loss",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[FunctionalModule, DifferentiableOptimizer]]:
    """A patched copy of the model and a differentiable copy of the optimiser, for one inner loop.

    Args:
        model: any module; it stays as it is, buffers included.
        opt: an optimiser over its parameters, or some of them; its settings and its state are taken over.
        device: where the copies are to be.
        copy_initial_weights: start from detached copies of the weights. **MAML needs False**: with True no gradient
            reaches the model, only `fmodel.parameters(time=0)`.
        override: {setting: [value]} or {setting: [one for each group of parameters]} in the place of the optimiser's,
            among them tensors to learn.
        track_higher_grads: False for test time: nothing is kept to differentiate through.

    Yields:
        (fmodel, diffopt): see `monkeypatch` and `DifferentiableOptimizer`.

    Raises:
        ValueError: an optimiser of no known type, or over parameters that are not the model's; an override of no
            setting; a model that is patched already.

    Example:
        >>> import torch, mtml.compat.higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> with higher.innerloop_ctx(net, torch.optim.Adam(net.parameters()), copy_initial_weights=False) as (f, opt):
        ...     new = opt.step(f(torch.ones(4, 2)).square().mean())
        >>> len(new)
        2
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    yield (
        fmodel,
        get_diff_optim(
            opt,
            model.parameters(),
            fmodel=fmodel,
            device=device,
            override=override,
            track_higher_grads=track_higher_grads,
        ),
    )
