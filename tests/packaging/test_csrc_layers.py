"""The C++ sources stand in layers: what a file includes lies below it, and a header needs nothing before it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
ROOTS = ("include", ".", "cpu")  # as -I

# From the bottom. A file may include files of its own folder and of lower ranks; folders of one rank are strangers.
RANKS = {
    "include/mtml": 0,
    "cuda/host": 1,
    "cuda": 2,
    "cpu/simd": 1,
    "cpu/runtime": 2,
    "cpu/inner_loop/plan": 3,
    "cpu/layers": 4,
    "cpu/inner_loop": 5,
    "cpu/head_inner_loop": 5,
    "cpu/multihead_loss": 5,
    "cpu/task_linear": 5,
    "cpu/task_conv2d": 5,
    "cpu/task_update": 5,
    "cpu/linear_multihead_loss": 6,
    "cpu/isa": 7,
    "api": 8,
    "bindings": 9,
}
# Sources of the C ABI stand beside their op, and may use everything.
API = {"cpu/inner_loop/api.cpp", "cpu/head_inner_loop/api.cpp", "cpu/multihead_loss/api.cpp"}
API |= {"cpu/linear_multihead_loss/api.cpp"}
API |= {f"cpu/{op}/api.cpp" for op in ("task_linear", "task_conv2d", "task_update")}

BODIES = {"cpu/isa/isa_body.h", "cpu/isa/tasks_body.h"}  # of files that say which instruction set they are


def sources(*suffixes: str) -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*") if path.suffix in suffixes)


def layer(file: str) -> str:
    """The layer of a file, named by its folder.

    Example:
        >>> layer("cpu/layers/conv/layer.h")
        'cpu/layers'
    """
    if file in API:
        return "api"
    return next(folder for folder in map(str, PurePosixPath(file).parents) if folder in RANKS)


def resolve(file: str, included: str) -> str:
    """The path under csrc of what `file` includes."""
    places = (PurePosixPath(file).parent, *map(PurePosixPath, ROOTS))
    return next(path for path in (str(place / included) for place in places) if (CSRC / path).is_file())


def may_include(file: str, other: str) -> bool:
    own, below = layer(file), layer(other)
    if own == "bindings":  # which know the engine by its C ABI alone
        return below in {"bindings", "include/mtml"}
    if own.startswith("cuda"):  # compiled by nvcc and by the host's compiler: nothing of the CPU engine
        return below in {"cuda", "cuda/host", "include/mtml"} and RANKS[own] >= RANKS[below]
    return own == below or RANKS[own] > RANKS[below]


def includes_of(file: str) -> list[str]:
    return [resolve(file, name) for name in INCLUDE.findall((CSRC / file).read_text())]


def cycles(graph: dict[str, list[str]]) -> list[str]:
    """Files from which a walk along `graph` comes back to them."""
    found = []
    for start in graph:
        seen: set[str] = set()
        left = list(graph[start])
        while left:
            file = left.pop()
            if file not in seen:
                seen.add(file)
                left += graph[file]
        if start in seen:
            found.append(start)
    return found


def test_includes_point_down() -> None:
    graph = {file: includes_of(file) for file in sources(".h", ".cpp", ".cu", ".cuh")}
    assert [(a, b) for a, below in graph.items() for b in below if not may_include(a, b)] == []
    assert cycles(graph) == []
    assert len(graph) > 60


def test_includes_that_point_up_are_found() -> None:
    assert not may_include("cpu/simd/gemm.h", "cpu/layers/block.h")
    assert not may_include("cpu/multihead_loss/kernel.h", "cpu/inner_loop/loss.h")
    assert not may_include("cpu/layers/table.h", "cpu/inner_loop/runner.h")
    assert not may_include("bindings/module.cpp", "cpu/isa/dispatch.h")
    assert not may_include("cuda/host/launch.h", "cuda/launch.h")
    assert not may_include("cuda/device.cu", "cpu/simd/gemm.h")
    assert may_include("cpu/layers/conv/node.h", "cpu/layers/norm/stats.h")
    assert cycles({"a.h": ["b.h"], "b.h": ["c.h"], "c.h": ["b.h"]}) == ["b.h", "c.h"]


def complaints(text: str, *flags: str) -> str:
    """What the compiler says of a translation unit; empty where nothing is wrong."""
    include = [f"-I{CSRC / root}" for root in ROOTS]
    command = [*compiler(), "-std=c++17", "-fsyntax-only", *include, *flags, "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stderr


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler {command[0]}")
    return command


def test_every_header_stands_alone() -> None:
    """As the first thing that a file includes, and twice."""
    headers = [h for h in sources(".h") if layer(h) != "bindings" and h not in BODIES]

    def check(header: str) -> str:
        again = f'#include "{header}"\n' * 2
        return complaints(again, "-Wno-unused-function", "-Wno-psabi", f"-I{CSRC}")

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(headers, pool.map(check, headers), strict=True))
    assert {header: text for header, text in found.items() if text} == {}


def test_a_header_that_does_not_is_found() -> None:
    assert "Block" in complaints("template <class T> void node(const Block<T>&);")
