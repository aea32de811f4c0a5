"""Models of one group adapted to a batch of tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtml.adapted import Adapted
from mtml.multitask.features import GroupModel, as_rows
from mtml.multitask.targets import check_set, mask_rows, target_rows
from mtml_kernels.functional.multihead_loss import multihead_loss

__all__ = ["AdaptedGroup"]


class AdaptedGroup(Adapted):
    """What `MultiTaskMAML.transfer` returns: an `Adapted` whose outputs and loss are those of the group's head.

    Where the head alone was adapted, the trunk runs once over the samples of all tasks.
    """

    model: GroupModel

    def __call__(self, x: Any, step: int = -1) -> Tensor:
        """Predictions of each task's model on its own inputs: x [T, N, ...] -> [T, N, ...], as `Head` says of [N, ...].

        Raises as `Adapted`.
        """
        params = self.params_at(step)
        if any(not name.startswith("head.") for name in params):
            found: Tensor = super().__call__(x, step)
            return found
        self._check_tasks("x", x)
        layer = self.model.head
        features = self.model.features(x)[0]  # [T, N, D], [T, N, D, H, W] or [T, N, L, D]
        moved = features.movedim(2, -1) if layer.head.channels == 1 else features
        weight, bias = params.get("head.weight", layer.weight), params.get("head.bias", layer.bias)
        rows = moved.flatten(1, -2) @ weight.mT
        rows = rows if bias is None else rows + (bias[:, None] if "head.bias" in params else bias)
        prediction = rows.unflatten(1, moved.shape[1:-1])
        return prediction.movedim(-1, 2) if layer.head.channels == 1 else prediction

    def loss(self, qx: Any, qy: Any = None, *, query_mask: Tensor | None = None, step: int = -1) -> Tensor:
        """The head's loss of every task [T]; arguments as of `Adapted.loss`, masks as of `MultiTaskMAML.meta_loss`."""
        if qy is None and hasattr(qx, "qx"):
            qx, qy, query_mask = qx.qx, qx.qy, qx.query_mask if query_mask is None else query_mask
        layer, output = self.model.head, self(qx, step)
        check_set("qy", layer.head, output, qy, query_mask)
        masks = mask_rows(layer.head, qy, query_mask)
        return multihead_loss(
            as_rows(layer.head, output).unbind(),
            target_rows(layer.head, qy).unbind(),
            [layer.head.spec] * self.tasks,
            sample_weights=None if masks is None else masks.unbind(),
            class_weights=[layer.class_weights] * self.tasks,
            pos_weights=[layer.pos_weight] * self.tasks,
        )
