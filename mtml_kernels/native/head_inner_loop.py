"""The compiled engine's `head_inner_loop`: addresses in, tensors out; see `native` for what is checked here and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtml_kernels.native import _at, _cotangent, _engine, _label_error, _one, addresses_of
from mtml_kernels.schema.head_inner_loop import (
    NEEDS_RATES,
    Cotangents,
    HeadArgs,
    HeadOutputs,
    carry_size,
    parse_options,
)

__all__ = ["head_backward", "head_forward"]

_DTYPES = {torch.float32: 0, torch.float64: 1}


class _Call:
    """The inputs of one call, made contiguous and kept alive."""

    def __init__(self, a: HeadArgs) -> None:
        options = parse_options(a.options)
        kinds = options.support_loss.kind, options.query_loss.kind
        dtype = self.dtype = a.weight.dtype
        tasks, support, features = a.support.shape
        self.args, self.tasks, self.query, self.classes = a, tasks, a.query.shape[1], a.weight.shape[0]
        self.numbers = [*map(float, options.support_loss.encode()), *map(float, options.query_loss.encode())]
        self.numbers += [options.decay, options.proximal]
        groups, steps, _ = a.rates.shape
        self.sizes = [_DTYPES[dtype], torch.get_num_threads(), tasks, support, self.query, features, self.classes]
        self.sizes += [steps, groups, int(bool(a.needs & NEEDS_RATES))]
        label_types = [torch.int64 if kind == "cross_entropy" else dtype for kind in kinds]
        floats, at_floats = addresses_of(HeadArgs._fields[:5].__getitem__, a[:5], dtype)
        masks, at_masks = addresses_of(HeadArgs._fields[7:9].__getitem__, a[7:9], dtype)
        labels = [_one(*each) for each in zip(HeadArgs._fields[5:7], a[5:7], label_types, strict=True)]
        self.held = floats, masks, labels
        self.addresses = [*at_floats, *(at for _, at in labels), *at_masks]

    def inputs(self, carry: Tensor | None, cotangents: Cotangents = (None, None, None, None)) -> list[int]:
        names = ("grad_loss", "grad_logits", "grad_support_losses", "grad_coefficients")
        given = [_cotangent(c, name) for c, name in zip(cotangents, names, strict=True)]
        return [*self.addresses, _cotangent(carry, "carry"), *given]

    def run(self, inputs: list[int], outputs: list[int]) -> None:
        engine = _engine()
        try:
            engine.head_loop(self.sizes, self.numbers, inputs, outputs)
        except engine.BadLabel as error:
            text = str(_label_error(str(error)))
            raise ValueError(text.replace("support_y", "labels").replace("query_y", "query_labels")) from None

    def carry(self) -> Tensor:
        return torch.empty((self.tasks, carry_size(self.args)), dtype=self.dtype, device="cpu")


def head_forward(*args: Any) -> HeadOutputs:
    """The op's forward (arguments of `HeadArgs`, positionally)."""
    a = HeadArgs(*args)
    call = _Call(a)
    tasks, support, query, classes = call.tasks, a.support.shape[1], call.query, call.classes
    groups, steps, _ = a.rates.shape
    loss = torch.empty(0 if a.query_labels is None else tasks, dtype=call.dtype, device="cpu")
    logits = torch.empty((tasks, query, classes), dtype=call.dtype, device="cpu")
    support_losses = torch.empty((steps, tasks), dtype=call.dtype, device="cpu")
    coefficients = torch.empty((tasks, groups, classes, support), dtype=call.dtype, device="cpu")
    carry = call.carry() if a.needs and a.query_labels is not None else torch.empty(0, dtype=call.dtype, device="cpu")
    outputs = [loss, logits, support_losses, coefficients]
    call.run(call.inputs(carry if carry.numel() else None), [t.data_ptr() for t in outputs])
    return loss, logits, support_losses, coefficients, carry


def head_backward(cotangents: Cotangents, a: HeadArgs, carry: Tensor) -> list[Tensor | None]:
    """The op's backward: scales what the forward carried, or runs the loop again where other cotangents came in."""
    call = _Call(a)
    scale = cotangents[0]
    if scale is None or not carry.numel() or any(c is not None for c in cotangents[1:]):
        if all(c is None for c in cotangents):
            cotangents = (torch.zeros(call.tasks, dtype=call.dtype, device="cpu"), None, None, None)
        carry, scale = call.carry(), None
        call.run(call.inputs(carry, cotangents), [0, 0, 0, 0])
    wanted = (a.support, a.query, a.weight, a.bias, a.rates)
    grads = [
        torch.empty(t.shape, dtype=call.dtype, device="cpu") if t is not None and a.needs >> i & 1 else None
        for i, t in enumerate(wanted)
    ]
    into = call.inputs(carry, (scale, None, None, None))
    if call.tasks:
        _engine().head_chain(call.sizes, call.numbers, into, [_at(g) for g in grads])
        return grads
    return [None if g is None else g.zero_() for g in grads]
