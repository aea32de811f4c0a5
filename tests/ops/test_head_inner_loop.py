"""mtml::head_inner_loop: equal to the loop over weights, exact, and what it promises, on every backend here."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from cases.head_inner_loop import BACKEND_NAMES, DIFFERENTIABLE, HeadCase, gradients, make_head_case, total
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import head_inner_loop, native
from mtml_kernels.functional.head_forms import gram_is_cheaper
from mtml_kernels.losses import LossSpec
from mtml_kernels.reference.head_inner_loop import gram_form, scales
from mtml_kernels.schema.head_inner_loop import carry_size

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
compiled = pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason="needs the compiled engine")
LOSSES = [
    LossSpec("cross_entropy"),
    LossSpec("cross_entropy", "sum"),
    LossSpec("cross_entropy", label_smoothing=0.2),
    LossSpec("mse"),
    LossSpec("mse", "sum"),
    LossSpec("bce_with_logits"),
    LossSpec("bce_with_logits", "sum"),
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"masks": True},
    "two_rates": {"groups": 2, "masks": True},
    "no_bias": {"bias": False},
    "decay": {"decay": 0.3},
    "decay_two_rates": {"decay": 0.3, "proximal": 0.1, "groups": 2},
    "decay_no_bias": {"decay": 0.3, "bias": False},
    "proximal": {"proximal": 0.4},
    "no_steps": {"steps": 0},
    "one_step": {"steps": 1, "groups": 2, "decay": 0.1},
    "no_targets": {"targets": False},
    "no_queries": {"query": 0},
    "no_tasks": {"tasks": 0},
    "one_of_each": {"tasks": 1, "support": 1, "query": 1, "features": 1, "classes": 1, "steps": 1},
    "other_query_loss": {"loss": LossSpec("mse", "sum"), "query_loss": LossSpec("bce_with_logits")},
    "wide": {"support": 9, "query": 17, "features": 37, "classes": 11},
}


def adapted(case: HeadCase, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The op's outputs with the coefficients turned into weights and biases, as the specification returns them."""
    loss, logits, support_losses, coefficients = outputs
    a = case.args
    u, v = scales(a.rates, case.options.decay, case.options.proximal)
    weight = u[-1][:, None] * a.weight - coefficients[:, 0] @ a.support
    bias = torch.zeros_like(weight[..., 0]) if a.bias is None else v[-1] * a.bias - coefficients[:, -1].sum(-1)
    return loss, logits, support_losses, weight, bias


def check_equal_to_weight_space(case: HeadCase, backend: str) -> None:
    case = case.requiring_grad()
    ours, theirs = adapted(case, case.call(backend)), case.by_weights()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    grads = [
        torch.autograd.grad(total(o), case.tensors(), allow_unused=True, materialize_grads=True) for o in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


# --- the same as the loop over weights --------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", [n for n in CASES if n != "no_tasks"])
def test_equal_to_weight_space(name: str, backend: str) -> None:
    check_equal_to_weight_space(make_head_case(**CASES[name]), backend)


@every_backend
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_equal_to_weight_space_for_every_loss(loss: LossSpec, backend: str) -> None:
    check_equal_to_weight_space(make_head_case(loss=loss, masks=True, groups=2, decay=0.1), backend)


@every_backend
@settings(max_examples=25)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 20, 20, 70, 18))),
    steps=st.integers(0, 4),
    loss=st.sampled_from(LOSSES),
    groups=st.integers(1, 2),
    masks=st.booleans(),
    decay=st.sampled_from([0.0, 0.2]),
    proximal=st.sampled_from([0.0, 0.3]),
)
def test_equal_to_weight_space_at_any_size(backend: str, sizes: tuple[int, ...], **options: Any) -> None:
    names = ("tasks", "support", "query", "features", "classes")
    check_equal_to_weight_space(make_head_case(**dict(zip(names, sizes, strict=True)), **options), backend)


@every_backend
def test_many_steps(backend: str) -> None:
    case = make_head_case(steps=100, support=7, features=40)
    case.args.rates.mul_(0.5)
    check_equal_to_weight_space(case, backend)


@every_backend
def test_masks_of_zeros_and_ignored_labels(backend: str) -> None:
    case = make_head_case(tasks=3, masks=True)
    case.args.support_mask[0] = 0  # type: ignore[index]
    case.args.query_mask[1] = 0  # type: ignore[index]
    case.args.labels[1, :2] = -100
    case.args.query_labels[2] = -100  # type: ignore[index]
    check_equal_to_weight_space(case, backend)
    loss, _, support_losses, coefficients = case.call(backend)
    assert (support_losses[:, 0] == 0).all() and (coefficients[0] == 0).all() and (loss[1:] == 0).all()


# --- gradients --------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("no_tasks", "no_queries", "no_steps")])
def test_gradcheck(name: str, backend: str) -> None:
    case = make_head_case(**CASES[name])

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in case.with_tensors(tensors).call(backend) if t.numel())

    tensors = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@every_backend
def test_second_order_is_not_first_order(backend: str) -> None:
    """Negative control: constant residuals give another gradient of the weight."""
    case = make_head_case(steps=10).requiring_grad()
    exact = torch.autograd.grad(case.call(backend)[0].sum(), case.args.weight)[0]
    constants = case.call(backend)[3].detach()
    own = case.args.weight - constants[:, 0] @ case.args.support
    logits = case.args.query @ own.mT + (case.args.bias - constants[:, 0].sum(-1))[:, None]  # type: ignore[operator]
    loss = torch.nn.functional.cross_entropy(logits.mT, case.args.query_labels, reduction="none").mean(1)
    torch.testing.assert_close(loss, case.call(backend)[0])
    first = torch.autograd.grad(loss.sum(), case.args.weight)[0]
    assert (exact - first).norm() > 0.05 * exact.norm()


@every_backend
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_gradient_at_a_time(name: str, backend: str) -> None:
    case = make_head_case(groups=2, decay=0.1)
    expected = gradients(case, backend)[DIFFERENTIABLE.index(name)]
    wanted = getattr(case.args, name).requires_grad_()
    alone = torch.autograd.grad(total(case.call(backend)), wanted)[0]
    if backend == "reference":  # PyTorch may add up in another order where there is less to differentiate
        torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(alone, expected)


@every_backend
@pytest.mark.parametrize("name", ["plain", "two_rates", "no_bias", "decay_two_rates", "no_steps", "no_tasks"])
def test_scaled_carry_equals_the_loop_run_again(name: str, backend: str) -> None:
    """Of the losses alone the backward scales what the forward carried; with other cotangents it runs again."""
    case = make_head_case(**CASES[name]).requiring_grad()
    outputs = case.call(backend)
    weights = torch.linspace(-1, 2, len(outputs[0]), dtype=outputs[0].dtype)
    carried = torch.autograd.grad(outputs[0], case.tensors(), weights, retain_graph=True)
    zeros = [weights, *(torch.zeros_like(t) for t in outputs[1:])]
    again = torch.autograd.grad(outputs, case.tensors(), zeros)
    torch.testing.assert_close(carried, again, rtol=1e-10, atol=1e-12)


@every_backend
@pytest.mark.parametrize("door", [HeadCase.call, HeadCase.op], ids=["function", "op"])
def test_the_second_derivative_raises(door: Any, backend: str) -> None:
    case = make_head_case().requiring_grad()
    cotangent = torch.ones(2, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(door(case, backend)[0], case.tensors(), cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match=r'differentiable once.*backend="general"'):
        torch.autograd.grad(first[2].sum(), [case.args.weight], retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first[0].sum(), [cotangent])


@every_backend
def test_function_transforms_raise(backend: str) -> None:
    case = make_head_case()

    def of_weight(weight: Tensor) -> Tensor:
        return case.replace(weight=weight).call(backend)[0].sum()

    with pytest.raises(RuntimeError, match='backend="general"'):
        torch.func.grad(of_weight)(case.args.weight)


@every_backend
@pytest.mark.parametrize("name", ["support_mask", "query_mask"])
def test_what_has_no_gradient_may_not_require_one(name: str, backend: str) -> None:
    case = make_head_case(masks=True)
    getattr(case.args, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
        case.call(backend)


# --- registration -----------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, backend: str) -> None:
    case = make_head_case(**CASES[name]).requiring_grad()
    needs = sum(1 << i for i, t in enumerate(case.args[:5]) if t is not None)
    torch.library.opcheck(torch.ops.mtml.head_inner_loop.default, (*case.args._replace(needs=needs), backend))


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_function_and_op_agree_bitwise(name: str, backend: str) -> None:
    case = make_head_case(**CASES[name]).requiring_grad()
    results = []
    for outputs in (case.call(backend), case.op(backend)):
        grads = torch.autograd.grad(total(outputs), case.tensors(), allow_unused=True, materialize_grads=True)
        results.append((*outputs, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_backend
def test_under_torch_compile(backend: str) -> None:
    case = make_head_case(masks=True).requiring_grad()
    expected = gradients(case, backend)
    run = torch.compile(lambda c: total(c.call(backend)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(run(case), case.tensors()), expected)


# --- promises ---------------------------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    """The same values in memory with gaps."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


@every_backend
def test_non_contiguous_inputs_and_cotangents(backend: str) -> None:
    case = make_head_case(masks=True, groups=2)
    other = HeadCase(case.args._make(strided(t) if isinstance(t, Tensor) else t for t in case.args), case.options)
    torch.testing.assert_close(other.call(backend), case.call(backend), rtol=1e-12, atol=1e-14)
    leaves = [t.requires_grad_() for t in other.tensors()]
    outputs = other.call(backend)
    ones = [torch.ones((), dtype=t.dtype).expand(t.shape) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, ones)
    case = case.requiring_grad()
    plain = torch.autograd.grad(case.call(backend), case.tensors(), [torch.ones_like(t) for t in outputs])
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


@every_backend
def test_nothing_returned_aliases_an_input(backend: str) -> None:
    for options in ({"tasks": 1, "steps": 0}, {"tasks": 1}, {"steps": 1}):
        case = make_head_case(**options).requiring_grad()  # type: ignore[arg-type]
        outputs = case.call(backend)
        cotangents = [torch.ones_like(t) for t in outputs]
        grads = torch.autograd.grad(outputs, case.tensors(), cotangents)
        outside = {t.untyped_storage().data_ptr() for t in [*case.tensors(), *cotangents] if t.numel()}
        assert outside.isdisjoint(t.untyped_storage().data_ptr() for t in (*outputs, *grads) if t.numel())


@every_backend
def test_a_nan_stays_in_its_task(backend: str) -> None:
    for name in ("support", "query"):
        case = make_head_case(tasks=3)
        clean = case.requiring_grad()
        getattr(case.args, name)[1, 0, 0] = float("nan")
        dirty = case.requiring_grad()
        results = []
        for c in (clean, dirty):
            outputs = c.call(backend)
            grads = torch.autograd.grad(outputs[0], [c.args.support, c.args.query], torch.ones_like(outputs[0]))
            results.append([outputs[0], outputs[1], outputs[3], *grads])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert results[1][0][1].isnan()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [300, 1600])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, features: int) -> None:
    case = make_head_case(tasks=7, support=25, query=30, features=features, classes=5, dtype=dtype, groups=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            carried = case.requiring_grad()
            to_loss = torch.autograd.grad(carried.call("cpu")[0].mean(), carried.tensors())
            found.append((*case.call("cpu"), *gradients(case, "cpu"), *to_loss))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@compiled
def test_a_tasks_bits_do_not_depend_on_the_tasks_beside_it() -> None:
    case = make_head_case(tasks=5, support=25, query=30, features=300, classes=5, dtype=torch.float32)
    a = case.args
    alone = case.replace(
        support=a.support[3:4],
        query=a.query[3:4],
        labels=a.labels[3:4],
        query_labels=a.query_labels[3:4],  # type: ignore[index]
    )
    for both, one in zip(case.call("cpu"), alone.call("cpu"), strict=True):
        at = both[:, 3:4] if both.shape == (3, 5) else both[3:4]
        assert torch.equal(at, one)
    for both, one in zip(gradients(case, "cpu")[:2], gradients(alone, "cpu")[:2], strict=True):
        assert both[3:4].shape == one.shape
    together, apart = case.requiring_grad(), alone.requiring_grad()
    grads = [torch.autograd.grad(c.call("cpu")[0].sum(), [c.args.support, c.args.query]) for c in (together, apart)]
    assert all(torch.equal(b[3:4], o) for b, o in zip(*grads, strict=True))


@compiled
def test_threads_may_call_at_once() -> None:
    cases = [make_head_case(tasks=6, features=200, seed=seed) for seed in range(4)]
    expected = [gradients(case, "cpu") for case in cases]
    found: dict[int, list[tuple[Tensor, ...]]] = {}

    def work(i: int) -> None:
        found[i] = [gradients(cases[i], "cpu") for _ in range(10)]

    # the cases of other threads need torch's global seed only while they are made
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, results in found.items():
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, expected[i], strict=True))


@compiled
@pytest.mark.parametrize("loss", [LossSpec("cross_entropy"), LossSpec("mse"), LossSpec("bce_with_logits")], ids=str)
def test_float32_errors_are_no_worse_than_twice_pytorchs(loss: LossSpec) -> None:
    sizes = {"tasks": 3, "support": 10, "query": 15, "features": 300, "classes": 5, "steps": 5, "loss": loss}
    ratios = []
    for seed in range(20):
        exact = make_head_case(**sizes, seed=seed)  # type: ignore[arg-type]
        tensors = [t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in exact.args]
        single = HeadCase(exact.args._make(tensors), exact.options)
        oracle = HeadCase(
            exact.args._make(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors),
            exact.options,
        ).requiring_grad()
        outputs = oracle.by_weights()[:2]
        truth = (*outputs, *torch.autograd.grad(outputs[0].sum(), oracle.tensors()))
        errors = []
        for run in (lambda c: c.call("cpu")[:2], lambda c: c.by_weights()[:2]):
            case = single.requiring_grad()
            outputs = run(case)
            found = (*outputs, *torch.autograd.grad(outputs[0].sum(), case.tensors()))
            errors.append([float(((f - t).norm() / t.norm()).detach()) for f, t in zip(found, truth, strict=True)])
        ratios.append([ours / max(theirs, 1e-8) for ours, theirs in zip(*errors, strict=True)])
    assert (torch.tensor(ratios).median(0).values < 2).all()


@every_backend
def test_values_still_to_be_negated(backend: str) -> None:
    """Tensors with PyTorch's negative bit do not lie in memory as they are."""
    case = make_head_case()
    views = case.with_tensors([torch._neg_view(-t) for t in case.tensors()])
    results = []
    for some in (case, views):
        leaves = [t.requires_grad_() for t in some.tensors()]
        loss = some.call(backend)[0]
        results.append([loss, *torch.autograd.grad(loss, leaves, torch._neg_view(-torch.ones_like(loss)))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_backend
@pytest.mark.parametrize("name", ["plain", "masks", "no_bias", "no_targets", "no_tasks"])
def test_another_default_device(name: str, backend: str) -> None:
    """`torch.set_default_device` is for tensors the user makes; those of the head lie where its features do."""
    case = make_head_case(**CASES[name]).requiring_grad()
    expected = every_gradient(case, backend)
    with torch.device("meta"):
        assert torch.empty(0).is_meta
        found = every_gradient(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def every_gradient(case: HeadCase, backend: str) -> list[Tensor]:
    """The outputs, the gradients of the losses alone (which the forward pass carried) and those of every output."""
    outputs, options = case.call(backend), {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    found = [t.detach() for t in outputs]
    for some in (outputs[:1], outputs):
        some = [t for t in some if t.requires_grad]
        if some:
            found += torch.autograd.grad(some, case.tensors(), [t.detach() + 1 for t in some], **options)
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
    """Remembers the largest number of elements of the tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)}
        return out


@every_backend
def test_no_weight_of_a_task_is_formed(backend: str) -> None:
    tasks, classes, features = 6, 3, 64
    case = make_head_case(tasks=tasks, features=features, classes=classes, query=5).requiring_grad()
    with Sizes() as seen:
        torch.autograd.grad(head_of(case, backend).loss.sum(), case.tensors()[:4])
        gram_form(*gram_arguments(case))  # what is inside an op is not seen
    assert (tasks, classes, features) not in seen.shapes and (tasks * classes, features) not in seen.shapes
    assert (tasks, features, classes) not in seen.shapes
    assert carry_size(case.args) < classes * features


def gram_arguments(case: HeadCase) -> tuple[Any, ...]:
    a = case.args
    sets = (a.support, a.labels, a.query, a.query_labels, a.weight, a.bias, a.rates)
    return (*sets, a.support_mask, a.query_mask, case.options)


@compiled
def test_the_engine_allocates_no_weight_of_a_task() -> None:
    """64 weights would be 262 MB; all else here is below 20. In a process of its own, for its peak."""
    code = """
import resource, torch
from mtml_kernels import head_inner_loop
x, y = torch.randn(64, 2, 4096, requires_grad=True), torch.zeros(64, 2, dtype=torch.int64)
weight = torch.zeros(250, 4096, requires_grad=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def step(tasks):
    a, b = x[:tasks], y[:tasks]
    r = head_inner_loop(a, b, a, weight, None, 0.1, steps=2, query_labels=b, form="gram")
    r.loss.sum().backward()
step(1)
before = peak()
step(64)
assert peak() - before < 60_000, peak() - before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def head_of(case: HeadCase, backend: str) -> Any:
    a = case.args
    sets = (a.support, a.labels, a.query, a.weight, a.bias, 0.1)
    return head_inner_loop(*sets, steps=3, query_labels=a.query_labels, form="gram", backend=backend)


# --- the documented function ------------------------------------------------------------------------------------------


def problem(loss: str = "cross_entropy", **options: Any) -> tuple[tuple[Any, ...], Tensor]:
    a = make_head_case(loss=LossSpec(loss), **options).requiring_grad().args
    assert a.query_labels is not None
    return (a.support, a.labels, a.query, a.weight, a.bias), a.query_labels


RATES: dict[str, Any] = {
    "number": 0.2,
    "scalar": torch.tensor(0.2, dtype=torch.float64),
    "per_step": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
    "per_class": torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64),
    "per_step_and_class": torch.linspace(0.1, 0.5, 9, dtype=torch.float64).view(3, 3),
    "pair": (torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64), 0.4),
}


@every_backend
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_with_logits"])
def test_both_forms_agree_for_every_rate(rate: str, loss: str, backend: str) -> None:
    sets, query_labels = problem(loss)
    lr = RATES[rate]
    leaves = [*(t for t in sets if t.is_floating_point() and t.requires_grad)]
    if isinstance(lr, Tensor):
        lr = lr.clone().requires_grad_()
        leaves.append(lr)
    found = []
    for form in ("gram", "weight"):
        options = {"loss": loss, "query_labels": query_labels, "adapted": True, "form": form, "backend": backend}
        result = head_inner_loop(*sets, lr, steps=3, **options)
        found.append((*result, *torch.autograd.grad(total(tuple(result)), leaves)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_auto_takes_the_cheaper_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gram_is_cheaper(25, 75, 1600, 5, 10) and gram_is_cheaper(25, 75, 1600, 5, 100)
    assert not gram_is_cheaper(500, 500, 64, 10, 5) and not gram_is_cheaper(100, 75, 640, 5, 1)
    taken = []
    monkeypatch.setattr(
        sys.modules["mtml_kernels.functional.head_inner_loop"],
        "gram_is_cheaper",
        lambda *sizes: bool(taken.append(sizes)),
    )
    sets, query_labels = problem()
    by_weight = head_inner_loop(*sets, 0.1, steps=3, query_labels=query_labels)
    assert taken == [(4, 3, 6, 3, 3)]
    by_gram = head_inner_loop(*sets, 0.1, steps=3, query_labels=query_labels, form="gram")
    torch.testing.assert_close(by_weight.loss, by_gram.loss)


def test_huber_takes_the_weight_form() -> None:
    sets, query_labels = problem("mse")
    result = head_inner_loop(*sets, 0.1, steps=2, loss="huber", query_labels=query_labels)
    assert result.loss.isfinite().all()
    with pytest.raises(ValueError, match=r"loss: expected one of .*'huber'.*form='weight'"):
        head_inner_loop(*sets, 0.1, steps=2, loss="huber", query_labels=query_labels, form="gram")


def test_weight_form_refuses_decay() -> None:
    sets, query_labels = problem()
    with pytest.raises(ValueError, match=r"form: 'weight' has no weight_decay.*form='gram'"):
        head_inner_loop(*sets, 0.1, steps=2, query_labels=query_labels, weight_decay=0.1, form="weight")
    result = head_inner_loop(*sets, 0.1, steps=2, query_labels=query_labels, weight_decay=0.1, adapted=True)
    assert result.weight is not None and result.weight.shape == (2, 3, 6)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("classes", {"labels": torch.full((2, 4), 3)}, r"labels: expected class ids.*got 3"),
    ("negative", {"labels": torch.full((2, 4), -1)}, r"labels: expected class ids.*got -1"),
    ("query_classes", {"query_labels": torch.full((2, 3), 9)}, r"query_labels: expected class ids.*got 9"),
    ("label_shape", {"labels": torch.zeros(2, 5, dtype=torch.int64)}, r"labels: expected \[2, 4\]"),
    ("weight", {"weight": torch.zeros(3, 7, dtype=torch.float64)}, r"weight: expected \[C, D\] with D = 6"),
    ("bias", {"bias": torch.zeros(4, dtype=torch.float64)}, r"bias: expected \[C\] = \[3\]"),
    ("rate", {"lr": float("nan")}, "lr: expected finite"),
    ("few_rates", {"lr": torch.ones(2)}, r"lr: expected at least steps=3 rates, got 2"),
    ("element_rates", {"lr": torch.ones(3, 6)}, r"lr: expected a scalar.*per element.*mtml\.MetaSGD"),
    ("mask", {"support_mask": torch.ones(2, 3)}, r"support_mask: expected a tensor \[2, 4\]"),
    ("form", {"form": "gramm"}, "form: expected one of"),
]


@every_backend
@pytest.mark.parametrize(("name", "wrong", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_input_is_named(name: str, wrong: dict[str, Any], message: str, backend: str) -> None:
    sets, query_labels = problem()
    names = ("features_support", "labels", "features_query", "weight", "bias")
    arguments = dict(zip(names, sets, strict=True)) | {"lr": 0.1, "steps": 3, "query_labels": query_labels}
    with pytest.raises(ValueError, match=message):
        head_inner_loop(**(arguments | {"form": "gram", "backend": backend} | wrong))


def test_wrong_dtypes_are_named() -> None:
    sets, query_labels = problem()
    with pytest.raises(TypeError, match="features_query: expected float64"):
        head_inner_loop(sets[0], sets[1], sets[2].float(), *sets[3:], 0.1, steps=1, query_labels=query_labels)
    with pytest.raises(TypeError, match=r"labels: expected int64 class ids.*\.long\(\)"):
        head_inner_loop(sets[0], sets[1].int(), *sets[2:], 0.1, steps=1, query_labels=query_labels)


@compiled
def test_labels_are_checked_before_they_index_memory() -> None:
    case = make_head_case()
    case.args.labels[1, 2] = 10**9
    with pytest.raises(ValueError, match=r"labels: .*1000000000 at task 1, sample 2"):
        case.call("cpu")
    assert native.availability() is None
