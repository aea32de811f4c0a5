"""The networks of the experiments and their initialisations, of standard layers only, so that the engine fuses them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["INITS", "NORMS", "adapted_names", "conv4", "mlp"]

INITS = ("torch", "finn2017", "he", "learn2learn", "maml++")
NORMS = ("none", "bias", "affine", "meta-affine")
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
FINN_EPS = 1e-3  # tf.contrib's and learn2learn's perceptron's; PyTorch's own is 1e-5


def mlp(sizes: Sequence[int], *, init: str = "torch", norm: str = "none", seed: int | None = None) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them: ``[..., sizes[0]] -> [..., sizes[-1]]``.

    `init`: "torch" is nn.Linear's own; "finn2017" and "learn2learn" the MAML code's truncated normal of sigma 0.01 with
    zero bias; "he" normal with variance 2 / inputs and zero bias; "maml++" Xavier's uniform with zero bias. `norm` as
    in `conv4`; what has a normalisation takes ``[N, sizes[0]]``. With a `seed` the global generator is left as it was.

    Raises:
        ValueError: where `init` or `norm` has another name.
    """
    _check(init, norm)
    with _seeded(seed):
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            if i:
                layers += [*_norm(nn.BatchNorm1d, before, norm, init, FINN_EPS), nn.ReLU()]
            layers.append(_initialised(nn.Linear(before, after), init))
    return nn.Sequential(*layers)


def conv4(
    ways: int,
    *,
    side: int = 28,
    channels: int = 1,
    filters: int = 64,
    init: str = "torch",
    norm: str = "bias",
    seed: int | None = None,
) -> nn.Sequential:
    """Finn's Omniglot network: ``[N, channels, side, side] -> [N, ways]``.

    Blocks of [convolution 3x3 with stride 2 and padding 1, batch normalisation, ReLU] halve the image until it is 2x2,
    which for 28x28 are four; then the mean over what remains, and a linear layer. TensorFlow's "SAME" pads 28x28
    images at the lower right only, PyTorch at the upper left in effect: the mirror image of the published network.

    Args:
        ways, side, channels, filters: the sizes.
        init: "torch" is each layer's own; "finn2017" Xavier's uniform for convolutions, standard normal for the linear
            layer, zero biases, as in the paper's code; "learn2learn" the same with uniform normalisation scales; "he"
            normal with variance 2 / inputs; "maml++" Xavier's uniform everywhere.
        norm: always by batch statistics. "bias": no scale, a bias that the inner loop does not adapt (the MAML paper's
            code); "affine": both, adapted (learn2learn); "meta-affine": both, meta-learned but not adapted (MAML++);
            "none": no normalisation.
        seed: of the weights; the global generator is then left as it was.

    Raises:
        ValueError: where `init` or `norm` has another name.

    Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.
    """
    _check(init, norm)
    eps = FINN_EPS if norm == "bias" else 1e-5
    with _seeded(seed):
        layers: list[nn.Module] = []
        while side > 2:
            layers.append(_initialised(nn.Conv2d(channels, filters, 3, stride=2, padding=1), init))
            layers += [*_norm(nn.BatchNorm2d, filters, norm, init, eps), nn.ReLU()]
            channels, side = filters, (side + 1) // 2
        head = _initialised(nn.Linear(filters, ways), init)
        if init in ("finn2017", "learn2learn"):
            nn.init.normal_(head.weight)
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]
    return nn.Sequential(*layers)


def adapted_names(model: nn.Module, norm: str) -> tuple[str, ...] | None:
    """What the inner loop changes, as `mtml.MAML` takes it: None where that is every trainable parameter."""
    if norm in ("none", "affine"):
        return None
    fixed = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters()
    }
    return tuple(name for name, p in model.named_parameters() if p.requires_grad and name not in fixed)


def _check(init: str, norm: str) -> None:
    for label, value, known in (("init", init, INITS), ("norm", norm, NORMS)):
        if value not in known:
            raise ValueError(f"{label}: expected one of {', '.join(known)}; got {value!r}")


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Within it, draws come from `seed`, and the global generator stays as it was; for None they come from that."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _norm(kind: type[_BatchNorm], width: int, norm: str, init: str, eps: float) -> list[nn.Module]:
    """The normalisation layer, or none. Without running statistics: train() and eval() make no difference."""
    if norm == "none":
        return []
    layer = kind(width, eps=eps, track_running_stats=False)
    if norm == "bias":
        layer.weight.requires_grad_(False)  # fixed at 1
    elif init == "learn2learn" and kind is nn.BatchNorm2d:
        nn.init.uniform_(layer.weight)
    return [layer]


def _initialised(layer: Layer, init: str) -> Layer:
    linear = isinstance(layer, nn.Linear)
    if init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif init in ("finn2017", "learn2learn") and linear:
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)  # TensorFlow cuts at two sigmas
    elif init != "torch":
        nn.init.xavier_uniform_(layer.weight)
    if init != "torch" and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
