"""Pieces of a recording between tensors: a value as a function of other values, which can be run again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from mtml.mapped.recording import Ran, Recording

__all__ = ["Piece", "Pieces", "ordered"]


class Piece(NamedTuple):
    """A tensor as a function of `inputs`, by the operations of one run; `__call__` takes values in their order.

    form: equal for pieces that compute the same function of inputs in the same order.
    """

    ran: tuple[Ran, ...]
    inputs: tuple[Tensor, ...]
    output: Tensor
    form: Hashable

    def __call__(self, *values: Tensor) -> Tensor:
        """The value that the output has where the inputs have these."""
        at: dict[int, Any] = {id(t): value for t, value in zip(self.inputs, values, strict=True)}

        def now(value: Any) -> Any:
            return at.get(id(value), value)

        for ran in self.ran:
            result = ran.function(*_mapped(now, ran.args), **_mapped(now, ran.kwargs))
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            at.update((id(old), new) for old, new in zip(ran.made, made, strict=True))
        found: Tensor = at[id(self.output)]
        return found


class Pieces:
    """Cuts pieces from a recording. Copies (`clone`) count as what they are copies of."""

    def __init__(self, recording: Recording) -> None:
        self.makers: dict[int, Ran] = {}
        self.first: dict[int, Tensor] = {}
        for ran in recording.tape:
            if not isinstance(ran, Ran):
                continue
            given = {id(t) for t in _tensors((ran.args, ran.kwargs))}
            for tensor in ran.made:
                if ran.name == "clone":
                    self.first[id(tensor)] = self.original(ran.args[0])
                elif id(tensor) not in given and id(tensor) not in self.makers:
                    self.makers[id(tensor)] = ran

    def original(self, tensor: Tensor) -> Tensor:
        """What a tensor is a copy of, or itself."""
        return self.first.get(id(tensor), tensor)

    def cut(self, output: Tensor, ends: Sequence[Tensor]) -> Piece:
        """`output` as a function of those of `ends` that it is made of, and of what no operation made."""
        stops = {id(t) for t in ends if t is not self.original(output)}
        needed, inputs = dict[int, Ran](), dict[int, Tensor]()
        waiting, seen = [self.original(output)], set[int]()
        while waiting:
            tensor = waiting.pop()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            maker = None if id(tensor) in stops else self.makers.get(id(tensor))
            if maker is None:
                inputs[id(tensor)] = tensor
            else:
                needed[id(maker)] = maker
                waiting += map(self.original, _tensors((maker.args, maker.kwargs)))
        order = {id(ran): at for at, ran in enumerate(self.makers.values())}
        ran = tuple(self._plain(ran) for ran in sorted(needed.values(), key=lambda ran: order[id(ran)]))
        found = tuple(inputs.values())
        return Piece(ran, found, self.original(output), _form(ran, found, self.original(output)))

    def _plain(self, ran: Ran) -> Ran:
        args, kwargs = (_mapped(lambda v: self.original(v) if isinstance(v, Tensor) else v, part) for part in ran[2:4])
        return ran._replace(args=args, kwargs=kwargs)


def ordered(piece: Piece, inputs: Sequence[Tensor]) -> Piece:
    """The same piece with its inputs in another order."""
    return piece._replace(inputs=tuple(inputs), form=_form(piece.ran, inputs, piece.output))


def _form(ran: Sequence[Ran], inputs: Sequence[Tensor], output: Tensor) -> Hashable:
    numbers = {id(t): at for at, t in enumerate(inputs)}

    def word(value: Any) -> Hashable:
        return ("tensor", numbers[id(value)]) if isinstance(value, Tensor) else (type(value), repr(value))

    parts: list[Hashable] = []
    for each in ran:
        flat, spec = pytree.tree_flatten((each.args, each.kwargs))
        parts.append((each.name, id(each.function), tuple(map(word, flat)), repr(spec)))
        for tensor in each.made:
            numbers[id(tensor)] = len(numbers)
    return tuple(parts), numbers[id(output)]


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _mapped(function: Any, value: Any) -> Any:
    return pytree.tree_map(function, value)
