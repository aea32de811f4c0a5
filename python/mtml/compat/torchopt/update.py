"""Parameters and what is added to them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtml.compat.torchopt import pytree

__all__ = ["apply_updates"]


def apply_updates(params: Any, updates: Any, *, inplace: bool = True) -> Any:
    """params + updates, leaf by leaf; a parameter whose update is None stays.

    Args:
        params: a tree of tensors.
        updates: a tree of the same structure.
        inplace: add to the parameters' own data, which autograd does not see. False: new tensors, differentiable.
    """

    def added(p: Tensor, u: Tensor | None) -> Tensor:
        if u is None:
            return p
        if not inplace:
            return p + u
        p.data.add_(u)
        return p

    return pytree.tree_map(added, params, updates)
