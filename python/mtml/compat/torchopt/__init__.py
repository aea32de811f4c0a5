"""TorchOpt's interface, on torch alone: differentiable optimizers of modules, and what they are made of.

>>> import torch
>>> from mtml.compat import torchopt
>>> net = torch.nn.Linear(1, 1)
>>> inner = torchopt.MetaSGD(net, lr=0.1)
>>> x, y = torch.randn(4, 5, 1), torch.randn(4, 5, 1)
>>> state, states = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
>>> losses = []
>>> for task in range(4):
...     inner.step((net(x[task]) - y[task]).square().mean())
...     losses.append((net(x[task]) - y[task]).square().mean())
...     torchopt.recover_state_dict(net, state)
...     torchopt.recover_state_dict(inner, states)
>>> torch.allclose(torch.stack(losses), torchopt.meta_loss(net, inner, x, y, x, y, loss="mse"))  # all tasks at once
True

Not here: implicit and zero-order gradients, RPC, solvers and drawing; each import of them says so.
"""

from __future__ import annotations

from typing import Any

from mtml.compat.torchopt import (
    accelerated_op,
    alias,
    base,
    clip,
    combine,
    hook,
    optim,
    pytree,
    schedule,
    transform,
    typing,
    update,
    utils,
    version,
)
from mtml.compat.torchopt.absent import ABSENT, absent
from mtml.compat.torchopt.accelerated_op import is_available as accelerated_op_available
from mtml.compat.torchopt.alias import adadelta, adagrad, adam, adamax, adamw, radam, rmsprop, sgd
from mtml.compat.torchopt.clip import clip_grad_norm
from mtml.compat.torchopt.combine import chain
from mtml.compat.torchopt.engine import meta_loss
from mtml.compat.torchopt.hook import register_hook
from mtml.compat.torchopt.optim import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    FuncOptimizer,
    Optimizer,
    RAdam,
    RMSProp,
    RMSprop,
)
from mtml.compat.torchopt.optim.meta import (
    MetaAdaDelta,
    MetaAdadelta,
    MetaAdaGrad,
    MetaAdagrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamax,
    MetaAdamW,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaSGD,
)
from mtml.compat.torchopt.transform import nan_to_num
from mtml.compat.torchopt.update import apply_updates
from mtml.compat.torchopt.utils import (
    extract_state_dict,
    module_clone,
    module_detach_,
    recover_state_dict,
    stop_gradient,
)
from mtml.compat.torchopt.version import __version__

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "__version__",
    "accelerated_op",
    "accelerated_op_available",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "alias",
    "apply_updates",
    "base",
    "chain",
    "clip",
    "clip_grad_norm",
    "combine",
    "extract_state_dict",
    "hook",
    "meta_loss",
    "module_clone",
    "module_detach_",
    "nan_to_num",
    "optim",
    "pytree",
    "radam",
    "recover_state_dict",
    "register_hook",
    "rmsprop",
    "schedule",
    "sgd",
    "stop_gradient",
    "transform",
    "typing",
    "update",
    "utils",
    "version",
]


def __getattr__(name: str) -> Any:
    if name in ABSENT:
        raise AttributeError(absent(name))
    raise AttributeError(f"module 'mtml.compat.torchopt' has no attribute {name!r}")
