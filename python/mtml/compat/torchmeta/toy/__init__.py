"""Tasks of one-dimensional regression."""

from mtml.compat.torchmeta.toy import helpers
from mtml.compat.torchmeta.toy.harmonic import Harmonic
from mtml.compat.torchmeta.toy.sinusoid import Sinusoid
from mtml.compat.torchmeta.toy.sinusoid_line import SinusoidAndLine

__all__ = ["Harmonic", "Sinusoid", "SinusoidAndLine", "helpers"]
