"""What wraps a module and stands for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtml.wrappers import refuse_data_parallel

__all__ = ["BaseLearner", "check_model"]


def check_model(name: str, model: Any) -> None:
    """Raise TypeError for what is no module, or one in DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(model).__name__}")
    refuse_data_parallel(
        name, model, "call mtml.distributed.average_gradients(learner.parameters()) between backward and step"
    )


class BaseLearner(nn.Module):
    """A module around `module`, whose attributes are found on it too: for learners of one's own.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.algorithms import BaseLearner
        >>> BaseLearner(torch.nn.Linear(2, 1)).in_features
        2
    """

    module: Any

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if modules.get("module") is None:
                raise
            return getattr(modules["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self._modules["module"](*args, **kwargs)  # type: ignore[misc]  # found sooner than as an attribute
