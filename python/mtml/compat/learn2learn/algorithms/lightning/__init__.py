"""learn2learn.algorithms.lightning, for PyTorch Lightning, which is imported here."""

from __future__ import annotations

from mtml.compat.learn2learn.algorithms.lightning.anil import LightningANIL
from mtml.compat.learn2learn.algorithms.lightning.episodic import LightningEpisodicModule
from mtml.compat.learn2learn.algorithms.lightning.maml import LightningMAML
from mtml.compat.learn2learn.algorithms.lightning.protonet import LightningPrototypicalNetworks

__all__ = ["LightningANIL", "LightningEpisodicModule", "LightningMAML", "LightningPrototypicalNetworks"]
