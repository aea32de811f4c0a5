"""Calls of whole networks: of each kind of layer that a thread block's program has, with options of every kind."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from cases.call_random import FULL, present, with_axes, with_rule
from cases.images import Shape, headed, image_case
from cases.inner_loop import Case
from torch import nn

from mtml_kernels.losses import LossSpec
from mtml_kernels.schema.inner_loop import PER_STEP, QUERY_STEPS, STARTS, InnerLoopArgs
from mtml_kernels.schema.update import UpdateSpec

WORDS, WIDTH = 11, 6


class Words(nn.Module):
    """Ids, normalised twice, as probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows = nn.Embedding(WORDS, WIDTH, padding_idx=1), nn.LayerNorm(WIDTH)
        self.mid, self.groups = nn.Linear(3 * WIDTH, 8), nn.GroupNorm(4, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mid(torch.tanh(self.rows(self.table(ids))).flatten(1))
        found: torch.Tensor = self.out(torch.softmax(self.groups(x), 1))
        return found


def _network(*layers: nn.Module) -> tuple[nn.Module, Shape]:
    return headed((5,), *layers), (5,)


# A network and its options; rule and axes are put on afterwards.
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Shape]], dict[str, Any], UpdateSpec | None, int]] = {
    "adam": (
        lambda: _network(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 9), nn.Tanh()),
        {"steps": 3, "support": 5, "query": 4, "lr_scale": 0.02},
        UpdateSpec("adam", clipped=True, decayed=True),
        0,
    ),
    "words": (
        lambda: (Words().double(), (3,)),
        {"steps": 2, "support": 4, "query": 3, "loss": LossSpec("cross_entropy", label_smoothing=0.1), "ignored": True},
        UpdateSpec("sgd", momentum=True),
        0,
    ),
    "masks": (
        lambda: _network(nn.Linear(5, 12), nn.SiLU()),
        {"steps": 2, "support": 6, "query": 5, "masks": ("some", "some"), "loss": LossSpec("huber", delta=0.6)},
        None,
        PER_STEP | STARTS | QUERY_STEPS,
    ),
    "batch_norm": (
        lambda: _network(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4), nn.BatchNorm1d(4)),
        {"steps": 2, "support": 7, "query": 6, "lr": "element_per_step", "keep": 2, "step_weights": True},
        None,
        0,
    ),
    "wide": (
        lambda: _network(nn.Linear(5, 40), nn.GELU(), nn.Linear(40, 40), nn.Sigmoid()),
        {"steps": 2, "support": 33, "query": 17, "lr": "tensor", "first_order": False},
        UpdateSpec("rmsprop", momentum=True, centered=True),
        0,
    ),
}


def network_case(name: str, tasks: int = 2, dtype: torch.dtype = torch.float64) -> Case:
    make, options, rule, axes = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, shape = make()
        case = image_case(model, shape, tasks=tasks, dtype=dtype, rng=random.Random(0), **options)
        if name == "words":  # ids, many of them alike
            ids = [torch.randint(WORDS, x[0].shape) for x in (case.support_x, case.query_x)]
            case = dataclasses.replace(case, support_x=ids[:1], query_x=ids[1:])
        if rule is not None:
            case = with_rule(case, rule, random.Random(0))
        return with_axes(case, axes)


def network_call(name: str, tasks: int = 2, dtype: torch.dtype = torch.float64) -> InnerLoopArgs:
    """With every gradient that there is."""
    case = network_case(name, tasks, dtype)
    return InnerLoopArgs.of_schema(case.op_arguments(FULL & present(case)))
