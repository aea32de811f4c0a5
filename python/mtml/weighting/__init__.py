"""How the losses of several heads become one: fixed weights, learned ones, or weights that follow the losses."""

from mtml.weighting.base import Weighting
from mtml.weighting.cosmos import COSMOS
from mtml.weighting.famo import FAMO
from mtml.weighting.fixed import GLS, RLW, Fixed
from mtml.weighting.following import DWA, GradNorm
from mtml.weighting.imtl import IMTLL
from mtml.weighting.make import make_weighting
from mtml.weighting.stch import STCH
from mtml.weighting.uncertainty import Uncertainty

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "RLW",
    "STCH",
    "Fixed",
    "GradNorm",
    "Uncertainty",
    "Weighting",
    "make_weighting",
]
