"""mtml::inner_loop at the level of the op: its autograd, its registration and its promises, on every backend here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.inner_loop import BACKEND_NAMES, Case, latent, make_case
from torch import Tensor
from torch.autograd import forward_ad

from mtml_kernels.losses import KINDS, LossSpec
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.reference.inner_loop import inner_loop as reference_inner_loop
from mtml_kernels.registry import Backend
from mtml_kernels.schema.inner_loop import MOMENTS, PER_STEP, QUERY_STEPS, STARTS, InnerLoopArgs
from mtml_kernels.schema.update import UpdateSpec

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
LATENT_ONLY = [False, False, False, False, True]
RATES = ["all", "all_per_step", "tensor", "tensor_per_step", "element", "element_per_step"]
LOSSES = [
    *(LossSpec(kind, delta=0.7) for kind in KINDS),
    LossSpec("mse", "sum"),
    LossSpec("cross_entropy", label_smoothing=0.2),
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"masks": True, "loss": LossSpec("cross_entropy"), "out": 3},
    "step_weights": {"step_weights": True, "masks": True},
    "keep_last": {"keep": 1},
    "keep_steps": {"keep": 2, "masks": True},
    "adapt_only": {"query": 0, "keep": 2},
    "latent": {"program": latent(), "adapted": LATENT_ONLY, "keep": 1},
    "no_steps": {"steps": 0, "keep": 2},
    "no_tasks": {"tasks": 0, "keep": 2},
    "one_of_each": {"tasks": 1, "support": 1, "query": 1, "steps": 1},
    "momentum": {"update": UpdateSpec("sgd", momentum=True, nesterov=True, decayed=True), "masks": True},
    "adam": {"update": UpdateSpec("adam", clipped=True), "moments": True, "keep": 1, "axes": MOMENTS},
    "rmsprop": {
        "update": UpdateSpec("rmsprop", momentum=True, centered=True),
        "moments": True,
        "lr": "tensor_per_step",
    },
    "per_step": {"axes": PER_STEP, "masks": True, "steps": 3},
    "starts": {"axes": STARTS, "keep": 2, "lr": "element"},
    "query_steps": {"axes": QUERY_STEPS, "masks": True},
    "everything": {
        "update": UpdateSpec("adam", decoupled=True, decayed=True, clipped=True),
        "moments": True,
        "axes": PER_STEP | STARTS | QUERY_STEPS | MOMENTS,
        "keep": 2,
        "lr": "element_per_step",
    },
    "other_query_loss": {"loss": LossSpec("mse", "sum"), "query_loss": LossSpec("huber"), "lr": "element_per_step"},
}


def gradcheck(case: Case, backend: str, **options: Any) -> None:
    tensors = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.flat(backend), tensors, fast_mode=True, **options)


def total(outputs: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> Tensor:
    """A number that depends on every output, each element with a weight of its own."""
    loss, output, support_losses, adapted = outputs
    flat = torch.cat([t.flatten() for t in (loss, output, support_losses, *adapted)])
    return flat @ torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype)


def gradients(case: Case, backend: str) -> tuple[Tensor, ...]:
    case = case.requiring_grad()
    return torch.autograd.grad(total(case.call(backend)), case.tensors(), allow_unused=True, materialize_grads=True)


# --- gradients --------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_every_form(name: str, backend: str) -> None:
    gradcheck(make_case(**CASES[name]), backend)


@every_backend
@pytest.mark.parametrize("lr", RATES)
def test_gradcheck_of_every_learning_rate(lr: str, backend: str) -> None:
    gradcheck(make_case(lr=lr), backend)


@every_backend
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradcheck_of_every_loss(loss: LossSpec, backend: str) -> None:
    gradcheck(make_case(loss=loss, masks=True), backend)


@every_backend
def test_gradcheck_element_by_element(backend: str) -> None:
    case = make_case(lr="tensor_per_step", keep=1, tasks=1)
    tensors = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.flat(backend), tensors)


@every_backend
@pytest.mark.parametrize("name", ["plain", "keep_steps", "latent"])
def test_first_order_equals_the_detached_unrolled_loop(name: str, backend: str) -> None:
    case = make_case(**CASES[name], first_order=True)
    leaves = case.requiring_grad()
    loss, output, support_losses, adapted = reference_inner_loop(InnerLoopArgs.of_schema(leaves.op_arguments(0)))
    number = total((loss, output, support_losses, list(adapted)))
    expected = torch.autograd.grad(number, leaves.tensors(), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients(case, backend), expected)


@every_backend
def test_second_order_is_not_first_order(backend: str) -> None:
    exact = gradients(make_case(), backend)
    first = gradients(make_case(first_order=True), backend)
    assert (exact[0] - first[0]).norm() > 0.05 * exact[0].norm()


@every_backend
def test_backends_agree_with_the_reference(backend: str) -> None:
    for options in CASES.values():
        case = make_case(**options)
        ours, theirs = case.call(backend), case.call("reference")
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(case, backend), gradients(case, "reference"))


@every_backend
@pytest.mark.parametrize("wanted", ["params", "lr", "support_x", "query_x"])
def test_one_group_of_gradients_at_a_time(wanted: str, backend: str) -> None:
    case = make_case()
    expected = gradients(case, backend)
    start = {"params": 0, "lr": 4, "support_x": 5, "query_x": 6}[wanted]
    group = [t.requires_grad_() for t in getattr(case, wanted)]
    found = torch.autograd.grad(total(case.call(backend)), group)
    assert all(torch.equal(f, e) for f, e in zip(found, expected[start:], strict=False))


@every_backend
def test_some_parameters_frozen(backend: str) -> None:
    case = make_case()
    expected = gradients(case, backend)
    case.params[2].requires_grad_()
    (found,) = torch.autograd.grad(total(case.call(backend)), [case.params[2]])
    assert torch.equal(found, expected[2])


# --- differentiating again raises -------------------------------------------------------------------------------------


def call_op(case: Case, backend: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The registered op, as torch.compile would call it, run eagerly."""
    return torch.ops.mtml.inner_loop(*case.op_arguments(63), backend)[:4]


@every_backend
@pytest.mark.parametrize("door", [Case.call, call_op], ids=["function", "op"])
@pytest.mark.parametrize("way", ["backward", "inputs", "cotangent"])
def test_the_second_derivative_raises(way: str, door: Any, backend: str) -> None:
    case = make_case(keep=1).requiring_grad()
    outputs = door(case, backend)
    cotangent = torch.ones_like(outputs[0], requires_grad=True)
    first = torch.autograd.grad(outputs[0], case.params, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match=r'differentiable once.*backend="general"'):
        if way == "backward":
            first[0].sum().backward()
        else:
            inputs = [case.params[0]] if way == "inputs" else [cotangent]
            torch.autograd.grad(first[0].square().sum(), inputs)


@every_backend
def test_create_graph_alone_changes_nothing(backend: str) -> None:
    case = make_case().requiring_grad()
    plain = torch.autograd.grad(total(case.call(backend)), case.tensors())
    recorded = torch.autograd.grad(total(case.call(backend)), case.tensors(), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


@every_backend
def test_what_has_no_gradient_may_not_require_one(backend: str) -> None:
    case = make_case(masks=True, step_weights=True)
    assert case.step_weights is not None
    case.step_weights.requires_grad_()
    with pytest.raises(ValueError, match=r"step_weights requires grad.*step_weights\.detach\(\)"):
        case.call(backend)
    with torch.no_grad():
        case.call(backend)
    case.params[0].requires_grad_()
    with pytest.raises(ValueError, match="step_weights requires grad"):
        call_op(case, backend)


@every_backend
def test_function_transforms_raise(backend: str) -> None:
    case = make_case()
    with pytest.raises(RuntimeError, match='backend="general"'):
        torch.func.grad(lambda p: case.with_tensors([p, *case.tensors()[1:]]).call(backend)[0].sum())(case.params[0])
    with pytest.raises(RuntimeError, match='backend="general"'):
        torch.vmap(lambda p: case.with_tensors([p, *case.tensors()[1:]]).call(backend)[0])(case.params[0][None])


@every_backend
def test_forward_mode_raises(backend: str) -> None:
    case = make_case()
    with forward_ad.dual_level():
        case.params[0] = forward_ad.make_dual(case.params[0], torch.ones_like(case.params[0]))
        with pytest.raises(RuntimeError, match="jvp"):
            case.call(backend)


def test_needs_must_cover_what_requires_grad() -> None:
    case = make_case().requiring_grad()
    with pytest.raises(ValueError, match="needs=1"):
        torch.ops.mtml.inner_loop(*case.op_arguments(1), "reference")


@every_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_gradients_of_what_is_not_there_may_be_asked_for(loss: str, backend: str) -> None:
    """Of masks that no one gave, and of class ids: all bits of `needs`."""
    case = make_case(loss=LossSpec(loss), out=3, query_loss=LossSpec(loss)).requiring_grad()
    loss_of_tasks, *_ = torch.ops.mtml.inner_loop(*case.op_arguments(1023), backend)
    found = torch.autograd.grad(loss_of_tasks.sum(), case.tensors())
    expected = torch.autograd.grad(case.call("reference")[0].sum(), case.tensors())
    torch.testing.assert_close(found, expected)


@every_backend
def test_clipping_where_nothing_is_adapted(backend: str) -> None:
    case = make_case(adapted=[False] * 4, update=UpdateSpec("adam", clipped=True))
    torch.testing.assert_close(case.call(backend)[0], make_case(adapted=[False] * 4).call("reference")[0])


# --- registration -----------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, backend: str) -> None:
    case = make_case(**CASES[name]).requiring_grad()
    torch.library.opcheck(torch.ops.mtml.inner_loop.default, (*case.op_arguments(63), backend))


@every_backend
@pytest.mark.parametrize("name", ["plain", "keep_steps", "adapt_only"])
def test_opcheck_of_the_backward(name: str, backend: str) -> None:
    case = make_case(**CASES[name])
    arguments = case.op_arguments(63)
    loss, _, support_losses, adapted, carry = torch.ops.mtml.inner_loop(*arguments, backend)
    grad_adapted = [torch.randn_like(t) for t in adapted[1:]]
    given = [index > 0 for index in range(len(adapted))]
    cotangents = (torch.randn_like(loss), None, torch.randn_like(support_losses), grad_adapted, given)
    torch.library.opcheck(torch.ops.mtml.inner_loop_backward.default, (*cotangents, *arguments, carry, backend))


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_function_and_op_agree_bitwise(name: str, backend: str) -> None:
    case = make_case(**CASES[name]).requiring_grad()
    ours, theirs = case.call(backend), call_op(case, backend)
    for a, b in zip((*ours[:3], *ours[3]), (*theirs[:3], *theirs[3]), strict=True):
        assert torch.equal(a, b)
    grads = [
        torch.autograd.grad(total(o), case.tensors(), allow_unused=True, materialize_grads=True) for o in (ours, theirs)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.fixture
def carrying() -> Iterator[str]:
    """A backend that leaves tensors for its backward, and whose backward insists on them and on plain cotangents."""
    reference = BACKENDS.named("reference")

    def forward(a: InnerLoopArgs) -> Any:
        *results, _ = reference.forward(a)
        return (*results, [results[0] + 1, a.params[0].float().sum(0)] if a.needs else [])

    def backward(*arguments: Any) -> Any:
        *cotangents, a, carry = arguments
        loss, summed = carry
        assert torch.equal(summed, a.params[0].float().sum(0)) and loss.dim() == 1
        *fixed, adapted = cotangents
        assert all(g is None or g.is_contiguous() for g in (*fixed, *adapted))
        return reference.backward(*cotangents, a, [])

    def carry_shapes(a: InnerLoopArgs) -> Any:
        return [((a.support_y.shape[0],), a.params[0].dtype), (a.params[0].shape[1:], torch.float32)]

    BACKENDS.register(Backend("carrying", lambda: None, forward, backward, carry_shapes=carry_shapes))
    yield "carrying"
    BACKENDS.unregister("carrying")


def test_what_a_backend_carries_reaches_its_backward(carrying: str) -> None:
    case = make_case(keep=1, masks=True).requiring_grad()
    torch.library.opcheck(torch.ops.mtml.inner_loop.default, (*case.op_arguments(63), carrying))
    expected = gradients(case, "reference")
    compiled = torch.compile(lambda c: total(c.call(carrying)), fullgraph=True, backend="aot_eager")
    for number in (total(case.call(carrying)), total(call_op(case, carrying)), compiled(case)):
        torch.testing.assert_close(torch.autograd.grad(number, case.tensors(), retain_graph=True), expected)
    recorded = torch.autograd.grad(total(case.call(carrying)), case.tensors(), create_graph=True)
    torch.testing.assert_close(recorded, expected)


# --- promises ---------------------------------------------------------------------------------------------------------


@every_backend
def test_expanded_and_strided_cotangents(backend: str) -> None:
    case = make_case(keep=1).requiring_grad()
    outputs = case.call(backend)
    flat = (*outputs[:3], *outputs[3])
    expanded = [torch.ones((), dtype=t.dtype).expand(t.shape) for t in flat]
    strided = [torch.ones(*t.shape, 2, dtype=t.dtype)[..., 0] for t in flat]
    plain = [torch.ones_like(t) for t in flat]
    found = [torch.autograd.grad(flat, case.tensors(), g, retain_graph=True) for g in (expanded, strided, plain)]
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


def strided(t: Tensor) -> Tensor:
    """The same values in memory with gaps and, from two dimensions on, with the last two swapped."""
    gaps = torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
    if t.dim() < 2:
        return gaps
    return gaps.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


@every_backend
def test_non_contiguous_inputs(backend: str) -> None:
    case = make_case(masks=True, step_weights=True, lr="element_per_step", keep=1)
    other = case.with_tensors([strided(t) for t in case.tensors()])
    for name in ("support_y", "query_y", "support_mask", "query_mask", "step_weights"):
        setattr(other, name, strided(getattr(case, name)))
    assert not any(t.is_contiguous() for t in other.params)
    torch.testing.assert_close(other.call(backend), case.call(backend), rtol=1e-12, atol=1e-14)
    leaves = [t.requires_grad_() for t in other.tensors()]
    found = torch.autograd.grad(total(other.call(backend)), leaves)
    torch.testing.assert_close(found, gradients(case, backend), rtol=1e-12, atol=1e-14)


@every_backend
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("name", ["no_steps", "latent", "one_of_each"])
def test_nothing_returned_aliases_an_input(name: str, keep: int, backend: str) -> None:
    case = make_case(**(CASES[name] | {"keep": keep, "tasks": 1})).requiring_grad()
    loss, output, support_losses, adapted = case.call(backend)
    flat = [loss, output, support_losses, *adapted]
    cotangents = [torch.ones_like(t) for t in flat]
    grads = torch.autograd.grad(flat, case.tensors(), cotangents, allow_unused=True)
    outside = {t.untyped_storage().data_ptr() for t in [*case.tensors(), *cotangents] if t.numel()}
    returned = [t for t in (*flat, *grads) if t is not None and t.numel()]
    assert outside.isdisjoint(t.untyped_storage().data_ptr() for t in returned)


@every_backend
def test_shapes(backend: str) -> None:
    loss, output, support_losses, adapted = make_case(keep=2, steps=3).call(backend)
    assert (loss.shape, output.shape, support_losses.shape) == ((2,), (2, 2, 2), (3, 2))
    assert [tuple(t.shape) for t in adapted] == [(4, 2, 4, 3), (4, 2, 4), (4, 2, 2, 4), (4, 2, 2)]
    loss, output, _, adapted = make_case(query=0).call(backend)
    assert (loss.shape, output.shape, adapted) == ((0,), (2, 0, 2), [])
    case = make_case()
    case.query_y = None
    loss, output, *_ = case.call(backend)
    assert (loss.shape, output.shape) == ((0,), (2, 2, 2))


@every_backend
def test_retained_graphs_and_interleaved_calls(backend: str) -> None:
    first, second = make_case(seed=1).requiring_grad(), make_case(seed=2).requiring_grad()
    a, b = first.call(backend)[0].sum(), second.call(backend)[0].sum()
    once = torch.autograd.grad(a, first.params, retain_graph=True)
    other = torch.autograd.grad(b, second.params)
    again = torch.autograd.grad(a, first.params)
    alone = torch.autograd.grad(second.call(backend)[0].sum(), second.params)
    assert all(torch.equal(x, y) for x, y in zip((*once, *other), (*again, *alone), strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(a, first.params)


@every_backend
def test_a_parameter_changed_before_backward_is_noticed(backend: str) -> None:
    case = make_case().requiring_grad()
    loss = case.call(backend)[0].sum()
    with torch.no_grad():
        case.params[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_backend
def test_two_threads_at_once(backend: str) -> None:
    cases = [make_case(seed=seed, tasks=5) for seed in (1, 2)]
    alone = [gradients(case, backend) for case in cases]
    together: list[list[tuple[Tensor, ...]]] = [[], []]
    gate = threading.Barrier(2)

    def work(index: int) -> None:
        gate.wait()
        together[index].extend(gradients(cases[index], backend) for _ in range(5))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 5
        assert all(torch.equal(a, b) for grads in found for a, b in zip(grads, expected, strict=True))


@every_backend
def test_no_grad_saves_nothing_and_still_adapts(backend: str) -> None:
    case = make_case(keep=1).requiring_grad()
    with torch.no_grad():
        loss, _, _, adapted = case.call(backend)
    assert not loss.requires_grad and not any(t.requires_grad for t in adapted)
    assert torch.equal(loss, case.call(backend)[0])
    assert not torch.equal(adapted[0][0], case.params[0])


@every_backend
def test_values_still_to_be_negated(backend: str) -> None:
    """Tensors with PyTorch's negative bit do not lie in memory as they are."""
    case = make_case(lr="tensor", loss=LossSpec("cross_entropy"))
    views = case.with_tensors([torch._neg_view(-t) for t in case.tensors()])
    assert all(t.is_neg() for t in views.tensors())
    for some in (case, views):
        for t in some.tensors():
            t.requires_grad_()
    results = []
    for some in (case, views):
        loss = some.call(backend)[0]
        results.append([loss, *torch.autograd.grad(loss, some.tensors(), torch._neg_view(-torch.ones_like(loss)))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_backend
def test_no_tasks_have_no_gradients_of_their_inputs(backend: str) -> None:
    case = make_case(tasks=0).requiring_grad()
    loss = case.call(backend)[0]
    found = torch.autograd.grad(loss, [*case.support_x, *case.query_x], loss.detach())
    assert [g.shape for g in found] == [x.shape for x in (*case.support_x, *case.query_x)]


@every_backend
@pytest.mark.parametrize("name", ["plain", "masks", "keep_steps", "step_weights", "no_tasks"])
def test_another_default_device(name: str, backend: str) -> None:
    """`torch.set_default_device` is for tensors the user makes; those of the loop lie where the parameters do."""
    case = make_case(**CASES[name]).requiring_grad()
    expected = gradients_of_all(case, backend)
    with torch.device("meta"):
        assert torch.empty(0).is_meta
        found = gradients_of_all(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def gradients_of_all(case: Case, backend: str) -> list[Tensor]:
    """The outputs, the gradients of each loss alone (which the forward pass carried) and those of every output."""
    loss, *rest, adapted = case.call(backend)
    outputs = [t for t in (loss, *rest, *adapted) if t.requires_grad]
    leaves, options = case.tensors(), {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    of_loss = torch.autograd.grad([loss], leaves, [loss.detach() + 1], **options)
    of_all = torch.autograd.grad(outputs, leaves, [t.detach() + 1 for t in outputs], **options)
    return [*(t.detach() for t in outputs), *of_loss, *of_all]
