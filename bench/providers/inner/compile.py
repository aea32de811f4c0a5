"""The torch.func loop under torch.compile."""

from __future__ import annotations

import torch

from bench.providers.base import Prepared
from bench.providers.inner import vmap
from bench.workloads.inner import InnerWorkload, Problem

REQUIRES = ("torch",)
OPTIONS = vmap.OPTIONS


def prepare(w: InnerWorkload, p: Problem, options: frozenset[str]) -> Prepared:
    torch._dynamo.reset()
    return vmap.build(w, p, options, torch.compile)
