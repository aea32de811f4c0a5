"""Batch normalisation: the running statistics are the module's own whatever `params` holds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mtml.compat.torchmeta.modules.module import MetaModule, Params, chosen

__all__ = ["MetaBatchNorm1d", "MetaBatchNorm2d", "MetaBatchNorm3d"]


def _normalised(layer: nn.modules.batchnorm._BatchNorm, input: Tensor, params: Params) -> Tensor:
    layer._check_input_dim(input)
    average, moves = layer.momentum, layer.training and layer.track_running_stats
    if moves and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if average is None:
            average = 1.0 / float(layer.num_batches_tracked)
    statistics = (layer.running_mean, layer.running_var) if moves or not layer.training else (None, None)
    by_batch = layer.training or layer.running_mean is None
    weight, bias = chosen(layer, params, "weight", "bias")
    return F.batch_norm(input, *statistics, weight, bias, by_batch, average or 0.0, layer.eps)


class MetaBatchNorm1d(nn.BatchNorm1d, MetaModule):
    """`torch.nn.BatchNorm1d` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        return super().forward(input) if params is None else _normalised(self, input, params)


class MetaBatchNorm2d(nn.BatchNorm2d, MetaModule):
    """`torch.nn.BatchNorm2d` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        return super().forward(input) if params is None else _normalised(self, input, params)


class MetaBatchNorm3d(nn.BatchNorm3d, MetaModule):
    """`torch.nn.BatchNorm3d` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        return super().forward(input) if params is None else _normalised(self, input, params)
