"""The kernels of tests/cuda/kernels as one program, and the lines of their sources that tests speak of."""

from __future__ import annotations

from pathlib import Path

from cases.cuda_host import Run, build, run

KERNELS = Path(__file__).parents[1] / "cuda" / "kernels"
MAIN = KERNELS / "main.cu"

# The right ones, and how far they may be from a plain loop. TF32 keeps 10 bits of fraction; three products of it, 21.
CASES = {
    "rotation": 0,
    "reduction": 0,
    "carving": 0,
    "indices": 0,
    "histogram": 0,
    "last_block": 0,
    "pairs": 0,
    "shuffles": 0,
    "groups": 0,
    "drawn_groups": 0,
    "copies": 0,
    "copies_at_once": 0,
    "clusters": 0,
    "clusters_named": 0,
    "overlaps": 0,
    "tf32": 4e-3,
    "tf32_thrice": 4e-6,
    "side_by_side": 0,
}


def case(name: str, flavour: str = "plain", order: int = 0) -> Run:
    return run(build(MAIN, flavour), name, order=order)


def line(file: str, comment: str) -> str:
    """`file:line` of the one line that ends with a comment."""
    lines = (KERNELS / file).read_text().splitlines()
    (found,) = (number for number, text in enumerate(lines, 1) if text.endswith(f"// {comment}"))
    return f"{file}:{found}"
