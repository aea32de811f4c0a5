"""What PyTorch cannot differentiate twice, on the general path: every layer of torch.nn, attention, clear errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.layer_survey import CONTAINERS, FUNCTIONS, LAYERS, Entry
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from test_general import run
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mtml import MAML
from mtml_kernels.general.formulas import formulas


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    return [t for item in value for t in tensors_of(item)] if isinstance(value, tuple | list) else []


def directional(call: Callable[[list[Tensor]], Any], at: list[Tensor], ways: list[list[Tensor]]) -> Tensor:
    """The derivative of a fixed function of the outputs along each way in turn."""
    outputs = tensors_of(call(at))
    if not outputs:
        return torch.zeros((), dtype=torch.float64)
    value = sum((torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o) * o).sum() for o in outputs)
    for way in ways:
        if not value.requires_grad:
            return torch.zeros((), dtype=torch.float64)
        grads = torch.autograd.grad(value, at, create_graph=True, materialize_grads=True)
        value = sum((w * g).sum() for w, g in zip(way, grads, strict=True))
    return value


def check_orders(call: Callable[[list[Tensor]], Any], tensors: list[Tensor]) -> None:
    """Derivatives of order 1 to 3 against finite differences of the order below."""
    ways = [[torch.randn_like(t) for t in tensors] for _ in range(3)]

    def value(order: int, step: float, way: list[Tensor]) -> float:
        at = [(t + step * w).detach().requires_grad_() for t, w in zip(tensors, way, strict=True)]
        return float(directional(call, at, ways[:order]).detach())

    for order, way in enumerate(ways, 1):
        slopes = [(value(order - 1, h, way) - value(order - 1, -h, way)) / (2 * h) for h in (5e-5, 1e-4)]
        want, got = (4 * slopes[0] - slopes[1]) / 3, value(order, 0.0, way)
        assert abs(got - want) <= 1e-5 * max(abs(want), 0.1), f"order {order}: {got} for {want}"


def prepared(entry: Entry) -> tuple[Callable[[list[Tensor]], Any], list[Tensor]]:
    """The call as a function of all its floating-point tensors, parameters included."""
    torch.manual_seed(2)
    built, inputs, fixed = entry.build(), entry.inputs(), entry.fixed()
    built = built.double() if isinstance(built, nn.Module) else built
    params = dict(built.named_parameters()) if isinstance(built, nn.Module) else {}

    def call(tensors: list[Tensor]) -> Any:
        args = (*tensors[: len(inputs)], *fixed)
        with formulas():
            if not isinstance(built, nn.Module):
                return built(*args)
            new = dict(zip(params, tensors[len(inputs) :], strict=True))
            return functional_call(built, new | {n: b.clone() for n, b in built.named_buffers()}, args)

    return call, [*inputs, *(p.detach() for p in params.values())]


@pytest.mark.parametrize("name", [*LAYERS, *FUNCTIONS])
def test_three_orders_of_every_layer(name: str) -> None:
    call, tensors = prepared((LAYERS | FUNCTIONS)[name])
    check_orders(call, tensors)


def test_the_survey_has_every_layer_of_pytorch() -> None:
    known = {name for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)}
    layers = (
        {name for name in known if not name.startswith("Lazy")} - CONTAINERS - {"CTCLoss", "CrossMapLRN2d"}
    )  # which have an error
    assert layers - LAYERS.keys() == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_first_derivatives_are_pytorchs(name: str) -> None:
    entry = FUNCTIONS[name]
    torch.manual_seed(2)
    function, inputs, fixed = entry.build(), entry.inputs(), entry.fixed()
    inputs = tuple(t.requires_grad_() for t in inputs)
    want = function(*inputs, *fixed)
    with formulas():
        got = function(*inputs, *fixed)
    close = {"rtol": 1e-7} if "hardsigmoid" in name else {}  # which PyTorch computes with a sixth in float32
    assert_same(got, want, **close)
    assert_same(gradients(got, list(inputs)), gradients(want, list(inputs)), **close)


class Attending(nn.Module):
    """`attend(module, x)` between two layers, of sequences [N, 3, 4]."""

    def __init__(self, attend: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.attend, self.last, self.call = nn.Linear(2, 4), attend, nn.Linear(4, 2), call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.attend, self.first(x))).mean(1)


SIZES: dict[str, Any] = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0, "batch_first": True}
CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, True], [False, True, True], [False, False, False], [False, True, False]])
ADDED = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, 2)).transpose(1, 2)


def attend(x: Tensor, **options: Any) -> Tensor:
    h = heads(x)
    return F.scaled_dot_product_attention(h, h.cos(), h.sin(), **options).transpose(1, 2).flatten(2)


def multihead(**options: Any) -> Callable[[], nn.Module]:
    build = lambda: nn.MultiheadAttention(4, 2, batch_first=True)  # noqa: E731
    return lambda: Attending(build(), lambda m, x: m(x, x, x, **options)[0])


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "multihead": multihead(need_weights=False),
    "multihead with weights": multihead(),
    "multihead causal": multihead(attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "multihead padded": multihead(key_padding_mask=PADDING, need_weights=False),
    "multihead both masks": multihead(key_padding_mask=PADDING, attn_mask=CAUSAL, need_weights=False),
    "encoder": lambda: Attending(nn.TransformerEncoderLayer(**SIZES), lambda m, x: m(x)),
    "encoder in eval": lambda: Attending(nn.TransformerEncoderLayer(**SIZES).eval(), lambda m, x: m(x)),
    "encoder masked": lambda: Attending(
        nn.TransformerEncoderLayer(**SIZES, norm_first=True),
        lambda m, x: m(x, src_mask=CAUSAL, src_key_padding_mask=PADDING, is_causal=True),
    ),
    "decoder": lambda: Attending(nn.TransformerDecoderLayer(**SIZES), lambda m, x: m(x, x.cos(), tgt_mask=CAUSAL)),
    "function": lambda: Attending(nn.Identity(), lambda m, x: attend(x)),
    "function causal": lambda: Attending(nn.Identity(), lambda m, x: attend(x, is_causal=True, scale=0.3)),
    "function masked": lambda: Attending(nn.Identity(), lambda m, x: attend(x, attn_mask=~CAUSAL)),
    "function added": lambda: Attending(nn.Identity(), lambda m, x: attend(x, attn_mask=ADDED)),
    "function, a query without keys": lambda: Attending(nn.Identity(), lambda m, x: attend(x, attn_mask=CAUSAL)),
}


def sequences() -> tuple[Tensor, ...]:
    shapes = ((4, 3, 2), (4, 2), (4, 3, 2), (4, 2))
    return tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_as_pytorch_ships_it(name: str, mode: str) -> None:
    model, batch = ATTENTION[name]().double(), sequences()
    found = run(model, batch, mode).loss
    with sdpa_kernel(SDPBackend.MATH):
        want = oracle(model, batch, F.mse_loss, 0.1, 2).loss
        expected = gradients(want, list(model.parameters()))
    assert_same(found, want)
    assert_same(gradients(found, list(model.parameters())), expected)


def test_fused_attention_runs_where_first_order_is_enough() -> None:
    model, batch = ATTENTION["multihead"]().double(), sequences()
    loss = MAML(model, 0.1, True, loss="mse", backend="general").meta_loss(*batch)
    expected = oracle(model, batch, F.mse_loss, 0.1, 1, first_order=True).loss
    assert_same(gradients(loss, list(model.parameters())), gradients(expected, list(model.parameters())))
    with Operators() as operators:
        run(model, batch, "loop", first_order=True)
    assert any("flash" in name for name in operators.names)


class Operators(TorchDispatchMode):
    """The names of what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def ctc(output: Tensor, target: Tensor) -> Tensor:
    scores = torch.stack([output, -output], -1).log_softmax(-1)  # [N, 2, 2] -> [time 2, N, classes]
    return F.ctc_loss(scores.transpose(0, 1), torch.ones(len(output), 1).long(), [2] * len(output), [1] * len(output))


class Spelled(nn.Module):
    """CTC as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CTCLoss(reduction="none")

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.stack([x, -x], -1).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(x),), 2), torch.full((len(x),), 1)
        return self.loss(scores, torch.ones(len(x), 1).long(), *lengths).unsqueeze(1).expand(-1, 2)


def with_layer(layer: nn.Module, shape: tuple[int, ...] = (6,)) -> nn.Module:
    inner = nn.Unflatten(1, shape)
    return nn.Sequential(nn.Linear(3, 6), inner, layer, nn.Flatten(), nn.Linear(6, 2)).double()


MISSING: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a function": (lambda: with_layer(Sine()), "mse", r"layer '2' \(Sine\) runs an autograd.Function"),
    "a layer": (lambda: with_layer(nn.CrossMapLRN2d(3), (3, 2, 1)), "mse", r"layer '2' \(CrossMapLRN2d\)"),
    "an operation": (
        lambda: nn.Sequential(nn.Linear(3, 2), Spelled()).double(),
        "mse",
        r"layer '1.loss' \(CTCLoss\) runs 'ctc_loss'",
    ),
    "in the loss": (lambda: mlp(3, 4, 2), ctc, "the loss or the update rule runs 'ctc_loss'"),
}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", MISSING)
def test_what_has_no_second_derivative_says_so(name: str, tasks: int) -> None:
    """In the backward alone: the loss has its value, and first_order=True its gradient."""
    build, loss, words = MISSING[name]
    model, batch = build(), regression(tasks)
    parameters = list(model.parameters())
    maml = MAML(model, 0.1, steps=2, loss=loss, backend="general")
    first = maml.meta_loss(*batch, first_order=True)
    exact = maml.meta_loss(*batch)
    assert_same(exact, first)
    assert all(g.isfinite().all() for g in gradients(first, parameters) if g is not None)
    with pytest.raises(RuntimeError, match=f"first_order: expected True, because {words}.*pass first_order=True"):
        torch.autograd.grad(exact.sum(), parameters, allow_unused=True)
    with torch.no_grad():
        assert_same(maml.meta_loss(*batch), exact.detach())
