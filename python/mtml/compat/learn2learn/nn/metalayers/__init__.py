"""Modules of another model wrapped to be adapted."""

from __future__ import annotations

from mtml.compat.learn2learn.nn.metalayers.metamodule import MetaModule
from mtml.compat.learn2learn.nn.metalayers.parameter_transform import ParameterTransform

__all__ = ["MetaModule", "ParameterTransform"]
