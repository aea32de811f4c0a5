"""learn2learn's names on mtml: its per-task loop unchanged, and a method for the batched engine.

>>> import torch
>>> import mtml.compat.learn2learn as l2l
>>> maml = l2l.algorithms.MAML(torch.nn.Linear(2, 1), lr=0.1)
>>> x, y = torch.randn(8, 2), torch.randn(8, 1)
>>> learner = maml.clone()
>>> learner.adapt((learner(x) - y).square().mean())
>>> (learner(x) - y).square().mean().backward()

Submodules are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtml.compat.learn2learn.utils import *  # noqa: F403  # as the original has them at its top
from mtml.compat.learn2learn.utils import __all__ as _UTILS

if TYPE_CHECKING:
    from mtml.compat.learn2learn import algorithms, nn, optim, utils, vision
    from mtml.compat.learn2learn.batched import meta_loss

__version__ = "0.2.1"  # of the original, whose names these are

_MODULES = ("algorithms", "data", "nn", "optim", "utils", "vision")
_ABSENT = {"gym": "environments for reinforcement learning", "text": "data sets of text"}
__all__ = ["__version__", "algorithms", "data", "meta_loss", "nn", "optim", "utils", "vision", *_UTILS]  # noqa: F405


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "meta_loss":
        return import_module(f"{__name__}.batched").meta_loss
    if name in _ABSENT:
        raise AttributeError(
            f"learn2learn.{name}: {_ABSENT[name]} are not part of mtml.compat; install the original for them"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
