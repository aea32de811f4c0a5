"""learn2learn.algorithms. Those for Lightning are imported, with Lightning, when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mtml.compat.learn2learn.algorithms.base_learner import BaseLearner
from mtml.compat.learn2learn.algorithms.gbml import GBML
from mtml.compat.learn2learn.algorithms.maml import MAML, maml_update
from mtml.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]

_LIGHTNING = ("LightningANIL", "LightningEpisodicModule", "LightningMAML", "LightningPrototypicalNetworks")


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING:
        return getattr(import_module(f"{__name__}.lightning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
