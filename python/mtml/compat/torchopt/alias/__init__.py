"""Optimizers as transformations."""

from __future__ import annotations

from mtml.compat.torchopt.alias.presets import adadelta, adagrad, adam, adamax, adamw, radam, rmsprop, sgd

__all__ = ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd"]
