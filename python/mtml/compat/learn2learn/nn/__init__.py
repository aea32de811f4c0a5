"""learn2learn.nn: layers and heads."""

from __future__ import annotations

from typing import Any

from mtml.compat.learn2learn.nn.kroneckers import KroneckerLinear, KroneckerLSTM, KroneckerRNN
from mtml.compat.learn2learn.nn.metalayers import MetaModule, ParameterTransform
from mtml.compat.learn2learn.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze
from mtml.compat.learn2learn.nn.protonet import PrototypicalClassifier

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerRNN",
    "Lambda",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "Scale",
    "freeze",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name == "SVClassifier":
        raise AttributeError(
            "learn2learn.nn.SVClassifier: it needs the solver qpth and is not part of mtml.compat; a head in closed "
            "form is mtml.R2D2"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
