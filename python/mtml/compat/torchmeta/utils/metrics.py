"""How hard an episode is (Dhillon et al., 2019, arXiv 1909.02729)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtml.compat.torchmeta.utils.prototype import get_prototypes

__all__ = ["hardness_metric"]

SIDE = 224


def hardness_metric(
    batch: Mapping[str, Any], num_classes: int, backbone: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean log-odds against the right class, [T], under a nearest-prototype classifier on a trained network's outputs.

    Args:
        batch: "train" (or "support") and "test" (or "query"), each (images [T, N, 3, H, W], class ids [T, N]), as
            `BatchMetaDataLoader` makes them.
        backbone: images [N, 3, 224, 224] -> logits [N, D]. By default the original's: ResNet-152 with its ImageNet
            weights from PyTorch Hub, which needs torchvision and a network.

    Raises:
        ValueError: a set is missing, or images are not RGB.
    """
    sets = [
        next((name for name in names if name in batch), None) for names in (("train", "support"), ("test", "query"))
    ]
    if sets[0] is None or sets[1] is None:
        raise ValueError(f"batch: expected 'train' or 'support', and 'test' or 'query'; got {', '.join(batch)}")
    (inputs, targets), (test_inputs, test_targets) = batch[sets[0]], batch[sets[1]]
    if inputs.shape[2] != 3:
        raise ValueError(f"batch: expected RGB images [T, N, 3, H, W], got {list(inputs.shape)}")
    with torch.no_grad():
        network = _resnet(inputs.device) if backbone is None else backbone
        features = get_prototypes(F.relu(_logits(network, inputs)), targets, num_classes)
        weights = F.normalize(features, dim=2)  # [T, C, D]
        scores = torch.bmm(weights, F.normalize(_logits(network, test_inputs), dim=2).mT)  # [T, C, M]
        log_probas = -F.cross_entropy(scores, test_targets, reduction="none")
        return (torch.log1p(-log_probas.exp()) - log_probas).mean(1)


def _logits(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """[T, N, D], of images [T, N, 3, H, W] in the middle of a black square."""
    height, width = SIDE - images.shape[-2], SIDE - images.shape[-1]
    padded = F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
    return network(padded.flatten(0, 1)).unflatten(0, images.shape[:2])


def _resnet(device: torch.device) -> Any:
    network: Any = torch.hub.load("pytorch/vision", "resnet152", weights="IMAGENET1K_V1", verbose=False)
    return network.eval().to(device)
