"""What an inner step does with the gradient: the rules by name, their options, and the codes by which they travel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

__all__ = ["HYPERS", "NAMED", "PLAIN", "RULES", "UpdateRule", "UpdateSpec"]

RULES = ("sgd", "adam", "rmsprop")
# The numbers of a rule, one layout for all: what a rule has no use for is ignored.
HYPERS: tuple[str, ...] = ("clip_norm", "weight_decay", "momentum", "dampening", "beta1", "beta2", "eps", "eps_root")
_FLAGS = ("momentum", "nesterov", "decoupled", "centered", "clipped", "decayed")


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """An update rule less its numbers.

    Args:
        rule: "sgd", "adam" or "rmsprop".
        momentum: whether sgd and rmsprop keep a momentum buffer.
        nesterov: sgd looks ahead along its momentum.
        decoupled: weight decay shrinks the parameters by themselves (AdamW) instead of joining the gradient.
        centered: rmsprop divides by the deviation from the mean gradient.
        clipped: the gradient of all adapted tensors is first scaled to a norm of at most `clip_norm`.
        decayed: whether there is weight decay.

    Raises:
        ValueError: an unknown rule, or an option that the rule has not.
    """

    rule: str = "sgd"
    momentum: bool = False
    nesterov: bool = False
    decoupled: bool = False
    centered: bool = False
    clipped: bool = False
    decayed: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"update: expected one of {', '.join(RULES)}, got {self.rule!r}")
        if self.nesterov and not (self.rule == "sgd" and self.momentum):
            raise ValueError("nesterov: expected an SGD with momentum above 0")
        if self.centered and self.rule != "rmsprop":
            raise ValueError("centered: expected rmsprop, which alone has it")
        if self.momentum and self.rule == "adam":
            raise ValueError("momentum: expected sgd or rmsprop; Adam has beta1 for it")

    @property
    def moments(self) -> tuple[str, ...]:
        """The tensors like the parameters that a step leaves for the next one, by PyTorch's names."""
        if self.rule == "adam":
            return ("exp_avg", "exp_avg_sq")
        square = ("square_avg",) if self.rule == "rmsprop" else ()
        centre = ("grad_avg",) if self.centered else ()
        return (*square, *centre, *(("momentum_buffer",) if self.momentum else ()))

    def encode(self) -> list[int]:
        """[rule, flags]: the position in RULES, and a bit for each of momentum, nesterov, decoupled, ..."""
        return [RULES.index(self.rule), sum(1 << i for i, name in enumerate(_FLAGS) if getattr(self, name))]

    @staticmethod
    def decode(rule: int, flags: int) -> UpdateSpec:
        """The inverse of `encode`."""
        return UpdateSpec(RULES[rule], **{name: bool(flags >> i & 1) for i, name in enumerate(_FLAGS)})


PLAIN = UpdateSpec()


class UpdateRule(Protocol):
    """A rule with its numbers, as those of `mtml.inner` are."""

    spec: UpdateSpec

    def numbers(self) -> Mapping[str, float | Tensor]:
        """By the names in HYPERS; those the rule has no use for may lack."""
        ...


_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
# What a name means: the rule with the numbers that torch.optim has by default.
NAMED: dict[str, tuple[UpdateSpec, dict[str, float]]] = {
    "sgd": (PLAIN, {}),
    "adam": (UpdateSpec("adam"), _ADAM),
    "adamw": (UpdateSpec("adam", decoupled=True, decayed=True), {**_ADAM, "weight_decay": 0.01}),
    "rmsprop": (UpdateSpec("rmsprop"), {"beta2": 0.99, "eps": 1e-8}),
}
