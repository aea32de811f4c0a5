"""Gradient steps, few-shot heads and data."""

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

__all__ = [
    "data",
    "get_num_samples",
    "get_prototypes",
    "gradient_update_parameters",
    "hardness_metric",
    "matching_log_probas",
    "matching_loss",
    "matching_probas",
    "pairwise_cosine_similarity",
    "prototypical_loss",
    "ridge_regression",
]
