"""mtml_kernels.functional.inner_loop: the documented engine function and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, classification, gradients, mlp, oracle, regression

from mtml_kernels.functional import inner_loop
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import trace

every_backend = pytest.mark.parametrize("backend", BACKENDS.available())


@every_backend
@pytest.mark.parametrize("as_list", [False, True])
def test_against_the_loop(backend: str, as_list: bool) -> None:
    model, batch = mlp(3, 6, 2), regression()
    named = dict(model.named_parameters())
    lr = {name: torch.full((), 0.1, dtype=torch.float64, requires_grad=True) for name in named}
    masks = (torch.rand(3, 5, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64))
    result = inner_loop(
        trace(model, [(3,)]),
        list(named.values()) if as_list else named,
        batch[0],
        batch[1],
        lr,
        steps=2,
        loss="mse",
        mask=masks[0],
        query_x=batch[2],
        query_y=batch[3],
        query_mask=masks[1],
        step_weights=[0.1, 0.2, 0.7],
        keep="steps",
        backend=backend,
    )
    options: dict[str, Any] = {"masks": masks, "step_weights": [0.1, 0.2, 0.7]}
    want = oracle(model, batch, F.mse_loss, lambda n, k: lr[n], 2, **options)
    assert_same(tuple(result[:3]), want[:3])
    for k, params in enumerate(want.trajectory):
        for name, value in params.items():
            assert_same(result.params[name][k], value)
    leaves = [*named.values(), *lr.values()]
    assert_same(gradients(result.loss, leaves), gradients(want.loss, leaves))


@every_backend
def test_adapting_alone_and_some(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    program, named = trace(model, [(3,)]), dict(model.named_parameters())
    options: dict[str, Any] = {"steps": 2, "loss": F.mse_loss, "adapted": ["2.weight"], "backend": backend}
    result = inner_loop(program, named, batch[0], batch[1], 0.1, **options)
    want = oracle(model, batch, F.mse_loss, 0.1, 2, ["2.weight"])
    assert list(result.params) == ["2.weight"]
    assert_same(result.params["2.weight"], want.trajectory[-1]["2.weight"])
    assert result.loss.shape == (0,) and result.output.shape == (3, 0, 2)
    outputs = inner_loop(program, named, batch[0], batch[1], 0.1, query_x=batch[2], keep="none", **options)
    assert_same(outputs.output, want.output)
    assert outputs.params == {}


def call(**changes: Any) -> Any:
    model, batch = mlp(3, 6, 4), classification()
    arguments: dict[str, Any] = {
        "program": trace(model, [(3,)]),
        "params": dict(model.named_parameters()),
        "x": batch[0],
        "y": batch[1],
        "lr": 0.1,
        "steps": 1,
        "loss": "cross_entropy",
        "query_x": batch[2],
        "query_y": batch[3],
    }
    return inner_loop(**(arguments | changes))


@every_backend
def test_bad_input(backend: str) -> None:
    x, y, _, _ = classification()
    for changes, error, text in (
        ({"steps": -1}, ValueError, "steps: expected an int >= 0"),
        ({"keep": "all"}, ValueError, "keep: expected one of 'none', 'last', 'steps'"),
        ({"params": {}}, ValueError, "params: expected every parameter"),
        ({"params": [torch.zeros(6, 3)]}, ValueError, "params: expected 4 tensors"),
        ({"params": [torch.zeros(2)] * 4}, ValueError, r"params\['0.weight'\]: expected \[6, 3\], got \[2\]"),
        ({"loss": lambda o, t: o.sum()}, ValueError, "loss: expected one that is fused, got <lambda>"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
        ({"x": x[..., :2]}, ValueError, r"x: expected \[T, N, \*\[3\]\]"),
        ({"x": [x, x]}, ValueError, "x: expected 1 inputs, as traced, got 2"),
        ({"x": x.float()}, TypeError, "x: expected float64"),
        ({"x": x.long()}, TypeError, "x: expected float64"),
        ({"y": y[:, :2]}, ValueError, "y: expected its first dimensions"),
        ({"y": y + 4}, ValueError, r"y: expected class ids"),
        ({"y": y.double()}, TypeError, "y: expected integer class ids"),
        ({"query_mask": torch.ones(3, 5)}, ValueError, r"query_mask: expected \[T, Q\]"),
        ({"adapted": ["4.weight"]}, ValueError, "adapted: expected names among"),
        ({"step_weights": [1.0]}, ValueError, r"step_weights: expected \[K\+1\] = \[2\]"),
        ({"lr": float("nan")}, ValueError, "lr: expected finite"),
        ({"backend": "quantum"}, ValueError, "unknown backend 'quantum'"),
    ):
        with pytest.raises(error, match=text):
            call(**({"backend": backend} | changes))
