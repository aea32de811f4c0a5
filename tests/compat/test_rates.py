"""A rate in every form that the originals multiply by: numpy's numbers, arrays and tensors of one element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same
from torch import Tensor, nn

from mtml.compat import higher, learn2learn, torchmeta, torchopt
from mtml.compat.rate import number, scalar

FORMS: dict[str, Callable[[], Any]] = {
    "float32": lambda: np.float32(0.125),
    "int64": lambda: np.int64(1),
    "array": lambda: np.array(0.125),
    "array [1]": lambda: np.array([0.125]),
    "tensor [1]": lambda: torch.tensor([0.125]),
    "tensor [1, 1]": lambda: torch.tensor([[0.125]], dtype=torch.float64),
    "learnt [1]": lambda: nn.Parameter(torch.tensor([0.125])),
}
T = 3


class Bilinear(torchmeta.modules.MetaModule):
    """With a parameter of no dimensions, which a rate [1] would give one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(1, 2, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        own = dict(self.meta_named_parameters()) if params is None else params
        return own["scale"] * F.linear(x, own["weight"])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, 4, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(T, 4, 1, generator=generator, dtype=torch.float64)


def l2l_learner(net: nn.Module, learner: Any) -> list[Tensor]:
    x, y = batch()
    clone = learner.clone()
    clone.adapt(F.mse_loss(clone(x[0]), y[0]))
    assert [p.shape for p in clone.module.parameters()] == [p.shape for p in net.parameters()]
    return [F.mse_loss(clone(x[0]), y[0]), learner.meta_loss(x, y, x, y, loss="mse")[0]]


def l2l_maml(net: nn.Module, rate: Any) -> list[Tensor]:
    return l2l_learner(net, learn2learn.algorithms.MAML(net, lr=rate))


def l2l_gbml(net: nn.Module, rate: Any) -> list[Tensor]:
    return l2l_learner(net, learn2learn.algorithms.GBML(net, lambda parameter: None, lr=rate))


def l2l_meta_sgd(net: nn.Module, rate: Any) -> list[Tensor]:
    return l2l_learner(net, learn2learn.algorithms.MetaSGD(net, lr=rate))


def of_torchmeta(net: Any, rate: Any) -> list[Tensor]:
    x, y = batch()
    found = []
    for step_size in (rate, {"weight": rate, "scale": rate}):
        params = torchmeta.utils.gradient_update_parameters(net, F.mse_loss(net(x[0]), y[0]), step_size=step_size)
        found.append(F.mse_loss(net(x[0], params=params), y[0]))
        found.append(torchmeta.meta_loss(net, x, y, x, y, step_size=step_size, loss="mse")[0])
    return found


def of_torchopt(net: nn.Module, rate: Any) -> list[Tensor]:
    x, y = batch()
    found = []
    for lr in (rate, lambda count: rate):
        inner = torchopt.MetaSGD(net, lr=lr)
        found.append(torchopt.meta_loss(net, inner, x, y, x, y, loss="mse")[0])
        state = torchopt.extract_state_dict(net)
        inner.step(F.mse_loss(net(x[0]), y[0]))
        assert net.scale.shape == ()
        found.append(F.mse_loss(net(x[0]), y[0]))
        torchopt.recover_state_dict(net, state)
    return found


def of_higher(net: nn.Module, rate: Any) -> list[Tensor]:
    x, y = batch()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    found = [higher.meta_loss(net, opt, x, y, x, y, loss="mse", backend="general", override={"lr": [scalar(rate)]})[0]]
    if not isinstance(rate, Tensor):
        opt.param_groups[0]["lr"] = rate
        found.append(higher.meta_loss(net, opt, x, y, x, y, loss="mse")[0])
        with higher.innerloop_ctx(net, opt) as (fnet, inner):
            inner.step(F.mse_loss(fnet(x[0]), y[0]))
            found.append(F.mse_loss(fnet(x[0]), y[0]))
    return found


@pytest.mark.parametrize("losses", [l2l_maml, l2l_gbml, l2l_meta_sgd, of_torchmeta, of_torchopt, of_higher])
@pytest.mark.parametrize("form", FORMS)
def test_one_number_in_any_form_is_that_number(form: str, losses: Callable[[Any, Any], list[Tensor]]) -> None:
    rate = FORMS[form]()
    net, (x, y) = Bilinear(), batch()
    grads = torch.autograd.grad(F.mse_loss(net(x[0]), y[0]), [net.weight, net.scale])
    size = scalar(rate.detach() if isinstance(rate, Tensor) else rate)
    moved = {"weight": net.weight - size * grads[0], "scale": net.scale - size * grads[1]}
    for found in losses(net, rate):
        assert_same(found, F.mse_loss(net(x[0], params=moved), y[0]))


def test_steps_beyond_the_first_and_gradients_to_a_rate_of_one_element() -> None:
    net, (x, y) = Bilinear(), batch()
    for rate in (nn.Parameter(torch.tensor([0.125])), torch.tensor([0.125], requires_grad=True)):
        inner = torchopt.MetaSGD(net, lr=rate)
        for _ in range(2):  # with the engine of the call before
            found = torch.autograd.grad(torchopt.meta_loss(net, inner, x, y, x, y, steps=3, loss="mse").sum(), rate)
        plain = torch.tensor(0.125, requires_grad=True)
        losses = torchopt.meta_loss(net, torchopt.MetaSGD(net, lr=plain), x, y, x, y, steps=3, loss="mse")
        assert_same(found[0], torch.autograd.grad(losses.sum(), plain)[0].reshape(1))


def test_numbers_of_a_schedule_beside_learnt_ones_are_not_rounded() -> None:
    net, (x, y) = Bilinear(), batch()
    learnt = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    mixed = torchopt.MetaSGD(net, lr=lambda count: learnt if count == 1 else 0.1)
    constant = torchopt.MetaSGD(net, lr=0.1)
    found, expected = (torchopt.meta_loss(net, opt, x, y, x, y, steps=3, loss="mse") for opt in (mixed, constant))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)  # 0.1 in float32 is 1.5e-8 from it


@pytest.mark.parametrize("rate", ["0.1", None, [0.1], 1j, torch.tensor([0.1, 0.2])])
def test_what_is_no_rate_is_named(rate: Any) -> None:
    with pytest.raises(TypeError, match="lr: expected a number"):
        torchopt.sgd(rate)
    if not isinstance(rate, Tensor):
        with pytest.raises(TypeError, match="lr: expected a number or a tensor, got"):
            learn2learn.optim.DifferentiableSGD(rate)
        with pytest.raises(TypeError, match="lr: expected a number or a tensor, got"):
            learn2learn.algorithms.MetaSGD(nn.Linear(1, 1), lr=rate)
        net, (x, y) = Bilinear(), batch()
        with pytest.raises(TypeError, match="step_size: expected a number or a tensor, got"):
            torchmeta.utils.gradient_update_parameters(net, F.mse_loss(net(x[0]), y[0]), step_size=rate)


def test_others_are_themselves() -> None:
    for value in (True, 3, 0.5, "x", None, np.array([1.0, 2.0]), np.array("x"), torch.ones(2)):
        assert number(value) is value
        assert scalar(value) is value


def test_numbers_of_numpy_become_tensors_to_learn_and_come_back() -> None:
    opt = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
    opt.param_groups[0]["lr"] = np.float32(0.125)
    assert higher.optim.get_trainable_opt_params(opt)["lr"][0].item() == 0.125
    higher.optim.apply_trainable_opt_params(opt, {"lr": [np.array([0.25])]})
    assert opt.param_groups[0]["lr"] == 0.25
