"""Reptile: move the initialisation towards the adapted parameters; no query sets, no derivative of the inner loop."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mtml.algorithms.base import CallOptions, MetaOutput
from mtml.algorithms.gram import some_tasks
from mtml.algorithms.learner import LearnerOptions, ModelLearner, Rate
from mtml.params import ParamsArg
from mtml.paths.batch import unpacked
from mtml_kernels.checks import check_finite

__all__ = ["Reptile"]


class Reptile(ModelLearner):
    """The initialisation moves towards where K inner steps lead on each task's data.

        phi_t = U_t^K(theta)                                  K steps on task t, by any rule
        theta <- theta + eps (phi_t - theta)                  serial: task after task
        theta <- theta + eps mean_t (phi_t - theta)           batched

    `meta_loss` gives 1/2 |theta - phi_t|^2 of every task, phi_t being a constant: its gradient is Reptile's theta -
    phi_t, so that ``loss.mean().backward()`` and any optimizer make a step, torch.optim.SGD(lr=eps) the published one.
    `meta_step` makes the published one in place, serial or batched. The inner steps of all tasks are one fused call
    that keeps nothing.

    Args:
        model, lr, params and the keyword arguments: as of `MAML`. The published inner rule is
            ``update=mtml.inner.Adam(betas=(0.0, 0.999))``, with new data at every step (``per_step=True``). Tensors
            that require no grad may be adapted as well, and are not meta-trained.

    Query sets are not looked at: a task's data is sx, sy. `adapt_tasks` adapts to unseen tasks, as `MAML`'s.

    Raises:
        ValueError, TypeError: as `MAML`.

    Example:
        >>> import torch, mtml
        >>> reptile = mtml.Reptile(torch.nn.Linear(2, 1), lr=0.1, steps=5, loss="mse")
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> reptile.meta_loss(x, y).mean().backward()  # for an optimizer of your own, or
        >>> reptile.meta_step(x, y, step_size=0.5, serial=True).shape  # support losses [K, T]
        torch.Size([5, 4])

    Paper: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018 (arXiv:1803.02999).
    """

    def __init__(
        self, model: nn.Module, lr: Rate, *, params: ParamsArg = None, **options: Unpack[LearnerOptions]
    ) -> None:
        super().__init__(model, lr, True, params=params, **options)

    def meta_forward(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> MetaOutput:
        """loss [T] = 1/2 |theta - phi_t|^2, no output, support_losses [K, T] before each step.

        Args:
            sx, sy: the tasks' data, or a TaskBatch alone; qx, qy may be given and are not looked at.
            options: steps, support_mask, per_step and query_mask (not looked at) as of `MAML.meta_forward`.

        Raises:
            ValueError: another option of `MAML.meta_forward`.
        """
        others = {name for name, value in options.items() if value is not None and value is not False}
        others -= {"steps", "support_mask", "query_mask", "per_step"}
        if others:
            raise ValueError(f"{', '.join(sorted(others))}: Reptile has no such option; see mtml.MAML or mtml.FOMAML")
        if sy is None:
            mask = options.get("support_mask")
            sx, sy, _, _, mask, _ = unpacked(sx, sy, None, None, mask, None, self, adapting=True)
            options["support_mask"] = mask
        adapted, losses = self._inner(sx, sy, options)
        own = {name: p for name, p in self.module.named_parameters() if p.requires_grad and name in adapted}
        each = [(p - adapted[name]).flatten(1).square().sum(1) for name, p in own.items()]
        loss = 0.5 * torch.stack(each).sum(0) if each else losses.new_zeros(losses.shape[1])
        return MetaOutput(loss, None, losses)

    @torch.no_grad()
    def meta_step(
        self,
        sx: Any,
        sy: Any = None,
        *,
        step_size: float,
        serial: bool = False,
        steps: int | None = None,
        support_mask: Tensor | None = None,
        per_step: bool = False,
    ) -> Tensor:
        """One published step in place, of size eps = `step_size`: once by the tasks' mean, or `serial` task by task.

        Arguments and errors as of `meta_forward`. Returns the support losses [K, T].
        """
        check_finite("step_size", step_size)
        if sy is None:
            sx, sy, _, _, support_mask, _ = unpacked(sx, sy, None, None, support_mask, None, self, adapting=True)
        count = pytree.tree_leaves(sx)[0].shape[0]
        parts = [slice(t, t + 1) for t in range(count)] if serial else [slice(0, count)]
        found = []
        for part in parts:
            x, y, mask = some_tasks((sx, sy, support_mask), part)
            adapted, losses = self._inner(x, y, {"steps": steps, "support_mask": mask, "per_step": per_step})
            for name, p in self.module.named_parameters():
                if p.requires_grad and name in adapted:
                    p.add_(adapted[name].sub_(p).mean(0), alpha=step_size)
            found.append(losses)
        return torch.cat(found, 1)

    def _inner(self, sx: Any, sy: Any, options: CallOptions) -> tuple[dict[str, Tensor], Tensor]:
        """The adapted tensors [T, *shape] by name, and the support losses, as values."""
        with torch.no_grad():
            found = self.adapt_tasks(
                sx,
                sy,
                steps=options.get("steps"),
                support_mask=options.get("support_mask"),
                per_step=options.get("per_step", False),
            )
        return found.params, found.support_losses
