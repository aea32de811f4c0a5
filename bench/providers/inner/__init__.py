"""The providers of the inner-loop workloads: ours, plain autograd, torch.func (compiled or not), and JAX.

Each module has ``REQUIRES``, ``OPTIONS`` and ``prepare(workload, problem, options) -> Prepared``.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from bench.providers.base import Prepared, Unavailable
from bench.workloads.inner import InnerWorkload, make_problem

NAMES = ("mtml", "loop", "vmap", "compile", "jax")


def prepare(w: InnerWorkload, spec: str, dtype: torch.dtype, device: str, seed: int) -> Prepared:
    """Bind a provider, ``name`` or ``name:option+option``, to a workload.

    Raises Unavailable for one that is not installed or has no such inner loop, ValueError for an unknown option.
    """
    name, _, options = spec.partition(":")
    if name not in NAMES:
        raise Unavailable(f"no inner loop of this kind in this provider (there are {', '.join(NAMES)})")
    module = importlib.import_module(f"bench.providers.inner.{name}")
    chosen = frozenset(filter(None, options.split("+")))
    if not chosen <= set(module.OPTIONS):
        raise ValueError(f"provider {name}: expected options among {', '.join(module.OPTIONS)}; got {options}")
    for package in module.REQUIRES:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed (pip install {package})")
    prepared: Prepared = module.prepare(w, make_problem(w, dtype, device, seed), chosen)
    return prepared
