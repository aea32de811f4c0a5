"""One line for the batched engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtml.compat.learn2learn.algorithms import GBML, MAML, MetaSGD

__all__ = ["meta_loss"]


def meta_loss(learner: MAML | MetaSGD | GBML, *tasks: Any, **options: Any) -> Tensor:
    """The query loss of every task of a batch [T], as the script's loop over `learner.clone()` computes it.

    Not in learn2learn. One call of the batched engine, which is kept on the learner; differentiable to all that the
    loop's result is.

    Args:
        learner: MAML, MetaSGD or GBML.
        tasks: sx [T, S, ...], sy [T, S, ...], qx [T, Q, ...], qy [T, Q, ...], or an `mtml.TaskBatch`.
        options: as of `MAML.meta_loss`: steps=1, loss="cross_entropy", query_loss=None and more.

    Raises:
        TypeError: the learner is none of these.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> maml = l2l.algorithms.MAML(torch.nn.Linear(2, 1), lr=0.1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> l2l.meta_loss(maml, x, y, x, y, steps=5, loss=torch.nn.MSELoss()).mean().backward()
    """
    if not isinstance(learner, MAML | MetaSGD | GBML):
        raise TypeError(
            f"learner: expected learn2learn's MAML, MetaSGD or GBML, got {type(learner).__name__}; a model and another "
            "inner loop go into mtml.MAML, which takes the same batch"
        )
    return learner.meta_loss(*tasks, **options)
