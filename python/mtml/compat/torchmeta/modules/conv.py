"""Convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from mtml.compat.torchmeta.modules.module import MetaModule, Params, chosen

__all__ = ["MetaConv1d", "MetaConv2d", "MetaConv3d"]


class MetaConv1d(nn.Conv1d, MetaModule):
    """`torch.nn.Conv1d` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        return self._conv_forward(input, *chosen(self, params, "weight", "bias"))


class MetaConv2d(nn.Conv2d, MetaModule):
    """`torch.nn.Conv2d` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        return self._conv_forward(input, *chosen(self, params, "weight", "bias"))


class MetaConv3d(nn.Conv3d, MetaModule):
    """`torch.nn.Conv3d` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        return self._conv_forward(input, *chosen(self, params, "weight", "bias"))
