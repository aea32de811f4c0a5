"""`mtml::task_update`: the steps of torch.optim for every task, derivatives, transforms, and bad arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases.task_ops import TRANSFORMS, error, second_order, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml import inner
from mtml_kernels import BackendUnavailable, task_update
from mtml_kernels.ops.task_update import BACKENDS
from mtml_kernels.schema.update import HYPERS

NAMES = BACKENDS.available()
every_backend = pytest.mark.parametrize("backend", NAMES)
D = torch.float64
Of = Callable[[float], Any]
RULES: dict[str, Callable[[Of], inner.Rule]] = {
    "sgd": lambda of: inner.SGD(),
    "sgd decay clipped": lambda of: inner.SGD(weight_decay=of(0.2), clip_norm=of(0.3)),
    "momentum": lambda of: inner.SGD(momentum=of(0.8), dampening=of(0.3)),
    "nesterov": lambda of: inner.SGD(momentum=of(0.8), nesterov=True, weight_decay=of(0.1), clip_norm=of(50.0)),
    "adam": lambda of: inner.Adam((of(0.8), of(0.95)), eps=of(1e-2), eps_root=of(1e-3), weight_decay=of(0.1)),
    "adamw": lambda of: inner.AdamW((of(0.8), of(0.95)), eps=of(1e-2), weight_decay=of(0.1), clip_norm=of(0.4)),
    "rmsprop": lambda of: inner.RMSprop(of(0.9), eps=of(1e-2)),
    "rmsprop centered": lambda of: inner.RMSprop(of(0.9), eps=of(0.1), momentum=of(0.7), centered=True),
}
every_rule = pytest.mark.parametrize("name", RULES)
OPTIMISERS: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ("sgd", lambda p: torch.optim.SGD(p, 0.05)),
    "momentum": (
        inner.SGD(momentum=0.9, dampening=0.2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.2, weight_decay=0.1),
    ),
    "nesterov": (
        inner.SGD(momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "adam": ("adam", lambda p: torch.optim.Adam(p, 0.05)),
    "adamw": ("adamw", lambda p: torch.optim.AdamW(p, 0.05)),
    "rmsprop": ("rmsprop", lambda p: torch.optim.RMSprop(p, 0.05)),
    "rmsprop centered": (
        inner.RMSprop(momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.5, centered=True),
    ),
}
SHAPES: list[tuple[int, ...]] = [(3, 2), (), (5,)]


class Case:
    """One call as a function of all tensors that may have a gradient: parameters, gradients, rates, state, numbers."""

    def __init__(
        self, name: str, shapes: Sequence[tuple[int, ...]] = SHAPES, tasks: int = 3, step: int = 2, rates: str = "one",
        seed: int = 0, numbers: bool = True,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, dtype=D, generator=g) + 0.1

        self.make, self.names = RULES[name], list(RULES[name](lambda v: v).names)
        rule = RULES[name](lambda v: v)
        self.step = step if rule.spec.moments else 0
        params = [draw(tasks, *s) - 0.6 for s in shapes]
        grads = [draw(tasks, *s) - 0.6 for s in shapes]
        ones = [(1,) * len(s) for s in shapes]
        forms = {
            "one": [draw()],
            "tensor": [draw() for _ in shapes],
            "element": [draw(*s) for s in shapes],
            "task": [draw(tasks, *o) for o in ones],
            "task element": [draw(tasks, *s) for s in shapes],
        }
        state = [draw(tasks, *s) for _ in rule.spec.moments for s in shapes] if self.step else []
        self.numbers = [n for n in self.names if numbers and float(rule.numbers()[n]) > 0]
        self.values = {n: float(v) for n, v in rule.numbers().items()}
        hyper = [torch.tensor(self.values[n], dtype=D) for n in self.numbers]
        self.groups = [params, grads, forms[rates], state, hyper]

    @property
    def tensors(self) -> list[Tensor]:
        return [t for group in self.groups for t in group]

    def __call__(self, *tensors: Tensor, backend: str = "cpu") -> tuple[Tensor, ...]:
        left = list(tensors)
        params, grads, rates, state, hyper = ([left.pop(0) for _ in group] for group in self.groups)
        rule = self.make(lambda v: v)
        for n, value in zip(self.numbers, hyper, strict=True):
            setattr(rule, n, value)
        lr = rates[0] if len(rates) == 1 and len(params) > 1 else rates
        options: dict[str, Any] = {"state": state, "step": self.step} if self.step else {}
        return tuple(task_update(params, grads, lr, rule=rule, backend=backend, **options))

    def backend(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *tensors: self(*tensors, backend=name)


@every_backend
@pytest.mark.parametrize("name", OPTIMISERS)
def test_is_torch_optim_for_every_task(name: str, backend: str) -> None:
    rule, optimiser = OPTIMISERS[name]
    params = [torch.randn(2, *s, dtype=D) for s in SHAPES]
    theirs = [[p[t].clone().requires_grad_() for p in params] for t in range(2)]
    optimisers = [optimiser(own) for own in theirs]
    state: dict[str, Any] = {}
    for step in range(4):
        grads = [torch.randn_like(p) for p in params]
        found = task_update(params, grads, 0.05, rule=rule, backend=backend, **state)
        params, state = found[: len(SHAPES)], {"state": found[len(SHAPES) :], "step": step + 1}
        for t, own in enumerate(theirs):
            for p, g in zip(own, grads, strict=True):
                p.grad = g[t].clone()
            optimisers[t].step()
            torch.testing.assert_close([p[t] for p in params], [p.detach() for p in own])


def test_clipping_is_pytorchs() -> None:
    grads = [torch.randn(2, *s, dtype=D) for s in SHAPES]
    zeros = [torch.zeros_like(g) for g in grads]
    found = task_update(zeros, grads, -1.0, rule=inner.SGD(clip_norm=0.5))
    for t in range(2):
        own = [torch.zeros_like(g[t]).requires_grad_() for g in grads]
        for p, g in zip(own, grads, strict=True):
            p.grad = g[t].clone()
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        torch.testing.assert_close([p[t] for p in found], [p.grad for p in own])


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(RULES)), tasks=st.sampled_from([0, 1, 2, 5]), step=st.sampled_from([0, 1, 4]),
    shapes=st.lists(st.sampled_from([(), (1,), (3,), (0, 4), (40, 33), (2, 3, 2)]), min_size=1, max_size=3),
    rates=st.sampled_from(["one", "tensor", "element", "task", "task element"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    name: str, tasks: int, step: int, shapes: list[tuple[int, ...]], rates: str, seed: int
) -> None:  # fmt: skip
    case = Case(name, shapes, tasks, step, rates, seed)
    expected = with_gradients(case, case.tensors, backend="reference")
    for backend in ("cpu", "torch"):
        found = with_gradients(case, case.tensors, backend=backend)
        assert [f.shape for f in found] == [e.shape for e in expected]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@every_backend
@every_rule
def test_second_derivatives(name: str, backend: str) -> None:
    case = Case(name, rates="element")
    found = second_order(case.backend(backend), case.tensors)
    torch.testing.assert_close(found, second_order(case.backend("reference"), case.tensors))


@every_rule
def test_gradcheck(name: str) -> None:
    for step in (0, 2):
        case = Case(name, [(2,), ()], 2, step)
        tensors = [t.requires_grad_() for t in case.tensors]
        assert torch.autograd.gradcheck(case, tensors)
        if step:
            assert torch.autograd.gradgradcheck(case, tensors)


def test_second_order_differs_from_first() -> None:
    """The negative control: Adam's step is curved in the gradient."""
    case = Case("adam")
    zero = [torch.zeros_like(t) for t in case.tensors]
    assert error(zero[3:6], second_order(case, case.tensors)[3:6]) > 0.5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_opcheck(name: str, backend: str) -> None:
    case = Case(name, [(2,), (1, 2)], 2)
    params, grads, _, state, _ = ([t.requires_grad_() for t in group] for group in case.groups)
    rates = [torch.rand(1, 2, dtype=D).requires_grad_(), torch.rand(2, 1, 1, dtype=D).requires_grad_()]
    hyper = torch.tensor([case.values.get(n, 0.0) for n in HYPERS], dtype=D).requires_grad_()
    spec = RULES[name](lambda v: v).spec
    arguments = (params, grads, rates, state, hyper, spec.encode(), case.step, backend)
    torch.library.opcheck(torch.ops.mtml.task_update.default, arguments)
    results = torch.ops.mtml.task_update(*arguments)
    given = [torch.randn_like(t).requires_grad_() for t in results]
    torch.library.opcheck(torch.ops.mtml.task_update_backward.default, (given, *arguments))


@pytest.mark.parametrize("way", TRANSFORMS)
@pytest.mark.parametrize("name, rates", [("adamw", "element"), ("nesterov", "one")])
def test_transforms(name: str, rates: str, way: str) -> None:
    case = Case(name, [(2,), (2, 1)], 2, rates=rates, numbers=False)
    expected = TRANSFORMS[way](case.backend("reference"), case.tensors)
    torch.testing.assert_close(TRANSFORMS[way](case, case.tensors), expected)


@every_rule
def test_vmap(name: str) -> None:
    """Over everything, the rule's numbers too, and over some tensors of it."""
    cases = [Case(name, seed=seed, rates="tensor") for seed in (1, 2, 3)]
    stacked = [torch.stack(ts) for ts in zip(*(c.tensors for c in cases), strict=True)]
    one_by_one = [cases[0](*c.tensors) for c in cases]
    expected = tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True))
    torch.testing.assert_close(torch.func.vmap(cases[0])(*stacked), expected)
    for batched in itertools.product([0, None], repeat=2):
        if batched == (None, None):
            continue
        dims = [
            batched[0] if i < len(SHAPES) else batched[1] if i < 2 * len(SHAPES) else None for i in range(len(stacked))
        ]
        given = [s if d == 0 else t for s, t, d in zip(stacked, cases[0].tensors, dims, strict=True)]
        found = torch.func.vmap(cases[0], in_dims=tuple(dims))(*given)
        rows = [cases[0](*(t[i] if d == 0 else t for t, d in zip(given, dims, strict=True))) for i in range(3)]
        torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*rows, strict=True)))


def test_compiled() -> None:
    torch._dynamo.reset()
    case = Case("adam", numbers=False)
    compiled = torch.compile(lambda *a: case(*a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, case.tensors), with_gradients(case, case.tensors))


@every_backend
@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_moments_in_float32_lose_no_digits(rule: str, backend: str) -> None:
    """1 - 0.999 taken in float32 is wrong in its sixth digit; torch.optim takes it in double, and then rounds."""
    g = torch.rand(2, 100) + 0.5
    made = inner.RMSprop(alpha=0.999) if rule == "rmsprop" else rule
    found = task_update([g], [g], 0.0, rule=made, backend=backend)
    torch.testing.assert_close(found[-1].double(), 0.001 * g.double() ** 2, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("name", [n for n in OPTIMISERS if n != "sgd"])
def test_float32_is_no_worse_than_torch_optim(name: str) -> None:
    rule, optimiser = OPTIMISERS[name]
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(20):
        torch.manual_seed(seed)
        start, gradients = torch.randn(1, 500, dtype=D), torch.randn(5, 1, 500, dtype=D)
        results = []
        for dtype, mine in ((D, True), (torch.float32, True), (torch.float32, False)):
            p = start.to(dtype)
            own, state = p.clone().requires_grad_(), {}
            steps = optimiser([own])
            for step, g in enumerate(gradients.to(dtype)):
                if mine:
                    p, *moments = task_update([p], [g], 0.05, rule=rule, backend="cpu", **state)
                    state = {"state": moments, "step": step + 1}
                else:
                    own.grad = g.clone()
                    steps.step()
            results.append(p if mine else own.detach())
        errors["ours"].append(error([results[1]], [results[0]]))
        errors["theirs"].append(error([results[2]], [results[0]]))
    ours, theirs = (torch.tensor(e).median().item() for e in errors.values())
    assert ours <= 2 * theirs, (ours, theirs)


@every_backend
def test_strided_tensors_and_aliases(backend: str) -> None:
    params = [torch.randn(4, 3, 2, dtype=D).permute(2, 1, 0)]  # [2, 3, 4]
    grads = [torch.randn(1, 4, dtype=D).expand(2, 3, 4)]
    rule = inner.SGD(momentum=0.9)
    found = task_update(params, grads, 0.1, rule=rule, backend=backend)
    torch.testing.assert_close(found, [params[0] - 0.1 * grads[0], grads[0]])
    held = {t.untyped_storage().data_ptr() for t in (*params, *grads)}
    assert not held & {t.untyped_storage().data_ptr() for t in found}
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_a_task_does_not_depend_on_those_beside_it() -> None:
    case = Case("adamw", [(70, 70), (300,)], 16, rates="element", numbers=False)
    singles = [t.float() for t in case.tensors]
    together = with_gradients(case, singles)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = with_gradients(case, singles)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, single, strict=True))
    rates = range(4, 6)
    alone = case(*(t if i in rates else t[5:6] for i, t in enumerate(singles)))
    assert all(torch.equal(a[0], b[5]) for a, b in zip(alone, together, strict=False))


def test_nan_stays_in_its_task_also_when_clipped() -> None:
    grads = [torch.ones(3, 2), torch.ones(3)]
    grads[1][1] = float("nan")
    found = task_update([torch.zeros(3, 2), torch.zeros(3)], grads, 0.1, rule=inner.SGD(clip_norm=0.5), backend="cpu")
    assert all(t[1].isnan().all() and not t[[0, 2]].isnan().any() for t in found)


def test_a_gradient_of_zero_has_finite_derivatives() -> None:
    p, g = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    for rule in ("adam", "rmsprop", inner.SGD(clip_norm=1.0)):
        found = task_update([p], [g], 0.1, rule=rule, backend="cpu")
        assert all(t.isfinite().all() for t in torch.autograd.grad(found[0].sum(), [p, g]))


P = [torch.zeros(3, 2), torch.zeros(3)]
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one tensor": ({"params": P[0]}, TypeError, r"params: expected a list of tensors, got .*pass \[tensor\] for one"),
    "nothing": ({"params": [], "grads": []}, ValueError, "params: expected at least one tensor"),
    "no tensor": ({"grads": [P[0], 1.0]}, TypeError, r"grads\[1\]: expected a tensor, got 1.0"),
    "no gradient": ({"grads": [P[0], None]}, TypeError, r"grads\[1\]: expected a tensor, got None; of a parameter"),
    "count of grads": ({"grads": P[:1]}, ValueError, "grads: expected 2 entries, got 1"),
    "shape of grads": ({"grads": [P[0], P[0]]}, ValueError, r"grads\[1\]: expected \[3\], got float32 \[3, 2\]"),
    "tasks": ({"params": [P[0], torch.zeros(2)]}, ValueError, r"params\[1\]: expected \[3\], got float32 \[2\]"),
    "dtype": ({"grads": [P[0], P[1].double()]}, TypeError, r"grads\[1\]: expected torch.float32, got float64"),
    "device": ({"grads": [P[0], P[1].to("meta")]}, ValueError, r"grads\[1\]: expected a dense tensor on cpu"),
    "lr of all": ({"lr": torch.ones(3)}, ValueError, "lr: expected a number, a scalar tensor or a list of one rate"),
    "count of lr": ({"lr": [0.1]}, ValueError, "lr: expected 2 rates, one a parameter, got 1; pass a number for all"),
    "shape of lr": ({"lr": [torch.ones(3), 0.1]}, ValueError, r"lr\[0\]: expected a scalar, a rate an element \[2\]"),
    "infinite lr": ({"lr": [0.1, float("inf")]}, ValueError, r"lr\[1\]: expected finite rates, got inf"),
    "no number": ({"lr": "fast"}, TypeError, "lr: expected a number or a tensor, got 'fast'"),
    "rule": ({"rule": "lion"}, ValueError, "rule: expected one of 'sgd', 'adam', 'adamw', 'rmsprop' or a rule"),
    "no step": ({"rule": "adam", "state": P * 2}, ValueError, "step: expected the number of steps that made"),
    "no state": ({"rule": "adam", "step": 1}, ValueError, "state: expected that of the step before with step=1"),
    "both": ({"rule": "adam", "step": 0, "state": P * 2}, ValueError, "state: expected none for step=0, got one"),
    "count of state": ({"rule": "adam", "step": 1, "state": P}, ValueError, "state: expected 4 tensors, .*exp_avg"),
    "shape of state": ({"rule": "adam", "step": 1, "state": [*P, P[1], P[1]]}, ValueError, r"state\[2\]: expected \[3"),
    "kind of step": ({"rule": "adam", "step": 1.0, "state": P * 2}, TypeError, "step: expected an int >= 0, got 1.0"),
    "missing backend": ({"backend": "cuda"}, BackendUnavailable, "task_update has no 'cuda' backend"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, kind, message = BAD[name]
    arguments = {"params": P, "grads": P, "lr": 0.1, **changed}
    with pytest.raises(kind, match=message):
        task_update(**arguments)
