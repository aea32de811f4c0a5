"""Which loss of the table a callable computes, found by running both on random inputs in float64.

What is compared: the value, the gradients in the output and in a floating-point target, and a second derivative, at
magnitudes from a millionth to a million millions, at the sizes of the calls that are to be fused. That proves something
because `purity` admits only smooth functions and a few piecewise ones, whose pieces lie between those magnitudes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtml_kernels.losses.task import per_sample, task_loss
from mtml_kernels.losses.vocabulary import OPERATIONS, OPERATORS
from mtml_kernels.neutral import neutral
from mtml_kernels.schema.losses import IGNORED, KINDS, LOSSES, LossSpec

__all__ = ["Match", "Sizes", "match"]

MAGNITUDES = (1.0, 1e-6, 1e-3, 30.0, 1e3, 1e6, 1e12)
LARGEST = 1 << 22  # elements of an output, which every trial holds a few times
FEW = 64  # elements that may all lie on one side of a kink
TOLERANCE = 1e-10  # in float64, relative to the largest value
NEAR, FAR = 2.0**-30, 2.0**40  # where huber is surely a square, and surely linear

Function = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Match:
    """A callable computes `scale` times `spec`.

    weighs: it returns one loss a sample, which a mask can weigh. passes_over: the ignored id means to it what it means
    to the kernels. flat: its targets are the kernels' in another shape.
    """

    spec: LossSpec
    scale: float = 1.0
    weighs: bool = False
    passes_over: bool = True
    flat: bool = False


class Sizes(NamedTuple):
    """Of one task: the output's shape [N, *out], the target's shape and dtype, and the model's dtype."""

    output: tuple[int, ...]
    target: tuple[int, ...]
    targets: torch.dtype
    dtype: torch.dtype

    @property
    def ids(self) -> bool:
        """Whether the targets are no numbers but ids."""
        return not self.targets.is_floating_point

    def obstacle(self) -> str | None:
        """Why no callable is tried at these sizes, or None."""
        if self.targets == torch.bool or self.targets.is_complex or (not self.ids and self.targets != self.dtype):
            return f"its targets are {self.targets}, and the model is {self.dtype}"
        if not 0 < math.prod(self.output) <= LARGEST or (self.ids and 3 * self.output[-1] ** 2 > LARGEST):
            return "its outputs are none, or too many to try it on; a loss by name is not tried"
        return None


class _Strange(Exception):
    """The callable does something that no fused loss does, and what."""


class _Followed(TorchFunctionMode):
    """Notes what runs, by PyTorch's names; raises for what is not in the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name not in OPERATIONS and name not in OPERATORS:
            raise _Strange(f"it uses {name!r}, which no fused loss is made of")
        if kwargs and "out" in kwargs:
            raise _Strange("it changes tensors in place")
        result = func(*args, **(kwargs or {}))
        given: Any = args[0] if args else None
        tensors = isinstance(given, Tensor) and isinstance(result, Tensor)
        if tensors and given.is_floating_point() and result.dtype != given.dtype:
            raise _Strange(f"it casts {given.dtype} to {result.dtype}")
        self.ran.append(name)
        return result


def match(loss: Function, sizes: Sizes) -> Match | str:
    """What a callable that `live_because` finds nothing against computes at these sizes, or why it is nothing known.

    Example:
        >>> sizes = Sizes((4, 2), (4, 2), torch.float32, torch.float32)
        >>> match(lambda output, target: ((output - target) ** 2).mean(), sizes)
        Match(spec=LossSpec(kind='mse', ...), scale=1.0, weighs=False, passes_over=True, flat=False)
    """
    return sizes.obstacle() or neutral(lambda: _attempted(loss, sizes))


def _attempted(loss: Function, sizes: Sizes) -> Match | str:
    trial = _Trial(loss, sizes)
    try:
        trial.check_dtype(sizes.dtype)
        return trial.find()
    except (MemoryError, torch.OutOfMemoryError):  # which says nothing about the loss
        raise
    except _Strange as found:
        return str(found)
    except Exception as error:  # whatever a user's code raises: it may run all the same where it is called
        return f"it fails on random inputs: {type(error).__name__}: {str(error)[:160]}"


class _Trial:
    """One callable at the sizes of one call."""

    def __init__(self, loss: Function, sizes: Sizes) -> None:
        self.loss, self.ids, self.kind = loss, sizes.ids, sizes.targets
        self.shape, self.target = sizes.output, sizes.target
        self.flat = not self.ids and self.shape != self.target and _squeezed(self.shape) == _squeezed(self.target)
        self.generator = torch.Generator().manual_seed(0)
        self.form = "scalar"  # what it returns

    # --- inputs -----------------------------------------------------------------------------------------------------

    def _random(self, shape: tuple[int, ...], magnitude: float = 1.0) -> Tensor:
        return magnitude * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _inputs(self, magnitude: float) -> tuple[Tensor, Tensor]:
        if not self.ids:
            return self._random(self.shape, magnitude), self._random(self.target, magnitude)
        classes = self.shape[-1]
        ids = torch.randint(classes, self.target, generator=self.generator).to(self.kind)
        return self._random(self.shape, magnitude), ids

    # --- the callable -----------------------------------------------------------------------------------------------

    def run(self, output: Tensor, target: Tensor) -> Tensor:
        """As the general path takes it: a scalar, or one loss a sample [N]."""
        value = self._followed(output, target)[0]
        if value.ndim == 0:
            self.form = "scalar"
        elif value.shape[0] == output.shape[0]:
            self.form = "samples"
            return value.flatten(1).mean(1) if value.ndim > 1 else value
        else:
            self.form = "others"
        return value.mean()

    def _followed(self, output: Tensor, target: Tensor) -> tuple[Tensor, list[str]]:
        with _Followed() as mode:
            value = self.loss(output, target)
        if not isinstance(value, Tensor):
            raise _Strange(f"it returns a {type(value).__name__}")
        return value, mode.ran

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise where it runs other operations in the model's dtype than in float64, in which it is judged."""
        output, target = self._inputs(1.0)
        narrow = target if self.ids else target.to(dtype)
        if self._followed(output.to(dtype), narrow)[1] != self._followed(output, target)[1]:
            raise _Strange(f"it runs other operations in {dtype} than in float64")

    # --- comparing --------------------------------------------------------------------------------------------------

    def find(self) -> Match | str:
        """The loss of the table that it is, or what it is instead."""
        self.run(*self._inputs(1.0))  # `form` says from here on what it returns
        near = ""
        for kind in KINDS:
            option = self._option(kind) if self._fits(kind) else None
            if option is None:
                continue
            spec = LossSpec.decode(KINDS.index(kind), 0, option)
            scale = self._scale(spec)
            if scale is None or not self._agree(spec, scale, MAGNITUDES[:1]):
                continue
            near = f"it differs from {kind} at large or small values"
            if self._agree(spec, scale, (*MAGNITUDES[1:], *(f * spec.delta for f in (0.3, 1.0, 3.0)))):
                return self._named(spec, scale)
        return near or "it computes none of them at these shapes"

    def _fits(self, kind: str) -> bool:
        """Whether a loss of this kind takes such targets."""
        if LOSSES[kind].ids:
            return self.ids and (len(self.shape), len(self.target)) == (2, 1)
        return not self.ids and (self.shape == self.target or self.flat)

    def _scale(self, spec: LossSpec) -> float | None:
        """By how much the gradient in the output is larger than the formula's; None where that is no number."""
        given = self._inputs(1.0)
        found, expected = (self._derived(f, *given)[1] for f in (self.run, self._formula(spec)))
        size = float((expected * expected).sum())
        scale = _rounded(float((found * expected).sum()) / size) if size else 0.0
        return scale if math.isfinite(scale) and scale != 0.0 else None

    def _named(self, spec: LossSpec, scale: float) -> Match | str:
        """With the reduction that the numbers allow: as a mean, or as a sum of which it is a multiple."""
        count = self.shape[0] * (1 if spec.info.classes else math.prod(self.shape[1:]))
        forms, each = [(spec, scale)], self.form == "samples"
        if not each:
            forms.insert(
                count == 1 or scale != count, (dataclasses.replace(spec, reduction="sum"), _rounded(scale / count))
            )
        if not self.ids:
            return Match(*forms[0], each, True, self.flat)
        for ignored in (True, False):
            for form in forms:
                if self._knows_ids(*form, ignored):
                    return Match(*form, each, ignored)
        return f"it treats some classes otherwise than {spec.kind!r}"

    def _formula(self, spec: LossSpec) -> Function:
        loss = per_sample if self.form == "samples" else task_loss
        if self.flat:
            return lambda output, target: loss(spec, output, target.reshape(output.shape))
        return lambda output, target: loss(spec, output, target)

    def _agree(self, spec: LossSpec, scale: float, magnitudes: Sequence[float]) -> bool:
        formula = self._formula(spec)
        signs = (1, -1) if math.prod(self.shape) < FEW else (1,)
        return all(
            self._same(formula, scale, sign * output, target if self.ids else sign * target)
            for output, target in map(self._inputs, magnitudes)
            for sign in signs
        )

    def _same(self, formula: Function, scale: float, output: Tensor, target: Tensor) -> bool:
        """Whether the callable is scale times the formula, in value and derivatives, but for roundings."""
        expected = self._derived(lambda o, t: scale * formula(o, t), output, target)
        found = self._derived(self.run, output, target)
        rounding = 1e-13 * abs(scale)  # of numbers around 1 that cancel
        floors = [rounding * float(output.abs().amax()), *[rounding] * len(found)]
        return all(map(_close, expected, found, floors))

    def _knows_ids(self, spec: LossSpec, scale: float, ignored: bool) -> bool:
        """Whether every class counts as it does for the kernels, and so does an ignored id."""
        classes = self.shape[-1]
        rows = max(self.shape[0], 3 * classes)
        output, target = self._random((rows, classes)), (torch.arange(rows) // 3 % classes).to(self.kind)
        if ignored:
            target[::3] = IGNORED
        try:
            return self._same(self._formula(spec), scale, output, target)
        except Exception:  # an index out of range
            return False

    def _derived(self, function: Function, output: Tensor, target: Tensor) -> list[Tensor]:
        """Value, gradients, and second derivatives in one direction."""
        leaves = [output.detach().requires_grad_()]
        leaves += [] if self.ids else [target.detach().requires_grad_()]
        value = function(leaves[0], target if self.ids else leaves[1])
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.ndim else 1.0
        grads = _gradients((weights * value).sum(), leaves)
        along = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        return [value.detach(), *(g.detach() for g in grads), *_gradients((grads[0] * along).sum(), leaves)]

    # --- options ----------------------------------------------------------------------------------------------------

    def _option(self, kind: str) -> float | None:
        """The option of a loss of this kind that the callable may be; None where it can be none."""
        option = LOSSES[kind].option
        if option == "delta":
            return self._delta()
        return self._smoothing() if option else 0.0

    def _first_gradient(self, output: Tensor, target: Tensor) -> Tensor:
        leaf = output.requires_grad_()
        return _gradients(self.run(leaf, target).sum(), [leaf])[0][0].detach()

    def _delta(self) -> float | None:
        """Where the slope stops growing."""
        zero = torch.zeros(self.target, dtype=torch.float64)
        near, far = (
            self._first_gradient(torch.full(self.shape, at, dtype=torch.float64), zero).sum().item()
            for at in (NEAR, FAR)
        )
        delta = NEAR * far / near if near else 0.0
        return _rounded(delta) if 4.0 * NEAR < delta < 0.25 * FAR else None

    def _smoothing(self) -> float | None:
        """From the gradients where one class has all the probability: a wrong one, and the right one."""
        classes, ids = self.shape[-1], torch.zeros(self.target, dtype=self.kind)
        if classes < 2:
            return None
        rows = []
        for sure in (1, 0):
            output = torch.zeros(self.shape, dtype=torch.float64)
            output[:, sure] = 1e4
            rows.append(self._first_gradient(output, ids)[sure].item())
        weight = rows[0] + rows[1] / (classes - 1)
        smoothing = _rounded(rows[1] / weight / (1.0 - 1.0 / classes)) if weight else math.nan
        return smoothing if 0.0 <= smoothing <= 1.0 else None


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """[N, *out] without dimensions of 1 after the first."""
    return (*shape[:1], *(size for size in shape[1:] if size != 1))


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)


def _rounded(value: float) -> float:
    """The number that was written, where a sum of roundings hides it."""
    near = float(f"{value:.12g}")
    return near if abs(near - value) <= 1e-13 * abs(value) + 1e-15 else value


def _close(expected: Tensor, found: Tensor, floor: float) -> bool:
    expected, found = expected.detach(), found.detach()
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not (expected.isfinite().all() and found.isfinite().all()):
        return False
    return bool((expected - found).abs().amax() <= TOLERANCE * expected.abs().amax() + floor)
