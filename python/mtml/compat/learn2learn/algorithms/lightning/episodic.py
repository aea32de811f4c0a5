"""What learners for Lightning have in common: a batch is one task."""

from __future__ import annotations

import abc
from argparse import ArgumentParser
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtml.compat.learn2learn.utils.with_lightning import pytorch_lightning

__all__ = ["LightningEpisodicModule", "split_episode"]

_lightning: Any = pytorch_lightning()


def split_episode(batch: tuple[Tensor, Tensor], ways: int, shots: int, queries: int) -> tuple[Tensor, ...]:
    """sx, sy, qx, qy of a task (data [N, ...], labels [N]), class after class, each of `shots` and then `queries`.

    Raises ValueError where N is not ways * (shots + queries).
    """
    data, labels = batch
    if len(data) != ways * (shots + queries):
        raise ValueError(
            f"batch: expected ways * (shots + queries) = {ways} * ({shots} + {queries}) samples, got {len(data)}; draw "
            "tasks of that size, or pass train_ways, train_shots, train_queries (test_...)"
        )
    support = torch.arange(len(data)) % (shots + queries) < shots
    return data[support], labels[support], data[~support], labels[~support]


class LightningEpisodicModule(_lightning.LightningModule):  # Any: it need not be installed
    """Training, validation and test steps that call `meta_learn` with one task.

    Options are keyword arguments of the classes made of it, and class attributes here: train_ways, train_shots,
    train_queries, test_ways, test_shots, test_queries, and lr, scheduler_step, scheduler_decay of Adam and StepLR.
    """

    train_shots: int = 1
    train_queries: int = 1
    train_ways: int = 5
    test_shots: int = 1
    test_queries: int = 1
    test_ways: int = 5
    lr: float = 0.001
    scheduler_step: int = 20
    scheduler_decay: float = 1.0

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "train_ways",
        "train_shots",
        "train_queries",
        "test_ways",
        "test_shots",
        "test_queries",
        "lr",
        "scheduler_step",
        "scheduler_decay",
    )

    def _take(self, given: dict[str, Any]) -> None:
        """Set the options given, and save all as hyper-parameters. Others pass: scripts hand over all arguments."""
        for name in self.OPTIONS:
            setattr(self, name, given.get(name, getattr(type(self), name)))
        self.data_parallel = bool(given.get("data_parallel", False)) and torch.cuda.device_count() > 1
        self.save_hyperparameters({name: getattr(self, name) for name in self.OPTIONS})

    def _same_ways(self) -> None:
        if self.train_ways != self.test_ways:
            raise ValueError(
                f"test_ways: expected train_ways={self.train_ways}, as a classifier has one number of classes, got "
                f"{self.test_ways}"
            )

    @classmethod
    def _add_options(cls, parent: ArgumentParser) -> ArgumentParser:
        parser = ArgumentParser(parents=[parent], add_help=True, conflict_handler="resolve")
        for name in cls.OPTIONS:
            default = getattr(cls, name)
            parser.add_argument(f"--{name}", type=type(default), default=default)
        parser.add_argument("--data_parallel", action="store_true", help="use every visible GPU")
        return parser

    @classmethod
    def add_model_specific_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """A parser with the parent's arguments and these options."""
        return cls._add_options(parent_parser)

    @abc.abstractmethod
    def meta_learn(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) on the queries of one task."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, accuracy = self.meta_learn(batch, batch_idx, self.train_ways, self.train_shots, self.train_queries)
        self._log("train", loss, accuracy)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> float:
        return self._judged("valid", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> float:
        return self._judged("test", batch, batch_idx)

    def _judged(self, name: str, batch: Any, batch_idx: int) -> float:
        loss, accuracy = self.meta_learn(batch, batch_idx, self.test_ways, self.test_shots, self.test_queries)
        self._log(name, loss, accuracy)
        return loss.item()

    def _log(self, name: str, loss: Tensor, accuracy: Tensor) -> None:
        self.log(f"{name}_loss", loss.item(), on_step=False, on_epoch=True, prog_bar=False, logger=True)
        self.log(f"{name}_accuracy", accuracy.item(), on_step=False, on_epoch=True, prog_bar=True, logger=True)

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """Adam, and StepLR."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.scheduler_step, self.scheduler_decay)
        return [optimizer], [schedule]
