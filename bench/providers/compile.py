"""torch.func under torch.compile: the whole meta-step in one graph, or (``compile:loop``) one graph called per task."""

from __future__ import annotations

import torch
from torch import nn

from bench.providers import vmap
from bench.providers.base import Prepared
from bench.workloads import Data, Workload

REQUIRES = ("torch",)
OPTIONS = vmap.OPTIONS


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    torch._dynamo.reset()
    return vmap.build(w, net, data, options, torch.compile)
