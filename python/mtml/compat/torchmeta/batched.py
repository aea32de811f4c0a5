"""A batch of tasks in one call: what a loop of `gradient_update_parameters` over the tasks computes, fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from mtml.algorithms.base import Loss, TaskOptions
from mtml.algorithms.maml import MAML
from mtml.compat.follow import follow
from mtml.compat.rate import scalar
from mtml.compat.torchmeta.utils.gradient_based import check_model, check_trainable, rates_by_name
from mtml.tasks import TaskBatch
from mtml_kernels.batch_norm import tracks
from mtml_kernels.checks import shown

__all__ = ["meta_loss"]

SETS = (("train", "support"), ("test", "query"))


def meta_loss(
    model: nn.Module,
    sx: Any,
    sy: Any = None,
    qx: Any = None,
    qy: Any = None,
    *,
    step_size: Any = 0.5,
    steps: int = 1,
    first_order: bool = False,
    loss: Loss = "cross_entropy",
    query_loss: Loss | None = None,
    backend: str = "auto",
    **options: Unpack[TaskOptions],
) -> Tensor:
    """The query loss of every task [T] after `steps` calls of `gradient_update_parameters`, by `mtml.MAML`.

    Gradients are those of the loop over the tasks, exact second order unless `first_order`, to `step_size` too. The
    MAML that does it is kept on the model, so that a training loop traces the model once.

    Args:
        model: a MetaModule, or one in `torch.nn.DataParallel`; its ``meta_named_parameters()`` are adapted.
        sx, sy, qx, qy: [T, S, ...], [T, S, ...], [T, Q, ...], [T, Q, ...]; or in their place a batch of
            `BatchMetaDataLoader`, {"train": (sx, sy), "test": (qx, qy)} (or "support" and "query"), or a `TaskBatch`.
        step_size: as of `gradient_update_parameters`.
        loss, query_loss, backend: as of `mtml.MAML`.
        options: as of `mtml.MAML.meta_forward`: masks, `step_weights`, ...

    Raises:
        ValueError: the model is no MetaModule; `step_size` lacks a name; a batch without the two sets; as `mtml.MAML`.
        RuntimeError: a parameter requires no grad, or the loss does not depend on it.

    Example:
        >>> import torch
        >>> from mtml.compat import torchmeta
        >>> from mtml.compat.torchmeta.modules import MetaLinear, MetaSequential
        >>> model = MetaSequential(MetaLinear(1, 16), torch.nn.ReLU(), MetaLinear(16, 1))
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> losses = torchmeta.meta_loss(model, x, y, x, y, step_size=0.01, steps=5, loss="mse")
        >>> losses.mean().backward()
    """
    if isinstance(model, nn.DataParallel):
        model, step_size = model.module, _inner_names(step_size)
    if sy is None and isinstance(sx, Mapping):
        sx = _batch(sx)
    named = dict(check_model(model).meta_named_parameters())
    maml = _kept(model, list(check_trainable(named)))
    batch_norm = "track" if tracks(model) else "module"  # running statistics move as in the loop
    follow(maml, lr=_rates(step_size, maml), loss=loss, query_loss=query_loss, backend=backend, batch_norm=batch_norm)
    return maml.meta_loss(sx, sy, qx, qy, steps=steps, first_order=first_order, **options)


def _inner_names(step_size: Any) -> Any:
    """By the names of the wrapped module."""
    if not hasattr(step_size, "items"):
        return step_size
    return {name.removeprefix("module."): rate for name, rate in step_size.items()}


def _batch(batch: Mapping[str, Any]) -> TaskBatch:
    found = [next((batch[name] for name in names if name in batch), None) for names in SETS]
    if found[0] is None or found[1] is None:
        raise ValueError(f"batch: expected 'train' or 'support', and 'test' or 'query'; got {shown(list(batch))}")
    return TaskBatch(*found[0], *found[1])


class _Engine:
    """What is kept on a model: no part of its state, and its copies and pickles start without."""

    __slots__ = ("maml",)

    def __init__(self) -> None:
        self.maml: MAML | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Engine, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engine:
        return _Engine()


def _kept(model: nn.Module, names: list[str]) -> MAML:
    """The model's own MAML of these parameters."""
    engine = model.__dict__.setdefault("_mtml_engine", _Engine())
    maml: MAML | None = engine.maml
    if maml is None or maml.module is not model or maml.params != names:
        maml = engine.maml = MAML(model, 0.5, params=names)
    return maml


def _rates(step_size: Any, maml: MAML) -> Any:
    """As MAML takes them; the ones that it has already where they are the same."""
    step_size = scalar(step_size)
    if isinstance(step_size, float | int):
        return float(step_size)
    names: Any = maml.params
    rates = {name: rate for name, rate in rates_by_name(step_size, names).items() if name in names}
    before = maml.lr
    same = isinstance(before, dict) and all(before.get(name) is rate for name, rate in rates.items())
    return before if same else rates
