"""The kernels of tests/cuda/kernels as one program, and the lines of their sources that tests speak of."""

from __future__ import annotations

from pathlib import Path

from cases.cuda_host import Run, build, run

KERNELS = Path(__file__).parent / "kernels"
MAIN = KERNELS / "main.cu"


def case(name: str, flavour: str = "plain", order: int = 0) -> Run:
    return run(build(MAIN, flavour), name, order=order)


def line(file: str, comment: str) -> str:
    """`file:line` of the one line that ends with a comment."""
    lines = (KERNELS / file).read_text().splitlines()
    (found,) = (number for number, text in enumerate(lines, 1) if text.endswith(f"// {comment}"))
    return f"{file}:{found}"
