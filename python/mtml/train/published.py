"""What others have published for the settings of `mtml train omniglot`."""

from __future__ import annotations

__all__ = ["SETTINGS", "published"]

# per cent, by (network, ways, shots); Finn 2017, Li 2017 (Meta-SGD), Antoniou 2019 (MAML++)
_PUBLISHED: dict[tuple[str, int, int], dict[str, float]] = {
    ("mlp", 5, 1): {"MAML": 89.7},
    ("mlp", 5, 5): {"MAML": 97.5},
    ("conv4", 5, 1): {"MAML": 98.7, "first-order MAML": 98.3, "Meta-SGD": 99.53},
    ("conv4", 5, 5): {"MAML": 99.9, "first-order MAML": 99.2, "Meta-SGD": 99.93},
    ("conv4", 20, 1): {"MAML": 95.8, "first-order MAML": 89.4, "MAML++": 97.65},
    ("conv4", 20, 5): {"MAML": 98.9, "first-order MAML": 97.9, "MAML++": 99.33},
}
SETTINGS = tuple(_PUBLISHED)  # (network, ways, shots)


def published(net: str, ways: int, shots: int) -> dict[str, float]:
    """Accuracies by method, as shares, of 1200/423 splits of Omniglot; empty where nothing is published."""
    return {name: round(value / 100, 6) for name, value in _PUBLISHED.get((net, ways, shots), {}).items()}
