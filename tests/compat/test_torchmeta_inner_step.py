"""torchmeta's gradient step, loops of it, and the same loops as one call of the engine."""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import mtml
from mtml.compat import torchmeta
from mtml.compat.torchmeta import gradient_update_parameters, meta_loss
from mtml.compat.torchmeta import modules as mm

X = torch.float64
TASKS, SHOTS, QUERIES = 3, 5, 10


class ConvNet(mm.MetaModule):
    """As the few-shot examples have it."""

    def __init__(self, tracked: bool = False) -> None:
        super().__init__()
        self.features = mm.MetaSequential(_block(1, 4, tracked), _block(4, 4, tracked))
        self.classifier = mm.MetaLinear(16, 5)

    def forward(self, inputs: Tensor, params: Any = None) -> Tensor:
        features = self.features(inputs, params=self.get_subdict(params, "features"))
        return self.classifier(features.view((features.size(0), -1)), params=self.get_subdict(params, "classifier"))


def _block(channels: int, out: int, tracked: bool) -> mm.MetaSequential:
    norm = mm.MetaBatchNorm2d(out, track_running_stats=tracked)
    return mm.MetaSequential(mm.MetaConv2d(channels, out, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2))


class Tied(mm.MetaModule):
    """The last weight is the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = mm.MetaLinear(1, 1), mm.MetaLinear(1, 1)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        x = self.inner(x, params=self.get_subdict(params, "inner")).tanh()
        return self.outer(x, params=self.get_subdict(params, "outer"))


class Recurrent(mm.MetaModule):
    """What is no MetaModule is trained and not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(1, 4, batch_first=True), mm.MetaLinear(4, 1)

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        return self.head(self.memory(x.unsqueeze(-1))[0][:, -1], params=self.get_subdict(params, "head"))


def mlp() -> mm.MetaSequential:
    return mm.MetaSequential(mm.MetaLinear(1, 8), nn.Tanh(), mm.MetaLinear(8, 1))


def regression() -> tuple[Tensor, ...]:
    return tuple(torch.randn(TASKS, n, 1, dtype=X) for n in (SHOTS, SHOTS, QUERIES, QUERIES))


def images() -> tuple[Tensor, ...]:
    x, y = torch.randn(TASKS, 15, 1, 8, 8, dtype=X), torch.arange(5).repeat(TASKS, 3)
    return x[:, :5], y[:, :5], x[:, 5:], y[:, 5:]


CASES: dict[str, tuple[Callable[[], mm.MetaModule], Callable[[], tuple[Tensor, ...]], Any]] = {
    "mlp": (mlp, regression, F.mse_loss),
    "conv": (ConvNet, images, F.cross_entropy),
    "tied": (Tied, regression, F.mse_loss),
    "recurrent": (Recurrent, regression, F.mse_loss),
}


def case(name: str) -> tuple[mm.MetaModule, tuple[Tensor, ...], Any]:
    model, data, loss = CASES[name]
    return model().to(X), data(), loss


def weights(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def loop(model: Any, tasks: tuple[Tensor, ...], loss: Any, step_size: Any, steps: int, first_order: bool) -> Tensor:
    """As scripts write it: [T]."""
    losses = []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        params = None
        for _ in range(steps):
            inner = loss(model(sx, params=params), sy)
            params = gradient_update_parameters(model, inner, params, step_size, first_order)
        losses.append(loss(model(qx, params=params), qy))
    return torch.stack(losses)


def oracle(model: Any, tasks: tuple[Tensor, ...], loss: Any, step_size: float, steps: int) -> Tensor:
    """The same with nothing of ours: plain autograd on functional_call."""
    losses = []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        params = dict(model.meta_named_parameters())
        for _ in range(steps):
            inner = loss(functional_call(model, params, (sx,)), sy)
            grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
            params = {n: p - step_size * g for (n, p), g in zip(params.items(), grads, strict=True)}
        losses.append(loss(functional_call(model, params, (qx,)), qy))
    return torch.stack(losses)


def gradients(losses: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weighted = (losses * torch.arange(1, len(losses) + 1)).sum()  # each task's own gradient counts
    return list(torch.autograd.grad(weighted, tensors, retain_graph=True, materialize_grads=True))


def same(found: Tensor, expected: Tensor, found_of: list[Tensor], expected_of: list[Tensor] | None = None) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    mine, theirs = gradients(found, found_of), gradients(expected, expected_of or found_of)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_loop_of_steps_is_plain_autograd(name: str) -> None:
    model, tasks, loss = case(name)
    found = loop(model, tasks, loss, 0.1, 3, False)
    same(found, oracle(model, tasks, loss, 0.1, 3), weights(model))
    first = loop(model, tasks, loss, 0.1, 3, True)
    torch.testing.assert_close(first, found)
    exact, cut = gradients(found, weights(model)), gradients(first, weights(model))
    assert max(float((a - b).abs().max()) for a, b in zip(exact, cut, strict=True)) > 1e-4  # second order is there


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_one_call_is_the_loop(name: str, first_order: bool) -> None:
    model, tasks, loss = case(name)
    found = meta_loss(model, *tasks, step_size=0.1, steps=3, first_order=first_order, loss=loss)
    same(found, loop(model, tasks, loss, 0.1, 3, first_order), weights(model))


def test_what_few_shot_scripts_have_is_fused() -> None:
    model, tasks, _ = case("conv")
    found = meta_loss(model, *tasks, step_size=0.1, backend="cpu")  # raises where it is not
    same(found, loop(model, tasks, F.cross_entropy, 0.1, 1, False), weights(model))


def rates(model: mm.MetaModule, form: str) -> Any:
    if form in ("tensor", "one number"):
        return torch.full((1, 1) if form == "one number" else (), 0.1, dtype=X, requires_grad=True)
    sizes = {n: p.shape if form == "elements" else () for n, p in model.meta_named_parameters()}
    found = {n: nn.Parameter(torch.full(size, 0.1, dtype=X)) for n, size in sizes.items()}
    return nn.ParameterDict(found) if form == "parameters" else found


@pytest.mark.parametrize("form", ["tensor", "one number", "scalars", "elements", "parameters"])
def test_step_sizes_of_every_form_get_gradients(form: str) -> None:
    model = (mm.MetaLinear(1, 1) if form == "parameters" else mlp()).to(X)  # a ParameterDict has no names with dots
    tasks, rate = regression(), rates(model, form)
    of = [*model.parameters(), *([rate] if isinstance(rate, Tensor) else rate.values())]
    found = meta_loss(model, *tasks, step_size=rate, steps=2, loss="mse")
    same(found, loop(model, tasks, F.mse_loss, rate, 2, False), of)
    assert all(g.abs().max() > 0 for g in gradients(found, of))


@pytest.mark.parametrize("names", [("train", "test"), ("support", "query")])
def test_batches_as_loaders_make_them(names: tuple[str, str]) -> None:
    model, (sx, sy, qx, qy), _ = case("mlp")
    expected = meta_loss(model, sx, sy, qx, qy, step_size=0.1, loss="mse")
    batch = {names[0]: [sx, sy], names[1]: [qx, qy]}
    torch.testing.assert_close(meta_loss(model, batch, step_size=0.1, loss="mse"), expected, rtol=0, atol=0)
    batch = mtml.TaskBatch(sx, sy, qx, qy)
    torch.testing.assert_close(meta_loss(model, batch, step_size=0.1, loss="mse"), expected, rtol=0, atol=0)


def test_running_statistics_move_as_in_the_loop() -> None:
    model, tasks = ConvNet(tracked=True).to(X), images()
    other = copy.deepcopy(model)
    expected = loop(other, tasks, F.cross_entropy, 0.1, 2, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mtml.FallbackWarning)
        found = meta_loss(model, *tasks, step_size=0.1, steps=2)
    same(found, expected, weights(model), weights(other))
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_the_engine_is_kept_and_follows_changes() -> None:
    model, tasks, _ = case("mlp")
    meta_loss(model, *tasks, step_size=0.1, loss="mse")
    kept = model._mtml_engine.maml
    steps = {n: torch.tensor(0.1, dtype=X, requires_grad=True) for n, _ in model.meta_named_parameters()}
    for rate, loss in ((0.2, F.mse_loss), (steps, F.mse_loss), (steps, F.l1_loss), (0.3, F.l1_loss)):
        same(
            meta_loss(model, *tasks, step_size=rate, loss=loss),
            loop(model, tasks, loss, rate, 1, False),
            weights(model),
        )
    assert model._mtml_engine.maml is kept
    model[2] = nn.Linear(8, 1).to(X)  # no MetaModule: not adapted any more
    same(
        meta_loss(model, *tasks, step_size=0.2, loss="mse"),
        loop(model, tasks, F.mse_loss, 0.2, 1, False),
        weights(model),
    )


def test_the_engine_is_no_part_of_the_model() -> None:
    model, tasks, _ = case("mlp")
    keys = list(model.state_dict())
    meta_loss(model, *tasks, step_size=0.1, loss=lambda output, target: (output - target).square().mean())
    assert list(model.state_dict()) == keys and len(list(model.modules())) == 4
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # the lambda is not pickled
        assert again._mtml_engine.maml is None
        same(
            meta_loss(again, *tasks, step_size=0.1, loss="mse"),
            meta_loss(model, *tasks, step_size=0.1, loss="mse"),
            weights(again),
            weights(model),
        )


def test_a_wrapped_model_is_unwrapped() -> None:
    model, tasks, _ = case("mlp")
    expected = meta_loss(model, *tasks, step_size=0.1, loss="mse")
    for wrapped in (mm.DataParallel(model), nn.DataParallel(model)):
        sizes = {f"module.{n}": 0.1 for n, _ in model.meta_named_parameters()}
        torch.testing.assert_close(meta_loss(wrapped, *tasks, step_size=sizes, loss="mse"), expected)


# --- errors ---


class Wrapper(nn.Module):
    """As DistributedDataParallel stands around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("call", [gradient_update_parameters, meta_loss])
def test_a_wrapper_that_hides_the_model_is_named(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"got Wrapper; call it with the module inside.*mtml\.distributed"):
        call(Wrapper(mlp()), torch.zeros(()))


def test_errors_of_a_step() -> None:
    model, x = mlp(), torch.randn(5, 1)
    loss = model(x).square().mean()
    with pytest.raises(ValueError, match=r"model: expected a torchmeta.modules.MetaModule, got Linear"):
        gradient_update_parameters(nn.Linear(1, 1), loss)  # type: ignore[arg-type]
    plain = mm.MetaSequential(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"params: expected at least one tensor to adapt"):
        gradient_update_parameters(plain, plain(x).square().mean())
    with pytest.raises(ValueError, match=r"loss: expected one number for the task, got \[5, 1\]; take its mean"):
        gradient_update_parameters(model, model(x))
    with pytest.raises(ValueError, match=r"step_size: expected a step size for each of 0.weight.*'0.bias' has none"):
        gradient_update_parameters(model, loss, step_size={"0.weight": 0.1, "2.weight": 0.1, "2.bias": 0.1})
    with pytest.raises(RuntimeError, match=r"got one that does not on 2\.weight, 2\.bias"):
        gradient_update_parameters(model, model[0](x).square().mean())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad"):
        gradient_update_parameters(model, model(x).square().mean())
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'0.bias' does not; leave it out of params="):
        gradient_update_parameters(model, model(x).square().mean())


def test_errors_of_the_call() -> None:
    model, (sx, sy, qx, qy), _ = case("mlp")
    with pytest.raises(ValueError, match=r"model: expected a torchmeta.modules.MetaModule, got Linear"):
        meta_loss(nn.Linear(1, 1), sx, sy, qx, qy)
    with pytest.raises(
        ValueError, match=r"batch: expected 'train' or 'support', and 'test' or 'query'; got \['train'\]"
    ):
        meta_loss(model, {"train": (sx, sy)})
    with pytest.raises(ValueError, match="step_size: expected a step size for each"):
        meta_loss(model, sx, sy, qx, qy, step_size={"0.weight": 0.1}, loss="mse")
    with pytest.raises(TypeError, match="step_size: expected a number or a tensor, got 'much'"):
        meta_loss(model, sx, sy, qx, qy, step_size="much", loss="mse")
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'0\.bias' does not"):
        meta_loss(model, sx, sy, qx, qy, step_size=0.1, loss="mse")


# --- a script that knows only `import torchmeta` ---


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "one line"])
def test_a_script_trains(fused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parent / "scripts" / "torchmeta_maml.py"
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "argv", [str(script), "--num-batches", "30", *(["--fused"] if fused else [])])
    mtml.compat.install("torchmeta")
    try:
        assert runpy.run_path(str(script), run_name="__main__")["torchmeta"] is torchmeta
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchmeta"]:
            del sys.modules[name]
    first, last = map(float, capsys.readouterr().out.removeprefix("loss ").split(" -> "))
    assert last < 0.9 * first
