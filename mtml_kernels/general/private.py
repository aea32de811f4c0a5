"""A model for one run alone: given other tensors and another batch norm mode, with the caller's own left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import Tensor, nn

from mtml_kernels.batch_norm import set_batch_norm
from mtml_kernels.general.twin import STRUCTURE, Twins
from mtml_kernels.recurrent import RELINKED, relink

__all__ = ["Private"]

Held = dict[str, Any]


def _same(now: Held, then: Held) -> bool:
    return len(now) == len(then) and all(map(is_, now.values(), then.values())) and now.keys() == then.keys()


def _changes(now: Held, then: Held) -> dict[str, Any]:
    return {key: value for key, value in now.items() if key not in then or then[key] is not value}


class _Part:
    """One module and its copy: attributes that either sets are carried over to the other."""

    def __init__(self, original: nn.Module, copy: nn.Module, twins: Twins) -> None:
        self.original, self.copy, self.twins = original, copy, twins
        self.seen, self.own = dict(original.__dict__), dict(copy.__dict__)
        self.before: list[Held] = []

    def fetch(self) -> None:
        """What the model has been given since the last forward: a loss may reset what the forward counts up."""
        now, inner = self.original.__dict__.copy(), self.copy.__dict__
        if not _same(now, self.seen):
            for key, value in _changes(now, self.seen).items():
                if key not in STRUCTURE and key not in RELINKED:
                    inner[key] = self.twins.mapped(value)
            for key in self.seen.keys() - now.keys():
                inner.pop(key, None)
            self.seen, self.own = now, dict(inner)
        self.before = [dict(inner[kind]) for kind in STRUCTURE]

    def deliver(self, given: set[tuple[int, str]]) -> None:
        """What the forward set, for the loss or the user to read; not what stands in for a tensor of the model."""
        inner, outer = self.copy.__dict__, self.original.__dict__
        if not _same(inner, self.own):
            for key, value in _changes(inner, self.own).items():
                if key not in RELINKED:
                    outer[key] = self.twins.original(value)
            for key in self.own.keys() - inner.keys():
                outer.pop(key, None)
            self.own, self.seen = dict(inner), dict(outer)
        for kind, before in zip(STRUCTURE, self.before, strict=True):
            held = inner[kind]
            if not _same(held, before):
                for key, value in _changes(held, before).items():
                    if (id(held), key) in given:
                        held[key] = before[key]
                    else:
                        outer[kind][key] = self.twins.original(value)


class _Copy:
    """One set of copies and what they hold at present."""

    def __init__(self, model: nn.Module, batch_norm: str, tensors: Mapping[int, Tensor]) -> None:
        self.twins = Twins(model, lambda tensor, _: tensors.get(id(tensor), tensor))
        self.held = dict(tensors)
        set_batch_norm(self.twins.root, batch_norm)
        self.parts = [_Part(original, copy, self.twins) for original, copy in self.twins.pairs]
        self.linked = [copy for _, copy in self.twins.pairs if isinstance(copy, nn.RNNBase)]

    def hold(self, own: Mapping[int, Tensor], tensors: Mapping[int, Tensor]) -> None:
        """`tensors` by the id of the model's own that they stand in for."""
        for key in self.held.keys() | tensors.keys():
            new = tensors.get(key, own[key])
            if self.held.get(key, own[key]) is not new:
                for holder, name in self.twins.slots.get(key, ()):
                    holder[name] = new
        self.held = dict(tensors)
        for layer in self.linked:
            relink(layer)

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        for part in self.parts:
            part.fetch()
        try:
            yield self.twins.root
        finally:
            given = {(id(holder), name) for key in self.held for holder, name in self.twins.slots.get(key, ())}
            for part in self.parts:
                part.deliver(given)


class Private:
    """``private(tensors, x)``: the model's forward with `tensors` in place of its own, by name.

    The structure is copied once and shared with nobody, so that the model may run elsewhere at the same time, and
    modules that have several names are one module. Attributes that the forward sets are set on the model.

    Args:
        batch_norm: one of `BATCH_NORM_MODES`.
        keeps: a copy for every forward, which keeps its tensors: activation checkpointing repeats the forward in the
            backward.
    """

    def __init__(self, model: nn.Module, batch_norm: str = "track", keeps: bool = False) -> None:
        self.model, self.batch_norm, self.keeps = model, batch_norm, keeps
        named = (*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
        self.names = {name: id(tensor) for name, tensor in named}
        self.own = {id(tensor): tensor for _, tensor in named}
        self.copy: _Copy | None = None

    def release(self) -> None:
        """Let go of the tensors of the last forward."""
        if self.copy is not None and not self.keeps:
            self.copy.hold(self.own, {})

    def __call__(self, tensors: Mapping[str, Tensor], x: Any) -> Any:
        """A tuple or list x is several arguments, a dict keyword arguments."""
        new = {self.names[name]: tensor for name, tensor in tensors.items()}
        if self.copy is None or self.keeps or self.copy.twins.rigid:
            self.copy = _Copy(self.model, self.batch_norm, new)
        else:
            self.copy.hold(self.own, new)
        with self.copy.running() as copy:
            if isinstance(x, Mapping):
                return copy(**x)
            return copy(*x) if isinstance(x, list | tuple) else copy(x)
