"""Which path a call takes, when it warns or raises instead, and when a prepared one is stale."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, mlp, oracle, regression
from torch import Tensor, nn

import mtml
import mtml_kernels
from mtml import MAML, FallbackWarning
from mtml.paths import finder as _plan
from mtml_kernels.general.choice import GeneralPlan
from mtml_kernels.ops.inner_loop import BACKENDS


def unfused() -> nn.Sequential:
    """A transposed convolution is not in the engine's vocabulary."""
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.ConvTranspose1d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2)).double()


def test_fallback_warns_once_per_program() -> None:
    maml, batch = MAML(unfused(), 0.1, loss="mse"), regression()
    with pytest.warns(FallbackWarning, match=r"general path \((loop|vmap)\): .*ConvTranspose1d") as caught:
        maml.meta_loss(*batch)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.meta_loss(*batch)
        maml.meta_loss(*(t[:2] for t in batch))
        MAML(unfused(), 0.1, loss="mse", backend="general").meta_loss(*batch)


def test_fallback_warns_once_whichever_form_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice between loop and vmap is measured, so that it may differ from one batch to the next."""
    modes = iter(["vmap", "loop"])
    monkeypatch.setattr(_plan, "choose", lambda *_: GeneralPlan(next(modes), "as told", "module"))
    maml, batch = MAML(unfused(), 0.1, loss="mse"), regression()
    with pytest.warns(FallbackWarning, match=r"general path \(vmap\)") as caught:
        maml.meta_loss(*batch)
        maml.meta_loss(*(t[:2] for t in batch))
    assert len(caught) == 1 and next(modes, None) is None


def test_named_backends_raise_instead_of_falling_back() -> None:
    batch = regression()
    for backend in ("cpu", "triton", "cuda", "reference"):
        with pytest.raises(mtml.BackendUnavailable, match="ConvTranspose1d"):
            MAML(unfused(), 0.1, loss="mse", backend=backend).meta_loss(*batch)
    for backend in ("triton", "cuda"):
        with pytest.raises(mtml.BackendUnavailable, match=backend):
            MAML(mlp(3, 4, 2), 0.1, loss="mse", backend=backend).meta_loss(*batch)


@pytest.mark.parametrize("width", [2, 7])
def test_query_samples_of_another_shape_are_not_read_as_the_support_sets(width: int) -> None:
    """The engine would read them by the program's shape, past their end."""
    sx, sy, _, qy = regression()
    batch = (sx, sy, torch.randn(3, 4, width, dtype=torch.float64), qy)
    with pytest.raises(mtml.BackendUnavailable, match=rf"qx: samples of shape \[\({width},\)\], in sx of \[\(3,\)\]"):
        MAML(mlp(3, 4, 2), 0.1, loss="mse", backend=BACKENDS.available()[0]).meta_loss(*batch)
    with pytest.warns(FallbackWarning, match="qx: samples of shape"), pytest.raises(RuntimeError, match="shapes"):
        MAML(mlp(3, 4, 2), 0.1, loss="mse").meta_loss(*batch)


def test_models_of_any_image_size_take_queries_of_another() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)
    ).double()
    _, sy, _, qy = regression()
    batch = (torch.randn(3, 5, 1, 8, dtype=torch.float64), sy, torch.randn(3, 4, 1, 11, dtype=torch.float64), qy)
    with pytest.warns(FallbackWarning, match="qx: samples of shape"):
        loss = MAML(model, 0.1, steps=2, loss="mse").meta_loss(*batch)
    assert_same(loss, oracle(model, batch, F.mse_loss, 0.1, 2).loss)


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = regression()
    monkeypatch.setenv("MTML_BACKEND", "reference")
    assert MAML(mlp(3, 4, 2), 0.1, loss="mse").explain(*batch).kernel == "reference"
    monkeypatch.setenv("MTML_BACKEND", "general")
    assert MAML(mlp(3, 4, 2), 0.1, loss="mse").explain(*batch).path == "general"
    monkeypatch.setenv("MTML_BACKEND", "quantum")
    with pytest.raises(ValueError, match="quantum"):
        MAML(mlp(3, 4, 2), 0.1, loss="mse").meta_loss(*batch)


def functions_before(door: str, form: str, backend: str) -> list[tuple[str, str]]:
    """File and name of what a second call goes through until it meets a function."""
    called = []

    def note(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    maml, data = MAML(mlp(3, 4, 2), 0.1, steps=2, loss="mse", backend=backend), regression()
    given = data if form == "parts" else (mtml.TaskBatch(*data),)
    maml.meta_loss(*given)
    sys.setprofile(note)
    try:
        maml.meta_loss(*given)
    finally:
        sys.setprofile(None)
    return called[: next(i for i, (_, name) in enumerate(called) if name == door)]


@pytest.mark.parametrize("form", ["parts", "batch"])
def test_a_prepared_path_is_seven_functions_from_the_engine(form: str) -> None:
    """Host time is most of a small model's meta-step, and every Python function costs its share of it."""
    here, called = str(Path(mtml.__file__).parent), functions_before("inner_loop_call", form, "torch")
    own = {place for place in called if place[0].startswith(here)}
    assert len(own) <= 7 and len({file for file, _ in own}) <= 4, own
    assert len(own) == len(called)  # nothing twice, and nothing of others


@pytest.mark.parametrize("form", ["parts", "batch"])
def test_a_call_like_one_before_is_ten_functions_from_the_lane(form: str) -> None:
    ours = tuple(str(Path(str(package.__file__)).parent) for package in (mtml, mtml_kernels))
    called = [name for file, name in functions_before("run", form, "cpu") if file.startswith(ours)]
    assert len(called) <= (9 if form == "parts" else 10), called
    assert {"at_once", "Shortcut.__call__"} <= set(called)


@pytest.mark.parametrize("backend", BACKENDS.available())
def test_retraced_when_the_model_changes(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 2)).double()
    batch = regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)

    def check() -> None:
        want = oracle(model, batch, F.mse_loss, maml.lr, maml.steps)
        assert_same(maml.meta_loss(*batch), want.loss)

    check()
    model[1] = nn.Sigmoid()
    check()
    model[1] = nn.LeakyReLU(0.1)
    check()
    model[1].negative_slope = 0.7
    check()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    check()
    model[0].weight = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    check()
    model[3] = nn.Linear(6, 2, bias=False).double()
    check()
    model[0].bias.requires_grad_(False)
    check()
    model[0].weight.data = torch.randn(6, 3, dtype=torch.float64)
    check()
    maml.lr, maml.steps = 0.3, 3
    check()
    model.eval()
    check()
    handle = model[1].register_forward_hook(lambda module, args, output: 2.0 * output)
    with pytest.raises(mtml.BackendUnavailable, match="hook"):
        maml.meta_loss(*batch)
    handle.remove()
    check()
    model.train()
    model[2].p = 0.5
    with pytest.raises(mtml.BackendUnavailable, match=r"[Dd]ropout"):
        maml.meta_loss(*batch)
    model.eval()
    check()


def test_a_model_that_counts_its_calls_is_prepared_once() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x).sort(-1).values

    model = Counts().double()
    maml, batch = MAML(model, 0.1, loss="mse", backend="general"), regression()
    maml.meta_loss(*batch)
    before = model.calls
    maml.meta_loss(*batch)
    assert 0 < model.calls - before <= 6


def test_differentiable_twice_on_the_general_path() -> None:
    model, batch = mlp(3, 4, 2), regression()
    loss = MAML(model, 0.1, loss="mse", backend="general").meta_loss(*batch).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    penalty = torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()))
    assert all(g.isfinite().all() and g.any() for g in penalty)


def test_under_torch_func() -> None:
    model, batch = mlp(3, 4, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend="general")

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(maml, params, batch, {}, strict=False).sum()

    maml.forward = maml.meta_loss  # type: ignore[method-assign]
    got = torch.func.grad(loss)({n: p.detach() for n, p in maml.named_parameters()})
    want = torch.autograd.grad(oracle(model, batch, F.mse_loss, 0.1, 2).loss.sum(), list(model.parameters()))
    assert_same(list(got.values()), list(want))
