"""Gradients of the inner loop to float targets and to sample weights, and probabilities as targets of cross_entropy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.inner_loop import BACKEND_NAMES, mlp
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop import inner_loop_call
from mtml_kernels.schema.inner_loop import (
    DATA,
    DATA_NEEDS,
    PER_STEP,
    PLAIN,
    QUERY_STEPS,
    InnerLoopArgs,
    InnerLoopSpec,
)
from mtml_kernels.schema.update import UpdateSpec

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
compiled_backends = pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if name != "reference"])
D = torch.float64
SOFT = LossSpec("cross_entropy", soft=True)
LOSSES = {
    "mse": LossSpec("mse"),
    "l1": LossSpec("l1"),
    "huber": LossSpec("huber", delta=0.7),
    "bce": LossSpec("bce_with_logits"),
    "soft": SOFT,
    "soft_smoothed": LossSpec("cross_entropy", soft=True, label_smoothing=0.2),
    "ids": LossSpec("cross_entropy", label_smoothing=0.1),
    "mse_sum": LossSpec("mse", "sum"),
    "soft_sum": LossSpec("cross_entropy", "sum", soft=True),
    "ids_sum": LossSpec("cross_entropy", "sum"),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "per_step": {"axes": PER_STEP},
    "step_weights": {"step_weights": True},
    "query_steps": {"axes": QUERY_STEPS},
    "adam": {"adam": True},
    "adam_per_step": {"adam": True, "axes": PER_STEP | QUERY_STEPS},
}


def targets(loss: LossSpec, lead: tuple[int, ...], out: int, dtype: torch.dtype) -> Tensor:
    if loss.kind == "cross_entropy" and not loss.soft:
        ids = torch.randint(out, lead)
        ids[..., -1] = -100
        return ids
    if loss.kind == "mse" or loss.kind == "l1" or loss.kind == "huber":
        return torch.randn(*lead, out, dtype=dtype)
    return torch.rand(*lead, out, dtype=dtype)  # probabilities whose sum need not be 1


def problem(
    loss: LossSpec,
    query_loss: LossSpec | None = None,
    *,
    first_order: bool = False,
    axes: int = 0,
    step_weights: bool = False,
    adam: bool = False,
    keep: int = 1,
    tasks: int = 3,
    support: int = 5,
    query: int = 4,
    steps: int = 3,
    out: int = 3,
    hidden: int = 4,
    dtype: torch.dtype = D,
    seed: int = 0,
) -> InnerLoopArgs:
    """A random call of which every group wants gradients."""
    torch.manual_seed(seed)
    program, shapes = mlp(3, hidden, out)
    query_loss = query_loss or loss
    (*coded, p0), (*query_coded, query_p0) = loss.encode(), query_loss.encode()
    rule = [*UpdateSpec("adam").encode(), 0] if adam else PLAIN
    spec = InnerLoopSpec(
        [True] * 4, program, [], steps, coded, query_coded, [p0, query_p0], first_order, keep, rule, axes
    )
    lead = (tasks, steps, support) if axes & PER_STEP else (tasks, support)
    a = InnerLoopArgs(
        params=[0.7 * torch.randn(shape, dtype=dtype) for shape in shapes],
        lr=[torch.full((1,), 0.3, dtype=dtype)],
        support_x=[torch.randn(*lead, 3, dtype=dtype)],
        query_x=[torch.randn(tasks, query, 3, dtype=dtype)],
        hyper=[torch.tensor([0, 0, 0, 0, 0.8, 0.9, 1e-2, 1e-3], dtype=D)] if adam else [],
        moments=[],
        support_y=targets(loss, lead, out, dtype),
        query_y=targets(query_loss, (tasks, query), out, dtype),
        support_mask=torch.rand(*lead, dtype=dtype) + 0.1,
        query_mask=torch.rand(tasks, query, dtype=dtype) + 0.1,
        step_weights=torch.rand(steps + 1, dtype=dtype) if step_weights else None,
        spec=spec,
        needs=sum(DATA_NEEDS) + (31 if adam else 15),
    )
    masks = [a.support_mask, a.query_mask]
    for mask in masks:
        assert mask is not None
        mask[..., 0] = 0  # its loss counts for nothing, its weight's gradient does not
    return a


def call(a: InnerLoopArgs, backend: str) -> list[Tensor]:
    sets = (a.support_x, a.support_y, a.query_x, a.query_y, a.support_mask, a.query_mask)
    found = inner_loop_call(a.spec, a.params, *sets, a.lr, a.step_weights, backend, a.hyper, a.moments)
    loss, output, support_losses, kept = found
    return [loss, output, support_losses, *kept]


def call_op(a: InnerLoopArgs, backend: str) -> list[Tensor]:
    loss, output, support_losses, kept, _ = torch.ops.mtml.inner_loop(*a.in_schema(a.spec.values), backend)
    return [loss, output, support_losses, *kept]


def leaves_of(a: InnerLoopArgs, names: tuple[str, ...] = DATA) -> tuple[InnerLoopArgs, list[Tensor]]:
    """The same call with copies of its data that require grad where they can."""
    fresh = {name: getattr(a, name).clone() for name in names}
    leaves = [t.requires_grad_() for t in fresh.values() if t.is_floating_point()]
    return a._replace(**fresh), leaves


def total(outputs: list[Tensor]) -> Tensor:
    """A number that depends on every output, each element with a weight of its own."""
    flat = torch.cat([t.flatten() for t in outputs])
    return flat @ torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype)


def gradients(a: InnerLoopArgs, backend: str, what: str = "all", door: Any = call) -> list[Tensor]:
    a, leaves = leaves_of(a)
    outputs = door(a, backend)
    number = total(outputs if what == "all" else outputs[:1])
    return list(torch.autograd.grad(number, leaves, allow_unused=True, materialize_grads=True))


# --- the mathematics --------------------------------------------------------------------------------------------------


@compiled_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_the_reference(loss: str, form: str, backend: str) -> None:
    for first_order, other in itertools.product((False, True), (None, "huber", "soft")):
        a = problem(LOSSES[loss], other and LOSSES[other], first_order=first_order, **FORMS[form])
        for what in ("all", "loss"):
            found, expected = gradients(a, backend, what), gradients(a, "reference", what)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason="no compiled engine")
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_in_low_rank_form(loss: str) -> None:
    for first_order, axes in itertools.product((False, True), (0, PER_STEP)):
        a = problem(LOSSES[loss], first_order=first_order, axes=axes, keep=0, hidden=16, support=2)
        found, expected = gradients(a, "cpu:low_rank"), gradients(a, "reference")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@compiled_backends
def test_gradients_equal_the_reference_where_a_set_is_cut_into_blocks(backend: str) -> None:
    for loss in ("huber", "soft", "ids"):
        a = problem(LOSSES[loss], tasks=1, support=900, query=700, hidden=70, steps=2)
        torch.testing.assert_close(gradients(a, backend), gradients(a, "reference"), rtol=1e-9, atol=1e-11)


@every_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["huber", "bce", "soft_smoothed"])
def test_gradcheck(loss: str, form: str, backend: str) -> None:
    a, leaves = leaves_of(problem(LOSSES[loss], steps=2, tasks=2, support=3, query=2, **FORMS[form]))

    def outputs(*data: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(a._replace(**dict(zip(DATA, data, strict=True))), backend))

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@every_backend
@pytest.mark.parametrize("loss", ["mse", "bce", "soft"])
def test_the_second_order_is_there(loss: str, backend: str) -> None:
    """The data of the support sets reach the query loss through the inner gradients alone."""
    exact = gradients(problem(LOSSES[loss]), backend, "loss")
    first = gradients(problem(LOSSES[loss], first_order=True), backend, "loss")
    for name, own, cut in zip(DATA, exact, first, strict=True):
        assert own.norm() > 1e-3
        assert torch.count_nonzero(cut) == 0 if name.startswith("support") else torch.equal(own, cut)


@every_backend
@pytest.mark.parametrize("loss", LOSSES)
def test_a_task_whose_weights_are_all_zero(loss: str, backend: str) -> None:
    a = problem(LOSSES[loss])
    assert a.support_mask is not None and a.query_mask is not None
    a.support_mask[1], a.query_mask[2] = 0, 0
    found, expected = gradients(a, backend), gradients(a, "reference")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    if LOSSES[loss].reduction == "mean":
        support_mask, query_mask = found[-2:]
        assert torch.count_nonzero(support_mask[1]) == torch.count_nonzero(query_mask[2]) == 0
        assert support_mask[0, 0] != 0 != query_mask[0, 0]  # one weight of zero among others has a gradient


@every_backend
def test_ignored_labels_give_their_weights_no_gradient(backend: str) -> None:
    support_mask, query_mask = gradients(problem(LOSSES["ids"]), backend)
    assert torch.count_nonzero(support_mask[:, -1]) == torch.count_nonzero(query_mask[:, -1]) == 0
    assert torch.count_nonzero(support_mask[:, :-1]) == support_mask[:, :-1].numel()


# --- probabilities as targets -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_hot_probabilities_equal_class_ids(smoothing: float, backend: str) -> None:
    ids = problem(LossSpec("cross_entropy", label_smoothing=smoothing))
    assert ids.query_y is not None
    support_y, query_y = ids.support_y.clamp(min=0), ids.query_y.clamp(min=0)
    soft = problem(LossSpec("cross_entropy", label_smoothing=smoothing, soft=True))
    masks = {"support_mask": ids.support_mask, "query_mask": ids.query_mask}
    same = {"params": ids.params, "support_x": ids.support_x, "query_x": ids.query_x, **masks}
    ids = ids._replace(support_y=support_y, query_y=query_y)
    soft = soft._replace(support_y=F.one_hot(support_y, 3).to(D), query_y=F.one_hot(query_y, 3).to(D), **same)
    torch.testing.assert_close(call(soft, backend), call(ids, backend), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(soft, backend)[2:], gradients(ids, backend), rtol=1e-11, atol=1e-13)


@every_backend
def test_losses_of_probabilities_are_those_of_pytorch(backend: str) -> None:
    a = problem(LOSSES["soft_smoothed"])._replace(query_mask=None)
    assert a.query_y is not None
    loss, output, *_ = call(a, backend)
    for t in range(a.tasks):
        torch.testing.assert_close(loss[t], F.cross_entropy(output[t], a.query_y[t], label_smoothing=0.2))


def test_a_spec_fits_itself_to_its_targets() -> None:
    ids, probabilities = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
    plain = LossSpec("cross_entropy", label_smoothing=0.1)
    soft = plain.fitting(probabilities)
    assert soft.soft and soft.fitting(ids) == plain == plain.fitting(None) == plain.fitting(ids)
    assert LossSpec.decode(*soft.encode()) == soft and LossSpec.decode(*plain.encode()) == plain
    assert LossSpec("mse").fitting(probabilities) == LossSpec("mse")


# --- promises ---------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", DATA)
def test_one_alone(name: str, backend: str) -> None:
    a = problem(LOSSES["soft"])
    expected = dict(zip(DATA, gradients(a, backend), strict=True))[name]
    a, (leaf,) = leaves_of(a, (name,))
    (found,) = torch.autograd.grad(total(call(a, backend)), [leaf])
    assert torch.equal(found, expected)


@every_backend
def test_what_is_carried_equals_what_is_run_again(backend: str) -> None:
    a, leaves = leaves_of(problem(LOSSES["soft"]))
    loss, output, *_ = call(a, backend)
    weights = torch.rand_like(loss)
    carried = torch.autograd.grad(loss, leaves, weights, retain_graph=True)
    again = torch.autograd.grad([loss, output], leaves, [weights, torch.zeros_like(output)])
    torch.testing.assert_close(carried, again, rtol=1e-12, atol=1e-14)


@every_backend
def test_data_without_losses_get_zeros(backend: str) -> None:
    a, leaves = leaves_of(problem(LOSSES["mse"])._replace(query_x=[]))
    a.params[0].requires_grad_()
    found = torch.autograd.grad(total(call(a, backend)), leaves, allow_unused=True, materialize_grads=True)
    assert [g.shape for g in found] == [t.shape for t in leaves]
    assert [bool(torch.count_nonzero(g)) for g in found] == [True, False, True, False]


@every_backend
def test_no_tasks(backend: str) -> None:
    a, leaves = leaves_of(problem(LOSSES["soft"], tasks=0))
    found = torch.autograd.grad(total(call(a, backend)), leaves)
    assert [g.shape for g in found] == [t.shape for t in leaves]


@compiled_backends
@pytest.mark.parametrize("loss", ["mse", "bce", "soft", "ids"])
def test_single_precision_errs_no_more_than_pytorch(loss: str, backend: str) -> None:
    ours = theirs = 0.0
    for seed in range(8):
        exact = gradients(problem(LOSSES[loss], seed=seed), "reference")
        narrow = _narrowed(problem(LOSSES[loss], seed=seed))
        for sought, *found in zip(exact, gradients(narrow, backend), gradients(narrow, "reference"), strict=True):
            errors = [float((f.double() - sought).norm() / sought.norm()) for f in found]
            ours, theirs = ours + errors[0], theirs + errors[1]
    assert ours <= 2 * theirs


def _narrowed(a: InnerLoopArgs) -> InnerLoopArgs:
    def narrow(value: Any) -> Any:
        if isinstance(value, list):
            return [narrow(t) for t in value]
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return InnerLoopArgs._make(map(narrow, a))


@every_backend
@pytest.mark.parametrize("loss", ["huber", "soft", "ids"])
def test_opcheck(loss: str, backend: str) -> None:
    a, _ = leaves_of(problem(LOSSES[loss])._replace(needs=sum(DATA_NEEDS) + 15))
    torch.library.opcheck(torch.ops.mtml.inner_loop.default, (*a.in_schema(a.spec.values), backend))


@every_backend
def test_function_and_op_agree_bitwise(backend: str) -> None:
    a = problem(LOSSES["soft"])
    for own, other in zip(gradients(a, backend), gradients(a, backend, door=call_op), strict=True):
        assert torch.equal(own, other)


@every_backend
@pytest.mark.parametrize("loss", ["soft", "ids"])
def test_compiled_in_one_graph(loss: str, backend: str) -> None:
    torch._dynamo.reset()
    a, leaves = leaves_of(problem(LOSSES[loss]))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: total(call(x, backend)), fullgraph=True, backend=counter)
    found = torch.autograd.grad(compiled(a), leaves)
    torch.testing.assert_close(list(found), gradients(a, backend), rtol=1e-12, atol=1e-14)
    assert counter.frame_count == 1


@every_backend
def test_vmap_over_weights_and_cotangents(backend: str) -> None:
    a = problem(LOSSES["soft"])
    masks = torch.rand(4, *a.query_mask.shape, dtype=D)  # type: ignore[union-attr]
    losses = torch.vmap(lambda mask: call_op(a._replace(query_mask=mask), backend)[0])(masks)
    assert all(
        torch.equal(own, call(a._replace(query_mask=m), backend)[0]) for own, m in zip(losses, masks, strict=True)
    )
    arguments = a.in_schema(a.spec.values)
    kept, carry = torch.ops.mtml.inner_loop(*arguments, backend)[3:]

    def back(grad_loss: Tensor) -> list[Tensor]:
        none = (None, None, [], [False] * len(kept))
        return list(torch.ops.mtml.inner_loop_backward(grad_loss, *none, *arguments, carry, backend))

    cotangents = torch.rand(4, a.tasks, dtype=D)
    for own, *alone in zip(torch.vmap(back)(cotangents), *map(back, cotangents), strict=True):
        assert torch.equal(own, torch.stack(alone))


@every_backend
def test_bits_missing_from_needs_are_named(backend: str) -> None:
    a, _ = leaves_of(problem(LOSSES["mse"])._replace(needs=15))
    with pytest.raises(ValueError, match="need the bits 960"):
        call_op(a, backend)
