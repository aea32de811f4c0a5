"""What every comparison with a limit goes through, so that no NaN passes one.

Python's ``max(0.0, nan)`` is 0.0, a median sorts NaN anywhere, and a limit of infinity (a reference that overflowed)
lets everything through.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from torch import Tensor

__all__ = ["median", "relative", "within", "worst"]


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where any is, or where there is none.

    Example:
        >>> worst([0.0, float("nan")]), worst([0.5, 0.25])
        (nan, 0.5)
    """
    found = list(errors)
    return math.nan if not found or any(map(math.isnan, found)) else max(found)


def median(errors: Sequence[float]) -> float:
    """NaN where any value is: a median would sort it anywhere."""
    return math.nan if any(map(math.isnan, errors)) else statistics.median(errors)


def within(error: float, limit: float) -> bool:
    """Whether an error is at most a limit; False for NaN in either, and for a limit that is no finite number."""
    return math.isfinite(limit) and error <= limit


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any element, relative to the largest that is expected."""
    off = worst(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return off / worst(float(b.abs().max()) for b in expected)
