"""Layer normalisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mtml.compat.torchmeta.modules.module import MetaModule, Params, chosen

__all__ = ["MetaLayerNorm"]


class MetaLayerNorm(nn.LayerNorm, MetaModule):
    """`torch.nn.LayerNorm` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        weight, bias = chosen(self, params, "weight", "bias")
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
