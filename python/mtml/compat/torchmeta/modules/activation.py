"""Attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mtml.compat.torchmeta.modules.linear import MetaLinear
from mtml.compat.torchmeta.modules.module import MetaModule, Params

__all__ = ["MetaMultiheadAttention"]


class MetaMultiheadAttention(nn.MultiheadAttention, MetaModule):
    """`torch.nn.MultiheadAttention` whose forward takes its parameters by name, as `params`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight, bias = self.out_proj.weight, self.out_proj.bias is not None
        self.out_proj = MetaLinear(  # type: ignore[assignment]  # its parameters too are to be replaced
            self.embed_dim, self.embed_dim, bias, weight.device, weight.dtype
        )

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        params: Params | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if params is not None:
            given = (query, key, value, key_padding_mask, need_weights, attn_mask)
            return functional_call(self, dict(params), given, kwargs)
        return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **kwargs)
