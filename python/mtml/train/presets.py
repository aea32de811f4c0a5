"""Settings of image experiments by name; every rate is one under a cross-entropy averaged over the support set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mtml.tasks.errors import DataError
from mtml.train.models import INITS

__all__ = ["PRESETS", "Preset", "resolve"]

LEARN = ("no", "all", "tensor", "element")


@dataclass(frozen=True)
class Preset:
    """How one experiment trains; `per` makes the inner rates learnable ("all", "tensor", "element")."""

    meta_batch: int
    queries: int  # per class, in training
    steps: int
    test_steps: int
    inner_lr: float
    outer_lr: float
    init: str = "torch"
    per: str | None = None
    cosine: bool = False
    shift: int = 0  # pixels by which training drawings are moved at random


def finn2017(ways: int, shots: int) -> Preset:
    """The MAML paper's. Its code sums the cross-entropy over the support set and divides by the shots, so under a mean
    its inner rates 0.4 (5 ways) and 0.1 (20 ways) are both 2.0. Its networks have BatchNorm, which bears that rate."""
    many = ways > 5
    return Preset(
        meta_batch=16 if many else 32,
        queries=shots,
        steps=5 if many else 1,
        test_steps=5 if many else 3,
        inner_lr=(0.1 if many else 0.4) * ways,
        outer_lr=1e-3,
        init="finn2017",
    )


def learn2learn(ways: int, shots: int) -> Preset:
    """Of learn2learn's Omniglot example: one step at 0.5, outer Adam at 3e-3."""
    return Preset(meta_batch=32, queries=shots, steps=1, test_steps=1, inner_lr=0.5, outer_lr=3e-3)


def mtml(ways: int, shots: int) -> Preset:
    """What trained this network without BatchNorm best in a given time, judged on 100 validation characters.

    It owes most to He's initialisation, then to moving the drawings. A learned rate was a little worse than the fixed
    one after equal time, as were 2 inner steps, half the tasks, fewer queries and other rates, inner or outer.
    """
    return Preset(
        meta_batch=32,
        queries=5,
        steps=1,
        test_steps=3,
        inner_lr=0.8,
        outer_lr=2e-3,
        init="he",
        cosine=True,
        shift=2,
    )


PRESETS: dict[str, Callable[[int, int], Preset]] = {"mtml": mtml, "finn2017": finn2017, "learn2learn": learn2learn}


def resolve(name: str, ways: int, shots: int, **given: Any) -> Preset:
    """The preset of that name with the settings `given` (None: the preset's own) in place of its own.

    Raises:
        DataError: where a name is unknown.
    """
    for label, value, known in (
        ("preset", name, tuple(PRESETS)),
        ("init", given.get("init"), INITS),
        ("learn-lr", given.get("per"), LEARN),
    ):
        if value is not None and value not in known:
            raise DataError(f"{label}: expected one of {', '.join(known)}; got {value!r}")
    chosen = replace(PRESETS[name](ways, shots), **{key: value for key, value in given.items() if value is not None})
    return replace(chosen, per=None) if chosen.per == "no" else chosen
