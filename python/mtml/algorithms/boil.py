"""BOIL: the inner loop changes the body alone, and the head is learned across tasks."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from torch import Tensor, nn

from mtml.algorithms.learner import LearnerOptions, Rate
from mtml.algorithms.maml import MAML
from mtml.params import ParamsArg, aliases, select
from mtml_kernels.transforms import differentiated

__all__ = ["BOIL"]


class BOIL(MAML):
    """Body Only update in Inner Loop: `MAML` whose inner rate is 0 for the head, the opposite of `ANIL`.

        body_{k+1} = body_k - lr * grad_body L_s(body_k, head),    head_k = head

    With the head fixed, adapting has to change the features: representation change instead of reuse. The head is still
    meta-trained, through the query loss and through the inner gradients.

    Args:
        model, lr, first_order and the keyword arguments: as of `MAML`.
        head: names or patterns of the tensors that the inner loop leaves alone, such as "head.*", or a predicate.

    Raises:
        ValueError: `head` matches nothing, or everything that could be adapted; else as `MAML`.

    Example:
        >>> import torch, mtml
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> boil = mtml.BOIL(net, lr=0.5, head="2.*")
        >>> x, y = torch.randn(4, 6, 2), torch.randint(3, (4, 6))
        >>> boil.meta_loss(x, y, x, y).mean().backward()
        >>> list(boil.adapt_tasks(x, y).params)
        ['0.weight', '0.bias']

    Paper: Oh, Yoo, Kim, Yun, "BOIL: Towards Representation Change for Few-shot Learning", 2021 (arXiv:2008.08882).
    """

    def __init__(
        self, model: nn.Module, lr: Rate, head: ParamsArg, first_order: bool = False, **options: Unpack[LearnerOptions]
    ) -> None:
        if head is None:
            raise TypeError("head: expected names or patterns of the head's tensors, such as 'head.*', got None")
        fixed = select(model, head)
        others = {name for name, first in aliases(model).items() if first in fixed}
        super().__init__(model, lr, first_order, params=Body(frozenset(fixed) | others), **options)


@dataclasses.dataclass(frozen=True)
class Body:
    """The predicate of everything trainable that is not of the head."""

    head: frozenset[str]

    def __call__(self, name: str, tensor: Tensor) -> bool:
        return differentiated(tensor) and name not in self.head
