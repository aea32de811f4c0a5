"""What copies of recurrent layers need besides copies of their attributes."""

from __future__ import annotations

from torch import nn

__all__ = ["RELINKED", "relink"]

RELINKED = ("_flat_weights", "_flat_weight_refs")  # attributes that `relink` makes anew


def relink(module: nn.Module) -> None:
    """Recurrent layers keep a flat list of their weights, which must hold the present ones."""
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]
        module.__dict__["_flat_weight_refs"] = [None for _ in module._flat_weights_names]
