"""An optimiser of ordinary training whose update is learned by hypergradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtml.clone import Held
from mtml.compat.rate import rate, scalar

__all__ = ["LearnableOptimizer"]


class LearnableOptimizer(nn.Module):
    """p - lr * transform(p.grad), where the gradient that the next loss leaves in the transforms trains them.

    After a step the model's parameters are tensors that remember their last update alone; `.grad` is filled as ever.

    Args:
        model: what is trained; it is not registered, so that ``parameters()`` are the transforms' own.
        transform: transform(parameter) -> a module gradient -> update.
        lr: the learning rate.

    Raises:
        TypeError: the model is no module, or the rate neither a number nor a tensor.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
        >>> optimizer = l2l.optim.LearnableOptimizer(model, l2l.optim.ModuleTransform(torch.nn.Linear), lr=0.1)
        >>> for _ in range(2):
        ...     loss = model(x).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> all(p.grad is not None for p in optimizer.parameters())  # of the second loss, through the first step
        True
    """

    def __init__(self, model: nn.Module, transform: Callable[[nn.Parameter], nn.Module], lr: Any = 1.0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.info = {"model": model}
        self.transforms = nn.ModuleList([transform(p) for p in model.parameters()])
        self.lr = rate("lr", lr)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update the model from its parameters' `.grad`, after `closure`, where one is given; returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held, lr = Held(self.info["model"]), scalar(self.lr)
        new: list[Tensor | None] = []
        for tensor, transform in zip(held.tensors, self.transforms, strict=True):
            grad = tensor.grad
            new.append(None if grad is None else tensor.detach() - lr * transform(grad.detach()))
        held.replace(new)
        for moved in new:
            if moved is not None and moved.requires_grad:
                moved.retain_grad()
        return loss

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients of the model, or drop them; not those of the transforms."""
        for tensor in Held(self.info["model"]).tensors:
            if tensor.grad is not None:
                tensor.grad = None if set_to_none else torch.zeros_like(tensor)
