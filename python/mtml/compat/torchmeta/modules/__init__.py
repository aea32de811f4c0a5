"""Modules whose forward takes its parameters as an argument."""

from mtml.compat.torchmeta.modules.activation import MetaMultiheadAttention
from mtml.compat.torchmeta.modules.batchnorm import MetaBatchNorm1d, MetaBatchNorm2d, MetaBatchNorm3d
from mtml.compat.torchmeta.modules.container import MetaSequential
from mtml.compat.torchmeta.modules.conv import MetaConv1d, MetaConv2d, MetaConv3d
from mtml.compat.torchmeta.modules.linear import MetaBilinear, MetaLinear
from mtml.compat.torchmeta.modules.module import MetaModule
from mtml.compat.torchmeta.modules.normalization import MetaLayerNorm
from mtml.compat.torchmeta.modules.parallel import DataParallel
from mtml.compat.torchmeta.modules.sparse import MetaEmbedding, MetaEmbeddingBag

__all__ = [
    "DataParallel",
    "MetaBatchNorm1d",
    "MetaBatchNorm2d",
    "MetaBatchNorm3d",
    "MetaBilinear",
    "MetaConv1d",
    "MetaConv2d",
    "MetaConv3d",
    "MetaEmbedding",
    "MetaEmbeddingBag",
    "MetaLayerNorm",
    "MetaLinear",
    "MetaModule",
    "MetaMultiheadAttention",
    "MetaSequential",
]
