"""Gradient methods for several losses: shared parameters get one balanced update instead of the losses' sum.

>>> import torch, mtml
>>> trunk = torch.nn.Linear(4, 8)
>>> heads = mtml.MultiHead(8, {"a": mtml.Classification(3), "b": mtml.Regression(2)})
>>> targets = {"a": torch.randint(3, (5,)), "b": torch.randn(5, 2)}
>>> losses = heads.loss(trunk(torch.randn(5, 4)), targets, separate=True)
>>> result = mtml.balance.backward(losses, method="upgrad")
>>> trunk.weight.grad.shape, result.weights.shape
(torch.Size([8, 4]), torch.Size([2]))
"""

from mtml.balance.affinity import gram, task_affinity
from mtml.balance.fair import fairgrad, nash
from mtml.balance.gradvac import GradVac
from mtml.balance.methods import METHODS, aligned_mtl, cagrad, config, dualproj, imtl_g, mgda, pcgrad, upgrad
from mtml.balance.modo import MoDo
from mtml.balance.update import BalanceResult, backward

__all__ = [
    "METHODS",
    "BalanceResult",
    "GradVac",
    "MoDo",
    "aligned_mtl",
    "backward",
    "cagrad",
    "config",
    "dualproj",
    "fairgrad",
    "gram",
    "imtl_g",
    "mgda",
    "nash",
    "pcgrad",
    "task_affinity",
    "upgrad",
]
