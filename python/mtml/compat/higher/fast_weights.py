"""The weights of a patched module, step by step, and where the module holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mtml_kernels.checks import shown
from mtml_kernels.general.twin import ENTRIES, STRUCTURE, Twins
from mtml_kernels.recurrent import RELINKED

__all__ = ["FastWeights"]

Slot = tuple[Any, Any]  # container, key: a dict of parameters or a recurrent layer's list


class FastWeights:
    """What all parts of a patched module share. It knows their dicts of parameters and not the parts themselves, so
    that a patched module is freed as soon as nobody uses it.

    Args:
        originals: the module's parameters, in the order of its `parameters()`.
        twins: the copy that holds the weights.
    """

    def __init__(self, originals: list[Tensor], twins: Twins) -> None:
        self.slots: list[list[Slot]] = [twins.slots[id(p)] for p in originals]
        self.history: list[list[Tensor]] = []
        self.track = True
        self.held = _Held(twins, originals) if twins.rigid else None
        recurrent = [part for _, part in twins.pairs if isinstance(part, nn.RNNBase)]
        if recurrent:
            index = {id(twins.tensors[id(p)]): i for i, p in enumerate(originals)}
            for part in recurrent:
                flat: Any = part.__dict__["_flat_weights"]
                for key, tensor in enumerate(flat):
                    if id(tensor) in index:
                        self.slots[index[id(tensor)]].append((flat, key))

    @property
    def now(self) -> list[Tensor] | None:
        return self.history[-1] if self.history else None

    def put(self, params: Iterable[Tensor]) -> None:
        """The next weights; the former ones are kept where higher gradients are tracked."""
        params = list(params)
        if len(params) != len(self.slots):
            raise ValueError(f"params: expected {len(self.slots)} tensors, one a parameter, got {len(params)}")
        for tensor in params:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"params: expected tensors, got {shown(tensor)} among them")
        if self.track or not self.history:
            self.history.append(params)
        else:
            self.history[:] = [params]
        for tensor, slots in zip(params, self.slots, strict=True):
            for holder, key in slots:
                holder[key] = tensor
        if self.held is not None:
            self.held.renew(params)

    def take(self, params: Iterable[Tensor] | None) -> None:
        """The weights that a call brings, or those that are there."""
        if params is not None:
            self.put(params)
        elif not self.history:
            raise ValueError("params: expected the weights, since this patched module has none of its own")

    def replace(self, old: Tensor, new: Tensor) -> bool:
        """One weight for another; False where `old` is none of them."""
        if self.now is None:
            raise RuntimeError(
                "params: this patched module has no weights of its own yet; call it with params=, or make it by "
                "monkeypatch"
            )
        if not any(tensor is old for tensor in self.now):
            return False
        self.put(new if tensor is old else tensor for tensor in self.now)
        return True


class _Held:
    """Weights that attributes hold besides, such as a plain list of them: those are made anew with every step."""

    def __init__(self, twins: Twins, originals: list[Tensor]) -> None:
        self.twins, self.originals = twins, originals
        self.places: list[tuple[dict[str, Any], str, Any]] = []
        for original, part in twins.pairs:
            for name, value in original.__dict__.items():
                if name not in STRUCTURE and name not in RELINKED and self._holds_weights(value):
                    self.places.append((part.__dict__, name, value))

    def _holds_weights(self, value: Any) -> bool:
        self.twins.rigid, self.twins.left = False, ENTRIES
        self.twins.mapped(value)
        return self.twins.rigid

    def renew(self, params: list[Tensor]) -> None:
        self.twins.tensors.update((id(p), tensor) for p, tensor in zip(self.originals, params, strict=True))
        for attributes, name, value in self.places:
            self.twins.left = ENTRIES
            attributes[name] = self.twins.mapped(value)
