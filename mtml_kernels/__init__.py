"""mtml-kernels: the engine that runs MAML's inner loop, for a whole batch of tasks, as one exact operation.

Importing the package loads nothing else: each name below comes with its module when it is first used. The documented
functions are in `functional`, what every backend must compute in `reference`, this machine's report in `doctor`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtml_kernels._version import __version__

if TYPE_CHECKING:
    from mtml_kernels.errors import BackendUnavailable, DeviceMemoryError, FallbackWarning
    from mtml_kernels.functional.head_inner_loop import head_inner_loop
    from mtml_kernels.functional.hvp import hvp
    from mtml_kernels.functional.inner_loop import inner_loop
    from mtml_kernels.functional.linear_multihead_loss import linear_multihead_gram, linear_multihead_loss
    from mtml_kernels.functional.multihead_loss import multihead_loss
    from mtml_kernels.functional.task_conv2d import task_conv2d
    from mtml_kernels.functional.task_linear import task_linear
    from mtml_kernels.functional.task_update import task_update
    from mtml_kernels.program import Program, Unfusable, trace
    from mtml_kernels.schema.losses import HeadLoss, LossSpec

_HOME = {
    "BackendUnavailable": "errors",
    "DeviceMemoryError": "errors",
    "FallbackWarning": "errors",
    "HeadLoss": "losses",
    "LossSpec": "losses",
    "Program": "program",
    "Unfusable": "program",
    "head_inner_loop": "functional.head_inner_loop",
    "hvp": "functional.hvp",
    "inner_loop": "functional.inner_loop",
    "linear_multihead_gram": "functional.linear_multihead_loss",
    "linear_multihead_loss": "functional.linear_multihead_loss",
    "multihead_loss": "functional.multihead_loss",
    "task_conv2d": "functional.task_conv2d",
    "task_linear": "functional.task_linear",
    "task_update": "functional.task_update",
    "trace": "program",
}

__all__ = [
    "BackendUnavailable",
    "DeviceMemoryError",
    "FallbackWarning",
    "HeadLoss",
    "LossSpec",
    "Program",
    "Unfusable",
    "__version__",
    "head_inner_loop",
    "hvp",
    "inner_loop",
    "linear_multihead_gram",
    "linear_multihead_loss",
    "multihead_loss",
    "task_conv2d",
    "task_linear",
    "task_update",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # from now on without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
