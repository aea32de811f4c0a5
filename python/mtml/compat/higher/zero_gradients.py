"""One warning for a silent mistake: meta-gradients that went into detached copies of a model's weights.

With ``copy_initial_weights=True``, which is the default, `loss.backward()` fills the gradients of copies. That is what
a script wants that learns rates; one that then steps an optimiser over the model, whose gradients are all None, trains
nothing. The step is where that is certain, so that is where it is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["watch"]


class _Watch:
    """Whether a backward pass has reached copies of a model's weights; over at the first optimiser step after that."""

    def __init__(self) -> None:
        self.reached = self.over = False

    def note(self, _: Tensor) -> None:
        self.reached = True


_watched: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()
_hook: Any = None


def watch(module: nn.Module, copies: Sequence[Tensor]) -> None:
    """Notice gradients that reach the copies, until an optimiser over the module's parameters takes a step."""
    global _hook
    found = _watched.setdefault(module, _Watch())
    if found.over:
        return
    for copy in copies:
        if copy.requires_grad:
            copy.register_post_accumulate_grad_hook(found.note)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_judge)


def _judge(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _hook
    waiting = [(module, found) for module, found in list(_watched.items()) if found.reached and not found.over]
    if waiting:
        grads = {id(p): p.grad for group in optimizer.param_groups for p in group["params"]}
        for module, found in waiting:
            own = [grads[id(p)] for p in module.parameters() if id(p) in grads]
            found.over = bool(own)
            if own and all(grad is None for grad in own):
                _warn(module)
    if all(found.over for found in list(_watched.values())) and _hook is not None:
        _hook.remove()
        _hook = None


def _warn(module: nn.Module) -> None:
    warnings.warn(
        f"copy_initial_weights: an optimiser steps over the parameters of {type(module).__name__}, none of which has a "
        "gradient, while backward() has reached detached copies of them; pass copy_initial_weights=False to "
        "innerloop_ctx or monkeypatch, as MAML needs it, or leave the model out of that optimiser",
        UserWarning,
        stacklevel=5,
    )
