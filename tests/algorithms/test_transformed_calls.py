"""torch.func's grad, vmap and jvp over what mtml offers: right, or one error that names the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import mtml
from mtml import ANIL, MAML
from mtml_kernels import task_linear, task_update
from mtml_kernels.functional import head_inner_loop, inner_loop
from mtml_kernels.program import trace

pytestmark = pytest.mark.filterwarnings("ignore::mtml_kernels.errors.FallbackWarning")
Function = Callable[[Tensor], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Fixed:
    """Everything but the support inputs x [T, S, D] that functions are transformed by."""

    def __init__(self) -> None:
        self.x, self.sy, self.qx, self.qy = draw(3, 4, 3), draw(3, 4, 2), draw(3, 5, 3), draw(3, 5, 2)
        self.maml = MAML(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), 0.3, steps=2, loss="mse")
        trunk, self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), nn.Linear(3, 2).double()
        self.anil = ANIL(trunk, nn.Linear(4, 2).double(), 0.1, steps=2, loss="mse")
        self.adapted = self.maml.adapt_tasks(self.x, self.sy).detach()
        self.heads = mtml.MultiHead(3, {"a": mtml.Regression(2), "b": mtml.Regression(2)}).double()
        self.targets = {"a": self.sy.flatten(0, 1), "b": self.sy.flatten(0, 1) ** 2}

    def losses(self, x: Tensor, **options: Any) -> mtml.HeadLosses:
        return self.heads.loss(x.flatten(0, 1), self.targets, **options)

    def loop(self, x: Tensor) -> Tensor:
        """learn2learn's, for the first task."""
        learner = self.maml.clone()
        learner.adapt((learner(x[0]) - self.sy[0]).square().mean())
        return (learner(self.qx[0]) - self.qy[0]).square().mean()


RIGHT: dict[str, Callable[[Fixed, Tensor], Tensor]] = {
    "meta_loss": lambda f, x: f.maml.meta_loss(x, f.sy, f.qx, f.qy).sum(),
    "meta_forward": lambda f, x: f.maml.meta_forward(x, f.sy, f.qx, f.qy).output.square().sum(),
    "adapt_tasks": lambda f, x: f.maml.adapt_tasks(x, f.sy).params["0.weight"].square().sum(),
    "Adapted": lambda f, x: f.adapted(x).square().sum(),
    "Adapted.loss": lambda f, x: f.adapted.loss(x, f.sy).sum(),
    "MultiHead": lambda f, x: f.losses(x).total,
    "task_linear": lambda f, x: task_linear(x, f.net.weight, f.net.bias).square().sum(),
    "task_update": lambda f, x: task_update([x], [x * x], 0.1)[0].square().sum(),
}
REFUSED: dict[str, Callable[[Fixed, Tensor], Any]] = {
    "ANIL": lambda f, x: f.anil.meta_loss(x, f.sy, f.qx, f.qy).sum(),
    "ANIL.adapt_tasks": lambda f, x: f.anil.adapt_tasks(x, f.sy).params["head.weight"].sum(),
    "task_gradients": lambda f, x: f.maml.task_gradients(x, f.sy, f.qx, f.qy)["0.weight"].sum(),
    "task_gram": lambda f, x: f.maml.task_gram(x, f.sy, f.qx, f.qy).sum(),
    "adapt": lambda f, x: f.loop(x),
    "task_affinity": lambda f, x: mtml.task_affinity(f.losses(x, separate=True)).sum(),
    "balance": lambda f, x: mtml.balance.backward(f.losses(x, separate=True), method="pcgrad"),
    "inner_loop": lambda f, x: (
        inner_loop(
            trace(f.net, [(3,)]), dict(f.net.named_parameters()), x, f.sy, 0.1, steps=2, loss="mse", query_x=f.qx,
            query_y=f.qy,
        ).loss.sum()
    ),
    "head_inner_loop": lambda f, x: (
        head_inner_loop(
            x, f.sy, f.qx, f.net.weight, f.net.bias, 0.1, steps=9, loss="mse", query_labels=f.qy
        ).loss.sum()
    ),
}  # fmt: skip


def plain_gradient(function: Function, x: Tensor) -> Tensor:
    """By the engine, where the function has one."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    fixed = Fixed()
    function: Function = lambda x: RIGHT[name](fixed, x)  # noqa: E731
    x, v = fixed.x, draw(3, 4, 3)
    expected = plain_gradient(function, x)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(grad(function)(x), expected)
    torch.testing.assert_close(jacrev(function)(x), expected)
    value, tangent = jvp(function, (x,), (v,))
    torch.testing.assert_close((value, tangent), (function(x), (expected * v).sum()))
    both = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(function)(both), torch.stack([function(x), function(2 * x)]))
    torch.testing.assert_close(vmap(grad(function))(both)[1], plain_gradient(function, 2 * x))


TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda function, x: grad(function)(x),
    "vmap": lambda function, x: vmap(function)(torch.stack([x, 2 * x])),
    "jvp": lambda function, x: jvp(function, (x,), (torch.ones_like(x),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, transform: str) -> None:
    fixed = Fixed()
    with pytest.raises(RuntimeError, match=r"transform.*Way out: "):
        TRANSFORMS[transform](lambda x: REFUSED[name](fixed, x), fixed.x)


def test_the_way_out_of_task_gradients() -> None:
    fixed = Fixed()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maml = fixed.maml

        def forward(self, *data: Tensor) -> Tensor:
            return self.maml.meta_loss(*data)

    whole, data = Whole(), (fixed.x, fixed.sy, fixed.qx, fixed.qy)
    params = {name: p.detach() for name, p in whole.named_parameters()}
    found = jacrev(lambda given: functional_call(whole, given, data))(params)
    expected = fixed.maml.task_gradients(*data)
    torch.testing.assert_close(found["maml.module.0.weight"], expected["0.weight"])


@pytest.mark.parametrize("name", ["task_gradients", "adapt"])
def test_tangents_pass_where_no_transform_is(name: str) -> None:
    """Under forward_ad alone gradients taken within carry tangents."""
    fixed, step = Fixed(), 1e-5
    function: Function = lambda x: REFUSED[name](fixed, x)  # noqa: E731
    x, v = fixed.x, draw(3, 4, 3)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent
    expected = (function(x + step * v) - function(x - step * v)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
