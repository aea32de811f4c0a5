"""A file for each family of layers: its rows in `ops.OPS`, its handlers for tracing, and what its nodes compute.

Every file in this folder is part of the vocabulary: a new layer is a new file here.
"""

from __future__ import annotations

import importlib
import pkgutil

__all__: list[str] = []

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
