"""A call as one launch or some, in numbers: for `explain()`, on a GPU that need not be there."""

from __future__ import annotations

import dataclasses

from mtml_kernels.cuda.backends import FORMS
from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.device import DeviceEngine, DeviceKernels
from mtml_kernels.cuda.inner_loop.mlp import Bound, Perceptrons
from mtml_kernels.cuda.inner_loop.predicted import Prediction, prediction
from mtml_kernels.cuda.inner_loop.words import RING_BYTES
from mtml_kernels.schedule.devices import Device
from mtml_kernels.schema.inner_loop import InnerLoopArgs

__all__ = ["Launch", "PerceptronLaunch", "TiledLaunches", "launch_of"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the backend `cuda` starts for a call. Bytes are those of a block, which holds one task at a time."""

    full: bool  # the kernel with all instructions, not only those of most programs
    phases: int
    words: int
    threads: int
    blocks: int
    shared_bytes: int
    workspace_bytes: int
    why: str = ""  # no kernel of a perceptron

    def __str__(self) -> str:
        why = f"; no kernel of perceptrons, for {self.why}" if self.why else ""
        return (
            f"{'full' if self.full else 'plain'} kernel, {self.phases} phases in {self.words} words; {self.blocks} "
            f"{'block' if self.blocks == 1 else 'blocks'} of {self.threads} threads; a task takes "
            f"{self.shared_bytes:,} bytes of shared memory and {self.workspace_bytes:,} of workspace{why}"
        )


@dataclasses.dataclass(frozen=True)
class PerceptronLaunch:
    """The same of a perceptron that has a kernel of its own. rows: samples that a warp takes through all layers."""

    widths: tuple[int, ...]
    rows: int
    threads: int
    blocks: int
    shared_bytes: int
    workspace_bytes: int  # of what the steps leave for the way back
    predicted: Prediction | str = ""  # or why there is none

    def __str__(self) -> str:
        return (
            f"the kernel of perceptrons {'-'.join(map(str, self.widths))}, {self.rows} samples a warp; {self.blocks} "
            f"{'block' if self.blocks == 1 else 'blocks'} of {self.threads} threads; a task takes "
            f"{self.shared_bytes:,} bytes of shared memory and {self.workspace_bytes:,} of workspace"
            f"{_said(self.predicted)}"
        )


@dataclasses.dataclass(frozen=True)
class TiledLaunches:
    """The same of a perceptron whose tasks are cut into tiles of samples. Blocks, threads and bytes of the way back."""

    widths: tuple[int, ...]
    terms: int  # of TF32 for a large product of float32; 0: in float32
    tile: int  # samples
    launches: int
    threads: int
    blocks: int
    shared_bytes: int
    workspace_bytes: int  # of the call, for all that stays between launches
    predicted: Prediction | str = ""

    def __str__(self) -> str:
        how = {0: "", 1: " in TF32", 3: " in TF32 by three products for one"}[self.terms]
        return (
            f"the kernels of perceptrons {'-'.join(map(str, self.widths))}{how} by tiles of {self.tile} samples, "
            f"{self.launches} launches; the largest of {self.blocks} blocks of {self.threads} threads and "
            f"{self.shared_bytes:,} bytes of shared memory; {self.workspace_bytes:,} bytes of workspace for all tasks"
            f"{_said(self.predicted)}"
        )


def _said(predicted: Prediction | str) -> str:
    if isinstance(predicted, str):
        return f"; no time is predicted: {predicted}" if predicted else ""
    return f"; {predicted}"


def launch_of(
    a: InnerLoopArgs, chip: Chip, form: str = "cuda", device: Device | None = None
) -> Launch | PerceptronLaunch | TiledLaunches:
    """The launch of a call's forward, which goes on to the gradients where they are wanted.

    Args:
        a: a call; only shapes and dtypes of its tensors are looked at, which may lie on "meta".
        chip: the GPU's numbers.
        form: the backend, "cuda" or another of `FORMS`.
        device: what predictions know of that GPU; without it nothing is predicted.

    Raises:
        BackendUnavailable: no block can run it; names the operation and the way out.
        ValueError: the schedule does not know an operation of the program.
    """
    terms = FORMS[form]
    perceptrons = Perceptrons(DeviceKernels(lambda _: chip, tf32=terms > 0), terms)
    bound = perceptrons.bound(a)
    if bound is not None:
        return _of_perceptron(bound, "" if device is None else prediction(bound, device))
    engine = DeviceEngine(lambda _: chip)
    persistent = Persistent(lambda: engine, perceptrons, form if terms else None)
    program, where = persistent.of_forward(a), a.params[0].device
    return Launch(
        full=program.words.full,
        phases=program.words.phases,
        words=len(program.words.words),
        threads=engine.threads(program, a.tasks, where),
        blocks=engine.blocks(program, a.tasks, where),
        shared_bytes=program.placed.chip_bytes + RING_BYTES,
        workspace_bytes=program.placed.workspace_bytes,
        why=perceptrons.why_not(a),
    )


def _of_perceptron(bound: Bound, predicted: Prediction | str) -> PerceptronLaunch | TiledLaunches:
    launch, call = bound.launch, bound.call
    size = 8 if launch.dtype else 4
    if bound.tile:
        back = call.wants_gradient and not call.first_order
        launches = 2 * (call.steps + 1) + (2 * call.steps if back else 0)
        workspace = bound.history * size
        threads = launch.back_threads
        sizes = (launches, threads, launch.blocks, bound.shared_bytes, workspace)
        return TiledLaunches(bound.form.widths, bound.terms, bound.tile, *sizes, predicted)
    own = bound.history * size // launch.blocks
    sizes = (launch.rows, launch.threads, launch.blocks, bound.shared_bytes, own)
    return PerceptronLaunch(bound.form.widths, *sizes, predicted)
