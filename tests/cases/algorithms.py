"""Every algorithm by name, on small models of its own, and a batch that all of them take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mtml
from mtml.tasks import TaskBatch

D = torch.float64
T, C, S, Q = 3, 3, 6, 5


def trunk(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, width), nn.Tanh()).to(D)


def net() -> nn.Sequential:
    return nn.Sequential(*trunk(), nn.Linear(5, C)).to(D)


def context() -> nn.Sequential:
    return nn.Sequential(mtml.Context(3), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, C)).to(D)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C)).to(D)


def imaml(**options: Any) -> mtml.IMAML:
    return mtml.IMAML(net(), lr=0.3, strength=0.8, steps=80, cg_steps=40, **options)


EXACT: dict[str, Callable[[], Any]] = {
    "MAML": lambda: mtml.MAML(net(), lr=0.5, steps=2),
    "MAML with Adam": lambda: mtml.MAML(net(), lr=0.1, steps=2, update=mtml.inner.Adam(eps=1e-2)),
    "MetaSGD": lambda: mtml.MetaSGD(net(), lr=0.5, steps=2),
    "MAMLPlusPlus": lambda: mtml.MAMLPlusPlus(normed(), lr=0.5, steps=2),
    "ANIL": lambda: mtml.ANIL(trunk(), nn.Linear(5, C).to(D), lr=0.5, steps=2),
    "BOIL": lambda: mtml.BOIL(net(), lr=0.5, head="4.*", steps=2),
    "CAVIA": lambda: mtml.CAVIA(context(), lr=1.0, steps=2),
    "ProtoMAML": lambda: mtml.ProtoMAML(trunk(), nn.Linear(5, C).to(D), lr=0.2, steps=2),
    "R2D2": lambda: mtml.R2D2(trunk(), C),
    "IMAML": imaml,
    "IMAML with momentum": lambda: imaml(update=mtml.inner.SGD(momentum=0.3)),
    "MetaCurvature": lambda: mtml.MetaCurvature(net(), lr=0.5, steps=2),
}
APPROXIMATE: dict[str, Callable[[], Any]] = {
    "FOMAML": lambda: mtml.FOMAML(net(), lr=0.5, steps=2),
    "MAMLPlusPlus at first": lambda: mtml.MAMLPlusPlus(normed(), lr=0.5, steps=2, first_order_epochs=1),
    "CAVIA of first order": lambda: mtml.CAVIA(context(), 1.0, first_order=True, steps=2),
    "Reptile": lambda: mtml.Reptile(net(), lr=0.5, steps=2),
}
EVERY = EXACT | APPROXIMATE


def batch(masks: bool = False) -> TaskBatch:
    torch.manual_seed(5)
    y = torch.stack([torch.randperm(S) % C for _ in range(T)])
    sets = torch.randn(T, S, 4, dtype=D), y, torch.randn(T, Q, 4, dtype=D), torch.randint(C, (T, Q))
    return TaskBatch(*sets, *((torch.rand(T, S, dtype=D) + 0.1, torch.rand(T, Q, dtype=D)) if masks else ()))


def made(name: str) -> Any:
    torch.manual_seed(4)
    return EVERY[name]()
