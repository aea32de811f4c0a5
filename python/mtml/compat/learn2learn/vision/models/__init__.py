"""learn2learn.vision.models: the usual networks of few-shot image classification."""

from __future__ import annotations

from mtml.compat.learn2learn.vision.models.cnn4 import (
    CNN4,
    CNN4Backbone,
    ConvBase,
    ConvBlock,
    MiniImagenetCNN,
    OmniglotCNN,
    OmniglotFC,
    fc_init_,
    maml_init_,
)
from mtml.compat.learn2learn.vision.models.resnet12 import ResNet12, ResNet12Backbone
from mtml.compat.learn2learn.vision.models.wrn28 import WRN28, WRN28Backbone

__all__ = [
    "CNN4",
    "WRN28",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "ResNet12",
    "ResNet12Backbone",
    "WRN28Backbone",
    "fc_init_",
    "maml_init_",
]
