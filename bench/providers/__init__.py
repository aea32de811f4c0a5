"""The providers: ours and every peer, one module each, found by name.

A provider is named ``name`` or ``name:option+option``, for example ``mtml:general``, ``compile:loop`` or
``loop:channels_last``. Each module has ``REQUIRES`` (the packages it imports), ``OPTIONS`` (what it understands) and
``prepare(workload, network, data, options) -> Prepared``. A further provider is one more such module, named in NAMES.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from torch import nn

from bench.providers.base import OWN, Prepared, Unavailable, is_ours
from bench.workloads import Data, Workload, to_channels_last

NAMES = ("mtml", "loop", "learn2learn", "higher", "torchopt", "vmap", "mixflow", "compile", "jax")
DEFAULT = (*NAMES, "jax:map")
"""What runs when nothing is asked for: every provider, and the variants that have beaten their plain form."""
IMAGES = (
    *("mtml", "loop", "loop:channels_last", "learn2learn", "higher", "torchopt", "vmap", "mixflow"),
    *("compile", "compile:loop"),
)
"""The same for convolutional networks, without JAX: with weights of each task they take it 22 to 46 s a step."""
SHARED_OPTIONS = ("channels_last",)
Prepare = Callable[[Workload, nn.Module, Data], Prepared]

__all__ = ["DEFAULT", "IMAGES", "NAMES", "OWN", "Prepare", "Prepared", "Unavailable", "default", "is_ours", "load"]


def default(w: Workload) -> tuple[str, ...]:
    """What runs on a workload when nothing is asked for."""
    return IMAGES if len(w.x) == 3 else DEFAULT


def parse(spec: str) -> tuple[str, frozenset[str]]:
    """``compile:loop+channels_last`` -> ("compile", {"loop", "channels_last"})."""
    name, _, options = spec.partition(":")
    return name, frozenset(filter(None, options.split("+")))


def load(spec: str) -> Prepare:
    """The provider of this name, ready to be given a network and data.

    Raises ValueError for a name or option that does not exist, Unavailable for a peer that is not installed.
    """
    name, options = parse(spec)
    if name not in NAMES:
        raise ValueError(f"provider: expected one of {', '.join(NAMES)}; got {name!r}")
    module = importlib.import_module(f"bench.providers.{name}")
    unknown = options - set(module.OPTIONS) - set(SHARED_OPTIONS)
    if unknown:
        known = ", ".join((*module.OPTIONS, *SHARED_OPTIONS))
        raise ValueError(f"provider {name}: expected options among {known}; got {', '.join(sorted(unknown))}")
    for package in module.REQUIRES:
        if not getattr(module, "found", lambda: False)() and importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed ({getattr(module, 'INSTALL', f'pip install {package}')})")

    def prepare(w: Workload, net: nn.Module, data: Data) -> Prepared:
        if "channels_last" in options:
            net, data = to_channels_last(net, data)
        prepared: Prepared = module.prepare(w, net, data, options - set(SHARED_OPTIONS))
        return prepared

    return prepare
