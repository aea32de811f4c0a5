"""What the commands of ``python -m bench`` share on their way to their options. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import TypeAlias

GPUS = ("h200", "a100", "rtx4090", "l4")
"""Of mtml_kernels.schedule.devices, which --help need not import."""
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def names(text: str) -> tuple[str, ...]:
    """``a,b`` -> ("a", "b")."""
    return tuple(filter(None, text.split(",")))


def positive(text: str) -> int:
    """A whole number that is not negative."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value
