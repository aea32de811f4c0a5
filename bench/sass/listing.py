"""SASS as nvdisasm prints it: instructions with their operands and the source lines that they are of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Frame", "Instruction", "instructions"]

Frame = tuple[str, int]
"""A file and a line."""
_FRAME = re.compile(r'(?:File|inlined at) "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\S+):")
_TARGET = re.compile(r"`\((\S+?)\)")


class Instruction(NamedTuple):
    """One of a program's warp: where it stands, its guard ("" for none), words, lines from inmost to outmost."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    frames: tuple[Frame, ...]
    target: int | None  # of a branch within the kernel

    @property
    def base(self) -> str:
        """The opcode without what qualifies it."""
        return self.opcode.partition(".")[0]


class _Line(NamedTuple):
    address: int
    guard: str
    opcode: str
    rest: str
    frames: tuple[Frame, ...]


def _lines(text: str) -> Iterator[_Line | str]:
    """Instructions, and labels as text. What divisions call for rare numbers ("$...") stands behind and is left out."""
    frames: list[Frame] = []
    fresh = False
    for line in text.splitlines():
        if "//##" in line:
            if not fresh:
                frames, fresh = [], True
            frames += [(file, int(at)) for file, at in _FRAME.findall(line)]
            continue
        label = _LABEL.match(line)
        if label is not None:
            if label[1].startswith("$"):
                return
            yield label[1]
            continue
        found = _INSTRUCTION.search(line)
        if found is not None:
            fresh = False
            yield _Line(int(found[1], 16), found[2] or "", found[3], found[4], tuple(dict.fromkeys(frames)))


def _split(rest: str) -> tuple[str, ...]:
    words = (word.strip() for word in rest.split(","))
    return tuple(word for word in words if word)


def instructions(text: str) -> list[Instruction]:
    """The kernel of a listing, without the endless branch and what pads it behind its end."""
    lines, labels, waiting = [], dict[str, int](), list[str]()
    for line in _lines(text):
        if isinstance(line, str):
            waiting.append(line)
            continue
        labels |= dict.fromkeys(waiting, line.address)
        waiting.clear()
        lines.append(line)
    found = []
    for line in lines:
        name = _TARGET.search(line.rest) if line.opcode.startswith("BRA") else None
        target = labels.get(name[1]) if name is not None else None
        if target == line.address:
            break
        found.append(Instruction(line.address, line.guard, line.opcode, _split(line.rest), line.frames, target))
    return found
