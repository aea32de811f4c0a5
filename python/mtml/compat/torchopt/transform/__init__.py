"""The transformations that optimizers are chains of."""

from __future__ import annotations

from mtml.compat.torchopt.transform.moments import (
    scale_by_accelerated_adam,
    scale_by_adadelta,
    scale_by_adam,
    scale_by_adamax,
    scale_by_radam,
    scale_by_rms,
    scale_by_rss,
    scale_by_stddev,
)
from mtml.compat.torchopt.transform.simple import (
    add_decayed_weights,
    masked,
    nan_to_num,
    scale,
    scale_by_schedule,
    trace,
)

__all__ = [
    "add_decayed_weights",
    "masked",
    "nan_to_num",
    "scale",
    "scale_by_accelerated_adam",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_stddev",
    "trace",
]
