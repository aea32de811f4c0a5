"""The way of a program through its kernel: its job's instructions in their order, loops with how often they go round.

A loop of SASS is what lies between a branch and an earlier target. Its source lines name its `for`, whose turns are
known; how many of these one round holds (ptxas unrolls) is the ratio of its loads to those of a loop in PTX.
Branches between are taken for not taken: rare ways count as if everybody went them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from bench.sass.code import Code
from bench.sass.listing import Instruction, instructions
from bench.sass.recording import Recorded
from bench.sass.turns import Job, SourceLoop, jobs_of

__all__ = ["Node", "Path", "Repeat", "paths_of"]

LOADS = re.compile(r"\b(?:ld\.global|cp\.async\.c[ag])")


class Repeat(NamedTuple):
    """Instructions that are gone through `rounds` times, for the `for` that they are of; None of a loop of no `for`."""

    body: tuple[Instruction, ...]
    rounds: int
    source: SourceLoop | None


Node: TypeAlias = Instruction | Repeat


class Path(NamedTuple):
    """Of a job's programs: how many go it, and what each of their warps issues."""

    programs: int
    nodes: tuple[Node, ...]
    loops: tuple[SourceLoop, ...]

    def weighted(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction, and how often it is issued."""
        for node in self.nodes:
            if isinstance(node, Repeat):
                yield from ((one, node.rounds) for one in node.body)
            else:
                yield node, 1


class _Loop(NamedTuple):
    """A loop of SASS: its addresses, its `for`, and how many turns of it one round has."""

    first: int
    last: int
    source: SourceLoop | None
    unrolled: int


def _ptx_loads(ptx: str, loops: Sequence[SourceLoop]) -> dict[SourceLoop, int]:
    """Loads of one turn of every loop that PTX has."""
    files = dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx))
    lines, labels, ends = ptx.splitlines(), dict[str, int](), list[tuple[int, int]]()
    for i, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) and branch[1] in labels:
            ends.append((labels[branch[1]], i))
    found = dict[SourceLoop, int]()
    for first, last in ends:
        at = [re.search(r"\.loc\s+(\d+) (\d+)", line) for line in lines[first:last]]
        where = [(files.get(m[1], "").rpartition("/")[2], int(m[2])) for m in at if m]
        own = _most(where, loops)
        if own is not None:
            found[own] = sum(bool(LOADS.search(line)) for line in lines[first:last])
    return found


def _most(where: Sequence[tuple[str, int]], loops: Sequence[SourceLoop]) -> SourceLoop | None:
    """The loop that most of these lines are of. Files by their last name: PTX has folders apart."""
    votes = {
        loop: sum(loop.has(loop.file, line) and file == loop.file.rpartition("/")[2] for file, line in where)
        for loop in loops
    }
    best = max(votes, key=lambda loop: votes[loop], default=None)
    return best if best is not None and votes[best] else None


def _sass_loops(found: Sequence[Instruction], ptx: str, loops: Sequence[SourceLoop]) -> list[_Loop]:
    """All of a kernel, without those that lie in another: their rounds are only known where a `for` is their own."""
    loads = _ptx_loads(ptx, loops)
    edges = [(one.target, one.address) for one in found if one.target is not None and one.target < one.address]
    outer = [edge for edge in edges if not any(_within(edge, other) for other in edges)]
    made = []
    for first, last in outer:
        body = [one for one in found if first <= one.address <= last]
        own = _most([(f.rpartition("/")[2], line) for one in body for f, line in one.frames], loops)
        many = sum(one.base in ("LDG", "LDGSTS") for one in body)
        turn = loads.get(own, 0) if own is not None else 0
        made.append(_Loop(first, last, own, max(1, round(many / turn)) if turn else 1))
    return made


def _within(edge: tuple[int, int], other: tuple[int, int]) -> bool:
    return edge != other and other[0] <= edge[0] and edge[1] <= other[1]


def _rounds(loops: Sequence[_Loop]) -> dict[_Loop, int]:
    """Of loops of one `for`, the one that is unrolled most goes first, and the others do what is left."""
    found, left = dict[_Loop, int](), dict[SourceLoop, int]()
    for loop in sorted(loops, key=lambda loop: -loop.unrolled):
        if loop.source is None:
            found[loop] = 1
            continue
        turns = left.setdefault(loop.source, loop.source.turns)
        found[loop] = turns // loop.unrolled
        left[loop.source] = turns % loop.unrolled
    return found


def _nodes(found: Sequence[Instruction], rounds: dict[_Loop, int], job: Job) -> tuple[Node, ...]:
    """The instructions with loops folded; what stands in another job's loop is not the job's."""
    nodes = list[Node]()
    for loop in [*sorted(rounds, key=lambda loop: loop.first), None]:
        before = found if loop is None else [one for one in found if one.address < loop.first]
        nodes += before
        if loop is None:
            break
        body = tuple(one for one in found if loop.first <= one.address <= loop.last)
        if body and (loop.source is None or loop.source in job.loops):
            nodes.append(Repeat(body, rounds[loop], loop.source))
        found = [one for one in found if one.address > loop.last]
    return tuple(nodes)


def _own(found: Sequence[Instruction], job: Job, file: str) -> list[Instruction]:
    """The job's instructions and those of no job."""
    if not job.called:
        return list(found)
    return [one for one in found if (file, job.called) in one.frames or not _of_jobs(one, file)]


def _of_jobs(one: Instruction, file: str) -> bool:
    """Inlined into the kernel, which lines of the kernel itself are not."""
    return len(one.frames) > 1 and any(name == file for name, _ in one.frames)


def paths_of(launch: Recorded, code: Code) -> list[Path]:
    """A path for every job of a launch. Raises ValueError where loops cannot be followed."""
    jobs, found = jobs_of(launch), instructions(code.sass)
    every = [loop for job in jobs for loop in job.loops]
    rounds = _rounds(_sass_loops(found, code.ptx, every))
    file = launch.kernel.fn.__code__.co_filename
    return [Path(job.programs, _nodes(_own(found, job, file), rounds, job), job.loops) for job in jobs]
