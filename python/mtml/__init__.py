"""mtml: meta-learning on the fused kernels of `mtml_kernels`.

>>> import torch, mtml
>>> model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
>>> maml = mtml.MAML(model, lr=0.01, steps=5, loss="mse")
>>> x, y = torch.randn(25, 10, 1), torch.randn(25, 10, 1)
>>> maml.meta_loss(x, y, x, y).mean().backward()

Names are imported when they are first used, so that ``import mtml`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtml_kernels._version import __version__

if TYPE_CHECKING:
    from mtml import balance, compat, distributed, inner, tasks, weighting
    from mtml.adapted import Adapted
    from mtml.algorithms.anil import ANIL
    from mtml.algorithms.base import MetaOutput
    from mtml.algorithms.boil import BOIL
    from mtml.algorithms.cavia import CAVIA, Context
    from mtml.algorithms.fomaml import FOMAML
    from mtml.algorithms.imaml import IMAML
    from mtml.algorithms.maml import MAML
    from mtml.algorithms.maml_plus_plus import MAMLPlusPlus
    from mtml.algorithms.meta_curvature import MetaCurvature
    from mtml.algorithms.meta_sgd import MetaSGD
    from mtml.algorithms.proto_maml import ProtoMAML
    from mtml.algorithms.r2d2 import R2D2
    from mtml.algorithms.reptile import Reptile
    from mtml.balance.affinity import task_affinity
    from mtml.head_losses import HeadLosses
    from mtml.inner_lr import InnerLR
    from mtml.mapped.explain import TaskMapExplanation
    from mtml.mapped.task_map import TaskMap, task_map
    from mtml.multihead import MultiHead
    from mtml.multihead.heads import Classification, MultiLabel, Regression, Segmentation, Tokens
    from mtml.multitask.losses import MultiTaskLoss
    from mtml.multitask.multi_task import MultiTaskMAML
    from mtml.paths.explain import Explanation
    from mtml.tasks import TaskBatch
    from mtml_kernels.batch_norm import PerStepBatchNorm
    from mtml_kernels.errors import BackendUnavailable, DeviceMemoryError, FallbackWarning

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "R2D2",
    "Adapted",
    "BackendUnavailable",
    "Classification",
    "Context",
    "DeviceMemoryError",
    "Explanation",
    "FallbackWarning",
    "HeadLosses",
    "InnerLR",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaOutput",
    "MetaSGD",
    "MultiHead",
    "MultiLabel",
    "MultiTaskLoss",
    "MultiTaskMAML",
    "PerStepBatchNorm",
    "ProtoMAML",
    "Regression",
    "Reptile",
    "Segmentation",
    "TaskBatch",
    "TaskMap",
    "TaskMapExplanation",
    "Tokens",
    "__version__",
    "balance",
    "compat",
    "distributed",
    "inner",
    "task_affinity",
    "task_map",
    "tasks",
    "weighting",
]

_WHERE = {
    "ANIL": "mtml.algorithms.anil",
    "BOIL": "mtml.algorithms.boil",
    "CAVIA": "mtml.algorithms.cavia",
    "Context": "mtml.algorithms.cavia",
    "FOMAML": "mtml.algorithms.fomaml",
    "IMAML": "mtml.algorithms.imaml",
    "MAML": "mtml.algorithms.maml",
    "MAMLPlusPlus": "mtml.algorithms.maml_plus_plus",
    "MetaCurvature": "mtml.algorithms.meta_curvature",
    "MetaOutput": "mtml.algorithms.base",
    "MetaSGD": "mtml.algorithms.meta_sgd",
    "MultiTaskMAML": "mtml.multitask.multi_task",
    "ProtoMAML": "mtml.algorithms.proto_maml",
    "R2D2": "mtml.algorithms.r2d2",
    "Reptile": "mtml.algorithms.reptile",
    "Adapted": "mtml.adapted",
    "Explanation": "mtml.paths.explain",
    "InnerLR": "mtml.inner_lr",
    "MultiHead": "mtml.multihead",
    "HeadLosses": "mtml.head_losses",
    "MultiTaskLoss": "mtml.multitask.losses",
    "Classification": "mtml.multihead.heads",
    "MultiLabel": "mtml.multihead.heads",
    "Regression": "mtml.multihead.heads",
    "Segmentation": "mtml.multihead.heads",
    "Tokens": "mtml.multihead.heads",
    "task_affinity": "mtml.balance.affinity",
    "task_map": "mtml.mapped.task_map",
    "TaskMap": "mtml.mapped.task_map",
    "TaskMapExplanation": "mtml.mapped.explain",
    "TaskBatch": "mtml.tasks",
    "PerStepBatchNorm": "mtml_kernels.batch_norm",
    "BackendUnavailable": "mtml_kernels.errors",
    "DeviceMemoryError": "mtml_kernels.errors",
    "FallbackWarning": "mtml_kernels.errors",
}
_MODULES = ("balance", "compat", "distributed", "inner", "tasks", "train", "weighting")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mtml.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'mtml' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
