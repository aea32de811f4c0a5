"""Embeddings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mtml.compat.torchmeta.modules.module import MetaModule, Params, chosen

__all__ = ["MetaEmbedding", "MetaEmbeddingBag"]


class MetaEmbedding(nn.Embedding, MetaModule):
    """`torch.nn.Embedding` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Tensor, params: Params | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        (weight,) = chosen(self, params, "weight")
        return F.embedding(
            input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class MetaEmbeddingBag(nn.EmbeddingBag, MetaModule):
    """`torch.nn.EmbeddingBag` whose forward takes its parameters by name, as `params`."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        params: Params | None = None,
    ) -> Tensor:
        if params is None:
            return super().forward(input, offsets, per_sample_weights)
        (weight,) = chosen(self, params, "weight")
        return F.embedding_bag(
            input,
            weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
