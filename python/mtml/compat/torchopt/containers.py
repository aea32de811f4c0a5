"""Where modules hold their tensors, and how to put others there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mtml_kernels.recurrent import relink

__all__ = ["Container", "Slots", "copied", "held", "parts"]

Container = dict[str, Any]


def parts(module: nn.Module) -> list[nn.Module]:
    """The module and all submodules, as `module.modules()` lists them, which makes names for them too: slower."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {module!r} ({type(module).__name__})")
    found: dict[int, nn.Module] = {}

    def add(part: nn.Module) -> None:
        if id(part) not in found:
            found[id(part)] = part
            for child in part._modules.values():
                if child is not None:
                    add(child)

    add(module)
    return list(found.values())


def held(every: Sequence[nn.Module]) -> tuple[tuple[Container, ...], tuple[Container, ...]]:
    """The dicts of parameters and of buffers of these modules, those that are empty left out: the dicts themselves."""
    params = tuple(part._parameters for part in every if part._parameters)
    return params, tuple(part._buffers for part in every if part._buffers)


class Slots:
    """The parameters of a module: each tensor once, with all places that hold it.

    A tensor that is shared between layers stays shared when it is replaced; recurrent layers compute with the new one.
    """

    def __init__(self, module: nn.Module) -> None:
        every = parts(module)
        self.containers = held(every)[0]
        self.recurrent = [part for part in every if isinstance(part, nn.RNNBase)]

    def tensors(self) -> tuple[list[Tensor], list[tuple[Container, str, int]]]:
        """(the tensors, the places that hold them, each with the tensor's position)."""
        found: list[Tensor] = []
        position: dict[int, int] = {}
        places = []
        for container in self.containers:
            for name in sorted(container):  # the order of the original's states
                tensor = container[name]
                if tensor is None:
                    continue
                at = position.get(id(tensor))
                if at is None:
                    at = position[id(tensor)] = len(found)
                    found.append(tensor)
                places.append((container, name, at))
        return found, places

    def put(self, places: Sequence[tuple[Container, str, int]], new: Sequence[Tensor]) -> None:
        for container, name, at in places:
            container[name] = new[at]
        for part in self.recurrent:
            relink(part)


def copied(container: Container, of: Callable[[Tensor], Tensor]) -> Container:
    """The container's tensors again, each as `of` makes it; other values are left out."""
    return type(container)((name, of(t)) for name, t in container.items() if isinstance(t, Tensor))
