"""A `mtml.MAML` that is kept between calls follows what a script's own objects say."""

from __future__ import annotations

from typing import Any

from mtml.algorithms.maml import MAML

__all__ = ["follow"]


def follow(learner: MAML, **settings: Any) -> MAML:
    """The learner with these settings; those that it has already are not set again, which costs a module's look-ups."""
    for name, value in settings.items():
        if getattr(learner, name) is not value:
            setattr(learner, name, value)
    return learner
