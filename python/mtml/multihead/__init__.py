"""Several heads on shared features: predictions, and all losses as one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from mtml.balance.affinity import gram
from mtml.head_losses import HeadLosses
from mtml.multihead.heads import Head, HeadLayer
from mtml.multihead.inputs import check_heads, check_names, check_target, mask_by_row, target_by_row
from mtml.weighting.base import Weighting
from mtml.weighting.following import takes_gradients
from mtml.weighting.make import make_weighting
from mtml_kernels.checks import shown
from mtml_kernels.functional.linear_multihead_loss import linear_multihead_loss
from mtml_kernels.functional.multihead_loss import multihead_loss
from mtml_kernels.neutral import uncompiled

__all__ = ["MultiHead"]

Features = Tensor | Mapping[str, Tensor]


class _RowWeights(TypedDict):
    sample_weights: list[Tensor | None]
    class_weights: list[Tensor | None]
    pos_weights: list[Tensor | None]


class MultiHead(nn.Module):
    """Heads on shared features, their losses in one call, and a weighting that makes them one.

    Args:
        in_features: the features' width D, one for all heads or {head: width}.
        heads: {name: head}; see `mtml.multihead.heads.Head` for what there is and which shapes each takes.
        weighting: "uncertainty", "sum", "dwa", "gls", "rlw", "gradnorm", "famo", "stch", "imtl_l", "cosmos",
            {head: fixed weight}, or a `Weighting`.

    Raises:
        ValueError, TypeError: no heads, names that a module cannot have, widths that do not fit the heads' names; when
            called, names, shapes, dtypes or devices that do not fit, each named with what was expected.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
        >>> heads = mtml.MultiHead(16, {"shape": mtml.Classification(3), "size": mtml.Regression(1)})
        >>> features = trunk(torch.randn(8, 4))
        >>> {name: tuple(prediction.shape) for name, prediction in heads(features).items()}
        {'shape': (8, 3), 'size': (8, 1)}
        >>> losses = heads.loss(features, {"shape": torch.randint(3, (8,)), "size": torch.randn(8, 1)})
        >>> losses.total.backward()

    Papers: those of the weightings, see `mtml.weighting`.
    """

    weighting: Weighting
    layers: Mapping[str, HeadLayer]  # a ModuleDict

    def __init__(
        self,
        in_features: int | Mapping[str, int],
        heads: Mapping[str, Head],
        weighting: str | Mapping[str, float] | Weighting = "uncertainty",
    ) -> None:
        super().__init__()
        self.heads = check_heads(heads)
        widths = in_features if isinstance(in_features, Mapping) else dict.fromkeys(self.heads, in_features)
        if set(widths) != set(self.heads):
            raise ValueError(f"in_features: expected a width for {', '.join(self.heads)}, got {', '.join(widths)}")
        layers = {name: HeadLayer(widths[name], head) for name, head in self.heads.items()}
        self.layers = nn.ModuleDict(layers)  # type: ignore[assignment]
        self.weighting = make_weighting(weighting)
        self.weighting.bind(self.heads)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """The predictions, {head: `Head`'s shape}, of features for all heads, or of {head: features} for those named.

        Class predictions are logits; gaussian_nll's are the means, then the log variances.
        """
        names = tuple(features) if isinstance(features, Mapping) else tuple(self.heads)
        return {name: self.layers[name](value) for name, value in self._features(features, names).items()}

    def loss(
        self,
        features: Features,
        targets: Mapping[str, Tensor],
        *,
        masks: Mapping[str, Tensor] | None = None,
        separate: bool = False,
    ) -> HeadLosses:
        """All losses of one batch. Under autocast they are computed in the heads' own dtype.

        Args:
            features: for all heads, or {head: features}.
            targets: {head: target}, for some or all heads. A head without is absent: its loss is 0, and it moves
                neither its layer nor its weighting. Heads whose targets are all ignored or masked out are
                absent too.
            masks: {head: bools or weights} of the samples [N], or of the pixels [N, H, W] or tokens [N, L].
            separate: keep the heads' gradients at the features apart, so that `mtml.balance` has them all from one
                backward pass through the heads.
        """
        if self.weighting.needs_norms and self.weighting.learning and is_dynamo_compiling():
            takes_gradients()
            found: HeadLosses = uncompiled(functools.partial(self._loss, separate=separate), features, targets, masks)
            return found
        return self._loss(features, targets, masks, separate=separate)

    def _loss(
        self,
        features: Features,
        targets: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
        separate: bool,
    ) -> HeadLosses:
        check_names("targets", targets, self.heads)
        names = tuple(name for name in self.heads if name in targets)
        masks = check_names("masks", masks or {}, self.heads)
        sources = self._features(features, names)
        measuring = self.weighting.needs_norms and self.weighting.learning
        copies = {name: x.view_as(x) for name, x in sources.items()} if separate or measuring else sources
        present = self._present_losses(sources, copies, targets, masks)
        zero = self.layers[next(iter(self.heads))].weight.new_zeros(())
        losses = torch.stack([present.get(name, zero) for name in self.heads])
        per_head = dict(zip(self.heads, losses.unbind(), strict=True))
        norms = self._norms(HeadLosses(zero, per_head, sources, copies)) if measuring and names else None
        total = self.weighting(losses, losses.detach() != 0, norms)
        return HeadLosses(total, per_head, sources, copies) if separate else HeadLosses(total, per_head)

    def _features(self, features: Features, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The features of the named heads, checked."""
        if isinstance(features, Tensor):
            features = dict.fromkeys(names, features)
        check_names("features", features, self.heads)
        chosen: dict[str, Tensor] = {}
        for name in names:
            if name not in features:
                raise ValueError(f"features: expected some for {name!r}, got {', '.join(features) or 'none'}")
            x, head, width = features[name], self.heads[name], self.layers[name].in_features
            if not isinstance(x, Tensor) or x.ndim != head.rank or x.shape[head.channels] != width:
                raise ValueError(
                    f"features[{name!r}]: expected {head.letters} with D = {width} for {type(head).__name__}, got "
                    f"{shown(x)}; features of several shapes go in as {{head: features}}"
                )
            chosen[name] = x
        return chosen

    def _present_losses(
        self,
        sources: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The losses of the heads that have features here: linear heads that read one tensor in one call."""
        for name, x in features.items():
            check_target(name, self.heads[name], x, targets[name], masks.get(name))
        maps = [name for name in features if self.heads[name].channels == 1]
        rest = {name: source for name, source in sources.items() if name not in maps}
        losses: dict[str, Tensor] = {}
        for names in _by_tensor(rest):
            one = features[names[0]] is sources[names[0]]  # no copies: all heads of the group read the same tensor
            own = [_in_dtype_of(self.layers[n], features[n]).flatten(0, -2) for n in (names[:1] if one else names)]
            each = linear_multihead_loss(
                own[0] if one else own,
                [self.layers[name].weight for name in names],
                [self.layers[name].bias for name in names],
                [target_by_row(features[name], targets[name]) for name in names],
                [self.heads[name].spec for name in names],
                **self._row_weights(names, {n: mask_by_row(features[n], m) for n, m in masks.items() if n in names}),
            )
            losses.update(zip(names, each.unbind(), strict=True))
        if maps:
            each = multihead_loss(
                [_in_dtype_of(self.layers[name], self.layers[name](features[name])) for name in maps],
                [targets[name] for name in maps],
                [self.heads[name].spec for name in maps],
                **self._row_weights(maps, masks),
            )
            losses.update(zip(maps, each.unbind(), strict=True))
        return losses

    def _row_weights(self, names: list[str], masks: Mapping[str, Tensor]) -> _RowWeights:
        """The engine's optional arguments for these heads."""
        layers = [self.layers[name] for name in names]
        return {
            "sample_weights": [masks.get(name) for name in names],
            "class_weights": [layer.class_weights for layer in layers],
            "pos_weights": [layer.pos_weight for layer in layers],
        }

    def _norms(self, losses: HeadLosses) -> Tensor:
        """Norms of the heads' gradients [H], constants, at the features or where the weighting says."""
        shared = getattr(self.weighting, "shared", None)
        if not all(x.requires_grad for x in losses.sources.values()):
            raise ValueError(
                "features: expected features that require grad, for weighting 'gradnorm' measures gradients at them or "
                "before them; give the features of a trunk that is trained, or choose another weighting"
            )
        return gram(losses, shared).diagonal().sqrt()


def _in_dtype_of(layer: HeadLayer, x: Tensor) -> Tensor:
    """Under autocast in the layer's dtype, for losses are not for half precision; as it is elsewhere."""
    return x.to(layer.weight.dtype) if torch.is_autocast_enabled(x.device.type) else x


def _by_tensor(features: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor; by comparing them, for a tensor that a graph computes has no id."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in features.items():
        known = next((names for first, names in groups if first is x), None)
        if known is None:
            groups.append((x, [name]))
        else:
            known.append(name)
    return [names for _, names in groups]
