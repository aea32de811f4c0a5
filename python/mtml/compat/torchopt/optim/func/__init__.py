"""An optimizer for trees of parameters that a function is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtml.compat.torchopt import pytree
from mtml.compat.torchopt.base import GradientTransformation, UninitializedState, uninitialised
from mtml.compat.torchopt.optim.base import check_impl
from mtml.compat.torchopt.update import apply_updates

__all__ = ["FuncOptimizer"]


class FuncOptimizer:
    """Keeps the state of a transformation between steps.

    Args:
        impl: the transformation.
        inplace: change the parameters' data instead of returning others; such a step is not differentiable.

    Example:
        >>> import torch
        >>> from mtml.compat import torchopt
        >>> optimizer = FuncOptimizer(torchopt.sgd(lr=0.25))
        >>> params = {"x": torch.ones(1, requires_grad=True)}
        >>> optimizer.step(params["x"].square().sum(), params)["x"].item()
        0.5
    """

    def __init__(self, impl: GradientTransformation, *, inplace: bool = False) -> None:
        self.impl = check_impl(impl)
        self.optim_state: Any = UninitializedState()
        self.inplace = bool(inplace)

    def step(self, loss: Tensor, params: Any, inplace: bool | None = None) -> Any:
        """The parameters after one step on the loss; differentiable any number of times, unless in place."""
        inplace = self.inplace if inplace is None else inplace
        if uninitialised(self.optim_state):
            self.optim_state = self.impl.init(params)
        flat, treespec = pytree.tree_flatten(params)
        found = torch.autograd.grad(loss, flat, create_graph=not inplace, allow_unused=True)
        # each in its parameter's place, None included
        grads = pytree.tree_unflatten(treespec, found)
        with torch.set_grad_enabled(not inplace):
            updates, self.optim_state = self.impl.update(grads, self.optim_state, params=params, inplace=False)
            return apply_updates(params, updates, inplace=inplace)

    def state_dict(self) -> Any:
        """The state itself, no copy."""
        return self.optim_state

    def load_state_dict(self, state_dict: Any) -> None:
        self.optim_state = state_dict
