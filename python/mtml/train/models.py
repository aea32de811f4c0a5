"""The plain multilayer perceptrons of the experiments and their initialisations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["INITS", "mlp"]

INITS = ("torch", "finn2017", "he")


def mlp(sizes: Sequence[int], *, init: str = "torch", seed: int | None = None) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them: ``[..., sizes[0]] -> [..., sizes[-1]]``.

    `init`: "torch" is nn.Linear's own; "finn2017" the MAML code's truncated normal of sigma 0.01 with zero bias; "he"
    normal with variance 2 / inputs and zero bias. With a `seed` the global generator is left as it was.

    Raises:
        ValueError: where `init` has another name.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}; got {init!r}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers += [nn.ReLU()] if i else []
            layers.append(_initialised(nn.Linear(before, after), init))
    return nn.Sequential(*layers)


def _initialised(layer: nn.Linear, init: str) -> nn.Linear:
    if init == "finn2017":
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)  # TensorFlow cuts at two sigmas
    elif init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if init != "torch":
        nn.init.zeros_(layer.bias)
    return layer
