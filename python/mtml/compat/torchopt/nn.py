"""Not here: importing it says so."""

from __future__ import annotations

from mtml.compat.torchopt.absent import absent

raise ImportError(absent("nn"))
