"""Random calls of `inner_loop` with all that an op may be asked for: rules, axes, gradients of everything.

A call runs at the level of a backend, whose gradients come in groups: also those of tasks apart.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from cases.engine import Evaluated, is_finite, worst_error
from cases.engine_random import random_case
from cases.inner_loop import HYPER, Case
from torch import Tensor

from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import decode
from mtml_kernels.schema.inner_loop import (
    DATA,
    DATA_NEEDS,
    KEEP_NONE,
    KEEP_STEPS,
    MOMENTS,
    NEED_HYPER,
    NEED_LR,
    NEED_MOMENTS,
    NEED_PARAMS,
    NEED_QUERY_X,
    NEED_SUPPORT_X,
    PER_STEP,
    QUERY_STEPS,
    STARTS,
    TASKS_APART,
    InnerLoopArgs,
    flat_gradients,
)
from mtml_kernels.schema.program import output_size
from mtml_kernels.schema.update import UpdateSpec

RULES = [
    UpdateSpec("sgd", clipped=True),
    UpdateSpec("sgd", momentum=True),
    UpdateSpec("sgd", momentum=True, nesterov=True, decayed=True, clipped=True),
    UpdateSpec("adam"),
    UpdateSpec("adam", clipped=True, decayed=True),
    UpdateSpec("adam", decoupled=True, decayed=True, clipped=True),
    UpdateSpec("rmsprop"),
    UpdateSpec("rmsprop", momentum=True, centered=True, clipped=True),
]
SOFT = [LossSpec("cross_entropy", soft=True), LossSpec("cross_entropy", soft=True, label_smoothing=0.2)]
NEEDS = (NEED_PARAMS, NEED_LR, NEED_SUPPORT_X, NEED_QUERY_X, NEED_HYPER, NEED_MOMENTS, *DATA_NEEDS)
FULL = sum(NEEDS)
# A cotangent is any, the loss's alone may be all that there is; of one value the way back is scaled.
Cotangents = list[Tensor | None]


def like(t: Tensor, *lead: int) -> Tensor:
    """Of its shape behind others, and of about its values."""
    return t * (1 + 0.1 * torch.randn(*lead, *t.shape, dtype=t.dtype))


def with_rule(case: Case, rule: UpdateSpec, rng: random.Random) -> Case:
    """Some with moments from steps before."""
    tasks, planes = len(case.support_y), len(rule.moments)
    changed = [p for p, flag in zip(case.params, case.spec.adapted, strict=True) if flag]
    taken = rng.choice([0, 3]) if planes and changed else 0
    moments = [0.5 + torch.rand(tasks, *p.shape, dtype=p.dtype) for _ in range(planes) for p in changed]
    spec = dataclasses.replace(case.spec, update=[*rule.encode(), taken])
    return dataclasses.replace(case, spec=spec, hyper=[HYPER.clone()], moments=moments if taken else [])


def with_axes(case: Case, axes: int) -> Case:
    """Every task's own start, a support set for every step."""
    tasks, steps = len(case.support_y), case.spec.steps
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, axes=axes))
    if axes & STARTS:
        own = zip(case.params, case.spec.adapted, strict=True)
        case = dataclasses.replace(case, params=[like(p, tasks) if flag else p for p, flag in own])
    if axes & PER_STEP:
        change = Stepped(steps)
        mask = None if case.support_mask is None else change(case.support_mask)
        xs, y = [change(x) for x in case.support_x], change(case.support_y)
        case = dataclasses.replace(case, support_x=xs, support_y=y, support_mask=mask)
    return case


class Stepped:
    """[T, S, ...] -> [T, K, S, ...], the samples of each step in another order."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, t: Tensor) -> Tensor:
        return torch.stack([t.roll(k, 1) for k in range(self.steps)], 1)


def with_soft_targets(case: Case, loss: LossSpec) -> Case:
    """Probabilities, whose sum need not be 1, where they were class ids or values."""
    kind, reduction, p0 = loss.encode()
    spec = dataclasses.replace(case.spec, support_loss=[kind, reduction], query_loss=[kind, reduction])
    spec = dataclasses.replace(spec, loss_args=[p0, p0])

    classes = output_size(case.spec.program)

    def soft(y: Tensor) -> Tensor:
        return torch.rand(*y.shape[:2], classes, dtype=case.support_x[0].dtype)

    query_y = None if case.query_y is None else soft(case.query_y)
    return dataclasses.replace(case, spec=spec, support_y=soft(case.support_y), query_y=query_y)


def random_call(seed: int, nodes: int = 5) -> InnerLoopArgs:
    """A random program with a rule, axes and wanted gradients."""
    rng = random.Random(seed)
    case = random_case(rng, nodes)
    if rng.random() < 0.25 and _output_rows(case) == 1:
        case = with_soft_targets(case, rng.choice(SOFT))
    axes = sum(bit for bit in (PER_STEP, STARTS, QUERY_STEPS, TASKS_APART) if rng.random() < 0.35)
    axes &= ~PER_STEP if not case.spec.steps else ~0
    rule = rng.choice([None, *RULES])
    if rule is not None:
        case = with_rule(case, rule, rng)
        axes |= MOMENTS if rng.random() < 0.3 and case.spec.keep != KEEP_NONE else 0
    needs = rng.choice([FULL, FULL, sum(bit for bit in NEEDS if rng.random() < 0.5) or NEED_PARAMS])
    case = with_axes(case, axes)
    needs &= present(case) if rng.random() < 0.8 else FULL
    return InnerLoopArgs.of_schema(case.op_arguments(needs))


def _output_rows(case: Case) -> int:
    program = decode(tuple(case.spec.program))
    return program.nodes[program.output].rows


def present(case: Case) -> int:
    """The bits of what can have a gradient."""
    groups = [*case.groups(), *([] if (t := getattr(case, name)) is None else [t] for name in DATA)]
    return sum(bit for bit, group in zip(NEEDS, groups, strict=True) if any(t.is_floating_point() for t in group))


def random_cotangents(a: InnerLoopArgs, seed: int) -> Cotangents:
    """Of the loss alone, or of any outputs."""
    rng = random.Random(seed)
    loss, output, support_losses, kept, _ = BACKENDS.named("torch").forward(a._replace(needs=0))
    alone = a.has_loss and rng.random() < 0.4
    there = [a.has_loss, *(not alone and rng.random() < 0.5 for _ in (output, support_losses, *kept))]
    if not any(there):
        there[1 if output.numel() else 2] = True
    outputs = (loss, output, support_losses, *kept)
    return [torch.randn_like(t) if given else None for t, given in zip(outputs, there, strict=True)]


def run_call(a: InnerLoopArgs, backend: str, cotangents: Sequence[Tensor | None]) -> Evaluated:
    """Outputs, and the gradients that are wanted."""
    chosen = BACKENDS.named(backend)
    loss, output, support_losses, kept, carry = chosen.forward(a)
    single, adapted = cotangents[:3], list(cotangents[3:])
    groups = chosen.backward(*single, adapted, a, carry)
    return [loss, output, support_losses, *kept], flat_gradients(a, groups)


def check_call(a: InnerLoopArgs, backend: str, cotangents: Sequence[Tensor | None]) -> bool:
    """Equal to the reference to 1e-9, as `cases.engine.check` has it; False where the reference is not finite."""
    expected = run_call(a, "reference", cotangents)
    if not is_finite(expected):
        return False
    error = worst_error(run_call(a, backend, cotangents), expected)
    if error > 1e-9:  # some loops are chaotic
        moved = max(worst_error(run_call(nudged(a), "reference", cotangents), expected) for _ in range(5))
        assert error <= 10 * moved or moved > 1e-2, f"error {error:.2g}"
    return True


def nudged(a: InnerLoopArgs) -> InnerLoopArgs:
    """With parameters a rounding error away."""
    return a._replace(params=[p * (1 + 1e-14 * torch.randn_like(p)) for p in a.params])


def in_dtype(a: InnerLoopArgs, dtype: torch.dtype) -> InnerLoopArgs:
    """The same call; a rule's numbers stay what they are."""

    def change(x: Any) -> Any:
        if isinstance(x, list):
            return [change(t) for t in x]
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    kept = ("hyper", "spec", "needs")
    return a._replace(**{name: change(x) for name, x in a._asdict().items() if name not in kept})


# --- tasks ------------------------------------------------------------------------------------------------------------


def some_tasks(a: InnerLoopArgs, order: Sequence[int]) -> InnerLoopArgs:
    """The call for these tasks alone, in this order."""
    own = a.spec.has(STARTS)
    lists = {name: [t[list(order)] for t in getattr(a, name)] for name in ("support_x", "query_x", "moments")}
    single = {name: None if (t := getattr(a, name)) is None else t[list(order)] for name in DATA}
    params = [p[list(order)] if own and flag else p for p, flag in zip(a.params, a.spec.adapted, strict=True)]
    return a._replace(params=params, **lists, **single)


def task_of(a: InnerLoopArgs, results: Evaluated, task: int) -> Evaluated:
    """What a call with tasks apart says about one of them: no gradient is a sum."""
    (loss, output, support_losses, *kept), grads = results
    count = sum(a.spec.adapted) if a.spec.keep else 0
    steps = a.spec.keep == KEEP_STEPS
    outputs = [loss[..., task], output[:, task] if a.spec.has(QUERY_STEPS) else output[task], support_losses[:, task]]
    outputs += [t[:, task] if steps and i < count else t[task] for i, t in enumerate(kept)]
    return outputs, [g[task] for g in grads]


def weighed(a: InnerLoopArgs, backend: str, alone: bool) -> Cotangents:
    """Cotangents of every output or of the loss alone, which depend on the outputs' own values only."""
    loss, output, support_losses, kept, _ = BACKENDS.named(backend).forward(a._replace(needs=0))
    rest = [None if alone else torch.sin(3 * t) + 1.25 for t in (output, support_losses, *kept)]
    return [torch.sin(3 * loss) + 1.25, *rest]
