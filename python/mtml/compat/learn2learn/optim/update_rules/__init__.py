"""learn2learn.optim.update_rules."""

from __future__ import annotations

from mtml.compat.learn2learn.optim.update_rules.differentiable_sgd import DifferentiableSGD

__all__ = ["DifferentiableSGD"]
