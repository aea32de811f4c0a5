"""Losses as people write them: which loss of the table each computes, and lookalikes that compute none."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, manual_seed, nn

from mtml_kernels.losses import LossSpec

Loss = Callable[[Tensor, Tensor], Any]
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
HALF, SMOOTHING = 0.5, 0.1
log_softmax, nll = nn.LogSoftmax(dim=-1), nn.NLLLoss()
criterion = nn.CrossEntropyLoss()


class Known(NamedTuple):
    """A loss and what it computes: scale x spec. weighs: it can be weighed by a mask."""

    loss: Loss
    spec: LossSpec
    scale: float = 1.0
    weighs: bool = False
    passes_over: bool = True


def squared(output: Tensor, target: Tensor) -> Tensor:
    error = output - target
    return torch.mul(error, error).sum() / error.numel()


def absolute(output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """With a document, a default, a loop and a check."""
    assert output.shape == target.shape, "shapes"
    total = torch.zeros_like(output)
    for part in (0.5, 0.5):
        total = total + part * torch.abs(output - target)
    return scale * total.mean()


def helped(output: Tensor, target: Tensor) -> Tensor:
    return squared(output, target)


class Own(nn.Module):
    """A module of the user's, with a setting and a part."""

    shared = 1.0

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.inner = factor, nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.factor * self.shared * self.inner(output, target)


class Inherited(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return HALF * super().forward(input, target)


def gathered(output: Tensor, ids: Tensor) -> Tensor:
    return -output.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1).mean()


def mixed(output: Tensor, ids: Tensor) -> Tensor:
    return 0.25 * F.cross_entropy(output, ids) + 0.75 * F.cross_entropy(output, ids, label_smoothing=0.4)


CE, MSE, BCE = LossSpec("cross_entropy"), LossSpec("mse"), LossSpec("bce_with_logits")
IDS: dict[str, Known] = {  # outputs [N, 4], class ids [N]
    "cross_entropy": Known(lambda o, t: F.cross_entropy(o, t), CE),
    "module in a global": Known(lambda o, t: criterion(o, t), CE),
    "module made at each call": Known(lambda o, t: nn.CrossEntropyLoss()(o, t), CE),
    "long": Known(lambda o, t: F.cross_entropy(input=o, target=t.long()), CE),
    "NLLLoss of LogSoftmax": Known(lambda o, t: nll(log_softmax(o), t), CE),
    "nll_loss": Known(lambda o, t: F.nll_loss(F.log_softmax(o, dim=1), t), CE),
    "nll_loss of a method": Known(lambda o, t: F.nll_loss(o.log_softmax(-1), t), CE),
    "sum": Known(lambda o, t: F.cross_entropy(o, t, reduction="sum"), LossSpec("cross_entropy", "sum")),
    "smoothed by a global": Known(
        lambda o, t: F.cross_entropy(o, t, label_smoothing=SMOOTHING), LossSpec("cross_entropy", label_smoothing=0.1)
    ),
    "own module": Known(Own(), LossSpec("cross_entropy", label_smoothing=0.1)),
    "own module scaled": Known(Own(3.0), LossSpec("cross_entropy", label_smoothing=0.1), 3.0),
    "partial": Known(
        functools.partial(lambda o, t, s: F.cross_entropy(o, t, label_smoothing=s), s=0.3),
        LossSpec("cross_entropy", label_smoothing=0.3),
    ),
    "mixed": Known(mixed, LossSpec("cross_entropy", label_smoothing=0.3)),
    "in bits": Known(lambda o, t: F.cross_entropy(o, t) / math.log(2.0), CE, 1.0 / math.log(2.0)),
    "per sample": Known(lambda o, t: F.cross_entropy(o, t, reduction="none"), CE, 1.0, True, False),
    "sum over count": Known(lambda o, t: F.cross_entropy(o, t, reduction="sum") / len(t), CE, 1.0, False, False),
    "gather": Known(gathered, CE, 1.0, False, False),
    "picked": Known(lambda o, t: -o.log_softmax(1)[torch.arange(o.shape[0]), t], CE, 1.0, True, False),
    "one_hot": Known(
        lambda o, t: -(F.one_hot(t, o.shape[1]) * torch.log_softmax(o, 1)).sum(1).mean(), CE, 1.0, False, False
    ),
}
NUMBERS: dict[str, Known] = {  # outputs and targets [N, 4]
    "square": Known(lambda o, t: ((o - t) ** 2).mean(), MSE),
    "pow": Known(lambda o, t: torch.mean(torch.pow(t - o, 2.0)), MSE),
    "mse_loss": Known(lambda o, t: F.mse_loss(o, t), MSE),
    "MSELoss": Known(lambda o, t: nn.MSELoss()(o, t), MSE),
    "own mse": Known(squared, MSE),
    "by a helper": Known(helped, MSE),
    "expanded": Known(lambda o, t: (o * o - 2 * o * t + t * t).mean(), MSE),
    "flattened": Known(lambda o, t: F.mse_loss(o.flatten(), t.view(-1)), MSE),
    "half": Known(lambda o, t: 0.5 * F.mse_loss(o, t), MSE, 0.5),
    "half in a class": Known(Inherited(), MSE, 0.5),
    "sum": Known(lambda o, t: (o - t).square().sum(), LossSpec("mse", "sum")),
    "half the sum": Known(lambda o, t: 0.5 * (o - t).square().sum(), MSE, 0.5 * 24),
    "per sample": Known(lambda o, t: F.mse_loss(o, t, reduction="none").mean(-1), MSE, 1.0, True),
    "per element": Known(lambda o, t: F.mse_loss(o, t, reduction="none"), MSE, 1.0, True),
    "norm of each": Known(lambda o, t: (o - t).square().sum(-1), MSE, 4.0, True),
    "over samples first": Known(lambda o, t: (o - t).square().mean(0), MSE),
    "l1": Known(lambda o, t: (o - t).abs().mean(), LossSpec("l1")),
    "own l1": Known(absolute, LossSpec("l1")),
    "huber": Known(lambda o, t: F.huber_loss(o, t, delta=0.3), LossSpec("huber", delta=0.3)),
    "smooth_l1": Known(lambda o, t: F.smooth_l1_loss(o, t), LossSpec("huber")),
    "smooth_l1 with beta": Known(lambda o, t: F.smooth_l1_loss(o, t, beta=0.5), LossSpec("huber", delta=0.5), 2.0),
    "bce": Known(lambda o, t: F.binary_cross_entropy_with_logits(o, t), BCE),
    "own bce": Known(lambda o, t: -(t * F.logsigmoid(o) + (1 - t) * F.logsigmoid(-o)).mean(), BCE),
    "weighted sum": Known(lambda o, t: 0.3 * F.mse_loss(o, t) + 0.7 * ((o - t) ** 2).mean(), MSE),
}

log: list[float] = []
settings = {"factor": 1.0}
count = 0


def counting(output: Tensor, target: Tensor) -> Tensor:
    global count
    count += 1
    return F.mse_loss(output, target)


def printing(output: Tensor, target: Tensor) -> Tensor:
    loss = F.mse_loss(output, target)
    print(float(loss))
    return loss


def without_graph(output: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (output - target).abs().mean()
    return F.mse_loss(output, target) / scale


def shifted(output: Tensor, target: Tensor) -> Tensor:
    output -= 1.0
    return F.mse_loss(output, target)


class Counting(nn.Module):
    calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.mse_loss(output, target)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * F.mse_loss(output, target)


class Sneaky:
    """With a state that only it knows."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)


# name: (loss, why it must run at every call, in its words)
LIVE: dict[str, tuple[Any, str]] = {
    "list": (lambda o, t: log.append(1.0) or F.mse_loss(o, t), "log, a list"),
    "dict": (lambda o, t: settings["factor"] * F.mse_loss(o, t), "settings, a dict"),
    "counter": (counting, "changes count"),
    "counter on a module": (Counting(), "changes calls"),
    "print": (printing, "print()"),
    "object": (Sneaky(), "is a Sneaky"),
    "method": (Sneaky().method, "is a method"),
    "parameter": (Learned().double(), "tensors of its own"),
    "class weights": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS), "WEIGHTS, a Tensor"),
    "detached target": (lambda o, t: F.mse_loss(o, t.detach()), "'detach'"),
    "detached output": (lambda o, t: ((o - t) * (o - t).detach()).mean(), "'detach'"),
    "data": (lambda o, t: F.mse_loss(o, t.data), "'data'"),
    "no_grad": (without_graph, "'no_grad'"),
    "clamp": (lambda o, t: F.mse_loss(o, t).clamp(max=10.0), "'clamp'"),
    "dropout": (lambda o, t: F.mse_loss(F.dropout(o, 0.0), t), "'dropout'"),
    "random": (lambda o, t: F.mse_loss(o + 0.0 * torch.randn(()), t), "'randn'"),
    "item": (lambda o, t: F.mse_loss(o, t) * t.mean().item(), "'item'"),
    "mode": (lambda o, t: F.mse_loss(o, t) if torch.is_grad_enabled() else o.mean(), "'is_grad_enabled'"),
    "by a computed name": (lambda o, t: F.mse_loss(o, getattr(t, "det" + "ach")()), "getattr()"),
    "PyTorch's, by its own name": (lambda o, t: manual_seed(0) and F.mse_loss(o, t), "manual_seed"),
    "stdlib": (lambda o, t: functools.reduce(lambda a, b: a + b, [F.mse_loss(o, t)]), "module"),
}
# name: (loss, with class ids, what is found by running it)
OTHERS: dict[str, tuple[Loss, bool, str]] = {
    "branch on a value": (lambda o, t: F.mse_loss(o, t) if o.mean() > -9e9 else o.mean(), False, "'__gt__'|'gt'"),
    "comparison": (lambda o, t: ((o - t) ** 2 * ((o - t) < 1e9)).mean(), False, "'lt'"),
    "truth": (lambda o, t: F.mse_loss(o, t) if o.sum() else o.mean(), False, "'__bool__'"),
    "number": (lambda o, t: F.mse_loss(o, t) * float(t.sum() * 0 + 1), False, "'__float__'"),
    "in place": (shifted, False, "'__isub__'|'sub_'"),
    "cast": (lambda o, t: F.mse_loss(o.float(), t.float()), False, "casts torch.float64 to torch.float32"),
    "cast unseen": (
        lambda o, t: F.mse_loss(o, t) if o.dtype == torch.float64 else o.abs().mean(),
        False,
        "other operations",
    ),
    "mean of broadcast": (lambda o, t: F.mse_loss(o, t.mean(0, keepdim=True)), False, "none of them"),
    "unreduced": (lambda o, t: (o, t), False, "returns a tuple"),
    "output alone": (lambda o, t: o.sum(), False, "none of them"),
    "epsilon": (lambda o, t: ((o - t) ** 2 + 1e-9).mean(), False, "differs|none"),
    "with a penalty": (lambda o, t: F.mse_loss(o, t) + 1e-4 * o.square().mean(), False, "none of them"),
    "one column": (lambda o, t: F.mse_loss(o[:, 0], t[:, 0]), False, "none of them"),
    "bce on probabilities": (lambda o, t: -(t * o.sigmoid().log()).mean(), False, "none of them"),
    "bce unguarded": (
        lambda o, t: -(t * o.sigmoid().log() + (1 - t) * (1 - o.sigmoid()).log()).mean(),
        False,
        "differs",
    ),
    "ignore_index": (lambda o, t: F.cross_entropy(o, t, ignore_index=3), True, "some classes|none of them"),
    "class weights made": (
        lambda o, t: F.cross_entropy(o, t, torch.tensor([1.0, 2.0, 3.0, 4.0]).type_as(o)),
        True,
        "some classes|casts",
    ),
    "temperature": (lambda o, t: F.cross_entropy(o / 0.5, t), True, "none of them"),
    "unstable": (lambda o, t: -(o.softmax(-1) + 1e-8).log().gather(1, t[:, None]).mean(), True, "differs|none"),
    "unstable alone": (lambda o, t: -o.softmax(-1).log().gather(1, t[:, None]).mean(), True, "differs|none"),
    "probabilities twice": (lambda o, t: F.cross_entropy(o.softmax(-1), t), True, "none of them"),
    "raises": (lambda o, t: F.cross_entropy(o, t, label_smoothing=2.0), True, "fails on random inputs"),
    "transposed": (lambda o, t: F.cross_entropy(o.T, t), True, "fails on random inputs"),
}
