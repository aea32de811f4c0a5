"""The general path: MAML's inner loop for any module, loss, learning rate and update rule, exact to every order.

Nothing is approximated and nothing is hidden: each task runs in ordinary PyTorch operations, under vmap or one after
another, whichever was measured to be faster for these shapes (`mtml_kernels.general.choice`). It is what the fused
engine falls back to, and what to ask for (backend="general") when gradients of meta-gradients are wanted.
"""

from mtml_kernels.general.choice import Probe, choose, probe
from mtml_kernels.general.loop import GeneralPlan, GeneralResult, forward_tasks, general_inner_loop
from mtml_kernels.general.task import TaskRule, apply_update
from mtml_kernels.general.twin import twin
from mtml_kernels.general.unused import refuse_unused

__all__ = [
    "GeneralPlan",
    "GeneralResult",
    "Probe",
    "TaskRule",
    "apply_update",
    "choose",
    "forward_tasks",
    "general_inner_loop",
    "probe",
    "refuse_unused",
    "twin",
]
