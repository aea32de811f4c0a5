"""Normalisations on the general path, wherever they stand, to the third derivative of the meta-loss: against the plain
loop with the norm written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same
from test_general import Batch, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mtml_kernels.general import GeneralPlan, forward_tasks, general_inner_loop
from mtml_kernels.general import choice as _general_choice
from mtml_kernels.general.choice import choose, probe
from mtml_kernels.general.formulas import formulas
from mtml_kernels.general.norms import NATIVE_NORMS
from mtml_kernels.general.task import TaskRule
from mtml_kernels.losses import resolve
from mtml_kernels.losses.task import TaskLoss

Norm = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # x [N, 4, 2], weight, bias


def written_out(dims: tuple[int, ...], shape: tuple[int, ...], groups: int = 0, centred: bool = True) -> Norm:
    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.unflatten(1, (groups, -1)) if groups else x
        y = y - y.mean(dims, keepdim=True) if centred else y
        y = (y / ((y * y).mean(dims, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        y = y if weight is None else y * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    return norm


LAYER, BATCH = written_out((2,), (1, 1, 2)), written_out((0, 2), (1, 4, 1))
INSTANCE, GROUP = written_out((2,), (1, 4, 1)), written_out((2, 3), (1, 4, 1), groups=2)
RMS = written_out((2,), (1, 1, 2), centred=False)
aten = torch.ops.aten
# what is called, the same written out, how many elements its weight has
NORMS: dict[str, tuple[Norm, Norm, int]] = {
    "F.layer_norm": (lambda x, w, b: F.layer_norm(x, (2,), w, b), LAYER, 2),
    "torch.layer_norm": (lambda x, w, b: torch.layer_norm(x, (2,), w, b), LAYER, 2),
    "native_layer_norm": (lambda x, w, b: torch.native_layer_norm(x, (2,), w, b, 1e-5)[0], LAYER, 2),
    "ops.layer_norm": (lambda x, w, b: aten.layer_norm.default(x, (2,), w, b, 1e-5), LAYER, 2),
    "ops.native_layer_norm": (lambda x, w, b: aten.native_layer_norm(x, (2,), w, b, 1e-5)[0], LAYER, 2),
    "F.batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), BATCH, 4),
    "torch.batch_norm": (lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False), BATCH, 4),
    "native_batch_norm": (lambda x, w, b: torch.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)[0], BATCH, 4),
    "legit": (lambda x, w, b: torch._native_batch_norm_legit(x, w, b, True, 0.1, 1e-5)[0], BATCH, 4),
    "F.instance_norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), INSTANCE, 4),
    "F.group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), GROUP, 4),
    "F.rms_norm": (lambda x, w, b: F.rms_norm(x, (2,), w, 1e-5) + b, RMS, 2),
}


def hidden(norm: Norm) -> Norm:
    """The norm inside an autograd.Function, in its forward and in its backward."""

    class Hidden(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return norm(x, w, b)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return torch.func.vjp(norm, *ctx.saved_tensors)[1](grad)

    apply: Norm = Hidden.apply
    return apply


class Normed(nn.Module):
    """Gives what `inside` makes of its features [N, 4, 2], and the weight and bias of a norm for the loss to use."""

    def __init__(self, size: int, inside: Norm | None) -> None:
        super().__init__()
        self.first, self.last, self.inside = nn.Linear(3, 8), nn.Linear(8, 8), inside
        self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).unflatten(1, (4, 2))
        x = x if self.inside is None else self.inside(x, self.weight, self.bias)
        return self.last(torch.tanh(x).flatten(1)), self.weight, self.bias


def plain_loss(output: Any, target: Tensor) -> Tensor:
    return (output[0] - target).square().mean() + 0.1 * (output[1].square().sum() + output[2].sum())


def placed(place: str, norm: Norm, size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model, a loss and an update rule, one of which calls the norm."""
    if place in ("model", "function"):
        return Normed(size, hidden(norm) if place == "function" else norm).double(), {"loss": plain_loss}

    def loss(output: Any, target: Tensor) -> Tensor:
        return (norm(output[0].unflatten(1, (4, 2)), *output[1:]).flatten(1) - target).square().mean()

    def update(params: Any, grads: Any, lr: Any, step: int) -> Any:
        even = norm(grads["first.weight"].reshape(3, 4, 2), params["weight"], params["bias"]).reshape(8, 3)
        return {n: p - lr[n] * (even if n == "first.weight" else grads[n]) for n, p in params.items()}

    options: dict[str, Any] = {"loss": loss} if place == "loss" else {"loss": plain_loss, "update": update}
    return Normed(size, None).double(), options


def batch_of(tasks: int = 2) -> Batch:
    return tuple(torch.randn(tasks, 3, n, dtype=torch.float64) for n in (3, 8, 3, 8))


def plain_loop(model: nn.Module, batch: Batch, loss: Any, update: Any = None) -> Tensor:
    """One step at 0.1 for each task, in nothing but autograd."""
    rows, names = [], [n for n, _ in model.named_parameters()]
    for sx, sy, qx, qy in zip(*batch, strict=True):
        theta = dict(model.named_parameters())
        value = loss(torch.func.functional_call(model, theta, (sx,)), sy)
        found = torch.autograd.grad(value, list(theta.values()), create_graph=True, materialize_grads=True)
        grads = dict(zip(names, found, strict=True))
        rule = update or (lambda p, g, lr, k: {n: p[n] - lr[n] * g[n] for n in p})
        theta = rule(theta, grads, dict.fromkeys(names, 0.1), 0)
        rows.append(loss(torch.func.functional_call(model, theta, (qx,)), qy))
    return torch.stack(rows)


def derivatives(loss: Tensor, tensors: list[Tensor], orders: int) -> list[tuple[Tensor, ...]]:
    """The gradient, the gradient of a function of it, and so on."""
    found, value = [], (loss * torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype)).sum()
    for _ in range(orders):
        grads = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
        found.append(grads)
        value = sum((g.sin() * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in grads)
    return found


def same_derivatives(found: Tensor, model: nn.Module, want: Tensor, twin: nn.Module, orders: int = 3) -> None:
    assert_same(found, want)
    pairs = (derivatives(loss, list(of.parameters()), orders) for loss, of in ((found, model), (want, twin)))
    for got, expected in zip(*pairs, strict=True):
        scale = max(float(e.detach().abs().max()) for e in expected)
        assert scale > 1e-6
        assert_same(got, expected, rtol=1e-8, atol=1e-10 * scale)


def seeded(place: str, norm: Norm, size: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(3)
    return placed(place, norm, size)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("place", ["model", "loss", "update"])
@pytest.mark.parametrize("name", NORMS)
def test_every_order_in_every_place(name: str, place: str, mode: str) -> None:
    native, formula, size = NORMS[name]
    model, options = seeded(place, native, size)
    twin, written = seeded(place, formula, size)
    batch = batch_of()
    found = run(model, batch, mode, steps=1, **options).loss
    orders = 3 if name.startswith("F.") else 2  # of the meta-loss: one more of the norm
    same_derivatives(found, model, plain_loop(twin, batch, **written), twin, orders)


@pytest.mark.parametrize("name", NORMS)
def test_in_the_backward_of_a_function_the_loop_runs_and_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's backward runs it out of reach: what PyTorch has wrong there is refused."""
    monkeypatch.setattr(_general_choice, "_measure", lambda rule, norm, args: GeneralPlan("vmap", "", norm))
    native, formula, size = NORMS[name]
    model, options = seeded("function", native, size)
    twin, written = seeded("model", formula, size)
    batch, loss = batch_of(), TaskLoss(resolve(options["loss"]))
    tensors = dict(model.named_parameters())
    rule = TaskRule(model, tuple(tensors), loss, loss, 1)
    args = (tensors, [torch.full((1,), 0.1, dtype=torch.float64)])
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    plan = choose(rule, *args, data)
    found, want = general_inner_loop(rule, plan, *args, data).loss, plain_loop(twin, batch, **written)
    if name in ("F.group_norm", "F.rms_norm"):  # right in PyTorch
        return same_derivatives(found, model, want, twin)
    assert plan.mode == "loop"
    same_derivatives(found, model, want, twin, orders=1)
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        derivatives(found, list(model.parameters()), 2)


class Layered(nn.Module):
    def __init__(self, norm: nn.Module | Norm) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), norm, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(1, (4, 2))
        x = self.norm(x) if isinstance(self.norm, nn.Module) else self.norm(x, None, None)
        return self.last(torch.tanh(x).flatten(1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Norm]] = {
    "layer norm": (lambda: nn.LayerNorm(2, elementwise_affine=False), LAYER),
    "layer norm of two": (lambda: nn.LayerNorm([4, 2], elementwise_affine=False), written_out((1, 2), ())),
    "batch norm": (lambda: nn.BatchNorm1d(4, affine=False), BATCH),
    "untracked": (lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False).eval(), BATCH),
    "instance norm": (lambda: nn.InstanceNorm1d(4), INSTANCE),
    "tracked instance norm": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), INSTANCE),
    "group norm": (lambda: nn.GroupNorm(2, 4, affine=False), GROUP),
    "rms norm": (lambda: nn.RMSNorm(2, eps=1e-5, elementwise_affine=False), RMS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_order_in_layers(name: str) -> None:
    build, formula = LAYERS[name]
    torch.manual_seed(3)
    model = Layered(build()).double()
    torch.manual_seed(3)
    twin, batch = Layered(formula).double(), batch_of()
    stateful = tuple(n for n, _ in model.named_buffers()) if name == "tracked instance norm" else ()
    found = run(model, batch, "loop", steps=1, stateful=stateful).loss
    same_derivatives(found, model, plain_loop(twin, batch, F.mse_loss), twin)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_tracked_as_ever(momentum: float | None) -> None:
    norms: list[Callable[[], nn.Module]] = [
        lambda: nn.BatchNorm1d(4, momentum=momentum),
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ]
    for build in norms:
        model, twin, batch = Layered(build()).double(), Layered(build()).double(), batch_of()
        twin.load_state_dict(model.state_dict())
        run(model, batch, "loop", batch_norm="track", names=["last.weight"], steps=1)
        for t in range(2):
            twin(batch[0][t])
            twin(batch[2][t])
        for (name, got), want in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(got, want), name


class Kernels(TorchDispatchMode):
    """Counts the norms that run as PyTorch's own kernels."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in NATIVE_NORMS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_kernels_run_where_first_order_is_enough(mode: str) -> None:
    model, batch = Layered(nn.LayerNorm(2)).double(), batch_of()

    def count(**options: Any) -> int:
        with Kernels() as kernels:
            run(model, batch, mode, steps=1, **options)
        return kernels.count

    assert count() == 0 and count(first_order=True) > 0
    with torch.no_grad():
        assert count() > 0


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_every_order_in_adapted_models(mode: str) -> None:
    torch.manual_seed(3)
    model, x = Layered(nn.LayerNorm(2, elementwise_affine=False)).double(), batch_of()[0]
    torch.manual_seed(3)
    twin = Layered(LAYER).double()

    def params(of: nn.Module) -> dict[str, Tensor]:
        return {n: torch.stack([p, 2 * p]) for n, p in of.named_parameters()}

    found = forward_tasks(model, params(model), x, GeneralPlan(mode, "")).square().mean((1, 2))
    rows = [torch.func.functional_call(twin, {n: p[t] for n, p in params(twin).items()}, (x[t],)) for t in range(2)]
    same_derivatives(found, model, torch.stack(rows).square().mean((1, 2)), twin)


class Repeating(Layered):
    """Checkpoints a function that calls the norm itself."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_activation_checkpointing_repeats_the_formulas() -> None:
    """Of a forward that it repeats after the call, in the caller's own backward."""
    torch.manual_seed(3)
    model = Repeating(lambda x, *_: F.layer_norm(x, (2,))).double()
    torch.manual_seed(3)
    twin, batch = Layered(LAYER).double(), batch_of()
    assert probe(model, batch[0], "module").recomputes
    names, loss = tuple(n for n, _ in model.named_parameters()), TaskLoss(resolve("mse"))
    rule, plan = TaskRule(model, names, loss, loss, 1), GeneralPlan("loop", "", recomputes=True)
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    rates = [torch.full((1,), 0.1, dtype=torch.float64)]
    found = general_inner_loop(rule, plan, dict(model.named_parameters()), rates, data).loss
    same_derivatives(found, model, plain_loop(twin, batch, F.mse_loss), twin, orders=1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["F.layer_norm", "F.batch_norm", "F.instance_norm"])
def test_half_precision_as_in_the_kernels(name: str, autocast: bool) -> None:
    native, _, size = NORMS[name]
    x, w, b = torch.randn(3, 4, 2).bfloat16(), torch.rand(size).bfloat16(), torch.rand(size).bfloat16()
    with torch.autocast("cpu", enabled=autocast):
        want = native(x, w, b)
        with formulas():
            got = native(x, w, b)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_tensor_subclasses_and_wrong_shapes_are_left_to_pytorch() -> None:
    with formulas(), pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(torch.ones(1, 4), None, None, training=True)
    with formulas(), pytest.raises(RuntimeError, match=r"expected an input \[\*, 3\], got \[2, 4\]"):
        F.layer_norm(torch.ones(2, 4), (3,))
