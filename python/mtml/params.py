"""Which tensors of a model the inner loop adapts, and by which names they may be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mtml_kernels.batch_norm import per_step_names
from mtml_kernels.checks import shown
from mtml_kernels.transforms import differentiated, has_tangents, is_forward_mode

__all__ = ["ParamsArg", "adaptable", "aliases", "by_first_name", "select"]

ParamsArg = str | Sequence[str] | Callable[[str, Tensor], bool] | None


def _statistics(model: nn.Module) -> set[str]:
    """Names of the running statistics of normalisation layers: buffers that no gradient step should move."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            prefix = f"{path}." if path else ""
            found |= {prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")}
    return found


def adaptable(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that an inner loop could change: floating-point parameters but those that exist once per step, then
    buffers but running statistics.
    """
    statistics, per_step = _statistics(model), per_step_names(model)
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name not in per_step}
    tensors |= {name: b for name, b in model.named_buffers() if name not in tensors and name not in statistics}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def aliases(model: nn.Module) -> dict[str, str]:
    """{further name of a shared parameter or buffer: its first name, by which everything else here knows it}."""
    first = {id(t): name for name, t in chain(model.named_buffers(), model.named_parameters())}
    every = chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return {name: first[id(tensor)] for name, tensor in every if first[id(tensor)] != name}


def by_first_name(table: Mapping[str, Any], others: Mapping[str, str]) -> dict[str, Any]:
    """Rates by name with `aliases` replaced. Raises ValueError where two names of one tensor have different rates."""
    found: dict[str, tuple[str, Any]] = {}
    for name, rate in table.items():
        first = others.get(name, name)
        other, before = found.setdefault(first, (name, rate))
        if before is not rate and (isinstance(before, Tensor) or isinstance(rate, Tensor) or before != rate):
            raise ValueError(
                f"lr: expected one rate for {other!r} and {name!r}, which are the same tensor, got {shown(before)} and "
                f"{shown(rate)}; name one of them"
            )
    return {first: rate for first, (_, rate) in found.items()}


def _candidates(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """(name, first name, tensor) of everything adaptable, once for each name that it has."""
    tensors = adaptable(model)
    names = [(name, name) for name in tensors]
    names += [(name, first) for name, first in aliases(model).items() if first in tensors]
    return [(name, first, tensors[first]) for name, first in names]


def _matches(model: nn.Module, pattern: str) -> set[str]:
    """Parameters that match; buffers only where none does, or where the pattern is a buffer's very name."""
    parameters = {name for name, _ in model.named_parameters()}
    found = {first for name, first, _ in _candidates(model) if fnmatchcase(name, pattern)}
    return found & parameters or found


def select(model: nn.Module, params: ParamsArg) -> tuple[str, ...]:
    """Names of the tensors to adapt, in the model's order; a shared tensor's first name.

    Args:
        params: None for all trainable parameters (those that torch.func.functional_call put in their place, if autograd
            or a transform follows them); a name or pattern ("head.*", as fnmatch has them) or several; or a
            predicate(name, tensor), which is asked about every floating-point parameter and buffer except running
            statistics. A pattern means parameters, frozen ones included, and buffers where it matches no parameter. A
            tensor that has several names is meant by each of them: it is chosen where one of them is.

    Raises:
        ValueError: a pattern or the predicate matches nothing, nothing is trainable, or forward_ad's dual tensors are
            attributes of modules instead of parameters.
        TypeError: `params` is none of these.
    """
    candidates = adaptable(model)
    _refuse_dual_attributes(model)
    if params is None:
        trainable = {name for name, p in model.named_parameters() if differentiated(p)}
        chosen = {name for name in candidates if name in trainable}
        if not chosen:
            raise ValueError(
                "model: expected trainable parameters, got none; unfreeze some, or name tensors in params="
            )
    elif callable(params):
        chosen = {first for name, first, tensor in _candidates(model) if params(name, tensor)}
        if not chosen:
            raise ValueError(f"params: the predicate matched no tensor; there are {_listed(candidates)}")
    elif isinstance(params, str) or all(isinstance(p, str) for p in params):
        chosen = set()
        for pattern in [params] if isinstance(params, str) else params:
            found = _matches(model, pattern)
            if not found:
                raise ValueError(
                    f"params: {pattern!r} matches no floating-point parameter or buffer; there are "
                    f"{_listed(candidates)} (a whole submodule is {pattern.rstrip('.*') + '.*'!r})"
                )
            chosen |= found
    else:
        raise TypeError(f"params: expected None, a pattern, a list of patterns or a predicate, got {params!r}")
    return tuple(name for name in candidates if name in chosen)


def _refuse_dual_attributes(model: nn.Module) -> None:
    """forward_ad's tutorial deletes a parameter and sets a dual tensor as an attribute, which nobody would see here."""
    for path, module in model.named_modules() if is_forward_mode() else ():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and has_tangents([value]):
                full = f"{path}.{name}" if path else name
                raise ValueError(
                    f"model: expected {full!r} with its tangent among the parameters or buffers, got an attribute; put "
                    f"dual tensors in by torch.func.functional_call(module, {{{full!r}: dual}}, batch)"
                )


def _listed(candidates: dict[str, Tensor]) -> str:
    names = list(candidates)
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
