"""Where the clocks of warps go, by the function of the source that an instruction is of."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from pathlib import Path

from bench.sass.emulation.clocks import Clocks
from bench.sass.listing import Frame
from bench.sass.persistent.kernel import Kernel

__all__ = ["function_of", "shares"]

_FUNCTION = re.compile(r"^\s*(?:template\b.*)?(?:__global__|DEV|DEV_CALL)\b[^;={]*?\b(\w+|operator\[\])\(")
_OURS = "/cuda/inner_loop/"


@functools.cache
def _functions(file: str) -> tuple[tuple[int, str], ...]:
    """(line, name) of every function of a file, in their order."""
    lines = Path(file).read_text().splitlines()
    found = [(number, match[1]) for number, line in enumerate(lines, 1) if (match := _FUNCTION.match(line))]
    return tuple(found)


def function_of(frames: tuple[Frame, ...]) -> str:
    """The innermost function of the kernel's own files; "" for none."""
    for file, line in frames:
        if _OURS in file:
            names = [name for first, name in _functions(file) if first <= line]
            return names[-1] if names else ""
    return ""


def shares(kernel: Kernel, clocks: Clocks, most: int = 12) -> list[tuple[str, float]]:
    """The functions in which warps spend most clocks, waiting included, and their shares of all."""
    found: defaultdict[str, float] = defaultdict(float)
    for at, stalled in clocks.stalls.items():
        found[function_of(kernel.listing[at].frames) or "elsewhere"] += stalled
    total = sum(found.values())
    ordered = sorted(found, key=lambda name: -found[name])
    return [(name, found[name] / total) for name in ordered[:most]]
