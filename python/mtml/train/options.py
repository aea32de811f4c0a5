"""Options that several commands share, with the checks that typer does not make."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Backend", "Iterations", "Minutes", "Out", "PlainSeconds", "Resume", "Seed", "Threads", "count", "number"]

MOST = 1_000_000  # of anything there is one by one: more is a slip of the finger, and overflows somewhere


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


def backend(value: str) -> str:
    """The name, if it is one; so must be that in MTML_BACKEND, which stands in for "auto"."""
    from mtml.algorithms.learner import BACKENDS

    for name, origin in ((value, ""), (os.environ.get("MTML_BACKEND") or "auto", "the variable MTML_BACKEND: ")):
        if name not in BACKENDS:
            raise typer.BadParameter(f"{origin}expected one of {', '.join(BACKENDS)}; got {name!r}")
    return value


def count(text: str, least: int = 1, **options: Any) -> Any:
    return typer.Option(min=least, max=MOST, help=text, **options)


def number(text: str, **options: Any) -> Any:
    return typer.Option(help=text, callback=finite, **options)


Iterations = Annotated[int | None, typer.Option(min=1, help="Meta-iterations to train for.", show_default=False)]
Minutes = Annotated[float | None, number("Time to train for.", min=0.001, show_default=False)]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the weights and the tasks.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads; PyTorch's own choice by default.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Folder for checkpoint, log and picture.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the folder.")]
Backend = Annotated[str, typer.Option(help="auto, cpu, reference or general.", callback=backend)]
PlainSeconds = Annotated[float, number("Time for the comparison with the plain PyTorch loop.", min=0.1)]
