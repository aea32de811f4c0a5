"""The error of everything that reads or samples data."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(ValueError):
    """Data that are missing, broken, or too few for the tasks asked; the message names what and the way out."""
