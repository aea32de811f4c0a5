"""What the original has and this has not, each with the way out."""

from __future__ import annotations

__all__ = ["ABSENT", "absent"]

_ORIGINAL = "or install torchopt"
ABSENT = {
    "diff": f"implicit and zero-order gradients are not here: mtml.IMAML is implicit MAML, {_ORIGINAL}",
    "distributed": f"RPC is not here: mtml.distributed runs tasks on several processes, {_ORIGINAL}",
    "linalg": f"linear solvers are not here: torch.linalg and mtml.IMAML have them, {_ORIGINAL}",
    "linear_solve": f"linear solvers are not here: torch.linalg and mtml.IMAML have them, {_ORIGINAL}",
    "nn": f"modules of implicit and zero-order gradients are not here: mtml.IMAML is implicit MAML, {_ORIGINAL}",
    "visual": f"graphs are not drawn here: torchviz draws them, {_ORIGINAL}",
}


def absent(name: str) -> str:
    """One line about a module that is not here."""
    return f"mtml.compat.torchopt.{name}: {ABSENT[name]}"
