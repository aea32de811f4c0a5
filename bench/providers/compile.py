"""torch.func under torch.compile: the whole meta-step in one graph, or (``compile:loop``) one graph called per task.

The option ``graphs`` replays CUDA graphs (mode "reduce-overhead"): what PyTorch has against the host's time on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from bench.providers import vmap
from bench.providers.base import Prepared
from bench.workloads import Data, Workload

REQUIRES = ("torch",)
OPTIONS = (*vmap.OPTIONS, "graphs")


def by_graphs(fn: Callable[..., Any], in_turn: bool) -> Callable[..., Any]:
    """Compiled for replay. A replay writes over the results of the one before: those of tasks in turn are copied."""
    compiled = torch.compile(fn, mode="reduce-overhead")

    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*args)
        return tree_map(torch.clone, out) if in_turn else out

    return call


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    torch._dynamo.reset()
    if "graphs" not in options:
        return vmap.build(w, net, data, options, torch.compile)
    return vmap.build(w, net, data, options, lambda fn: by_graphs(fn, "loop" in options))
