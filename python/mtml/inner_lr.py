"""Learnable inner learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtml.params import ParamsArg, adaptable, select
from mtml_kernels.checks import check_choice, check_finite, check_initialised, check_number, check_steps
from mtml_kernels.precision import first_floating

__all__ = ["InnerLR"]

PER = ("all", "tensor", "element")


class InnerLR(nn.Module):
    """Inner learning rates that are meta-learned: one in all, one per tensor (MAML++) or per element (Meta-SGD).

    Pass it as ``lr`` to `MAML`, which registers it: ``maml.parameters()`` then has the rates beside the model's own.
    It stores nothing but numbers, so its state_dict loads into another InnerLR made with the same arguments.

    Args:
        model: the model whose tensors are to be adapted; only names and shapes are taken from it.
        init: every rate at the start.
        per: "all", "tensor" or "element".
        steps: separate rates for each of so many inner steps; None for the same at every step.
        learnable: whether the rates require grad.
        min, max: rates are clamped to these bounds when read; outside them a rate gets no gradient.
        params: which tensors get rates, as `MAML`'s argument, and the same where buffers are adapted; None for all
            parameters, frozen ones included.

    Raises:
        TypeError: init, min or max is no number.
        ValueError: one of them is not finite, min exceeds max, `per` is unknown or steps < 1.

    Example:
        >>> import torch, mtml
        >>> model = torch.nn.Linear(2, 1)
        >>> lr = mtml.InnerLR(model, 0.1, per="tensor", steps=3, min=0.0)
        >>> {name: tuple(rate.shape) for name, rate in lr.as_dict().items()}
        {'weight': (3, 1, 1), 'bias': (3, 1)}
        >>> len(list(mtml.MAML(model, lr, steps=3).parameters()))
        4

    Papers: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017 (per element);
    Antoniou, Edwards, Storkey, "How to train your MAML", 2019 (per tensor and step).
    """

    def __init__(
        self,
        model: nn.Module,
        init: float = 0.01,
        *,
        per: str = "all",
        steps: int | None = None,
        learnable: bool = True,
        min: float | None = None,  # the bounds are called what torch.clamp calls them
        max: float | None = None,
        params: ParamsArg = None,
    ) -> None:
        super().__init__()
        check_choice("per", per, PER)
        check_finite("init", init)
        check_initialised(model)
        if steps is not None and check_steps(steps) < 1:
            raise ValueError(f"steps: expected None or at least 1, got {steps}")
        for name, bound in (("min", min), ("max", max)):
            if bound is not None:
                check_number(name, bound)
        if min is not None and max is not None and min > max:
            raise ValueError(f"min: expected at most max={max}, got {min}")
        self.per, self.steps, self.min, self.max = per, steps, min, max
        tensors = adaptable(model)
        names = (
            list(select(model, params))
            if params is not None
            else [name for name, _ in model.named_parameters() if name in tensors]
        )
        self.shapes = {name: tensors[name].shape for name in names}
        like = first_floating(tensors.values())
        rows = 1 if steps is None else steps
        # stored in the form the op takes, [rows] or [rows, *shape], so that reading them costs nothing
        forms = [()] if per == "all" else [self.shapes[n] if per == "element" else () for n in names]
        self.rates = nn.ParameterList(
            nn.Parameter(torch.full((rows, *form), float(init), dtype=like.dtype, device=like.device), learnable)
            for form in forms
        )
        self._index = {name: i for i, name in enumerate(names)}

    def read(self, names: Sequence[str]) -> list[Tensor]:
        """The rates of these tensors as the op takes them: [1] or [K], or [1, *shape] or [K, *shape]; clamped.

        One tensor for all where per="all". Raises ValueError for a name that has no rate.
        """
        rates: list[Tensor] = list(self.rates._parameters.values())  # type: ignore[arg-type]  # faster than iterating
        if self.per != "all":
            missing = [name for name in names if name not in self._index]
            if missing:
                raise ValueError(
                    f"lr: expected a rate for every adapted tensor, got none for {', '.join(map(repr, missing[:5]))}; "
                    "make the InnerLR from this model, with the same params="
                )
            rates = [rates[self._index[name]] for name in names]
        if self.min is None and self.max is None:
            return rates
        return [rate.clamp(self.min, self.max) for rate in rates]

    def as_dict(self) -> dict[str, Tensor]:
        """The clamped rates by name, in the forms that `MAML` takes: scalar, [*shape], [K, 1, ...] or [K, *shape]."""
        names = list(self.shapes)
        rates = self.read(names)
        if self.per == "all":
            rates = rates * len(names)
        if self.steps is None:
            return {name: rate[0] for name, rate in zip(names, rates, strict=True)}
        return {
            name: rate if rate.ndim > 1 else rate.reshape(-1, *(1 for _ in self.shapes[name]))
            for name, rate in zip(names, rates, strict=True)
        }

    def extra_repr(self) -> str:
        bounds = "" if self.min is None and self.max is None else f", min={self.min}, max={self.max}"
        return f"per={self.per!r}, steps={self.steps}{bounds}, tensors={len(self.shapes)}"
