"""What explain() says of a path whose calls run by a schedule: its calls, their work, and a prediction for a GPU; and
how the backend `cuda` runs it, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import Sizes
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.describe import TiledLaunches, launch_of
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.program import Program
from mtml_kernels.schedule.capacity import remark
from mtml_kernels.schedule.describe import Description, describe, device_of, with_article
from mtml_kernels.schema.inner_loop import CLASS_IDS, NEED_LR, NEED_PARAMS, InnerLoopArgs, InnerLoopSpec

__all__ = ["launched", "predicted"]


def predicted(
    program: Program,
    params: Sequence[Tensor],
    rates: Sequence[Tensor],
    hyper: Sequence[Tensor],
    spec: InnerLoopSpec,
    sizes: Sizes,
) -> tuple[str, list[dict[str, Any]]]:
    """(In one line, every call) of a meta-step of these sizes."""
    on = params[0].device
    device, known = device_of(on)
    a = _meta_step(program, params, rates, hyper, spec, sizes)
    found: Description = describe(a, device)
    said = [str(found), remark(a, on), "" if known else f"the tensors lie on {on}"]
    return "; ".join(filter(None, said)), [line.to_dict() for line in found.lines]


def launched(
    program: Program,
    params: Sequence[Tensor],
    rates: Sequence[Tensor],
    hyper: Sequence[Tensor],
    spec: InnerLoopSpec,
    sizes: Sizes,
    form: str,
) -> str:
    """What a form of `cuda` starts for a meta-step of these sizes, or why it cannot; and why it is not here."""
    on = params[0].device
    device, known = device_of(on)
    chip, name = (Chip.of(on), "this GPU") if on.type == "cuda" else (Chip.named(device), with_article(device.name))
    on_known = device if known or on.type != "cuda" else None
    try:
        launch = launch_of(_meta_step(program, params, rates, hyper, spec, sizes), chip, form, on_known)
    except BackendUnavailable as error:
        if error.__cause__ is None:  # what another form would take
            return str(error)
        return f"backend={form!r} cannot run it: {error.__cause__}; backend='triton' does, layer by layer"
    missing = BACKENDS.named(form).refusal(on.type, params[0].dtype)
    here = f"; not here: {missing}" if missing else ""
    how = "some for each step" if isinstance(launch, TiledLaunches) else "one for all steps"
    return f"by backend={form!r} {how}, on {name}: {launch}{here}"


def _meta_step(
    program: Program,
    params: Sequence[Tensor],
    rates: Sequence[Tensor],
    hyper: Sequence[Tensor],
    spec: InnerLoopSpec,
    sizes: Sizes,
) -> InnerLoopArgs:
    """The call, of tensors without memory."""

    def empty(samples: int, shape: Sequence[int], ids: bool) -> Tensor:
        dtype = torch.long if ids else params[0].dtype
        return torch.empty(sizes.tasks, samples, *shape, dtype=dtype, device="meta")

    def inputs(samples: int) -> list[Tensor]:
        return [empty(samples, info.shape, info.ids) for info in program.inputs] if samples else []

    def targets(samples: int, kind: int) -> Tensor:
        ids = kind == CLASS_IDS
        return empty(samples, () if ids else program.output_shape, ids)

    return InnerLoopArgs(
        params=[p.to("meta") for p in params],
        lr=[rate.to("meta") for rate in rates],
        support_x=inputs(sizes.support),
        query_x=inputs(sizes.query),
        hyper=[tensor.to("meta") for tensor in hyper],
        moments=[],
        support_y=targets(sizes.support, spec.support_loss[0]),
        query_y=targets(sizes.query, spec.query_loss[0]) if sizes.query else None,
        support_mask=None,
        query_mask=None,
        step_weights=None,
        spec=spec,
        needs=NEED_PARAMS | (NEED_LR if any(rate.requires_grad for rate in rates) else 0),
    )
