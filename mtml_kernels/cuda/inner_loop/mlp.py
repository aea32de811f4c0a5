"""Calls whose network is a perceptron of known widths, by a kernel that is compiled for them.

Forward, and backward where the cotangent is that of the losses; what else a call wants the program of a block does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtml_kernels.cuda.inner_loop.chip import MLP_REGISTERS, Chip
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.cuda.inner_loop.mlp_form import Form, form_of, why_not
from mtml_kernels.memory import in_memory
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, InnerLoopArgs, InnerLoopSpec, Outputs, output_shapes

__all__ = ["OVERLAP", "Bound", "Kernels", "Perceptrons", "launches_overlap", "tile_blocks"]

OVERLAP = "MTML_CUDA_OVERLAP"
MOST = 256  # calls of given shapes that are kept
TILE_THREADS = 256  # of a block that takes tiles on the way back; no bit of a result depends on it


class Kernels(Protocol):
    """What runs the perceptrons' kernels: a device, or the CPU in its place."""

    def shapes(self, dtype: torch.dtype) -> Sequence[MlpShape]:
        """The perceptrons that there are kernels for."""

    def chip(self, device: torch.device) -> Chip:
        """The numbers of the device."""

    def shared_bytes(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Of a block's memory on the chip."""

    def record(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Elements of a step in the history; of a shape in tiles of all of it."""

    def entry(self) -> int:
        """Address of `mtmlk_run_mlp`, or of what is in its place."""

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        """Launches the kernels."""

    def sum_over_tasks(
        self, parts: Tensor, scale: Tensor | None, results: Sequence[Tensor | None], begins: Sequence[int]
    ) -> None:
        """Each result = its elements, from `begins` on, of sum over tasks of scale [T] parts [T, P], in their order."""


class Bound(NamedTuple):
    """What calls of given shapes share: made once."""

    form: Form
    launch: MlpLaunch
    call: MlpCall  # all but its addresses
    parts: int  # elements of a task's gradients
    history: int  # elements, of all blocks or tiles
    shared_bytes: int
    tile: int = 0  # samples of a tile, where blocks take tiles
    terms: int = 0  # of TF32 for a large product, on matrix units


class Perceptrons:
    """Runs calls by the kernels of perceptrons, where there is one.

    terms: of those whose products are so many of TF32 on matrix units; 0: of those by multiply-adds.
    """

    def __init__(self, kernels: Kernels, terms: int = 0) -> None:
        self._kernels, self._terms = kernels, terms
        self._bound: dict[Any, tuple[InnerLoopSpec, Bound | None]] = {}  # the spec keeps its id from being another's

    def bound(self, a: InnerLoopArgs) -> Bound | None:
        """The kernels of a call and how they are launched; None where it has none."""
        like, y = a.params[0], a.query_y
        absent = (a.support_mask is None, a.query_mask is None, a.step_weights is None)
        shapes = [t.shape for t in (*a.support_x, *a.query_x, a.support_y, *a.lr)], None if y is None else y.shape
        key = (id(a.spec), a.needs, like.dtype, like.device, str(shapes), absent, launches_overlap())
        if key not in self._bound:
            if len(self._bound) >= MOST:
                self._bound.clear()
            self._bound[key] = a.spec, self._make(a)
        return self._bound[key][1]

    def _make(self, a: InnerLoopArgs) -> Bound | None:
        like = a.params[0]
        form = form_of(a)
        if form is None:
            return None
        for index, shape in enumerate(self._kernels.shapes(like.dtype)):
            own = _widths(shape), bool(shape.bent), shape.terms
            if own == (form.widths, form.bent, self._terms):
                return (self._tiled if shape.tile else self._launched)(a, form, index, shape)
        return None

    def why_not(self, a: InnerLoopArgs) -> str:
        """Why a call has no kernel here, in words that go on from "where" or "for"; only where `bound` finds none."""
        form, dtype = form_of(a), a.params[0].dtype
        if form is None:
            return why_not(a)
        shapes = [shape for shape in self._kernels.shapes(dtype) if shape.terms == self._terms]
        if not shapes:
            return f"this build has none in {dtype}"
        known = {_widths(shape) for shape in shapes if bool(shape.bent) == form.bent}
        if form.widths in known:
            return "a block of theirs does not fit this GPU"
        bends = "an activation that bends" if form.bent else "a piecewise linear activation"
        named = " and ".join("-".join(map(str, widths)) for widths in sorted(known)) or "none"
        widths, file = "-".join(map(str, form.widths)), "tf32_list.cuh" if self._terms else "list.cuh"
        return f"the widths are {widths} (with {bends} there are {named}; csrc/cuda/inner_loop/mlp/{file} takes others)"

    def _tiled(self, a: InnerLoopArgs, form: Form, index: int, shape: MlpShape) -> Bound | None:
        """By launches whose blocks take tiles of samples; None where the chip has no room for a block."""
        call, chip, dtype = _sizes(a, form), self._kernels.chip(a.params[0].device), a.params[0].dtype
        shared = self._kernels.shared_bytes(index, call, dtype)
        if shared > chip.block_bytes:
            return None
        blocks = call.tasks * tile_blocks(chip, call.tasks, _up(call.support, shape.tile), shared)
        there = 32 * _up(shape.tile, shape.rows[0])  # a warp for its rows
        options = (int(dtype == torch.float64), index, shape.rows[0], blocks, there, TILE_THREADS)
        launch = MlpLaunch(*options, int(launches_overlap()))
        history = self._kernels.record(index, call, dtype)
        return Bound(form, launch, call, _weights(form) + call.n_rates, history, shared, shape.tile, shape.terms)

    def _launched(self, a: InnerLoopArgs, form: Form, index: int, shape: MlpShape) -> Bound | None:
        """By which launch; None where the chip has no room for it."""
        call, chip, dtype = _sizes(a, form), self._kernels.chip(a.params[0].device), a.params[0].dtype
        few = a.tasks <= chip.multiprocessors
        for call.sets in (2, 1) if few else (1,):  # two hide the history's way back, one leaves room for more blocks
            shared = self._kernels.shared_bytes(index, call, dtype)
            if shared <= chip.block_bytes:
                break
        else:
            return None
        rows = shape.rows[0 if few else 1]
        threads = mlp_threads(form.widths, max(call.support, call.query), rows, few)
        blocks = chip.blocks(a.tasks, shared, threads, MLP_REGISTERS[not few])
        launch = MlpLaunch(int(dtype == torch.float64), index, rows, blocks, threads, threads)
        back = call.wants_gradient and not call.first_order
        history = blocks * call.steps * self._kernels.record(index, call, dtype) if back else 0
        return Bound(form, launch, call, _weights(form) + call.n_rates, history, shared)

    def entry(self) -> int:
        """Address of what launches the kernels."""
        return self._kernels.entry()

    def forward(self, a: InnerLoopArgs, bound: Bound) -> Outputs:
        """The op's forward, which goes on to every task's gradients where they are wanted."""
        like, tasks = a.params[0], a.tasks
        loss, output, support_losses = (like.new_empty(shape) for shape in output_shapes(a)[:3])
        parts = like.new_empty((tasks, bound.parts)) if bound.call.wants_gradient else None
        history = like.new_empty(bound.history) if bound.history else None
        call = MlpCall.from_buffer_copy(bound.call)
        where = like.device.type
        theta = [in_memory("inner_loop: params", a.params[i], where) for i in bound.form.tensors]
        rates = [in_memory("inner_loop: lr", rate, where) for rate in a.lr]
        call.theta[: len(theta)] = [t.data_ptr() for t in theta]
        call.rates[: len(theta)] = [rates[i if len(rates) > 1 else 0].data_ptr() for i in bound.form.tensors]
        data = {"support_x": a.support_x[0], "support_y": a.support_y, "query_x": a.query_x[0], "query_y": a.query_y}
        kept = {name: in_memory(f"inner_loop: {name}", t, where) for name, t in data.items() if t is not None}
        made = {"loss": loss, "output": output, "support_losses": support_losses, "parts": parts, "history": history}
        for name, t in (kept | made).items():
            setattr(call, name, None if t is None else t.data_ptr())
        self._kernels.run_mlp(bound.launch, call, like.device)
        return loss, output, support_losses, [], [] if parts is None else [parts]

    def gradients(
        self, a: InnerLoopArgs, bound: Bound, parts: Tensor, scale: Tensor
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Of the parameters and of the rates: the tasks' parts, scaled and added up."""
        sizes = [a.params[i].numel() for i in bound.form.tensors] + [t.numel() for t in a.lr]
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        params: list[Tensor | None] = [None] * len(a.params)
        if a.needs & NEED_PARAMS:
            params = [parts.new_empty(t.shape) for t in a.params]
        rates: list[Tensor | None] = [None] * len(a.lr)
        if a.needs & NEED_LR:
            rates = [parts.new_empty(t.shape) for t in a.lr]
        results = [*(params[i] for i in bound.form.tensors), *rates]
        self._kernels.sum_over_tasks(parts, scale.to(parts.dtype).contiguous(), results, begins)
        return params, rates


def _sizes(a: InnerLoopArgs, form: Form) -> MlpCall:
    """All of a call but its addresses."""
    spec, tensors = a.spec, len(form.tensors)
    call = MlpCall(
        tasks=a.tasks, support=a.support_x[0].shape[1], query=a.query_x[0].shape[1], steps=spec.steps,
        first_order=spec.first_order, wants_gradient=bool(a.needs), wants_rates=bool(a.needs & NEED_LR),
        act=int(form.act), c0=form.constants[0], c1=form.constants[1],
    )  # fmt: skip
    for loss, (kind, total), p0, samples in (
        (call.support_loss, spec.support_loss, spec.loss_args[0], call.support),
        (call.query_loss, spec.query_loss, spec.loss_args[1], call.query),
    ):
        loss.kind, loss.p0 = kind, p0
        loss.weight = 1.0 if total else 1.0 / (samples * form.widths[-1])
    begins = [0]
    for rate in a.lr:
        begins.append(begins[-1] + rate.shape[0])
    own = [i if len(a.lr) > 1 else 0 for i in form.tensors]
    call.rate_stride[:tensors] = [int(a.lr[i].shape[0] > 1) for i in own]
    call.rate_at[:tensors] = [begins[i] for i in own]
    call.n_rates = begins[-1] if call.wants_rates else 0
    return call


def _widths(shape: MlpShape) -> tuple[int, ...]:
    return tuple(shape.widths[: shape.layers + 1])


def _weights(form: Form) -> int:
    """Numbers of all its parameters."""
    return sum(o * (i + 1) for i, o in itertools.pairwise(form.widths))


def launches_overlap() -> bool:
    """Whether MTML_CUDA_OVERLAP asks that launches of tiles begin before the one before has ended (sm_90 and later).

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    asked = os.environ.get(OVERLAP) or "0"
    if asked not in {"0", "1"}:
        raise ValueError(f"{OVERLAP}: expected 0 or 1, got {asked!r}")
    return asked == "1"


def tile_blocks(chip: Chip, tasks: int, tiles: int, shared: int) -> int:
    """Of a task on the way back: as many as lie on the chip at once, for each reads the parameters.

    All have the same number of tiles, the last one perhaps fewer: as few blocks as that takes.
    """
    most = max(1, chip.blocks(tasks * tiles, shared, TILE_THREADS, MLP_REGISTERS[1]) // tasks)
    return _up(tiles, _up(tiles, most))


def mlp_threads(widths: Sequence[int], samples: int, rows: int, few: bool) -> int:
    """Of a block, 32 to 256: a warp for every `rows` samples.

    Where a task has a multiprocessor to itself, also a thread for every tile of 4 x 4 weights or four of a bias,
    of which a layer begins with a warp. No bit of a result depends on it. By the predictions in bench/LADDER.md, not
    measured.
    """
    warps = _up(samples, rows)
    if few:
        warps = max(warps, sum(_up(_up(o, 4) * (_up(i, 4) + 1), 32) for i, o in itertools.pairwise(widths)))
    return 32 * min(8, warps)


def _up(n: int, of: int) -> int:
    """How many of so many it takes."""
    return -(-n // of)
