"""Targets and masks of batches of tasks: checked, and as rows beside the rows of features that a head reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtml.multihead.heads import Head
from mtml.multihead.inputs import check_target
from mtml.multitask.features import as_rows
from mtml_kernels.checks import shown

__all__ = ["check_lead", "check_set", "like_targets", "mask_rows", "spread", "target_rows"]


def check_lead(label: str, lead: torch.Size, y: Any, mask: Any) -> None:
    """Raise where targets [T, N, ...] and their mask do not begin as their inputs do, with `lead` [T, N]."""
    if not isinstance(y, Tensor) or y.ndim < 2 or y.shape[:2] != lead:
        raise ValueError(f"{label}: expected targets [T, N, ...] with [T, N] = {list(lead)}, got {shown(y)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape[:2] != lead):
        raise ValueError(f"mask of {label}: expected [T, N] = {list(lead)}, one a sample, got {shown(mask)}")


def check_set(label: str, head: Head, features: Tensor, y: Any, mask: Any) -> None:
    """Raise where targets and mask do not fit features, or predictions, [T, N, ...] of this head."""
    check_lead(label, features.shape[:2], y, mask)
    check_target(label, head, features.flatten(0, 1), y.flatten(0, 1), None if mask is None else mask.flatten(0, 1))


def like_targets(head: Head, y: Tensor) -> Tensor:
    """A tensor of as many samples and positions as targets have, in the place of features that nobody has computed."""
    return y if y.is_floating_point() else y.unsqueeze(2 if head.channels == 1 else -1)


def target_rows(head: Head, y: Tensor) -> Tensor:
    """Ids [T, R], or values [T, R, C]."""
    return as_rows(head, y) if y.is_floating_point() else y.flatten(1)


def mask_rows(head: Head, y: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask of samples, pixels or tokens as one of rows [T, R]."""
    return None if mask is None else spread(head, y, mask).flatten(1)


def spread(head: Head, y: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of the shape of what is weighed one by one, [T, N], [T, N, H, W] or [T, N, L]; ones without a mask."""
    one = y.select(2 if head.channels == 1 else -1, 0) if y.is_floating_point() else y
    if mask is None:
        return torch.ones(one.shape, device=y.device)
    return mask.reshape(*mask.shape, *(1,) * (one.ndim - mask.ndim)).expand(one.shape)
