"""mtml.inner: the rules of torch.optim as inner steps, exact in everything, on every path; and the axes beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mtml
from mtml import MAML, inner
from mtml_kernels.ops.inner_loop import BACKENDS

pytestmark = pytest.mark.filterwarnings("ignore::mtml_kernels.errors.FallbackWarning")
D = torch.float64
T, S, Q = 3, 4, 5
ENGINE = "cpu" if "cpu" in BACKENDS.available() else "reference"


def net(dtype: torch.dtype = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def number(value: float, dtype: torch.dtype = D) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


RULES: dict[str, Callable[[Callable[[float], Any]], inner.Rule]] = {
    # the numbers are what `of` makes of them: tensors with a gradient, or plain
    "sgd decay": lambda of: inner.SGD(weight_decay=of(0.2)),
    "sgd clipped": lambda of: inner.SGD(clip_norm=of(0.3)),
    "momentum": lambda of: inner.SGD(momentum=of(0.8), dampening=of(0.3)),
    "nesterov": lambda of: inner.SGD(momentum=of(0.8), nesterov=True, weight_decay=of(0.1), clip_norm=of(0.5)),
    "adam": lambda of: inner.Adam((of(0.8), of(0.95)), eps=of(1e-3), eps_root=of(1e-4), weight_decay=of(0.1)),
    "adamw": lambda of: inner.AdamW((of(0.8), of(0.95)), weight_decay=of(0.1), clip_norm=of(0.4)),
    "rmsprop": lambda of: inner.RMSprop(of(0.9), eps=of(1e-3)),
    "rmsprop centered": lambda of: inner.RMSprop(of(0.9), momentum=of(0.7), centered=True, weight_decay=of(0.1)),
}
OPTIMISERS: dict[str, tuple[Callable[[], inner.Rule], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (
        lambda: inner.SGD(momentum=0.9, dampening=0.2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.2, weight_decay=0.1),
    ),
    "nesterov": (
        lambda: inner.SGD(momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "adam": (lambda: inner.Adam(weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1)),
    "adamw": (inner.AdamW, lambda p: torch.optim.AdamW(p, 0.05)),
    "rmsprop": (
        lambda: inner.RMSprop(momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.5, centered=True),
    ),
    "clipped": (lambda: inner.Adam(clip_norm=0.2), lambda p: torch.optim.Adam(p, 0.05)),
}


@pytest.mark.parametrize("backend", [ENGINE, "torch", "general"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_steps_are_those_of_torch_optim(name: str, backend: str) -> None:
    make, optimiser = OPTIMISERS[name]
    model = net()
    x, y = torch.randn(1, 8, 3, dtype=D), torch.randn(1, 8, 2, dtype=D)
    adapted = MAML(model, 0.05, steps=6, loss="mse", update=make(), backend=backend).adapt_tasks(x, y)
    optim = optimiser(model.parameters())
    for _ in range(6):
        optim.zero_grad()
        F.mse_loss(model(x[0]), y[0]).backward()
        if name == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optim.step()
    for key, value in model.named_parameters():
        torch.testing.assert_close(adapted.params[key][0], value, rtol=1e-9, atol=1e-11)


class Problem:
    """A call with everything in it, and the sum of all that it returns as a function of every tensor."""

    def __init__(self, rule: str, axes: tuple[bool, bool, bool], lr: str, first_order: bool, seed: int, steps: int = 3):
        per_step, starts, query_steps = axes
        torch.manual_seed(seed)
        self.model, self.steps, self.first_order = net(), steps, first_order
        self.hyper: list[Tensor] = []
        self.rule = RULES[rule](self.number)
        shape = (T, steps, S) if per_step else (T, S)
        self.data = [
            torch.randn(*shape, 3, dtype=D, requires_grad=True),
            torch.randn(*shape, 2, dtype=D),
            torch.randn(T, Q, 3, dtype=D, requires_grad=True),
            torch.randn(T, Q, 2, dtype=D),
        ]
        named = dict(self.model.named_parameters())
        self.start = None
        if starts:  # one is left to the model
            own = [name for name in named if name != "2.bias"]
            self.start = {n: (named[n].detach() + 0.1 * torch.randn(T, *named[n].shape, dtype=D)) for n in own}
            self.start = {n: t.requires_grad_() for n, t in self.start.items()}
        self.lr: Any = {
            "number": 0.05,
            "steps": torch.rand(steps, dtype=D).mul(0.1).requires_grad_(),
            "element": {n: torch.rand(p.shape, dtype=D).mul(0.1).requires_grad_() for n, p in named.items()},
        }[lr]
        self.options = {
            "support_mask": torch.rand(shape, dtype=D),
            "per_step": per_step,
            "query_steps": query_steps,
            "start": self.start,
        }

    def number(self, value: float) -> Tensor:
        self.hyper.append(number(value))
        return self.hyper[-1]

    def leaves(self) -> list[Tensor]:
        rates = [self.lr] if isinstance(self.lr, Tensor) else [*self.lr.values()] if isinstance(self.lr, dict) else []
        own = [] if self.start is None else [*self.start.values()]
        return [*self.model.parameters(), *self.hyper, self.data[0], self.data[2], *rates, *own]

    def results(self, backend: str) -> list[Tensor]:
        """loss, output, support losses, and the gradients of a weighted sum of all of them."""
        maml = MAML(
            self.model, self.lr, steps=self.steps, loss="mse", update=self.rule, backend=backend,
            first_order=self.first_order,
        )  # fmt: skip
        out = maml.meta_forward(*self.data, **self.options)
        weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=D).view(t.shape) for t in out]
        total = sum((t * w).sum() for t, w in zip(out, weights, strict=True))
        return [*out, *torch.autograd.grad(total, self.leaves(), allow_unused=True, materialize_grads=True)]


def same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@settings(max_examples=60)
@given(
    rule=st.sampled_from(sorted(RULES)),
    axes=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    lr=st.sampled_from(["number", "steps", "element"]),
    first_order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_rule_axis_and_rate_on_every_path(
    rule: str, axes: tuple[bool, bool, bool], lr: str, first_order: bool, seed: int
) -> None:
    problem = Problem(rule, axes, lr, first_order, seed)
    exact = problem.results("general")
    for backend in ("reference", "torch", ENGINE):
        same(problem.results(backend), exact)


@pytest.mark.parametrize("rule", RULES)
def test_the_controls_differ(rule: str) -> None:
    """Without the second order, and without what flows through the moments, the gradients are others."""
    problem = Problem(rule, (False, False, False), "number", False, 0)
    exact = problem.results(ENGINE)
    problem.first_order = True
    first = problem.results(ENGINE)
    assert not torch.allclose(exact[3], first[3], rtol=1e-4)
    if problem.rule.spec.moments:
        problem.first_order = False
        apart = problem.rule

        def forgetting(params: Any, grads: Any, lr: Any, step: int, state: Any = None) -> Any:
            after, state = apart(params, grads, lr, step, state)
            kept = {m: {n: t.detach() for n, t in state[m].items()} for m in apart.spec.moments}
            return after, {"step": state["step"], **kept}

        problem.rule = forgetting  # type: ignore[assignment]
        assert not torch.allclose(exact[3], problem.results("general")[3], rtol=1e-4)


@pytest.mark.parametrize("backend", [ENGINE, "torch", "reference", "general"])
@pytest.mark.parametrize("rule", RULES)
def test_a_loop_goes_on_where_another_ended(rule: str, backend: str) -> None:
    model, hyper = net(), []

    def of(value: float) -> Tensor:
        hyper.append(number(value))
        return hyper[-1]

    maml = MAML(model, 0.05, loss="mse", update=RULES[rule](of), backend=backend)
    x, y = torch.randn(T, S, 3, dtype=D), torch.randn(T, S, 2, dtype=D)
    one = maml.adapt_tasks(x, y, steps=5)
    two = maml.adapt_tasks(x, y, steps=3, start=maml.adapt_tasks(x, y, steps=2))
    assert (one.state or {}).get("step") == (two.state or {}).get("step")
    leaves = [*model.parameters(), *hyper]
    found = []
    for adapted in (one, two):
        total = sum((t.sin()).sum() for t in adapted.params.values())
        found.append([*adapted.params.values(), *torch.autograd.grad(total, leaves)])
    same(*found)
    assert one.detach().params["0.weight"].grad_fn is None


def test_data_of_every_step_is_read_in_its_order() -> None:
    """Per-step data by per-step loops of one step each."""
    model = net()
    maml = MAML(model, 0.1, steps=4, loss="mse", update=inner.SGD(momentum=0.9))
    x, y = torch.randn(T, 4, S, 3, dtype=D), torch.randn(T, 4, S, 2, dtype=D)
    whole = maml.adapt_tasks(x, y, per_step=True)
    step: Any = None
    for k in range(4):
        step = maml.adapt_tasks(x[:, k], y[:, k], steps=1, start=step)
    same([*whole.params.values()], [*step.params.values()])


def test_low_rank_form_takes_data_of_every_step() -> None:
    if ENGINE != "cpu":
        pytest.skip("needs the compiled engine")
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4)).to(D)
    x, y = torch.randn(T, 3, 2, 64, dtype=D), torch.randn(T, 3, 2, 4, dtype=D)
    qx, qy = torch.randn(T, 2, 64, dtype=D), torch.randn(T, 2, 4, dtype=D)
    found = []
    for backend in ("cpu:low_rank", "cpu:weights", "general"):
        loss = MAML(model, 0.1, steps=3, loss="mse", backend=backend).meta_loss(x, y, qx, qy, per_step=True)
        found.append([loss, *torch.autograd.grad(loss.sum(), [*model.parameters()])])
    same(found[0], found[2])
    same(found[1], found[2])


@pytest.mark.parametrize("rule", ["adam", "rmsprop", "rmsprop centered", "nesterov"])
@pytest.mark.parametrize("backend", [ENGINE, "torch", "reference", "general"])
def test_gradients_that_are_zero_leave_no_nan(rule: str, backend: str) -> None:
    """The square root at zero: a dead unit has no gradient at any step."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).to(D)
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    plain = {"adam": inner.Adam(), "rmsprop": inner.RMSprop(), "rmsprop centered": inner.RMSprop(centered=True)}
    maml = MAML(model, 0.05, steps=4, loss="mse", update=plain.get(rule, inner.SGD(0.9)), backend=backend)
    data = [torch.randn(T, S, n, dtype=D) for n in (3, 2, 3, 2)]
    loss = maml.meta_loss(*data)
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), [*model.parameters()]))


@pytest.mark.skipif(ENGINE != "cpu", reason="needs the compiled engine")
@pytest.mark.parametrize("rule", ["adam", "nesterov", "rmsprop centered"])
def test_bits_depend_neither_on_threads_nor_on_other_tasks(rule: str) -> None:
    def run(tasks: int, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = net(torch.float32)
        data = [torch.randn(8, S, n) for n in (3, 2, 3, 2)]
        maml = MAML(model, 0.05, steps=4, loss="mse", update=RULES[rule](float))
        out = maml.meta_forward(*[t[:tasks] for t in data])
        return [out.loss, out.output, *maml.adapt_tasks(data[0][:tasks], data[1][:tasks]).params.values()]

    before = torch.get_num_threads()
    try:
        alone, many, threads = run(2, 1), run(8, 1), run(8, 2)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(alone, many, threads, strict=True):
        assert torch.equal(a, b[:2]) and torch.equal(b, c)


@pytest.mark.parametrize("rule", RULES)
def test_float32_is_as_good_as_pytorchs(rule: str) -> None:
    def gradients(dtype: torch.dtype, backend: str, seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = net(torch.float32).to(dtype)
        data = [torch.randn(T, S, n).to(dtype) for n in (3, 2, 3, 2)]
        maml = MAML(model, 0.05, steps=4, loss="mse", update=RULES[rule](float), backend=backend)
        grads = torch.autograd.grad(maml.meta_loss(*data).sum(), [*model.parameters()])
        return torch.cat([g.flatten().double() for g in grads])

    errors = []
    for seed in range(9):
        exact = gradients(D, "general", seed)
        errors.append([(gradients(torch.float32, b, seed) - exact).norm() for b in (ENGINE, "torch", "general")])
    *ours, theirs = torch.tensor(errors).median(0).values
    assert all(error <= 2 * theirs + 1e-7 * exact.norm() for error in ours)


def test_parameters_of_a_rule_are_learned() -> None:
    beta = nn.Parameter(torch.tensor(0.9, dtype=D))
    maml = MAML(net(), 0.05, steps=2, loss="mse", update=inner.SGD(momentum=beta))
    assert any(p is beta for p in maml.parameters())
    data = [torch.randn(T, S, n, dtype=D) for n in (3, 2, 3, 2)]
    before = maml.meta_loss(*data)
    before.sum().backward()
    assert beta.grad is not None and beta.grad != 0
    with torch.no_grad():
        beta.mul_(0.5)
    assert not torch.allclose(maml.meta_loss(*data), before)


def test_a_change_of_a_number_is_followed() -> None:
    rule = inner.SGD(momentum=0.9)
    maml = MAML(net(), 0.05, steps=3, loss="mse", update=rule)
    data = [torch.randn(T, S, n, dtype=D) for n in (3, 2, 3, 2)]
    before = maml.meta_loss(*data)
    rule.momentum = 0.1  # type: ignore[assignment]
    after = MAML(maml.module, 0.05, steps=3, loss="mse", update=inner.SGD(momentum=0.1), backend="general")
    same([maml.meta_loss(*data)], [after.meta_loss(*data)])
    assert not torch.allclose(before, maml.meta_loss(*data))


def test_the_explanation_says_that_rules_are_fused() -> None:
    data = [torch.randn(T, S, n) for n in (3, 2, 3, 2)]
    found = MAML(net(torch.float32), 0.05, loss="mse", update=inner.Adam()).explain(*data)
    assert found.path == "fused"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: inner.SGD(momentum=-0.1), ValueError, "momentum: expected a number of at least 0"),
        (lambda: inner.SGD(nesterov=True), ValueError, "nesterov: expected an SGD with momentum"),
        (lambda: inner.Adam((0.9, 1.0)), ValueError, r"betas\[1\]: expected a number of at least 0 and below 1"),
        (lambda: inner.Adam(eps="small"), TypeError, "eps: expected a number or a scalar tensor, got 'small'"),
        (lambda: inner.RMSprop(alpha=torch.ones(2)), TypeError, "alpha: expected a number or a scalar"),
        (lambda: inner.AdamW(clip_norm=-1.0), ValueError, "clip_norm: expected a number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_what_does_not_fit_is_named() -> None:
    maml = MAML(net(), 0.05, steps=2, loss="mse", update=inner.Adam())
    x, y = torch.randn(T, S, 3, dtype=D), torch.randn(T, S, 2, dtype=D)
    with pytest.raises(ValueError, match=r"sx: expected \[T, K, S, ...\] with K = 2 steps"):
        maml.adapt_tasks(x, y, per_step=True)
    with pytest.raises(ValueError, match=r"start: expected names of adapted tensors"):
        maml.adapt_tasks(x, y, start={"nothing": torch.zeros(T, 2)})
    with pytest.raises(ValueError, match=r"start\['2.bias'\]: expected \[T, \*shape\] = \[3, 2\], got \[2\]"):
        maml.adapt_tasks(x, y, start={"2.bias": torch.zeros(2, dtype=D)})
    with pytest.raises(TypeError, match=r"start\['2.bias'\]: expected torch.float64"):
        maml.adapt_tasks(x, y, start={"2.bias": torch.zeros(T, 2)})
    with pytest.raises(TypeError, match="start: expected"):
        maml.adapt_tasks(x, y, start=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_weights: expected None with query_steps"):
        maml.meta_loss(x, y, x, y, step_weights=[1.0, 1.0], query_steps=True)
    anil = mtml.ANIL(nn.Identity(), nn.Linear(3, 2).to(D), 0.1, loss="mse")
    for options in itertools.chain([{"per_step": True}, {"query_steps": True}, {"start": {}}]):
        with pytest.raises(ValueError, match="ANIL has none"):
            anil.meta_loss(x, y, x, y, **options)


@pytest.mark.parametrize("backend", [ENGINE, "torch", "reference", "general"])
@pytest.mark.parametrize("make", [lambda: inner.Adam(), lambda: inner.RMSprop(alpha=0.999)], ids=["adam", "rmsprop"])
def test_moments_in_float32_lose_no_digits(make: Callable[[], inner.Rule], backend: str) -> None:
    """1 - 0.999 taken in float32 is wrong in its sixth digit; torch.optim takes it in double, and then rounds."""
    moments = []
    for dtype in (torch.float32, D):
        torch.manual_seed(0)
        model, x, y = net().to(dtype), torch.randn(T, S, 3).to(dtype), torch.randn(T, S, 2).to(dtype)
        adapted = MAML(model, 0.0, steps=1, loss="mse", update=make(), backend=backend).adapt_tasks(x, y)
        assert adapted.state is not None
        moments.append(adapted.state["exp_avg_sq" if "exp_avg_sq" in adapted.state else "square_avg"]["2.bias"])
    torch.testing.assert_close(moments[0].double(), moments[1], rtol=4e-6, atol=0.0)


# --- gradients a task -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "adam", "masks", "head alone", "lambda", "starts", "first order"])
@pytest.mark.parametrize("backend", [ENGINE, "torch", "reference", "general"])
def test_gradients_of_each_task(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    options: dict[str, Any] = {"steps": 2, "loss": "mse", "backend": "auto" if case == "lambda" else backend}
    call: dict[str, Any] = {}
    if case == "adam":
        options["update"] = inner.Adam(weight_decay=0.1)
    if case == "masks":
        call = {"support_mask": torch.rand(T, S, dtype=D), "step_weights": [0.2, 0.3, 0.5]}
    if case == "head alone":
        options["params"] = "2.*"
    if case == "lambda":
        options["loss"] = lambda o, t: 0.5 * F.mse_loss(o, t)
    if case == "starts":
        call = {"start": {"2.bias": torch.randn(T, 2, dtype=D, requires_grad=True)}}
    options["first_order"] = case == "first order"
    maml = MAML(model, 0.1, **options)
    data = [torch.randn(T, n, k, dtype=D) for n, k in ((S, 3), (S, 2), (Q, 3), (Q, 2))]
    found = maml.task_gradients(*data, **call)
    loss = maml.meta_loss(*data, **call)
    named = dict(model.named_parameters())
    assert list(found) == list(named)
    start = call.get("start", {})
    for t in range(T):
        inputs = [start.get(name, p) for name, p in named.items()]
        expected = torch.autograd.grad(loss[t], inputs, retain_graph=True, materialize_grads=True)
        own = [g[t] if name in start else g for name, g in zip(named, expected, strict=True)]
        same([found[n][t] for n in named], own)
    flat = torch.cat([g.reshape(T, -1) for g in found.values()], 1)
    torch.testing.assert_close(maml.task_gram(*data, **call), flat @ flat.T)
    monkeypatch.setattr("mtml.algorithms.gram.BUDGET", 1)  # one task at a time
    torch.testing.assert_close(maml.task_gram(*data, **call), flat @ flat.T)


def test_query_losses_of_every_step_have_no_one_gradient() -> None:
    data = [torch.randn(T, n, k, dtype=D) for n, k in ((S, 3), (S, 2), (Q, 3), (Q, 2))]
    with pytest.raises(ValueError, match="query_steps: expected False"):
        MAML(net(), 0.1, loss="mse").task_gradients(*data, query_steps=True)
