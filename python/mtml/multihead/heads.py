"""Heads of a multi-task model: what each one predicts from which features, and by which loss it learns."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.checks import check_choice
from mtml_kernels.losses import HeadLoss

__all__ = ["Classification", "Head", "HeadLayer", "MultiLabel", "Regression", "Segmentation", "Tokens"]

Weights = Sequence[float] | Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Head(abc.ABC):
    """One head: a linear layer over the features' channels, and a loss.

    | head              | features     | prediction          | target                                         |
    |-------------------|--------------|---------------------|------------------------------------------------|
    | Classification(C) | [N, D]       | [N, C] logits       | class ids [N], or probabilities [N, C]         |
    | Regression(O)     | [N, D]       | [N, O], or [N, 2 O] | [N, O]                                         |
    | MultiLabel(C)     | [N, D]       | [N, C] logits       | [N, C] in [0, 1]                               |
    | Segmentation(C)   | [N, D, H, W] | [N, C, H, W] logits | class ids [N, H, W], or probabilities as logits |
    | Tokens(V)         | [N, L, D]    | [N, L, V] logits    | token ids [N, L], or probabilities [N, L, V]   |

    Options of every head: ``bias`` and ``reduction`` ("mean" over what counts, or "sum"). `HeadLoss` says what they and
    the losses mean.
    """

    outputs: int
    _: dataclasses.KW_ONLY
    bias: bool = True
    reduction: str = "mean"

    letters: ClassVar[str] = "[N, D]"  # the features' shape
    channels: ClassVar[int] = -1  # where D lies

    def __post_init__(self) -> None:
        if isinstance(self.outputs, bool) or not isinstance(self.outputs, int) or self.outputs < 1:
            raise ValueError(f"{type(self).__name__}: expected at least 1 output, got {self.outputs!r}")
        for name in ("class_weights", "pos_weight"):
            weights = getattr(self, name, None)
            if weights is not None and tuple(torch.as_tensor(weights).shape) != (self.outputs,):
                raise ValueError(
                    f"{name}: expected [{self.outputs}], one a class, got {list(torch.as_tensor(weights).shape)}"
                )
        _ = self.spec  # raises where an option is out of range

    @abc.abstractmethod
    def loss_spec(self) -> HeadLoss:
        """Make `spec`."""

    @functools.cached_property
    def spec(self) -> HeadLoss:
        """The loss as the engine takes it."""
        return self.loss_spec()

    @property
    def width(self) -> int:
        """Outputs of the linear layer."""
        return self.outputs

    @property
    def rank(self) -> int:
        """Dimensions of the features."""
        return self.letters.count(",") + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Classification(Head):
    """One of `outputs` classes a sample: features [N, D], logits [N, C], targets ids [N] or probabilities [N, C].

    Args:
        outputs: C.
        loss: "cross_entropy", or "kl" for probabilities.
        ignore_index: class id whose samples count for nothing.
        label_smoothing: in [0, 1].
        class_weights: [C].

    Raises:
        ValueError: an option outside its range.

    Example:
        >>> Classification(10, label_smoothing=0.1).width
        10
    """

    loss: str = "cross_entropy"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    class_weights: Weights | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("cross_entropy", "kl"))
        if self.loss == "kl" and (self.class_weights is not None or self.label_smoothing):
            raise ValueError("loss: expected 'cross_entropy' with class_weights or label_smoothing, got 'kl'")
        super().__post_init__()

    def loss_spec(self) -> HeadLoss:
        return HeadLoss(self.loss, self.reduction, self.ignore_index, self.label_smoothing)


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation(Classification):
    """One of `outputs` classes a pixel, by a 1x1 convolution: features [N, D, H, W], logits [N, C, H, W].

    Options and errors as `Classification`; targets are ids [N, H, W] or probabilities [N, C, H, W].

    Example:
        >>> Segmentation(21, ignore_index=0).rank
        4
    """

    letters: ClassVar[str] = "[N, D, H, W]"
    channels: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens(Classification):
    """One of `outputs` tokens a position: features [N, L, D], logits [N, L, V], targets ids [N, L].

    Options and errors as `Classification`. The loss never holds all logits at once where the engine can avoid it.

    Example:
        >>> Tokens(32000, ignore_index=0).rank
        3
    """

    letters: ClassVar[str] = "[N, L, D]"


@dataclasses.dataclass(frozen=True, eq=False)
class Regression(Head):
    """`outputs` numbers a sample: features [N, D], predictions [N, O], targets [N, O].

    Args:
        outputs: O.
        loss: "mse", "l1", "huber", or "gaussian_nll", whose prediction [N, 2 O] is the means, then the log variances.
        delta: where huber turns linear, above 0.

    Raises:
        ValueError: an option outside its range.

    Example:
        >>> Regression(3, loss="gaussian_nll").width
        6

    Paper: Kendall, Gal, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?", 2017.
    """

    loss: str = "mse"
    delta: float = 1.0

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("mse", "l1", "huber", "gaussian_nll"))
        super().__post_init__()

    def loss_spec(self) -> HeadLoss:
        return HeadLoss(self.loss, self.reduction, delta=self.delta)

    @property
    def width(self) -> int:
        return 2 * self.outputs if self.loss == "gaussian_nll" else self.outputs


@dataclasses.dataclass(frozen=True, eq=False)
class MultiLabel(Head):
    """Any of `outputs` labels a sample: features [N, D], logits [N, C], targets [N, C] in [0, 1].

    Args:
        outputs: C.
        pos_weight: [C], what a positive label counts.

    Raises:
        ValueError: an option outside its range.

    Example:
        >>> MultiLabel(5, pos_weight=[2.0] * 5).width
        5
    """

    pos_weight: Weights | None = None

    def loss_spec(self) -> HeadLoss:
        return HeadLoss("bce_with_logits", self.reduction)


class HeadLayer(nn.Linear):
    """The linear layer of a head, [C, D] whatever the features' rank, and its class weights as buffers."""

    class_weights: Tensor | None
    pos_weight: Tensor | None

    def __init__(self, in_features: int, head: Head) -> None:
        super().__init__(in_features, head.width, head.bias)
        self.head = head
        for name in ("class_weights", "pos_weight"):
            weights = getattr(head, name, None)
            # given by the head's options, so no part of the state
            copied = None if weights is None else torch.as_tensor(weights, dtype=self.weight.dtype).clone()
            self.register_buffer(name, copied, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """The prediction of features with channels where `Head.channels` says."""
        if self.head.channels == 1:
            return F.conv2d(features, self.weight[:, :, None, None], self.bias)
        return super().forward(features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.head}"
