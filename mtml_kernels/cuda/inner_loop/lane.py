"""The fast lane of the persistent inner loop: what calls of one form have in common, made once; then one native call
there, and one back.

A call in the lane reads its tensors, makes room for the results, starts the kernel and hands out tensors within
csrc/bindings/inner_loop_lane.cpp. `Persistent` takes all others: tensors that must be converted or made contiguous
first, cotangents of more than the losses, gradients that each task has for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.mlp import Bound, Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_form import Form
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.native import engine
from mtml_kernels.native.tensors import home_of
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schema.inner_loop import LISTS, NEED_LR, SINGLE, InnerLoopArgs, output_shapes
from mtml_kernels.schema.inner_loop_lane import LaneCall

__all__ = ["Lane", "LaneEngine"]

Native = Callable[..., Any]


class LaneEngine(Protocol):
    """An engine that native code can launch."""

    def functions(self) -> tuple[int, int]:
        """Addresses of `mtmlk_run_schedule` and `mtmlk_sum_over_tasks`, or of what is in their place."""

    def sizes(self, program: BlockProgram, tasks: int, blocks: int, device: torch.device) -> tuple[int, ...]:
        """Of a launch: dtype, full, blocks, threads, first_words, chip_elements, workspace_elements."""

    def calling(self, native: Native, device: torch.device) -> Native:
        """The same with the device as the current one, and errors in words."""


class Lane:
    """The lane of a backend whose engine is launched by native code."""

    def __init__(self, persistent: Persistent, launcher: Callable[[], LaneEngine]) -> None:
        self._persistent, self._launcher = persistent, launcher

    def make(self, a: InnerLoopArgs) -> LaneCall | None:
        """For calls of this form; None where the lane does not take them."""
        if not a.tasks:
            return None
        perceptron = self._persistent.perceptron(a)
        if perceptron is not None:
            return self._of_perceptron(a, *perceptron)
        bound, ones = self._persistent.bound_for_forward(a)
        program, launcher, device = bound.program, self._launcher(), a.params[0].device
        read, results = _read(a, program, ones), _written(a, program, bound.outputs)
        if read is None or results is None:
            return None
        run, add_up = launcher.functions()
        home = home_of(a.params[0])
        launch = engine().ScheduleLaunch(
            function=run, sizes=launcher.sizes(program, a.tasks, bound.blocks, device), tasks=a.tasks,
            words=bound.words, program=bound.words.data_ptr(), strides=read.strides + results.strides,
        )  # fmt: skip
        forward = engine().LaneForward(
            home=home, launch=launch, tasks=a.tasks, arguments=read.places, constants=[] if ones is None else [ones],
            outputs=results.outputs, written=results.written, own=results.own, parts=program.parts,
            numbers=program.number_parts, workspace=bound.workspace, float64=torch.float64,
        )  # fmt: skip
        back = None
        if ones is not None and not results.own and not program.number_parts:
            sums = _sums(a, program, bound.groups)
            if sums is not None:
                back = engine().LaneBackward(home=home, function=add_up, tasks=a.tasks, elements=program.parts, **sums)
        return LaneCall(launcher.calling(forward, device), back and launcher.calling(back, device))

    def _of_perceptron(self, a: InnerLoopArgs, perceptrons: Perceptrons, bound: Bound) -> LaneCall | None:
        """By the kernel that is compiled for the network."""
        launcher, device, home, places = (
            self._launcher(),
            a.params[0].device,
            home_of(a.params[0]),
            _of_mlp(a, bound.form),
        )
        if any(t is None or t.dtype != a.params[0].dtype for t in (a.tensors[place] for place in places)):
            return None
        launch = engine().MlpLaunch(
            function=perceptrons.entry(), launch=bytes(bound.launch), call=bytes(bound.call),
            parameters=len(bound.form.tensors),
        )  # fmt: skip
        outputs, back = output_shapes(a)[:3], None
        forward = engine().LaneForward(
            home=home, launch=launch, tasks=a.tasks, arguments=places, constants=[], outputs=outputs,
            written=[True] * 3, own=[], parts=bound.parts if a.needs else 0, numbers=0, workspace=bound.history,
            float64=torch.float64,
        )  # fmt: skip
        if a.needs:
            _, add_up = launcher.functions()
            sums = _sums_of_mlp(a, bound.form)
            back = engine().LaneBackward(home=home, function=add_up, tasks=a.tasks, elements=bound.parts, **sums)
        return LaneCall(launcher.calling(forward, device), back and launcher.calling(back, device))


class _Read(NamedTuple):
    """Where the program's arguments stand among a call's tensors, and from one task to the next."""

    places: list[int]
    strides: list[int]


def _read(a: InnerLoopArgs, program: BlockProgram, ones: Tensor | None) -> _Read | None:
    """None where a tensor must be converted first. Behind the call's tensors stand the cotangents of the losses."""
    tensors, found = [*a.tensors, ones], _Read([], [])
    for argument in program.arguments:
        place = _place(a, argument.field, argument.position)
        tensor = tensors[place]
        if tensor is None or tensor.dtype != argument.dtype:
            return None
        found.places.append(place)
        found.strides.append(tensor.numel() // a.tasks if argument.stride is None else argument.stride)
    return found


def _place(a: InnerLoopArgs, field: str, position: int = 0) -> int:
    if field.startswith("grad_"):
        return len(a.tensors)
    begins = [0, *accumulate(len(getattr(a, name)) for name in LISTS)]
    if field in LISTS:
        return begins[LISTS.index(field)] + position
    return begins[-1] + SINGLE.index(field)


def _of_mlp(a: InnerLoopArgs, form: Form) -> list[int]:
    """Places of what a perceptron's kernel reads: parameters, the rate of each, the two sets."""
    rates = [_place(a, "lr", i if len(a.lr) > 1 else 0) for i in form.tensors]
    data = [_place(a, name) for name in ("support_x", "support_y", "query_x", "query_y")]
    return [*(_place(a, "params", i) for i in form.tensors), *rates, *data]


def _sums_of_mlp(a: InnerLoopArgs, form: Form) -> dict[str, Any]:
    """As `_sums`: a task's parts are the gradients of the parameters layer by layer, then of the rates."""
    rates = a.lr if a.needs & NEED_LR else []
    tensors = [*(a.params[i] for i in form.tensors), *rates]
    places = [*(form.tensors.index(i) for i in range(len(a.params))), *range(len(form.tensors), len(tensors))]
    wanted = [(place, list(t.shape)) for place, t in zip(places, [*a.params, *rates], strict=True) if t.requires_grad]
    begins = [0, *accumulate(t.numel() for t in tensors)][: len(tensors)]
    return {"begins": begins, "wanted": [place for place, _ in wanted], "shapes": [shape for _, shape in wanted]}


class _Written(NamedTuple):
    """The shapes of what the program writes for a call, and its strides, those of the tasks' shares at last."""

    outputs: list[list[int]]
    written: list[bool]  # of the outputs; the others have no elements
    own: list[tuple[int, ...]]  # gradients that each task has for itself
    strides: list[int]


def _written(a: InnerLoopArgs, program: BlockProgram, outputs: int) -> _Written | None:
    """None where an output that is not written has elements, or a tensor is of another dtype than the call."""
    loss, output, support, kept = output_shapes(a)
    shapes = [loss, output, support, *kept]
    written = [result is not None for result in program.results[:outputs]]
    if not all(there or 0 in shape for there, shape in zip(written, shapes, strict=True)):
        return None
    results = [result for result in program.results if result is not None and result.at is None]
    if any(result.dtype != program.dtype for result in results):
        return None
    own = [(*result.lead, a.tasks, *result.shape) for result in results[sum(written) :]]
    strides = [*(result.elements for result in results), program.parts, program.number_parts]
    return _Written(shapes, written, own, strides)


def _sums(a: InnerLoopArgs, program: BlockProgram, groups: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """Where the sums begin, which of them somebody wants, and their shapes; None where a gradient is no sum."""
    begins = {i: r.at for i, r in enumerate(program.results) if r is not None and r.at is not None}
    places, wanted, shapes = list(begins), [], []
    for at, (_, tensors) in enumerate(a.groups):
        for i, tensor in enumerate(tensors):
            if tensor.requires_grad:
                position = groups[at][i] if i < len(groups[at]) else ABSENT
                if position == ABSENT or tensor.dtype != program.dtype:
                    return None
                wanted.append(places.index(position))
                shapes.append(list(a.gradient_shape(at, i)))
    return {"begins": list(begins.values()), "wanted": wanted, "shapes": shapes}
