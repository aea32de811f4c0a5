"""learn2learn.utils.lightning: tasks for a Lightning trainer."""

from __future__ import annotations

from typing import Any

from mtml.compat.learn2learn.utils.with_lightning import pytorch_lightning

__all__ = ["EpisodicBatcher", "TrackTestAccuracyCallback"]

_lightning: Any = pytorch_lightning()


class _Epoch:
    """`length` tasks, drawn when they are asked for."""

    def __init__(self, tasks: Any, length: int) -> None:
        self.tasks, self.length = tasks, length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)  # which ends an iteration
        return self.tasks.sample()

    def __len__(self) -> int:
        return self.length


class EpisodicBatcher(_lightning.LightningDataModule):  # Any: it need not be installed
    """Task sets as the data of a trainer: an epoch has `epoch_length` tasks of each.

    Args:
        train_tasks: what has a ``sample()`` -> (data, labels) of a task.
        validation_tasks, test_tasks: None for the set before.
    """

    def __init__(
        self, train_tasks: Any, validation_tasks: Any = None, test_tasks: Any = None, epoch_length: int = 1
    ) -> None:
        super().__init__()
        self.train_tasks = train_tasks
        self.validation_tasks = train_tasks if validation_tasks is None else validation_tasks
        self.test_tasks = self.validation_tasks if test_tasks is None else test_tasks
        self.epoch_length = epoch_length

    @staticmethod
    def epochify(taskset: Any, epoch_length: int) -> _Epoch:
        """The tasks of one epoch."""
        return _Epoch(taskset, epoch_length)

    def train_dataloader(self) -> _Epoch:
        return _Epoch(self.train_tasks, self.epoch_length)

    def val_dataloader(self) -> _Epoch:
        return _Epoch(self.validation_tasks, self.epoch_length)

    def test_dataloader(self) -> _Epoch:
        return _Epoch(self.test_tasks, self.epoch_length)


class TrackTestAccuracyCallback(_lightning.callbacks.Callback):
    """Tests after each validation."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        trainer.test(model=module, verbose=False)
