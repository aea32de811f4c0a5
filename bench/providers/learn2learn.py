"""learn2learn's MAML: clone, adapt, backward.

learn2learn 0.2.0 does not install on Python >= 3.11: point LEARN2LEARN_SRC at its unpacked source distribution, and its
algorithms alone are loaded (its __init__ imports gym and torchvision).
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.base import Prepared, loss_of, stored_grads
from bench.workloads import Data, Workload

REQUIRES = ("learn2learn",)
INSTALL = "unpack its source distribution and set LEARN2LEARN_SRC to the folder"
OPTIONS: tuple[str, ...] = ()


def found() -> bool:
    """Whether a source tree was named instead of an installation."""
    return bool(os.environ.get("LEARN2LEARN_SRC"))


def _load_source(src: str) -> None:
    for name, path in (("learn2learn", "learn2learn"), ("learn2learn.algorithms", "learn2learn/algorithms")):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = [os.path.join(src, path)]
            sys.modules[name] = module


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    if found():
        _load_source(os.environ["LEARN2LEARN_SRC"])
    maml_class: Any = importlib.import_module("learn2learn.algorithms.maml").MAML

    sx, sy, qx, qy = data
    loss_fn, maml = loss_of(w), maml_class(net, lr=w.lr, first_order=False)

    def backward() -> Tensor:
        losses = []
        for t in range(w.tasks):
            learner = maml.clone()
            for _ in range(w.steps):
                learner.adapt(loss_fn(learner(sx[t]), sy[t]))
            losses.append(loss_fn(learner(qx[t]), qy[t]))
        total = torch.stack(losses).mean()
        total.backward()
        return total

    return stored_grads(w, net, data, backward)
