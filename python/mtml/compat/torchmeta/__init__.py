"""torchmeta 1.8 by its own names: modules that take their parameters, few-shot data, and what stands around them.

Signatures and semantics are those of the original (https://github.com/tristandeleu/pytorch-meta), with torch, numpy and
this package beneath. New: `meta_loss`, a batch of tasks by the fused engine.

>>> import torch
>>> from mtml.compat import torchmeta
>>> model = torchmeta.modules.MetaSequential(torchmeta.modules.MetaLinear(1, 8), torch.nn.Tanh())
>>> params = torchmeta.gradient_update_parameters(model, model(torch.ones(2, 1)).square().mean(), step_size=0.1)
>>> list(params)
['0.weight', '0.bias']
"""

from mtml.compat.torchmeta import datasets, modules, toy, transforms, utils
from mtml.compat.torchmeta.batched import meta_loss
from mtml.compat.torchmeta.utils import data
from mtml.compat.torchmeta.utils.gradient_based import gradient_update_parameters
from mtml.compat.torchmeta.utils.matching import (
    matching_log_probas,
    matching_loss,
    matching_probas,
    pairwise_cosine_similarity,
)
from mtml.compat.torchmeta.utils.metrics import hardness_metric
from mtml.compat.torchmeta.utils.prototype import get_num_samples, get_prototypes, prototypical_loss
from mtml.compat.torchmeta.utils.r2d2 import ridge_regression
from mtml.compat.torchmeta.version import VERSION as __version__

__all__ = [
    "__version__",
    "data",
    "datasets",
    "get_num_samples",
    "get_prototypes",
    "gradient_update_parameters",
    "hardness_metric",
    "matching_log_probas",
    "matching_loss",
    "matching_probas",
    "meta_loss",
    "modules",
    "pairwise_cosine_similarity",
    "prototypical_loss",
    "ridge_regression",
    "toy",
    "transforms",
    "utils",
]
