"""What a MultiHead is given: checks, and the rows that its linear layers see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtml.multihead.heads import Head
from mtml_kernels.checks import shown
from mtml_kernels.losses import CLASS_KINDS

__all__ = ["check_heads", "check_names", "check_target", "mask_by_row", "target_by_row"]


def check_heads(heads: Mapping[str, Head]) -> dict[str, Head]:
    if not heads:
        raise ValueError("heads: expected at least one head, got none")
    for name, head in heads.items():
        if not isinstance(head, Head):
            raise TypeError(f"heads[{name!r}]: expected a head such as mtml.Classification(10), got {shown(head)}")
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"heads: expected names that a submodule can have, got {name!r}; rename that head")
    return dict(heads)


def check_names(argument: str, given: Mapping[str, Tensor], heads: Mapping[str, Head]) -> Mapping[str, Tensor]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected {{head: tensor}}, got {shown(given)}")
    for name in given:
        if name not in heads:
            raise ValueError(f"{argument}: expected names out of {', '.join(heads)}; got {name!r}")
    return given


def check_target(name: str, head: Head, features: Tensor, target: Tensor, mask: Tensor | None) -> None:
    """A target as `Head` says, and a mask of samples or of rows."""
    rows = [size for i, size in enumerate(features.shape) if i != head.channels % features.ndim]
    full = list(features.shape)
    full[head.channels] = head.outputs
    classes = head.spec.kind in CLASS_KINDS
    ids = isinstance(target, Tensor) and not target.is_floating_point()
    expected = rows if classes and ids else full
    if not isinstance(target, Tensor) or list(target.shape) != expected:
        wanted = f"class ids {rows} or probabilities {full}" if classes else f"{full}"
        raise ValueError(f"targets[{name!r}]: expected {wanted} for {type(head).__name__}, got {shown(target)}")
    if ids and (not classes or head.spec.kind == "kl"):
        raise TypeError(f"targets[{name!r}]: expected floating point, got {shown(target)}; use .to(features.dtype)")
    if target.dtype == torch.bool:
        raise TypeError(f"targets[{name!r}]: expected integer class ids, got {shown(target)}; use .long()")
    allowed = [rows[:1], rows] if classes else [rows[:1]]
    if mask is not None and (not isinstance(mask, Tensor) or list(mask.shape) not in allowed):
        wanted = " or ".join(map(str, allowed if len(rows) > 1 else allowed[:1]))
        raise ValueError(f"masks[{name!r}]: expected {wanted}, one a sample or row; got {shown(mask)}")


def target_by_row(features: Tensor, target: Tensor) -> Tensor:
    """Ids [N] or [N, L], or values [N, C] or [N, L, C], as [rows] or [rows, C]."""
    return target.flatten(0, -2) if target.ndim == features.ndim else target.flatten()


def mask_by_row(features: Tensor, mask: Tensor) -> Tensor:
    """A mask [N] or [N, L] of features [N, D] or [N, L, D], one entry a row."""
    rows = features.shape[:-1]
    return mask.reshape(*mask.shape, *(1,) * (len(rows) - mask.ndim)).expand(rows).flatten()
