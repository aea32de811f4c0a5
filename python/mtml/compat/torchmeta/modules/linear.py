"""Linear and bilinear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mtml.compat.torchmeta.modules.module import MetaModule, Params, chosen

__all__ = ["MetaBilinear", "MetaLinear"]


class MetaLinear(nn.Linear, MetaModule):
    """`torch.nn.Linear` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        return F.linear(input, *chosen(self, params, "weight", "bias"))


class MetaBilinear(nn.Bilinear, MetaModule):
    """`torch.nn.Bilinear` whose forward takes its parameters by name, as `params`."""

    def forward(self, input1: Tensor, input2: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input1, input2)
        return F.bilinear(input1, input2, *chosen(self, params, "weight", "bias"))
