"""Every model of the fused path under torch.compile: MAML, ANIL and several heads on it, one graph each."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cases.compiled import assert_as_eager, whole_graph
from cases.conv_models import SPATIAL
from cases.program_models import FUSED, Case
from torch import Tensor, nn

import mtml

MODELS: dict[str, Case] = {**FUSED, **SPATIAL}
TASKS, SUPPORT, QUERY = 3, 4, 5
IN_SHORT = (
    "mlp", "points per sample", "film", "residual", "tied weights", "in-place", "latent expand", "slices", "softmax",
    "RMSNorm", "two inputs", "keyword inputs", "conv", "conv1d", "group norm", "functions",
)  # fmt: skip


def inputs(shapes: Any, *lead: int) -> Any:
    """A tensor, a tuple or a dict of such."""
    if isinstance(shapes, Mapping):
        return {name: torch.randn(*lead, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    found = tuple(torch.randn(*lead, *shape, dtype=torch.float64) for shape in shapes)
    return found if len(found) > 1 else found[0]


def forward(model: nn.Module, x: Any) -> Tensor:
    found: Tensor = model(**x) if isinstance(x, Mapping) else model(*x) if isinstance(x, tuple) else model(x)
    return found


def by_row(output: Tensor) -> Tensor:
    return output.reshape(output.shape[0], -1)


class Flat(nn.Module):
    """A model as a trunk: features [N, D]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *x: Tensor, **named: Tensor) -> Tensor:
        return by_row(self.model(*x, **named))


def as_maml(model: nn.Module, case: Case, width: tuple[int, ...], warm: bool) -> None:
    """meta_loss where nothing was called before, meta_forward after eager calls."""
    if case is FUSED["the input itself"] or not any(p.requires_grad for p in model.parameters()):
        pytest.skip("nothing to adapt")
    lr = 1e-4 if "siren" in str(case.make) else 0.01
    maml = mtml.MAML(model, lr, steps=2, loss="mse", backend="cpu")
    data = [
        part
        for n in (SUPPORT, QUERY)
        for part in (inputs(case.shapes, TASKS, n), torch.randn(TASKS, n, *width, dtype=torch.float64))
    ]
    step: Callable[..., Any] = maml.meta_loss
    if warm:
        maml.meta_loss(*data)
        step = maml.meta_forward
    compiled, graphs = whole_graph(step)
    assert_as_eager(compiled, step, data, list(model.parameters()))
    assert graphs() == 1


def as_trunk(model: nn.Module, case: Case, width: tuple[int, ...]) -> None:
    trunk, features = Flat(model), math.prod(width)
    anil = mtml.ANIL(trunk, nn.Linear(features, 3).double(), 0.01, steps=2)
    data = [
        part
        for n in (SUPPORT, QUERY)
        for part in (inputs(case.shapes, TASKS, n), torch.randint(3, (TASKS, n)))
    ]  # fmt: skip
    compiled, graphs = whole_graph(anil.meta_loss)
    assert_as_eager(compiled, anil.meta_loss, data, list(anil.parameters()))
    assert graphs() == 1


def as_trunk_of_heads(model: nn.Module, case: Case, width: tuple[int, ...]) -> None:
    features = math.prod(width)
    heads = mtml.MultiHead(features, {"kind": mtml.Classification(3), "size": mtml.Regression(2)}).double()

    def step(x: Any, kind: Tensor, size: Tensor) -> Any:
        found = heads.loss(by_row(forward(model, x)), {"kind": kind, "size": size})
        return found.total, found.per_head

    data = inputs(case.shapes, 6), torch.randint(3, (6,)), torch.randn(6, 2, dtype=torch.float64)
    compiled, graphs = whole_graph(step)
    assert_as_eager(compiled, step, data, [*model.parameters(), *heads.parameters()])
    assert graphs() == 1


def made(name: str) -> tuple[nn.Module, Case, tuple[int, ...]]:
    """A model, its case and the shape of a sample's output."""
    case = MODELS[name]
    model = case.make().double()
    return model, case, tuple(forward(model, inputs(case.shapes, 2)).shape[1:])


KINDS: dict[str, Callable[[nn.Module, Case, tuple[int, ...]], None]] = {
    "meta_loss": lambda *made: as_maml(*made, warm=False),
    "meta_forward": lambda *made: as_maml(*made, warm=True),
    "ANIL": as_trunk,
    "MultiHead": as_trunk_of_heads,
}


@pytest.mark.parametrize(("name", "kind"), zip(IN_SHORT, itertools.cycle(KINDS), strict=False))
def test_some_models(name: str, kind: str) -> None:
    KINDS[kind](*made(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), list(itertools.product(MODELS, KINDS))[:: int(os.environ.get("MTML_EVERY", 1))]
)
def test_every_model(name: str, kind: str) -> None:
    KINDS[kind](*made(name))
