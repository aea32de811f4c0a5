"""Batch normalisation: the modes that its layers may be put into, and MAML++'s, by batch statistics with a weight and a
bias of its own for every inner step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtml_kernels.checks import check_choice

__all__ = [
    "BATCH_NORM_MODES",
    "PerStepBatchNorm",
    "batch_norm_mode",
    "check_batch_norm",
    "per_step_batch_norm",
    "per_step_names",
    "set_batch_norm",
    "step_row",
    "step_rows",
    "tracks",
]

BATCH_NORM_MODES = ("module", "track", "batch", "running", "per_step")


def check_batch_norm(model: nn.Module, mode: str) -> None:
    """Raise ValueError for an unknown mode, or one that the model's layers cannot follow."""
    check_choice("batch_norm", mode, BATCH_NORM_MODES)
    for name, module in model.named_modules():
        if mode == "per_step" and isinstance(module, _BatchNorm):
            raise ValueError(
                f"batch_norm: expected PerStepBatchNorm layers for 'per_step', but layer {name!r} is a "
                f"{type(module).__name__}; mtml.MAML(..., batch_norm='per_step') replaces nn.BatchNorm1d, 2d and 3d"
            )
        if mode == "running" and isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"batch_norm: expected running statistics for 'running', but layer {name!r} keeps none; "
                "use 'batch', or build the layer with track_running_stats=True"
            )


def tracks(model: nn.Module) -> bool:
    """Does a batch normalisation layer of the model update running statistics as it stands?"""
    return any(
        isinstance(m, _BatchNorm) and m.training and m.track_running_stats and m.running_mean is not None
        for m in model.modules()
    )


def set_batch_norm(model: nn.Module, mode: str) -> None:
    """From now on, batch normalisation layers normalise as `mode` says and, unless that is "track", update nothing."""
    for layer in [] if mode == "track" else [m for m in model.modules() if isinstance(m, _BatchNorm)]:
        if mode == "running":
            layer.training = False
        elif mode in ("batch", "per_step") or layer.training:
            # a training layer that tracks nothing uses the batch and is handed no buffers, so none can change
            layer.training, layer.track_running_stats = True, False


@contextmanager
def batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Within it, the layers are as `set_batch_norm` makes them."""
    saved = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        set_batch_norm(model, mode)
        yield
    finally:
        for layer, training, track in saved:
            layer.training, layer.track_running_stats = training, track


class PerStepBatchNorm(nn.Module):
    """Batch statistics always, and affine parameters with a row for every inner step.

    At inner step k the support set is normalised with row k, and after k updates the query set with row k - 1, that of
    the step that led there (at least 0). Steps beyond the last row, and calls outside an inner loop, read the last row.
    The inner loop never adapts the rows; they are meta-trained. Takes [N, C] and [N, C, ...].

    Args:
        num_features: C.
        steps: K, the number of rows.
        eps: added to the variance.
        affine: False for no weight and bias.

    Example:
        >>> import torch, mtml
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
        >>> maml = mtml.MAML(net, lr=0.1, steps=5, batch_norm="per_step")
        >>> maml.module[1]
        PerStepBatchNorm(8, steps=5)
        >>> maml.module[1].weight.shape
        torch.Size([5, 8])

    Paper: Antoniou, Edwards, Storkey, "How to train your MAML", 2019.
    """

    def __init__(self, num_features: int, steps: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self.num_features, self.steps, self.eps = num_features, steps, eps
        self.weight = nn.Parameter(torch.ones(steps, num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(steps, num_features)) if affine else None

    @staticmethod
    def of(layer: _BatchNorm, steps: int) -> PerStepBatchNorm:
        """Every row a copy of the layer's weight and bias."""
        new = PerStepBatchNorm(layer.num_features, steps, layer.eps, affine=False)
        new.train(layer.training)
        for name in ("weight", "bias"):
            tensor: Tensor | None = getattr(layer, name)
            if tensor is not None:
                rows = tensor.detach().expand(steps, -1).clone()
                setattr(new, name, nn.Parameter(rows, tensor.requires_grad))
        return new

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if rows is None else rows[-1] for rows in (self.weight, self.bias))
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)

    def extra_repr(self) -> str:
        options = "" if self.eps == 1e-5 else f", eps={self.eps}"
        options += "" if self.weight is not None else ", affine=False"
        return f"{self.num_features}, steps={self.steps}{options}"


def per_step_batch_norm(model: nn.Module, steps: int) -> nn.Module:
    """The model with `PerStepBatchNorm` in place of every BatchNorm layer, changed in place; the new layer itself for a
    model that is one.
    """
    new: dict[int, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            return module
        assert isinstance(module, _BatchNorm)
        if id(module) not in new:  # a shared layer stays shared
            new[id(module)] = PerStepBatchNorm.of(module, max(steps, 1))
        return new[id(module)]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = replaced(child)
    return replaced(model)


def _layers(model: nn.Module) -> Iterator[tuple[str, PerStepBatchNorm]]:
    for path, module in model.named_modules():
        if isinstance(module, PerStepBatchNorm):
            yield f"{path}." if path else "", module


def per_step_names(model: nn.Module) -> set[str]:
    """Names of the parameters with a row for every step."""
    return {
        prefix + name
        for prefix, layer in _layers(model)
        for name, tensor in layer._parameters.items()
        if tensor is not None
    }


def step_row(rows: int, step: int | None, query: bool) -> int:
    """Which row of a LAYOUT_STEPS parameter a pass reads.

    A support pass at theta_k reads row k; a query pass at theta_k the row of the step that led there, k - 1. A row
    beyond the last, and a pass outside the inner loop (step None), reads the last.
    """
    if step is None:
        return rows - 1
    return min(max(step - 1, 0) if query else step, rows - 1)


def step_rows(
    model: nn.Module, step: int, query: bool, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What takes the place of the rows in a pass at theta_step: the one that it reads, [1, C], by name.

    `tensors` are used in place of the model's own.
    """
    found: dict[str, Tensor] = {}
    for prefix, layer in _layers(model):
        for name, own in layer._parameters.items():
            if own is not None:
                rows = (tensors or {}).get(prefix + name, own)
                at = step_row(rows.shape[0], step, query)
                found[prefix + name] = rows[at : at + 1]
    return found
