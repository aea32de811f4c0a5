"""learn2learn.utils: modules and distributions copied, updated and detached with their history."""

from __future__ import annotations

from mtml.compat.learn2learn.utils.distributions import clone_distribution, detach_distribution
from mtml.compat.learn2learn.utils.misc import accuracy, flatten_config, magic_box, warn_once
from mtml.compat.learn2learn.utils.modules import (
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_module,
    update_module,
)

__all__ = [
    "accuracy",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "update_module",
    "warn_once",
]
