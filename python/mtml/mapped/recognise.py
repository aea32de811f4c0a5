"""From the recording of one task to the inner loop that it is: model, losses, steps, rates, and where its data comes
from.

Read backwards, from the result: it is a loss of the module's output on the query set, with tensors that gradient steps
made; each of those took the gradient of a loss of the module's output on the support set; and the first started from
the module's own tensors, or from others that exist before the call. Every piece between is held against what it should
be by running it on random numbers in float64. All operations are smooth, or PyTorch's own losses, so that two pieces
which agree there are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtml.algorithms.maml import MAML
from mtml.mapped.recording import Called, Derived, Recording
from mtml.mapped.slices import Piece, Pieces, ordered
from mtml_kernels.losses import LossSpec, Opaque, Recognised, Sizes, recognise
from mtml_kernels.neutral import neutral

__all__ = ["InnerLoop", "Rate", "Unknown", "recognised"]


class Unknown(Exception):
    """A recording is no known inner loop, and why."""


class Rate(NamedTuple):
    """A step's rate of one tensor: a number, or where it depends on tensors the update that has it.

    update: of the tensor, its gradient, and the tensors that it `reads`. itself: the rate is the only one of those.
    """

    number: float | None
    update: Piece
    reads: tuple[Tensor, ...]
    itself: bool = False


class InnerLoop(NamedTuple):
    """A recording, understood; tensors are those of the recorded run.

    start: where adapted tensors start that are not the module's own. rates: {name: rate} for every step. factor: of the
    support loss. scale: of the query loss.
    """

    model: nn.Module
    start: dict[str, Tensor]
    rates: list[dict[str, Rate]]
    loss: LossSpec
    query_loss: LossSpec
    factor: float
    scale: float
    first_order: bool
    sx: Any
    sy: Tensor
    qx: Any
    qy: Tensor


class _Judged(NamedTuple):
    """A loss of a module's output: which call's, the target, and what it is."""

    call: Called
    target: Tensor
    piece: Piece


def recognised(notes: Recording, result: Any, modules: Sequence[nn.Module]) -> InnerLoop:
    """The inner loop that a recorded run is; raises Unknown with the reason where it is none that is known.

    `modules`: those that the function has under names.
    """
    if notes.strange is not None:
        raise Unknown(notes.strange)
    if not isinstance(result, Tensor) or result.ndim:
        raise Unknown("it does not return one number, its query loss")
    return _Reader(notes, modules).read(result)


class _Reader:
    def __init__(self, notes: Recording, modules: Sequence[nn.Module]) -> None:
        self.notes, self.pieces, self.modules = notes, Pieces(notes), modules
        self.calls = {id(c.output): c for c in notes.tape if isinstance(c, Called) and isinstance(c.output, Tensor)}
        steps = [d for d in notes.tape if isinstance(d, Derived)]
        self.steps = {id(g): d for d in steps for g in d.grads if g is not None}
        self.outputs = [c.output for c in self.calls.values()]

    def read(self, result: Tensor) -> InnerLoop:
        query = self.judged(result, "its result")
        module = query.call.module
        origin = self.origin(module)
        own = _own_tensors(origin)
        steps: list[tuple[Derived, _Judged, dict[str, Rate]]] = []
        call = query.call
        while (found := self.step(call, own)) is not None:
            steps.insert(0, found)
            call = found[1].call
            if call.module is not module:
                raise Unknown("its steps and its result are of different modules")
        if not steps:
            raise Unknown("no gradient step leads to its result")
        support = steps[0][1]
        self.check_alike(steps)
        names = list(steps[0][2])
        start = {name: self.pieces.original(call.tensors[name]) for name in names}
        specs = [_loss(judged) for judged in (support, query)]
        inner = isinstance(origin, MAML)  # whose forward is its module's
        short = {name: name.removeprefix("module.") if inner else name for name in names}
        return InnerLoop(
            origin.module if isinstance(origin, MAML) else origin,
            {short[name]: t for name, t in start.items() if t is not own[name]},
            [{short[name]: rate for name, rate in rates.items()} for _, _, rates in steps],
            specs[0].spec,
            specs[1].spec,
            specs[0].scale,
            specs[1].scale,
            not steps[0][0].second_order,
            _inputs(support.call),
            support.target,
            _inputs(query.call),
            query.target,
        )

    def origin(self, module: nn.Module) -> nn.Module:
        """The module that stands under a name: the one that was called, or the MAML that it is a clone of."""
        known = [each for held in self.modules for each in held.modules()]
        if any(each is module for each in known):
            return module
        first = next(c for c in self.calls.values() if c.module is module)
        for each in known if isinstance(module, MAML) else ():
            own = _own_tensors(each)
            named = type(each) is type(module) and list(own) == list(first.tensors)
            if named and all(self.pieces.original(t) is own[name] for name, t in first.tensors.items()):
                return each
        raise Unknown("its module is made by the function itself, or stands under no name that it reads")

    # --- one loss, one step -----------------------------------------------------------------------------------------

    def judged(self, value: Tensor, what: str) -> _Judged:
        """A loss as a function of one module's output and one target."""
        piece = self.pieces.cut(value, [*self.outputs, *self.all_grads()])
        calls = [self.calls[id(t)] for t in piece.inputs if id(t) in self.calls]
        others = [t for t in piece.inputs if id(t) not in self.calls]
        if len(calls) != 1 or any(id(t) in self.steps for t in others):
            raise Unknown(f"{what} is no function of one output of one module")
        if len(others) != 1:
            raise Unknown(f"{what} is made of {len(others)} tensors beside the output, where a loss has one target")
        return _Judged(calls[0], others[0], ordered(piece, (calls[0].output, others[0])))

    def all_grads(self) -> list[Tensor]:
        return [g for d in self.notes.tape if isinstance(d, Derived) for g in d.grads if g is not None]

    def step(self, call: Called, own: Mapping[str, Tensor]) -> tuple[Derived, _Judged, dict[str, Rate]] | None:
        """The step that made the tensors of a call; None where no step did."""
        derived: Derived | None = None
        rates: dict[str, Rate] = {}
        before: dict[str, Tensor] = {}
        for name, tensor in call.tensors.items():
            piece = self.pieces.cut(tensor, [*self.all_grads(), *self.all_inputs()])
            grads = [t for t in piece.inputs if id(t) in self.steps]
            if not grads:
                if piece.ran:
                    raise Unknown(f"{name!r} is computed otherwise than by gradient steps")
                continue
            taken = self.steps[id(grads[0])]
            if len(grads) != 1 or (derived is not None and taken is not derived):
                raise Unknown(f"a step of {name!r} uses the gradients of others")
            derived = taken
            index = next(at for at, grad in enumerate(taken.grads) if grad is grads[0])
            before[name] = taken.inputs[index]
            rates[name] = self.rate(name, piece, self.pieces.original(before[name]), grads[0])
        if derived is None:
            return None
        if len(derived.outputs) != 1:
            raise Unknown("it takes the gradients of several losses at once")
        judged = self.judged(derived.outputs[0], "an inner loss")
        self.check_tensors(judged.call, before, own, call)
        return derived, judged, rates

    def all_inputs(self) -> list[Tensor]:
        return [self.pieces.original(t) for d in self.notes.tape if isinstance(d, Derived) for t in d.inputs]

    def check_tensors(
        self, call: Called, before: Mapping[str, Tensor], own: Mapping[str, Tensor], later: Called
    ) -> None:
        """The inner loss must be of the tensors that the step changes, and of the module's own beside them."""
        for name, tensor in call.tensors.items():
            now = self.pieces.original(tensor)
            if name in before:
                if now is not self.pieces.original(before[name]):
                    raise Unknown(f"a step of {name!r} starts elsewhere than its gradient was taken")
            elif now is not own.get(name) or self.pieces.original(later.tensors[name]) is not now:
                raise Unknown(f"{name!r} is neither adapted nor the module's own")

    def rate(self, name: str, piece: Piece, before: Tensor, grad: Tensor) -> Rate:
        """That of a piece which is `before - rate * grad`."""
        if not any(t is before for t in piece.inputs):
            raise Unknown(f"a step of {name!r} does not start from the tensor itself")
        reads = tuple(t for t in piece.inputs if t is not before and t is not grad)
        update = ordered(piece, (before, grad, *reads))
        try:
            found = neutral(lambda: _rate(update, reads, before.shape))
        except Exception as error:  # whatever the operations raise in float64
            raise Unknown(f"the step of {name!r} fails on random numbers: {type(error).__name__}") from error
        if found is None:
            raise Unknown(f"the step of {name!r} is not gradient descent")
        if not reads:
            if found.unique().numel() != 1:
                raise Unknown(f"the step of {name!r} has different rates for its elements, which no tensor holds")
            return Rate(float(found.flatten()[0]), update, reads)
        return Rate(None, update, reads, len(reads) == 1 and _is(found, reads[0]))

    def check_alike(self, steps: Sequence[tuple[Derived, _Judged, dict[str, Rate]]]) -> None:
        first, support, rates = steps[0]
        for derived, judged, others in steps[1:]:
            if list(others) != list(rates) or derived.second_order != first.second_order:
                raise Unknown("its steps adapt different tensors, or differ in their order of derivatives")
            same = judged.target is support.target and judged.piece.form == support.piece.form
            if not same or not _equal(_inputs(judged.call), _inputs(support.call)):
                raise Unknown("its steps have different data or losses")


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _inputs(call: Called) -> Any:
    """As MAML takes a model's inputs: a tensor, a tuple or a dict of such."""
    parts = [*call.args, *call.kwargs.values()]
    if not parts or not all(isinstance(part, Tensor) for part in parts) or (call.args and call.kwargs):
        raise Unknown("its module takes other arguments than tensors, or some by name")
    return call.kwargs or (call.args if len(call.args) > 1 else call.args[0])


def _equal(one: Any, other: Any) -> bool:
    """Whether the inputs of two calls are the same tensors."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and _equal(tuple(one.values()), tuple(other.values()))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def _rate(update: Piece, reads: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """The rate where an update is `before - rate * grad` for all numbers, in float64 and of the tensor's shape."""
    generator = torch.Generator().manual_seed(0)
    held = [t.detach().to("cpu", torch.float64) if t.is_floating_point() else t.detach().cpu() for t in reads]
    zeros, ones = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    rate = -update(zeros, ones, *held)
    for _ in range(3):
        before, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        found, expected = update(before, grad, *held), before - rate * grad
        if found.shape != shape or not torch.allclose(found, expected, rtol=1e-12, atol=1e-14):
            return None
    return rate


def _is(rate: Tensor, read: Tensor) -> bool:
    """Whether a rate is the tensor that it is made of."""
    return bool((rate == read.detach().to("cpu", torch.float64)).all()) if read.shape in ((), rate.shape) else False


def _loss(judged: _Judged) -> Recognised:
    """Which of the kernels' losses it is."""
    output, target = judged.call.output, judged.target
    sizes = Sizes(tuple(output.shape), tuple(target.shape), target.dtype, output.dtype)
    if not output.ndim or not target.ndim:
        raise Unknown("its loss is of numbers, where a set has samples")
    found = recognise(Opaque(judged.piece.__call__, "loss"), sizes, masked=False)
    if not isinstance(found, Recognised):
        raise Unknown(found.reason)
    if found.flat or not found.passes_over:
        raise Unknown(f"its loss is {found}, of targets in a form that is not fused here")
    return found
