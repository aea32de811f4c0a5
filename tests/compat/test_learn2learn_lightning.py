"""learn2learn's Lightning classes, on a stand-in for Lightning: what they inherit is not theirs."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, mlp
from torch import Tensor, nn

import mtml.compat.learn2learn as l2l

NAMES = ("pytorch_lightning", "lightning", "lightning.pytorch")
OURS = (f"{l2l.__name__}.algorithms.lightning", f"{l2l.__name__}.utils.lightning")


class LightningModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, float] = {}
        self.hparams: dict[str, Any] = {}

    def log(self, name: str, value: float, **options: Any) -> None:
        self.logged[name] = value

    def save_hyperparameters(self, values: dict[str, Any]) -> None:
        self.hparams = dict(values)


class Callback:
    pass


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        del sys.modules[name]


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stand_in: Any = types.ModuleType("pytorch_lightning")
    stand_in.LightningModule, stand_in.LightningDataModule = LightningModule, type("LightningDataModule", (), {})
    stand_in.callbacks = types.SimpleNamespace(Callback=Callback)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", stand_in)
    forget()
    yield stand_in
    forget()


def episode(ways: int, each: int) -> tuple[Tensor, Tensor]:
    """Class after class, apart from each other."""
    labels = torch.arange(ways).repeat_interleave(each)
    return F.one_hot(labels, 4).double() + 0.1 * torch.randn(len(labels), 4, dtype=torch.float64), labels


def test_maml_is_the_loop(lightning: Any) -> None:
    model, (data, labels) = mlp(4, 6, 3), episode(3, 3)
    learner = l2l.algorithms.LightningMAML(
        model, train_ways=3, test_ways=3, train_shots=2, adaptation_steps=2, adaptation_lr=0.2
    )
    got = learner.training_step((data, labels), 0)
    clone, support = l2l.algorithms.MAML(model, 0.2).clone(), torch.arange(9) % 3 < 2
    for _ in range(2):
        clone.adapt(F.cross_entropy(clone(data[support]), labels[support]))
    assert_same(got, F.cross_entropy(clone(data[~support]), labels[~support]))
    got.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert learner.logged["train_loss"] == pytest.approx(got.item())
    assert learner.hparams["adaptation_lr"] == 0.2 and learner.hparams["train_shots"] == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["LightningMAML", "LightningANIL", "LightningPrototypicalNetworks"])
def test_validation_and_tests_adapt(lightning: Any, name: str, mode: Any) -> None:
    models = [mlp(4, 4), mlp(4, 3)][name == "LightningMAML" :]
    given = models[:1] if name == "LightningPrototypicalNetworks" else models
    learner = getattr(l2l.algorithms, name)(*given, train_ways=3, test_ways=3, adaptation_lr=3.0, adaptation_steps=20)
    with mode():  # as trainers call them, and make the batch
        loss = learner.validation_step(episode(3, 2), 0)
        assert isinstance(loss, float) and learner.logged["valid_accuracy"] == 1.0
        assert isinstance(learner.test_step(episode(3, 2), 0), float) and "test_loss" in learner.logged


def test_anil_trains_features_and_head(lightning: Any) -> None:
    features, head = mlp(4, 5, 5), mlp(5, 3)
    anil = l2l.algorithms.LightningANIL(features, head, train_ways=3, test_ways=3)
    optimizers, schedules = anil.configure_optimizers()
    batch = episode(3, 2)
    first = anil.training_step(batch, 0)
    for _ in range(30):
        optimizers[0].param_groups[0]["lr"] = 0.05
        optimizers[0].zero_grad()
        loss = anil.training_step(batch, 0)
        loss.backward()
        optimizers[0].step()
    assert loss < 0.5 * first and len(schedules) == 1
    assert all(p.grad is not None for p in (*features.parameters(), *head.parameters()))


def test_prototypes_in_any_order_of_classes(lightning: Any) -> None:
    learner = l2l.algorithms.LightningPrototypicalNetworks(nn.Identity(), train_ways=3, distance_metric="cosine")
    data, labels = episode(3, 2)
    order = torch.randperm(6)
    loss = learner.training_step((data[order], labels[order]), 0)
    assert learner.logged["train_accuracy"] == 1.0 and loss.item() < 1.0


def test_options_and_errors(lightning: Any) -> None:
    cls = l2l.algorithms.LightningMAML
    parsed = cls.add_model_specific_args(argparse.ArgumentParser(add_help=False)).parse_args(
        ["--train_ways", "7", "--adaptation_lr", "0.3"]
    )
    assert (parsed.train_ways, parsed.adaptation_lr, parsed.adaptation_steps, parsed.lr) == (7, 0.3, 1, 0.001)
    with pytest.raises(ValueError, match="test_ways: expected train_ways=3"):
        cls(mlp(4, 3), train_ways=3)
    assert cls(mlp(4, 5), root="~/data").hparams["lr"] == 0.001  # scripts hand over all of their arguments
    with pytest.raises(
        ValueError, match=r"batch: expected ways \* \(shots \+ queries\) = 5 \* \(1 \+ 1\) samples, got 9"
    ):
        cls(mlp(4, 5)).training_step(episode(3, 3), 0)


def test_episodic_batcher(lightning: Any) -> None:
    class Tasks:
        drawn = 0

        def sample(self) -> int:
            self.drawn += 1
            return self.drawn

    utils = importlib.import_module(f"{l2l.__name__}.utils.lightning")
    batcher = utils.EpisodicBatcher(Tasks(), epoch_length=3)
    assert list(batcher.train_dataloader()) == [1, 2, 3] and list(batcher.val_dataloader()) == [4, 5, 6]
    assert len(batcher.test_dataloader()) == 3 and batcher.test_tasks is batcher.train_tasks
    assert len(utils.EpisodicBatcher.epochify(Tasks(), 2)) == 2

    calls: list[Any] = []
    trainer = types.SimpleNamespace(test=lambda **options: calls.append(options))
    utils.TrackTestAccuracyCallback().on_validation_end(trainer, "module")
    assert calls == [{"model": "module", "verbose": False}]


def test_without_lightning_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    forget()
    assert l2l.algorithms.MAML
    for use in (lambda: l2l.algorithms.LightningMAML, lambda: importlib.import_module(OURS[1])):
        with pytest.raises(ImportError, match="PyTorch Lightning, which is not installed; pip install lightning, or"):
            use()
    forget()
