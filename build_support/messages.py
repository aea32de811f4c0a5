"""How a build ends that cannot go on: with one line."""

from __future__ import annotations

__all__ = ["fail"]


def fail(message: str) -> SystemExit:
    return SystemExit(f"mtml-kernels: {message}")
