"""Head losses: what the multi-head kernels compute for one head, with which options."""

from mtml_kernels.schema.losses import CLASS_KINDS, HeadLoss, rows_shape
from mtml_kernels.schema.losses import HEAD_KINDS as KINDS

__all__ = ["CLASS_KINDS", "KINDS", "HeadLoss", "rows_shape"]
