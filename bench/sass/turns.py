"""How often the loops of a kernel's source go round, and the multiply-adds that its products need.

Bounds are constants of the text, arguments of the launch, or sums and products of these; every program is taken for
the first of the launch, whose chunk is a whole one.
"""

from __future__ import annotations

import ast
import linecache
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from bench.sass.recording import Recorded

__all__ = ["Job", "SourceLoop", "jobs_of"]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "minimum": min,
    "maximum": max,
    "cdiv": lambda a, b: -(-a // b),
    "program_id": lambda axis: 0,
}


class SourceLoop(NamedTuple):
    """A `for`: its file, its lines, how often it goes round.

    Of a product a program's multiply-adds: all that its tile takes, and at least those of the elements that are there.
    """

    file: str
    first: int
    last: int
    turns: int
    least: int
    tile: int

    def has(self, file: str, line: int) -> bool:
        """Whether a line is the loop's."""
        return file == self.file and self.first <= line <= self.last


class Job(NamedTuple):
    """Programs that run the same text: how many, the line that calls it (0: the whole kernel), its loops."""

    programs: int
    called: int
    loops: tuple[SourceLoop, ...]


class _Unknown(Exception):
    """A number that only a running program has."""


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """Of an expression of numbers that are known."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Tuple(elts=elements):
            return tuple(_value(e, known) for e in elements)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, known), _value(right, known))
        case ast.Call(func=ast.Attribute(value=inner, attr="to")):
            return _value(inner, known)
        case ast.Call(func=ast.Attribute(attr=name), args=args) if name in _CALLS:
            return _CALLS[name](*(_value(a, known) for a in args))
    raise _Unknown(ast.unparse(node))


def _assign(node: ast.Assign, known: dict[str, Any]) -> None:
    """What an assignment makes known; its names are unknown where its value is."""
    target = node.targets[0]
    names = [e.id for e in ast.walk(target) if isinstance(e, ast.Name)]
    for name in names:
        known.pop(name, None)
    try:
        found = _value(node.value, known)
    except _Unknown:
        return
    values = found if isinstance(target, ast.Tuple) else (found,)
    known |= dict(zip(names, values, strict=True))


def _right_side(function: ast.FunctionDef, name: str) -> ast.expr:
    """Of a name's first assignment."""
    found = (a.value for a in function.body if isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == name)
    return next(found)


def _macs(loop: ast.For, function: ast.FunctionDef, bounds: range) -> tuple[int, int]:
    """(least, tile) of `acc = tl.zeros([rows, cols], ...)`, `live_m = m < M`, `live_c = c < C` and a `tl.dot`."""
    dots = [c for c in ast.walk(loop) if isinstance(c, ast.Call) and ast.unparse(c.func) == "tl.dot"]
    if not dots:
        return 0, 0
    numbers = [re.findall(r"\d+", ast.unparse(_right_side(function, name))) for name in ("acc", "live_m", "live_c")]
    (rows, cols, *_), (m,), (c,) = (list(map(int, found)) for found in numbers)
    times = len(dots) * (3 if "tf32x3" in ast.unparse(dots[0]) else 1)
    least = min(rows, m) * min(cols, c) * (bounds.stop - bounds.start)
    return times * least, times * rows * cols * bounds.step * len(bounds)


def _loops(function: ast.FunctionDef, file: str, known: dict[str, Any]) -> Iterator[SourceLoop]:
    """All of a function, in their order. Raises ValueError for a bound that is not known."""
    for node in _in_order(function):
        if isinstance(node, ast.Assign):
            _assign(node, known)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            try:
                bounds = range(*(_value(a, known) for a in node.iter.args))
            except _Unknown as error:
                raise ValueError(f"{file}:{node.lineno}: no number for {error}") from error
            last = node.end_lineno or node.lineno
            yield SourceLoop(file, node.lineno, last, len(bounds), *_macs(node, function, bounds))


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        yield from _in_order(child)


def _function(kernel: Any) -> tuple[ast.FunctionDef, str]:
    """A kernel's tree, with the lines of its file, and that file."""
    code = kernel.fn.__code__
    tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    name = code.co_name
    return next(f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == name), code.co_filename


def _calls(launched: ast.FunctionDef, programs: int) -> Iterator[tuple[str, int, int]]:
    """Of a made kernel: each job's name, the line of its call, its programs."""
    for branch in launched.body:
        if isinstance(branch, ast.If):
            bounds = [c.value for c in ast.walk(branch.test) if isinstance(c, ast.Constant) and type(c.value) is int]
            first, last = bounds or (0, programs)
            call = branch.body[0]
            name = re.match(r"\w+", ast.unparse(call))
            assert name is not None
            yield name[0], call.lineno, int(last) - int(first)


def jobs_of(launch: Recorded) -> list[Job]:
    """The launch's jobs, one where the kernel is not a made one. Raises ValueError for bounds that are not known."""
    function, file = _function(launch.kernel)
    if launch.name != "launched":
        return [Job(launch.programs, 0, tuple(_loops(function, file, dict(launch.numbers))))]
    found = []
    for name, line, programs in _calls(function, launch.programs):
        own, _ = _function(launch.kernel.fn.__globals__[name])
        found.append(Job(programs, line, tuple(_loops(own, file, {}))))
    return found
