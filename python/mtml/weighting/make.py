"""Weightings by name."""

from __future__ import annotations

from collections.abc import Mapping

from mtml.weighting.base import Weighting
from mtml.weighting.cosmos import COSMOS
from mtml.weighting.famo import FAMO
from mtml.weighting.fixed import GLS, RLW, Fixed
from mtml.weighting.following import DWA, GradNorm
from mtml.weighting.imtl import IMTLL
from mtml.weighting.stch import STCH
from mtml.weighting.uncertainty import Uncertainty
from mtml_kernels.checks import shown

__all__ = ["make_weighting"]

NAMED: dict[str, type[Weighting]] = {
    "sum": Fixed,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "gls": GLS,
    "rlw": RLW,
    "gradnorm": GradNorm,
    "famo": FAMO,
    "stch": STCH,
    "imtl_l": IMTLL,
    "cosmos": COSMOS,
}


def make_weighting(weighting: str | Mapping[str, float] | Weighting) -> Weighting:
    """A weighting from its name, from fixed weights by head, or itself.

    Raises:
        ValueError: an unknown name, or weights that are negative or not finite.
        TypeError: none of the three.
    """
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, Mapping):
        return Fixed(weighting)
    if not isinstance(weighting, str):
        raise TypeError(f"weighting: expected a name, {{head: weight}} or a Weighting, got {shown(weighting)}")
    if weighting not in NAMED:
        raise ValueError(
            f"weighting: expected one of {', '.join(map(repr, NAMED))}, {{head: weight}} or a Weighting; "
            f"got {weighting!r}"
        )
    return NAMED[weighting]()
