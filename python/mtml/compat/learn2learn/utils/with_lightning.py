"""PyTorch Lightning, by whichever name it is installed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["pytorch_lightning"]

NAMES = ("pytorch_lightning", "lightning.pytorch")  # learn2learn's own scripts import the first


def pytorch_lightning() -> Any:
    """The module. Of two the one that is imported already.

    Raises ImportError where there is none.
    """
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (*NAMES, "lightning"):  # but something that it needs
                raise
    raise ImportError(
        "learn2learn's Lightning classes need PyTorch Lightning, which is not installed; pip install lightning, or "
        "train with learn2learn.algorithms.MAML in a loop of your own"
    )
