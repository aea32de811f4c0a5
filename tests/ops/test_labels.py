"""Targets of a wrong dtype, shape, range or device are called sy and qy everywhere; class ids may be any integers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same
from torch import Tensor, nn

import mtml
from mtml import ANIL, MAML, FallbackWarning
from mtml_kernels.checks import NARROW
from mtml_kernels.losses import KINDS, LOSSES, TaskLoss, resolve

T, S, C, WIDTH = 1, 8, 3, 64
SIDES = ("sy", "qy")
ids_losses = [kind for kind in KINDS if LOSSES[kind].ids]
value_losses = [kind for kind in KINDS if not LOSSES[kind].ids]


def perceptron(loss: str, **options: Any) -> MAML:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, C)).double()
    return MAML(model, 0.1, loss=loss, **options)


PATHS: dict[str, Callable[[str], Any]] = {
    "fused": perceptron,
    "weights": lambda loss: perceptron(loss, backend="cpu:weights"),
    "reference": lambda loss: perceptron(loss, backend="reference"),
    "general": lambda loss: perceptron(loss, backend="general"),
    "trunk": lambda loss: perceptron(loss, params="2.*", steps=8),
    "gram": lambda loss: MAML(nn.Linear(WIDTH, C).double(), 0.1, loss=loss, steps=8),
    "anil": lambda loss: ANIL(nn.Tanh(), nn.Linear(WIDTH, C).double(), 0.1, loss=loss, steps=8),
    "adapted": lambda loss: Judge(perceptron(loss)),
}
made = functools.cache(lambda path, loss: PATHS[path](loss))  # what is refused is never kept as a prepared path
every_path = pytest.mark.parametrize("path", PATHS)


class Judge:
    """`Adapted.loss` in the place of the query loss."""

    def __init__(self, maml: MAML) -> None:
        self.maml = maml

    def meta_loss(self, sx: Tensor, sy: Any, qx: Tensor, qy: Any) -> Tensor:
        return self.maml.adapt_tasks(sx, sy).loss(qx, qy)


def ids() -> Tensor:
    return torch.arange(T * S).reshape(T, S) % C


def values() -> Tensor:
    return torch.linspace(0, 1, T * S * C, dtype=torch.float64).reshape(T, S, C)


def run(path: str, loss: str, side: str, target: Any, good: Tensor) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, T, S, WIDTH, dtype=torch.float64)
    batch = [x[0], good, x[1], good]
    batch[1 if side == "sy" else 3] = target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        result: Tensor = made(path, loss).meta_loss(*batch)
    return result


def test_the_paths_are_the_ones_meant() -> None:
    x = torch.zeros(T, S, WIDTH, dtype=torch.float64)
    batch = (x, ids(), x, ids())
    for path in ("gram", "anil"):
        explanation = PATHS[path]("cross_entropy").explain(*batch)
        assert "Gram" in f"{explanation.kernel} {explanation.reason}"
    assert "runs once" in PATHS["trunk"]("cross_entropy").explain(*batch).trunk
    assert PATHS["fused"]("cross_entropy").explain(*batch).path == "fused"


# a batch is checked before anything runs, and the targets of `Adapted.loss` beside the outputs
SHAPE = "(expected its first dimensions|expected class ids of shape|expected the shape of the model's output)"
WRONG_IDS: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "float": (TypeError, lambda: ids().double(), r"\.long\(\)"),
    "bool": (TypeError, lambda: ids() > 0, r"\.long\(\)"),
    "complex": (TypeError, lambda: ids().to(torch.complex64), r"\.long\(\)"),
    "one_hot": (ValueError, lambda: F.one_hot(ids(), C), r"expected class ids of shape \[1, 8\].*argmax"),
    "last_1": (ValueError, lambda: ids()[..., None], r"expected class ids of shape \[1, 8\].*squeeze"),
    "per_task": (ValueError, lambda: ids()[:, 0], SHAPE),
    "too_few_samples": (ValueError, lambda: ids()[:, 1:], SHAPE),
    "too_many_tasks": (ValueError, lambda: ids().repeat(2, 1), SHAPE),
    "few_probabilities": (ValueError, lambda: values()[..., :2], r"expected class ids of shape \[1, 8\]"),
    "negative": (ValueError, lambda: ids() - 1, "expected class ids .*got -1"),
    "too_high": (ValueError, lambda: ids() + 1, "expected class ids .*got 3"),
    "too_high_int32": (ValueError, lambda: ids().int() + 1, "expected class ids .*got 3"),
    "list": (TypeError, lambda: ids().tolist(), "expected a tensor"),
    "numpy": (TypeError, lambda: ids().numpy(), "expected a tensor"),
    "meta": (ValueError, lambda: ids().to("meta"), "expected the model's device cpu, got meta"),
}


@every_path
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("wrong", WRONG_IDS)
def test_wrong_class_ids(path: str, side: str, wrong: str) -> None:
    error, target, words = WRONG_IDS[wrong]
    with pytest.raises(error, match=rf"^{side}(\[0\]\[0\])?: .*{words}"):
        run(path, "cross_entropy", side, target(), ids())


WRONG_VALUES: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "int": (TypeError, lambda: values().long(), r"expected floating-point targets.*\.float\(\)"),
    "bool": (TypeError, lambda: values() > 0.5, "expected floating-point targets"),
    "complex": (TypeError, lambda: values().to(torch.complex128), "expected floating-point targets"),
    "ids": (ValueError, ids, r"expected the shape of the model's output \[1, 8, 3\]"),
    "one_column": (ValueError, lambda: values()[..., :1], r"expected the shape of the model's output"),
    "one_more": (ValueError, lambda: values()[..., None], r"expected the shape of the model's output"),
    "per_task": (ValueError, lambda: values()[:, 0, 0], SHAPE),
    "list": (TypeError, lambda: values().tolist(), "expected a tensor"),
    "meta": (ValueError, lambda: values().to("meta"), "expected the model's device cpu, got meta"),
}


@every_path
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("loss", value_losses)
def test_wrong_values(path: str, side: str, loss: str) -> None:
    for error, target, words in WRONG_VALUES.values():
        with pytest.raises(error, match=rf"^{side}(\[0\]\[0\]\[0\])?: .*{words}"):
            run(path, loss, side, target(), values())


@every_path
@pytest.mark.parametrize("side", SIDES)
def test_class_ids_of_every_integer_type(path: str, side: str) -> None:
    want = run(path, "cross_entropy", side, ids(), ids())
    for dtype in sorted(NARROW, key=str):
        assert_same(run(path, "cross_entropy", side, ids().to(dtype), ids()), want)


@every_path
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("loss", value_losses)
def test_values_of_another_float_type(path: str, side: str, loss: str) -> None:
    """The engine says which one it needs; PyTorch operations promote, whatever the loss."""
    narrow = values().float()
    if path == "general" or (path, side) == ("adapted", "qy"):
        assert_same(run(path, loss, side, narrow, values()), run(path, loss, side, narrow.double(), values()))
    else:
        with pytest.raises(TypeError, match=rf"^{side}: expected float64 .*got float32; .*\.to\(torch.float64\)"):
            run(path, loss, side, narrow, values())


def test_class_ids_of_every_integer_type_under_vmap() -> None:
    x, y = torch.randn(4, 8, WIDTH, dtype=torch.float64), torch.randint(C, (4, 8))
    for dtype in (torch.int64, torch.int32, torch.uint8):
        parts = torch.func.vmap(TaskLoss(resolve("cross_entropy")))(x[..., :C], y.to(dtype))
        assert_same(parts, torch.stack([F.cross_entropy(a, b) for a, b in zip(x[..., :C], y, strict=True)]))


def test_probabilities_are_refused_by_anil_with_a_way_out() -> None:
    for side in SIDES:
        with pytest.raises(ValueError, match=rf"^{side}: expected class ids .*got probabilities .*mtml.MAML"):
            run("anil", "cross_entropy", side, values(), ids())


def test_other_errors_of_the_engine_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise ValueError("step_weights: as it was")

    monkeypatch.setattr(mtml.paths.fused, "inner_loop_call", fails)
    monkeypatch.setattr(mtml.paths.shortcut, "run", fails)  # calls like one before
    with pytest.raises(ValueError, match=r"^step_weights: as it was$"):
        run("weights", "cross_entropy", "sy", ids(), ids())
