"""mtml.gradients: what torch.autograd.grad gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtml import gradients


@pytest.mark.parametrize("direct", [True, False])
def test_as_torch_autograd_grad_and_differentiable_again(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        monkeypatch.setattr(gradients, "_run", None)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    spare = torch.ones(1, requires_grad=True)
    found = gradients.recorded_gradients(x.pow(3).sum(), [x, spare], factor=-0.5)
    assert found[1] is None
    torch.testing.assert_close(found[0], -0.5 * 3 * x.square())

    def first(x: Tensor) -> Tensor:
        (grad,) = gradients.recorded_gradients(x.pow(3).sum(), [x])
        assert grad is not None
        return grad

    assert torch.autograd.gradcheck(first, (x,)) and torch.autograd.gradgradcheck(first, (x,))


def test_the_engine_is_called_directly_here() -> None:
    assert gradients._run is not None  # else every inner step pays for checks of its arguments
