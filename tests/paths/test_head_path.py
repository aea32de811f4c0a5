"""MAML of a model whose last linear layer alone is adapted: the trunk runs once, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases.maml_oracle import assert_same
from torch import Tensor, nn

from mtml import ANIL, MAML, InnerLR
from mtml.paths import finder as _plan
from mtml.paths import trunk as _trunk_path
from mtml.paths.trunk import TrunkOnce
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import split as _program_split
from mtml_kernels.program import trace
from mtml_kernels.program.split import Parts, once_is_dearer, split_head

FORCED = "forced by the test"
SUPPORT, QUERY, CLASSES = 5, 4, 3
SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.1)
every_backend = pytest.mark.parametrize("backend", BACKENDS.available())


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Says whether a trunk that can run once does: these models are too small for it to pay."""

    def choose(flag: bool) -> None:
        monkeypatch.setattr(_plan, "once_is_dearer", lambda *_: "" if flag else FORCED)

    choose(True)
    yield choose


# --- models -----------------------------------------------------------------------------------------------------------


class Custom(nn.Module):
    """A residual trunk, the head as a function, and a view after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(CLASSES, 8)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h + torch.sin(self.b(h))
        return nn.functional.linear(h, self.weight, self.bias).view(len(x), CLASSES)


class Pair(nn.Module):
    """Two inputs, of which the second modulates the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(2, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x)) * self.b(z))  # type: ignore[no-any-return]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 40), nn.Sigmoid(), nn.Linear(40, CLASSES))


def images(norm: type[nn.Module] = nn.Identity, drop: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, (2, 3), padding=1),
        norm(4) if norm is not nn.Identity else nn.Identity(),
        nn.SiLU(),
        nn.AvgPool2d(2, 1),
        nn.Dropout(drop),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def evaluating() -> nn.Module:
    model = images(nn.BatchNorm2d)
    with torch.no_grad():
        model[2].running_mean.uniform_(-1, 1)
        model[2].running_var.uniform_(0.5, 2)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (perceptron, "4."),
    "images": (images, "7."),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)), "3."),
    "evaluating": (evaluating, "7."),
    "batch_norm": (lambda: images(nn.BatchNorm2d), "7."),
    "custom": (Custom, ""),
}


def build(name: str) -> tuple[nn.Module, list[str]]:
    """A model in float64 and the names of its last layer's weight and bias."""
    make, prefix = MODELS[name]
    return make().double(), [f"{prefix}weight", f"{prefix}bias"]


def batch(loss: str = "cross_entropy", tasks: int = 3) -> tuple[Tensor, ...]:
    def labels(n: int) -> Tensor:
        return torch.randint(CLASSES, (tasks, n)) if loss == "cross_entropy" else torch.rand(tasks, n, CLASSES).double()

    sx, qx = (torch.randn(tasks, n, 6, dtype=torch.float64, requires_grad=True) for n in (SUPPORT, QUERY))
    return sx, labels(SUPPORT), qx, labels(QUERY)


# --- the same as in every step ----------------------------------------------------------------------------------------


def path_of(maml: MAML) -> Any:
    """The path that the last call took."""
    return list(maml._paths.finder().calls.values())[-1]


def outcome(maml: MAML, data: tuple[Any, ...], leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Values of a meta-step and of adapting, and all gradients of an uneven combination of them."""
    output = maml.meta_forward(*data, **options)
    options.pop("step_weights", None), options.pop("query_mask", None)
    adapted = maml.adapt_tasks(*data[:2], keep_steps=True, **options)
    ends = maml.adapt_tasks(*data[:2], **options)
    values = [*output, *(adapted.params_at(1)[name] for name in sorted(adapted.params)), *ends.params.values()]
    total = sum((v.sin() * torch.linspace(0.5, 1.5, v.numel()).reshape(v.shape)).sum() for v in values)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return (*values, *found)


def check(
    once: Callable[[bool], None], model: nn.Module, data: Any, rate: Any = 0.3, general: bool = False, **options: Any
) -> None:
    """Once, and in every step of the engine (or of the general path): values and gradients agree to 1e-9."""
    call = {k: options.pop(k) for k in ("support_mask", "query_mask", "step_weights", "first_order") if k in options}
    inputs = [t for t in torch.utils._pytree.tree_leaves((data[0], data[2])) if t.requires_grad]
    rates = list(rate.parameters()) if isinstance(rate, nn.Module) else [rate] if isinstance(rate, Tensor) else []
    leaves = [p for p in model.parameters() if p.requires_grad] + inputs + rates
    found = []
    backend = options.pop("backend", "auto")
    for flag, name in ((True, backend), (False, "general" if general else backend)):
        once(flag)
        maml = MAML(model, rate, **({"steps": 3, "backend": name} | options))
        found.append(outcome(maml, data, leaves, **call))
        assert isinstance(path_of(maml), TrunkOnce) == flag
    assert_same(*found)


@every_backend
@pytest.mark.parametrize("name", MODELS)
def test_equal_for_every_model(once: Callable[[bool], None], name: str, backend: str) -> None:
    model, params = build(name)
    check(once, model, batch(), params=params, backend=backend)


@pytest.mark.parametrize("name", ["mlp", "evaluating", "batch_norm"])
def test_equal_to_the_general_path(once: Callable[[bool], None], name: str) -> None:
    model, params = build(name)
    check(once, model, batch(), params=params, general=True, first_order=False)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "huber", "l1", SMOOTH], ids=str)
def test_equal_for_every_loss(once: Callable[[bool], None], loss: Any) -> None:
    model, params = build("mlp")
    check(once, model, batch("cross_entropy" if isinstance(loss, nn.Module) else loss), params=params, loss=loss)


@pytest.mark.parametrize("which", [0, 1], ids=["weight", "bias"])
def test_one_tensor_of_the_layer_alone(once: Callable[[bool], None], which: int) -> None:
    model, params = build("mlp")
    check(once, model, batch(), params=[params[which]])


OPTIONS: dict[str, dict[str, Any]] = {
    "masks": {"support_mask": True, "query_mask": True},
    "step_weights": {"step_weights": [0.5, 0.3, 1.0]},
    "first_order": {"first_order": True},
    "first_order_multi_step": {"first_order": True, "step_weights": [0.1, 0.5, 0.3, 1.0]},
}


@every_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_equal_for_every_option(once: Callable[[bool], None], name: str, backend: str) -> None:
    options = dict(OPTIONS[name])
    for mask, n in (("support_mask", SUPPORT), ("query_mask", QUERY)):
        if mask in options:
            options[mask] = torch.rand(3, n).double() * (torch.arange(n) > 0)
    model, params = build("images")
    check(once, model, batch(), params=params, backend=backend, **options)


@pytest.mark.parametrize("form", ["scalar", "per_step", "names", "inner_lr", "inner_lr_element"])
def test_equal_for_every_rate(once: Callable[[bool], None], form: str) -> None:
    model, params = build("mlp")
    rates: dict[str, Any] = {
        "scalar": torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
        "per_step": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True),
        "names": {params[0]: 0.2, params[1]: 0.4},
        "inner_lr": InnerLR(model, 0.2, per="tensor", steps=3, params=params),
        "inner_lr_element": InnerLR(model, 0.2, per="element", params=params),
    }
    check(once, model, batch(), rates[form], params=params)


@pytest.mark.parametrize("form", [tuple, dict])
def test_several_inputs(once: Callable[[bool], None], form: Any) -> None:
    sx, sy, qx, qy = batch()
    second = [torch.randn(3, n, 2, dtype=torch.float64, requires_grad=True) for n in (SUPPORT, QUERY)]
    pairs = [(x, z) if form is tuple else {"z": z, "x": x} for x, z in zip((sx, qx), second, strict=True)]
    check(once, Pair().double(), (pairs[0], sy, pairs[1], qy), params="head.*")


class Shaped(nn.Module):
    """The head on every row of a sample, and a view of its classes as another shape."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.first, self.head = rows, nn.Linear(6 // rows, 8), nn.Linear(8, CLASSES * 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(torch.tanh(self.first(x.view(len(x), self.rows, -1))))
        return h.view(len(x), self.rows, 2, CLASSES)  # type: ignore[no-any-return]


@every_backend
@pytest.mark.parametrize("rows", [1, 2])
def test_a_view_after_the_head(once: Callable[[bool], None], rows: int, backend: str) -> None:
    sx, _, qx, _ = batch()
    sy, qy = (torch.randn(3, n, rows, 2, CLASSES, dtype=torch.float64) for n in (SUPPORT, QUERY))
    check(once, Shaped(rows).double(), (sx, sy, qx, qy), params="head.*", loss="mse", backend=backend)


def test_a_frozen_trunk(once: Callable[[bool], None]) -> None:
    model, params = build("mlp")
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    check(once, model, batch(), params=None)
    assert list(MAML(model, 0.1).adapt_tasks(*batch()[:2]).params) == params


def test_running_statistics(once: Callable[[bool], None]) -> None:
    model = evaluating().double().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check(once, model, batch(), params="7.*", batch_norm="running")
    check(once, model, batch(), params="7.*", batch_norm="batch")
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_buffer_for_a_head(once: Callable[[bool], None]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(6, 8)
            self.register_buffer("head", torch.randn(CLASSES, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.tanh(self.trunk(x)), self.head)  # type: ignore[arg-type]

    check(once, Net().double(), batch(), params="head")


def test_without_grad_and_without_steps(once: Callable[[bool], None]) -> None:
    model, params = build("images")
    maml, data = MAML(model, 0.3, steps=3, params=params), batch()
    expected = maml.meta_forward(*data)
    with torch.no_grad():
        found = maml.meta_forward(*data)
        plain = maml.meta_forward(*data, steps=0).output
    assert not found.loss.requires_grad and isinstance(path_of(maml), TrunkOnce)
    assert_same(tuple(found), tuple(expected))
    assert_same(plain, model(data[2].flatten(0, 1)).unflatten(0, (3, QUERY)))


def test_adapted_models_are_those_of_meta_forward(once: Callable[[bool], None]) -> None:
    model, params = build("images")
    maml, data = MAML(model, 0.3, steps=3, params=params), batch()
    expected, adapted = maml.meta_forward(*data), maml.adapt_tasks(*data[:2])
    assert_same(adapted(data[2]), expected.output)
    assert_same(adapted.loss(*data[2:]), expected.loss)
    assert_same(adapted.task(1)(data[2][1]), expected.output[1])


def test_train_and_eval_are_two_states(once: Callable[[bool], None]) -> None:
    """A prepared path is not taken for the other mode."""
    model, data = evaluating().double(), batch()
    maml = MAML(model, 0.3, steps=2, params="7.*")
    losses = [maml.meta_loss(*data)]
    for training in (True, False):
        model.train(training)
        losses.append(maml.meta_loss(*data))
        assert path_of(maml).joint is not training
    assert torch.equal(losses[0], losses[2]) and not torch.allclose(losses[0], losses[1])


# --- what it promises -------------------------------------------------------------------------------------------------


def test_the_trunk_runs_once(once: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = [], _trunk_path.inner_loop_call

    def noted(spec: Any, *rest: Any) -> Any:
        seen.append((spec.steps, tuple(rest[3][0].shape)))
        return run(spec, *rest)

    monkeypatch.setattr(_trunk_path, "inner_loop_call", noted)
    model, params = build("mlp")
    MAML(model, 0.1, steps=7, params=params).meta_loss(*batch())
    assert seen == [(0, (3, SUPPORT + QUERY, 6))]


@every_backend
def test_a_task_depends_on_no_other(once: Callable[[bool], None], backend: str) -> None:
    model, params = build("images")
    maml, data = MAML(model.float(), 0.3, steps=3, params=params, backend=backend), batch()
    sx, sy, qx, qy = (t.detach().float() if t.is_floating_point() else t for t in data)
    alone = maml.meta_forward(sx[1:2], sy[1:2], qx[1:2], qy[1:2])
    sx[0] = float("nan")
    together = maml.meta_forward(sx, sy, qx, qy)
    assert together.loss[0].isnan() and together.loss[1:].isfinite().all()
    for both, one in zip(together, alone, strict=True):
        at = both[:, 1:2] if both.shape[0] != 3 or both.shape == (3, 3) else both[1:2]
        if backend in ("torch", "reference"):  # PyTorch's products may add up otherwise with another number of tasks
            torch.testing.assert_close(at, one, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(at, one)


def test_differentiable_once(once: Callable[[bool], None]) -> None:
    model, params = build("mlp")
    loss = MAML(model, 0.1, params=params).meta_loss(*batch()).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        sum(g.square().sum() for g in grads).backward()  # type: ignore[union-attr]


def test_second_order_is_not_first_order(once: Callable[[bool], None]) -> None:
    model, params = build("mlp")
    data, found = batch(), []
    for first_order in (False, True):
        loss = MAML(model, 0.5, first_order, steps=3, params=params).meta_loss(*data).sum()
        found.append(torch.autograd.grad(loss, [model[0].weight, data[0]], allow_unused=True, materialize_grads=True))
    assert found[0][1].any() and not found[1][1].any()  # only second order reaches the support features
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-3)


# --- where it is not taken --------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.head(self.first(x))))  # type: ignore[no-any-return]


class After(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(self.first(x)))


def conv_head() -> nn.Sequential:
    layers = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Conv2d(4, CLASSES, (1, 2)), nn.Flatten()]
    return nn.Sequential(*layers)


EXCLUDED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "per_step": (
        lambda: images(nn.BatchNorm2d),
        {"params": "7.*", "batch_norm": "per_step"},
        r"2 \(PerStepBatchNorm\) .*reads a row of its own in every step",
    ),
    "twice": (Twice, {"params": "head.*"}, "the adapted layer is used more than once: head.*, head"),
    "two_layers": (perceptron, {"params": ["2.*", "4.*"]}, r"several layers are adapted: 2 \(Linear\).*, 4 \(Linear\)"),
    "not_the_last": (perceptron, {"params": "2.*"}, r"4 \(Linear\) \(linear\) comes after the adapted layer"),
    "something_after": (After, {"params": "head.*"}, r"\(tanh\) comes after the adapted layer"),
    "no_linear_layer": (conv_head, {"params": "2.*"}, r"2 \(Conv2d\) .*is no linear layer"),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_excluded(once: Callable[[bool], None], name: str) -> None:
    """It runs as it does today, explain() says why, and what came out is right."""
    make, options, why = EXCLUDED[name]
    model, data = make().double(), batch()
    maml = MAML(model, 0.3, steps=2, **options)
    explanation = maml.explain(*data)
    assert explanation.path == "fused" and not isinstance(path_of(maml), TrunkOnce)
    assert explanation.trunk.startswith("it runs in every step: ")
    assert re.search(why, explanation.trunk), explanation.trunk
    assert f"trunk: {explanation.trunk}" in str(explanation)
    found = [m.meta_loss(*data) for m in (maml, MAML(maml.module, 0.3, steps=2, backend="general", **options))]
    assert_same(*found)


def test_batch_statistics_of_both_sets_would_be_wrong(
    once: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: in one pass the two sets share their statistics, and the losses are others."""
    model, data = images(nn.BatchNorm2d).double(), batch()
    maml = MAML(model, 0.3, steps=2, params="7.*")
    right = maml.meta_loss(*data)
    assert not path_of(maml).joint
    monkeypatch.setattr(_program_split, "mixes_samples", lambda nodes: False)
    maml = MAML(model, 0.3, steps=2, params="7.*")
    wrong = maml.meta_loss(*data)
    assert path_of(maml).joint and not torch.allclose(right, wrong, rtol=1e-3)


def test_dropout_takes_the_general_path(once: Callable[[bool], None]) -> None:
    maml, data = MAML(images(drop=0.5).double(), 0.3, steps=2, params="7.*"), batch()
    explanation = maml.explain(*data)
    assert explanation.path == "general" and any("ropout" in reason for reason in explanation.reasons)
    assert "mtml.ANIL runs any trunk once" in explanation.trunk
    maml.module.eval()
    assert maml.explain(*data).trunk == TrunkOnce.trunk


@pytest.mark.parametrize("backend", ["auto", "general"])
@pytest.mark.parametrize("mode", ["module", "per_step"])
def test_nothing_is_said_where_the_first_layer_is_adapted(
    once: Callable[[bool], None], mode: str, backend: str
) -> None:
    model = images(nn.BatchNorm2d).double().eval()  # whose running statistics, or rows for steps, are not adapted
    explanation = MAML(model, 0.3, batch_norm=mode, backend=backend).explain(*batch())
    assert explanation.trunk == "" and "trunk" not in str(explanation)


# --- the choice -------------------------------------------------------------------------------------------------------


def parts(*widths: int) -> Parts:
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())][:-1]
    program = trace(nn.Sequential(*layers), [(widths[0],)])
    found = split_head(program, [p.name.startswith(f"{len(layers) - 1}.") for p in program.params])
    assert isinstance(found, Parts)
    return found


def test_the_parts_are_the_whole() -> None:
    found = parts(784, 256, 64, 5)
    assert [p.name for p in found.trunk.params] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [p.name for p in found.head.params] == ["4.weight", "4.bias"]
    assert found.trunk.output_shape == found.head.inputs[0].shape == (1, 64) and found.head.output_shape == (5,)


def test_the_cost_model_decides() -> None:
    """Shapes whose ratio was measured far from one; a function of one task's shape alone."""
    wide, narrow = parts(784, 256, 64, 5).trunk, parts(4, 16, 5).trunk
    assert not once_is_dearer(wide, 5, 15, 5, False) and not once_is_dearer(wide, 25, 75, 10, False)
    assert once_is_dearer(wide, 5, 15, 1, False) and once_is_dearer(wide, 25, 75, 1, False)
    assert once_is_dearer(wide, 5, 15, 3, True)  # first order never goes back through the trunk
    assert once_is_dearer(narrow, 5, 15, 10, False)  # a second call costs more than such a trunk
    assert once_is_dearer(wide, 5, 15, 0, False)


def test_the_choice_is_made_and_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 3)).double()
    sx, sy = torch.randn(2, 5, 100, dtype=torch.float64), torch.randint(3, (2, 5))
    maml = MAML(model, 0.1, steps=30, params="2.*")
    assert maml.explain(sx, sy, sx, sy).trunk == TrunkOnce.trunk
    maml.steps = 1
    trunk = maml.explain(sx, sy, sx, sy).trunk
    assert trunk == "it runs in every step: that is cheaper at 5 support and 5 query samples, 1 step"


def test_flattened_inputs_need_no_trunk() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(200, 3)).double()
    sx = torch.randn(2, 5, 10, 20, dtype=torch.float64, requires_grad=True)
    sy, found = torch.randint(3, (2, 5)), []
    for backend in ("auto", "general"):
        maml = MAML(model, 0.01, steps=4, backend=backend)
        output, adapted = maml.meta_forward(sx, sy, sx, sy), maml.adapt_tasks(sx, sy).params
        found.append((*output, *adapted.values(), *torch.autograd.grad(output.loss.sum(), [sx, *model.parameters()])))
    assert_same(*found)
    explanation = MAML(model, 0.01, steps=4).explain(sx, sy, sx, sy)
    assert "in the Gram matrix" in explanation.reason and explanation.trunk == ""


def test_anil_says_the_same() -> None:
    model, data = perceptron().double(), batch()
    assert ANIL(model[:4], model[4], 0.3).explain(*data).trunk == TrunkOnce.trunk
