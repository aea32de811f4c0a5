"""A parameter or buffer that the model holds under several names is meant by every one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, oracle, regression
from torch import Tensor, nn

from mtml import MAML, InnerLR
from mtml_kernels.ops.inner_loop import BACKENDS

every_path = pytest.mark.parametrize("backend", ["general", *BACKENDS.available()])


class Tied(nn.Module):
    """One weight in two layers, each with a bias of its own."""

    first, second, others = "enc.weight", "enc2.weight", "enc.bias"

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.enc2, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.enc2.weight = self.enc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc2(torch.tanh(self.enc(x)))))


class Shared(nn.Module):
    """One submodule under two names, one of them within a list."""

    first, second, others = "base.weight", "parts.0.weight", "head.bias"

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.parts = nn.ModuleList([self.base, nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts[1](self.base(x)) + self.parts[0](x))


class Codes(nn.Module):
    """One buffer under two names."""

    first, second, others = "code", "again", "layer.bias"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("code", torch.zeros(2))
        self.register_buffer("again", self.code)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.code) + self.again

    def _apply(self, *args: Any, **options: Any) -> nn.Module:
        super()._apply(*args, **options)
        self.again = self.code  # a buffer does not stay shared by itself
        return self


MODELS: list[type[Any]] = [Tied, Shared, Codes]
every_model = pytest.mark.parametrize("make", MODELS)


def check(maml: MAML, model: Any, rate: Any, names: list[str]) -> None:
    batch = regression()
    want = oracle(model, batch, F.mse_loss, rate, 2, names)
    got = maml.meta_loss(*batch)
    assert_same(got, want.loss)
    trained = list(model.parameters())
    assert_same(gradients(got, trained), gradients(want.loss, trained))
    adapted = maml.adapt_tasks(*batch[:2])
    assert list(adapted.params) == names
    assert_same(list(adapted.params.values()), list(want.trajectory[-1].values()))
    clone = maml.clone()
    for _ in range(2):
        clone.adapt(F.mse_loss(clone(batch[0][0]), batch[1][0]))
    assert_same(F.mse_loss(clone(batch[2][0]), batch[3][0]), want.loss[0])


def ways_to_name(model: Any) -> dict[str, Any]:
    first, second = model.first, model.second
    return {
        "first": first,
        "second": second,
        "pattern": second[:-2] + "*",
        "several": [second, first],
        "predicate": lambda name, tensor: name == second,
    }


@every_path
@every_model
@pytest.mark.parametrize("way", ways_to_name(Tied))
def test_named_by_either_name(make: Any, way: str, backend: str) -> None:
    model = make().double()
    params = ways_to_name(model)[way]
    check(MAML(model, 0.2, steps=2, loss="mse", params=params, backend=backend), model, 0.2, [model.first])
    lr = InnerLR(model, 0.2, per="tensor", params=params)
    assert list(lr.shapes) == [model.first]
    check(MAML(model, lr, steps=2, loss="mse", params=params, backend=backend), model, 0.2, [model.first])


@every_path
@every_model
@pytest.mark.parametrize("form", ["number", "tensor", "learned"])
def test_rates_by_either_name(make: Any, form: str, backend: str) -> None:
    model = make().double()
    rate: Any = 0.3 if form == "number" else torch.tensor(0.3, dtype=torch.float64, requires_grad=form == "learned")
    both = [model.first, model.others]
    names = [name for name in [n for n, _ in (*model.named_parameters(), *model.named_buffers())] if name in both]
    for named in ([model.second], [model.first], [model.first, model.second]):
        table = dict.fromkeys(named, rate) | {model.others: 0.1}
        maml = MAML(model, table, steps=2, loss="mse", params=both, backend=backend)
        check(maml, model, lambda name, k: 0.1 if name == model.others else rate, names)


@every_path
@every_model
def test_two_rates_for_one_tensor_are_refused(make: Any, backend: str) -> None:
    model, batch = make().double(), regression()
    words = f"lr: expected one rate for '{model.first}' and '{model.second}', which are the same tensor, got 0.1 and 0"
    maml = MAML(model, {model.first: 0.1, model.second: 0.2}, loss="mse", params=model.first, backend=backend)
    with pytest.raises(ValueError, match=words):
        maml.meta_loss(*batch)
    clone = maml.clone()
    with pytest.raises(ValueError, match=words):
        clone.adapt(F.mse_loss(clone(batch[0][0]), batch[1][0]))


@every_model
def test_the_general_path_leaves_the_module_its_own_tensors(make: Any) -> None:
    """torch.func.functional_call leaves a module that has two names with the tensors that it was called with."""
    model, batch = make().double(), regression()
    before = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    maml = MAML(model, 0.2, steps=2, loss="mse", params=model.second, backend="general")
    maml.meta_loss(*batch).sum().backward()
    maml.adapt_tasks(*batch[:2])(batch[2])
    after = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


@every_model
def test_names_that_are_none_are_still_refused(make: Any) -> None:
    model = make().double()
    with pytest.raises(ValueError, match=r"params: 'nothing.\*' matches no"):
        MAML(model, 0.1, params=[model.second, "nothing.*"])
    with pytest.raises(ValueError, match="expected names of the model's tensors, got 'nothing'"):
        MAML(model, {model.second: 0.1, "nothing": 0.1}, loss="mse", params=model.first).meta_loss(*regression())
