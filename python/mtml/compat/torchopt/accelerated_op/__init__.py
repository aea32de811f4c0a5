"""Where Adam runs: `use_accelerated_op` is accepted everywhere, and everywhere gives what Adam gives without."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["is_available"]

Device = torch.device | str | int


def is_available(devices: Device | Iterable[Device] | None = None) -> bool:
    """Whether all of these devices are there; None: a GPU and the CPU."""
    if devices is None:
        devices = ["cuda", "cpu"]
    elif isinstance(devices, torch.device | str | int):
        devices = [devices]
    return all(_is_there(device) for device in devices)


def _is_there(device: Device) -> bool:
    try:
        torch.empty(0, device=torch.device(device))
    except (AssertionError, RuntimeError):  # torch's for a backend that it was not built with, or that has no device
        return False
    return True
