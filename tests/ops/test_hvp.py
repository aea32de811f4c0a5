"""mtml_kernels.hvp: Hessian-vector products of a batch of tasks, against PyTorch's double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mtml_kernels import hvp, inner_loop, trace
from mtml_kernels.ops.inner_loop import BACKENDS

D = torch.float64
T, S = 3, 6
ENGINES = [name for name in ("cpu", "torch", "reference") if name in BACKENDS.available()]
LOSSES: dict[str, Any] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4)).to(D)


def batch(loss: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(T, S, 3, dtype=D)
    return x, torch.randint(4, (T, S)) if loss == "cross_entropy" else torch.randn(T, S, 4, dtype=D)


def like(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    return {n: torch.randn(T, *p.shape, dtype=D) for n, p in model.named_parameters() if names is None or n in names}


def expected(
    model: nn.Module, x: Tensor, y: Tensor, vectors: dict[str, Tensor], loss: str, at: Any = None, mask: Any = None
) -> dict[str, Tensor]:
    """By differentiating twice, a task at a time."""
    rows = []
    for t in range(T):
        own = {n: p.detach() for n, p in model.named_parameters()} | {n: a[t] for n, a in (at or {}).items()}
        own = {n: p.requires_grad_(n in vectors) for n, p in own.items()}
        each = LOSSES[loss](functional_call(model, own, (x[t],)), y[t], reduction="none")
        each = each if each.ndim == 1 else each.mean(1)
        value = each.mean() if mask is None else (mask[t] * each).sum() / mask[t].sum()
        grads = torch.autograd.grad(value, [own[n] for n in vectors], create_graph=True)
        inner = sum((g * v[t]).sum() for g, v in zip(grads, vectors.values(), strict=True))
        assert isinstance(inner, Tensor)
        rows.append(torch.autograd.grad(inner, [own[n] for n in vectors]))
    return {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(vectors)}


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("own", [False, True])
def test_equal_to_differentiating_twice(loss: str, backend: str, own: bool) -> None:
    model, (x, y) = net(), batch(loss)
    names = ["0.weight", "2.bias"] if own else None  # a block of the Hessian
    vectors, start = like(model, names), like(model, names) if own else None
    mask = torch.rand(T, S, dtype=D) if own else None
    params = dict(model.named_parameters())
    found = hvp(trace(model, [(3,)]), params, x, y, vectors, loss=loss, mask=mask, start=start, backend=backend)
    wanted = expected(model, x, y, vectors, loss, start, mask)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_the_hessian_is_symmetric_and_a_piecewise_linear_loss_has_none() -> None:
    model, (x, y) = net(), batch("mse")
    program, params = trace(model, [(3,)]), dict(model.named_parameters())
    u, v = like(model), like(model)
    hu, hv = (hvp(program, params, x, y, w, loss="mse") for w in (u, v))
    left, right = (sum((a[n] * b[n]).flatten(1).sum(1) for n in a) for a, b in ((u, hv), (v, hu)))
    torch.testing.assert_close(left, right)
    assert float(left.detach().abs().min()) > 1e-3  # type: ignore[union-attr]
    line = nn.Linear(3, 4).to(D)
    zero = hvp(trace(line, [(3,)]), dict(line.named_parameters()), x, y, like(line), loss="l1")
    assert not any(t.any() for t in zero.values())


def test_float32_is_as_exact_as_double_backward() -> None:
    """The step so long that the point vanishes costs no digits: the errors are those of float32."""
    ours, theirs = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        model, (x, y) = net(), batch("mse")
        vectors = like(model)
        wanted = expected(model, x, y, vectors, "mse")
        model, x, y, vectors = model.float(), x.float(), y.float(), {n: v.float() for n, v in vectors.items()}
        found = hvp(trace(model, [(3,)]), dict(model.named_parameters()), x, y, vectors, loss="mse")
        peer = expected(model, x, y, vectors, "mse")
        for errors, result in ((ours, found), (theirs, peer)):
            errors.append(max(float((result[n].detach() - w).abs().max() / w.abs().max()) for n, w in wanted.items()))
    assert sorted(ours)[10] <= 2 * sorted(theirs)[10]


def test_differentiated_again_it_raises_and_without_grad_it_is_plain() -> None:
    model, (x, y) = net(), batch("mse")
    program, params, vectors = trace(model, [(3,)]), dict(model.named_parameters()), like(model)
    with pytest.raises(RuntimeError, match="general"):
        hvp(program, params, x, y, vectors, loss="mse")["0.weight"].sum().backward()
    with torch.no_grad():
        assert not hvp(program, params, x, y, vectors, loss="mse")["0.weight"].requires_grad
    frozen = {n: p.detach() for n, p in params.items()}
    assert not hvp(program, frozen, x, y, vectors, loss="mse")["0.weight"].requires_grad


def test_inference_mode() -> None:
    model, (x, y) = net(), batch("mse")
    program, vectors = trace(model, [(3,)]), like(model)
    wanted = expected(model, x, y, vectors, "mse")
    with torch.inference_mode():
        own = {n: v.clone() for n, v in vectors.items()}
        found = hvp(program, dict(model.named_parameters()), x.clone(), y, own, loss="mse")
    torch.testing.assert_close(found, wanted)


def test_inner_loop_from_own_starts() -> None:
    model, (x, y) = net(), batch("mse")
    program, params = trace(model, [(3,)]), dict(model.named_parameters())
    start = {n: t.requires_grad_() for n, t in like(model, ["0.weight", "0.bias"]).items()}
    found = inner_loop(program, params, x, y, 0.1, steps=2, loss="mse", start=start, query_x=x, query_y=y)
    grads = torch.autograd.grad(found.loss.sum(), [*start.values(), params["2.weight"]])
    for t in range(T):
        own = params | {n: s[t] for n, s in start.items()}
        alone = {n: p.detach().requires_grad_() for n, p in own.items()}
        one = inner_loop(program, alone, x[t : t + 1], y[t : t + 1], 0.1, steps=2, loss="mse", query_x=x[t : t + 1],
                         query_y=y[t : t + 1])  # fmt: skip
        torch.testing.assert_close(one.loss[0], found.loss[t])
        each = torch.autograd.grad(one.loss.sum(), [alone[n] for n in start])
        torch.testing.assert_close(each, tuple(g[t] for g in grads[:2]))


def test_errors_name_the_argument() -> None:
    model, (x, y) = net(), batch("mse")
    program, params, vectors = trace(model, [(3,)]), dict(model.named_parameters()), like(model)

    def call(vectors: Any, **options: Any) -> Any:
        return hvp(program, params, x, y, vectors, loss="mse", **options)

    with pytest.raises(TypeError, match="vectors: expected"):
        call({})
    with pytest.raises(ValueError, match=r"vectors: expected names of parameters, 0.weight"):
        call({"weight": vectors["0.weight"]})
    with pytest.raises(ValueError, match=r"vectors\['0.bias'\]: expected \[T, \*shape\] = \[3, 7\], got \[7\]"):
        call({"0.bias": torch.zeros(7, dtype=D)})
    with pytest.raises(TypeError, match=r"vectors\['0.bias'\]: expected float64"):
        call({"0.bias": torch.zeros(T, 7)})
    with pytest.raises(ValueError, match=r"start\['0.bias'\]: expected \[T, \*shape\] = \[3, 7\]"):
        call(vectors, start={"0.bias": torch.zeros(7, dtype=D)})
    with pytest.raises(ValueError, match=r"start: expected names of adapted parameters, 0.bias; got '2.bias'"):
        call({"0.bias": vectors["0.bias"]}, start={"2.bias": vectors["2.bias"]})
    with pytest.raises(TypeError, match=r"params: expected \{name: tensor\}, got list"):
        hvp(program, list(params.values()), x, y, vectors, loss="mse")
    with pytest.raises(TypeError, match="y: expected a tensor of targets"):
        hvp(program, params, x, None, vectors, loss="mse")
