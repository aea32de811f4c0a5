"""Updates of parameters from a loss, by learned transforms of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mtml.clone import inner_gradients

__all__ = ["ParameterUpdate"]


class ParameterUpdate(nn.Module):
    """update_i = transform_i(gradient_i), with a transform made for each parameter.

    Args:
        parameters: those of the model.
        transform: transform(parameter) -> a module, or None for the gradient itself.

    Raises:
        ValueError: the transform is something else.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> update = l2l.optim.ParameterUpdate(net.parameters(), l2l.optim.MetaCurvatureTransform)
        >>> loss = net(torch.ones(1, 2)).sum()
        >>> [tuple(u.shape) for u in update(loss, net.parameters(), create_graph=True)]
        [(1, 2), (1,)]
    """

    def __init__(self, parameters: Iterable[nn.Parameter], transform: Callable[[nn.Parameter], Any]) -> None:
        super().__init__()
        self.transforms_indices: list[int | None] = []
        modules: list[nn.Module] = []
        for parameter in parameters:
            made = transform(parameter)
            if made is not None and not isinstance(made, nn.Module):
                raise ValueError(f"transform: expected it to make a module or None, got {type(made).__name__}")
            self.transforms_indices.append(None if made is None else len(modules))
            modules += [] if made is None else [made]
        self.transforms_modules = nn.ModuleList(modules)

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The update of each parameter, None for those without a gradient.

        Args:
            create_graph, retain_graph: as of ``torch.autograd.grad``.
            allow_unused, allow_nograd: allow parameters that the loss does not depend on, or that require no grad.

        Raises:
            RuntimeError: there is such a parameter, and that is not allowed.
            ValueError: other parameters in number than transforms.
        """
        tensors = list(parameters)
        if len(tensors) != len(self.transforms_indices):
            raise ValueError(
                f"parameters: expected {len(self.transforms_indices)}, as many as this was made for, got {len(tensors)}"
            )
        grads = inner_gradients(
            loss,
            tensors,
            lambda: [f"parameter {i} {list(t.shape)}" for i, t in enumerate(tensors)],
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        return self.transformed(grads)

    def transformed(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The updates from gradients that are there already."""
        pairs = zip(grads, self.transforms_indices, strict=True)
        return [g if g is None or i is None else self.transforms_modules[i](g) for g, i in pairs]
