"""Warnings come once for a model: for each kind of reason to fall back, and for statistics that nothing updated."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import regression
from torch import Tensor, nn

from mtml import MAML, FallbackWarning


def caught(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return list(found)


# --- what falls back --------------------------------------------------------------------------------------------------


class Resized(nn.Module):
    """Its obstacles have the sizes of the input in their words."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "sort":
            x = x.sort(1).values
        if self.kind == "elements":
            x = x.unflatten(1, (2, -1)).transpose(2, 3).transpose(2, 3).flatten(1, 2)
        if self.kind == "transpose":
            x = x.transpose(0, 1).transpose(0, 1)
        return self.layer(x.mean(1))


def batch(points: int, tasks: int = 1, support: int = 5) -> tuple[Tensor, ...]:
    sx = torch.randn(tasks, support, points, 3, dtype=torch.float64)
    qx = torch.randn(tasks, 4, points, 3, dtype=torch.float64)
    return sx, sx.mean(2)[..., :2], qx, qx.mean(2)[..., :2]


@pytest.mark.parametrize("kind", ["sort", "elements", "transpose"])
def test_once_for_every_size(kind: str) -> None:
    maml = MAML(Resized(kind).double(), 0.1, loss="mse")
    first, *others = (caught(lambda n=n: maml.meta_loss(*batch(n))) for n in (4, 8, 12))
    assert [w.category for w in first] == [FallbackWarning] and first[0].filename == __file__
    assert others == [[], []]
    assert not caught(lambda: maml.meta_loss(*batch(6, support=6)))


def test_once_for_every_size_of_a_query_set() -> None:
    """qx: samples of shape [(7, 3)], in sx of [(4, 3)]: another text for every pair."""
    maml = MAML(Resized("none").double(), 0.1, loss="mse")
    messages = []
    for support, query in itertools.permutations((4, 7, 12), 2):
        (sx, sy, _, _), (_, _, qx, qy) = batch(support), batch(query)
        messages += caught(lambda b=(sx, sy, qx, qy): maml.meta_loss(*b))
    assert len(messages) == 1 and "qx: samples of shape" in str(messages[0].message)


def test_once_for_a_model_whoever_adapts_it() -> None:
    model = Resized("sort").double()
    assert len(caught(lambda: MAML(model, 0.1, loss="mse").meta_loss(*batch(4)))) == 1
    assert not caught(lambda: MAML(model, 0.2, steps=2, loss="mse").meta_loss(*batch(6)))
    assert len(caught(lambda: MAML(copy.deepcopy(model), 0.1, loss="mse").meta_loss(*batch(4)))) == 1


def test_another_reason_is_said() -> None:
    """Another layer, another kind of obstacle, another loss: each is news."""
    model = nn.Sequential(nn.Linear(3, 4), nn.CELU(), nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)).double()
    maml, data = MAML(model, 0.1, loss="mse"), regression(1)
    (first,) = caught(lambda: maml.meta_loss(*data))
    assert "1 (CELU)" in str(first.message)
    model[3] = nn.CELU()
    (second,) = caught(lambda: maml.meta_loss(*data))
    assert "3 (CELU)" in str(second.message)
    maml.loss = lambda output, y: F.mse_loss(output, y)
    (third,) = caught(lambda: maml.meta_loss(*data))
    assert "<lambda>" in str(third.message)
    assert not caught(lambda: maml.meta_loss(*regression(1, 3, 6)))


# --- statistics that nothing updated ----------------------------------------------------------------------------------


def normed(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)
    ).double()


WORDS = r"batch_norm='\w+': layer '1' and 1 more .*never updated .*batch_norm='track' .*batch_norm='batch'"


@pytest.mark.parametrize("backend", ["auto", "general"])
@pytest.mark.parametrize("mode", ["module", "running"])
def test_statistics_that_were_never_updated(mode: str, backend: str) -> None:
    maml, data = MAML(normed(), 0.1, loss="mse", batch_norm=mode, backend=backend), regression(1)
    if mode == "module":
        assert not caught(lambda: maml.meta_loss(*data))  # in train mode they are not read
    maml.eval()
    with pytest.warns(UserWarning, match=WORDS) as found:
        maml.meta_loss(*data)
    assert len(found) == 1 and found[0].filename == __file__
    assert not caught(lambda: maml.meta_loss(*data))
    assert not caught(lambda: maml.adapt_tasks(*data[:2])(data[0]))
    assert not caught(lambda: maml.train().eval().meta_loss(*regression(2)))


def test_adapted_models_say_it_too() -> None:
    maml, (sx, sy, qx, _) = MAML(normed(), 0.1, loss="mse"), regression(1)
    adapted = maml.adapt_tasks(sx, sy)
    assert not caught(lambda: adapted(qx))
    maml.eval()
    (found,) = caught(lambda: adapted(qx))
    assert "never updated" in str(found.message) and found.filename == __file__


def test_statistics_that_were_updated_or_are_not_read() -> None:
    data = regression(1)

    def quiet(model: nn.Module, mode: str = "module") -> None:
        maml = MAML(model.eval(), 0.1, loss="mse", batch_norm=mode, backend="general")
        assert not caught(lambda: maml.meta_loss(*data))

    updated = normed()
    updated(torch.randn(8, 3, dtype=torch.float64))
    quiet(updated)
    tracked = MAML(normed(), 0.1, loss="mse", batch_norm="track", backend="general")
    tracked.meta_loss(*data)
    quiet(tracked.module)
    by_hand = normed()
    for layer in (by_hand[1], by_hand[3]):  # as of a checkpoint without a count
        layer.running_mean.fill_(0.5)
    quiet(by_hand)
    quiet(normed(), "batch")
    quiet(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).double())
    quiet(nn.Sequential(nn.Linear(3, 2)).double())
