"""Counts the multiply-adds of compiled products, whose number is known; run as multihead_loss.py is.

    python product.py 90      # prints JSON, {"90": [{sizes, precision, programs, fma, matrix, rounds, unchecked}]}

unchecked: what the check says of the same kernel with one of its multiply-adds taken away.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from launches import Recorded, recorded

from bench.sass.code import cache_folder, code_of
from bench.sass.counting import LANES, check, count, matrix_macs
from bench.sass.paths import Node, Repeat, paths_of
from bench.sass.paths import Path as Way
from mtml_kernels.schedule.call import Call, Part, Plane, Schedule
from mtml_kernels.schedule.kernels import Linear
from mtml_kernels.triton.inner_loop import bound

sys.path.append(str(Path(__file__).parents[2]))

# Tasks, rows, columns, depth: whole tiles; more of the depth than of a block; sides that no tile divides.
SIZES = ((2, 128, 64, 96), (1, 64, 64, 512), (3, 70, 33, 50))
CASES = (*((sizes, "highest") for sizes in SIZES), (SIZES[1], "medium"))


def launch_of(tasks: int, rows: int, cols: int, depth: int) -> Recorded:
    """y [T, M, C] = x [T, M, K] w [T, C, K]^T, as one launch."""
    shapes = ((tasks, rows, 1, depth), "x"), ((tasks, cols, depth), "w"), ((tasks, rows, 1, cols), "y")
    planes = [Plane(shape, torch.float32, name) for shape, name in shapes]
    part = Part("linear.forward", (0, 1, -1), (2,), Linear(False, False))
    ((kernel, part, *_),) = bound(Schedule(tuple(planes), (Call((part,), "here"),), (2,))).steps
    with recorded() as found:
        kernel(part, *(torch.empty(plane.shape, device="meta") for plane in planes[:2]))
    return found[0]


def without_one(way: Way) -> Way:
    """The way with the first multiply-add of a product left out, be it in a loop or not."""
    nodes = list[Node]()
    lost = False
    for node in way.nodes:
        kept = []
        for one in node.body if isinstance(node, Repeat) else (node,):
            if not lost and (one.base == "FFMA" or matrix_macs(one)):
                lost = True
            else:
                kept.append(one)
        nodes += [node._replace(body=tuple(kept))] if isinstance(node, Repeat) else kept
    return way._replace(nodes=tuple(nodes))


def counted(capability: int) -> Iterator[dict[str, Any]]:
    """Every case's counts over all programs and warps."""
    for sizes, precision in CASES:
        torch.set_float32_matmul_precision(precision)
        launch = launch_of(*sizes)
        code = code_of(launch, capability, cache_folder())
        (way,) = paths_of(launch, code)
        check(way, code.warps)
        unchecked = ""
        try:
            check(without_one(way), code.warps)
        except ValueError as error:
            unchecked = str(error)
        counts, warps = count(way), way.programs * code.warps
        yield {
            "sizes": sizes,
            "precision": precision,
            "programs": way.programs,
            "fma": warps * LANES * counts.fma,
            "matrix": warps * counts.matrix,
            "rounds": [node.rounds for node in way.nodes if isinstance(node, Repeat)],
            "unchecked": unchecked,
        }


if __name__ == "__main__":
    print(json.dumps({name: list(counted(int(name))) for name in sys.argv[1:]}))
