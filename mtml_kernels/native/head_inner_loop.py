"""The compiled engine's `head_inner_loop`: addresses in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.native import engine
from mtml_kernels.native.inner_loop import label_error
from mtml_kernels.native.tensors import addresses_of, checked, checked_one, cotangent_address
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.head_inner_loop import (
    DIFFERENTIABLE,
    NEEDS_RATES,
    Cotangents,
    HeadArgs,
    HeadOutputs,
    carry_size,
    parse_options,
)

__all__ = ["head_backward", "head_forward"]

MASKS = ("support_mask", "query_mask")
COTANGENTS = ("grad_loss", "grad_logits", "grad_support_losses", "grad_coefficients")


class _Call:
    """The inputs of one call, made contiguous and kept alive."""

    def __init__(self, a: HeadArgs) -> None:
        options = parse_options(a.options)
        dtype = self.dtype = a.weight.dtype
        tasks, support, features = a.support.shape
        groups, steps, _ = a.rates.shape
        self.args, self.tasks, self.query, self.classes = a, tasks, a.query.shape[1], a.weight.shape[0]
        losses = (options.support_loss, options.query_loss)
        self.numbers = [*(float(n) for loss in losses for n in loss.encode()), options.decay, options.proximal]
        self.sizes = [DTYPES[dtype], torch.get_num_threads(), tasks, support, self.query, features, self.classes]
        self.sizes += [steps, groups, int(bool(a.needs & NEEDS_RATES))]
        types = [torch.int64 if loss.kind == "cross_entropy" else dtype for loss in losses]
        floats, at_floats = checked(DIFFERENTIABLE.__getitem__, a.differentiable, dtype)
        labels, at_labels = checked_one("labels", a.labels, types[0])
        query_labels, at_query_labels = checked_one("query_labels", a.query_labels, types[1])
        masks, at_masks = checked(MASKS.__getitem__, (a.support_mask, a.query_mask), dtype)
        self.held = floats, labels, query_labels, masks
        self.addresses = [*at_floats, at_labels, at_query_labels, *at_masks]

    def inputs(self, carry: Tensor | None, cotangents: Cotangents = (None, None, None, None)) -> list[int]:
        """As csrc/bindings/head_inner_loop.cpp reads them."""
        given = [cotangent_address(name, c) for name, c in zip(COTANGENTS, cotangents, strict=True)]
        return [*self.addresses, cotangent_address("carry", carry), *given]

    def run(self, inputs: list[int], outputs: list[int]) -> None:
        module = engine()
        try:
            module.head_loop(self.sizes, self.numbers, inputs, outputs)
        except module.BadLabel as error:
            raise label_error(str(error), "labels", "query_labels") from None

    def carry(self) -> Tensor:
        return torch.empty((self.tasks, carry_size(self.args)), dtype=self.dtype, device="cpu")


def head_forward(a: HeadArgs) -> HeadOutputs:
    """The op's forward."""
    call = _Call(a)
    tasks, support, query, classes = call.tasks, a.support.shape[1], call.query, call.classes
    groups, steps, _ = a.rates.shape
    loss = torch.empty(tasks if a.has_loss else 0, dtype=call.dtype, device="cpu")
    logits = torch.empty((tasks, query, classes), dtype=call.dtype, device="cpu")
    support_losses = torch.empty((steps, tasks), dtype=call.dtype, device="cpu")
    coefficients = torch.empty((tasks, groups, classes, support), dtype=call.dtype, device="cpu")
    carry = call.carry() if a.needs and a.has_loss else torch.empty(0, dtype=call.dtype, device="cpu")
    inputs = call.inputs(carry if carry.numel() else None)
    call.run(inputs, addresses_of([loss, logits, support_losses, coefficients]))
    return loss, logits, support_losses, coefficients, carry


def head_backward(cotangents: Cotangents, a: HeadArgs, carry: Tensor) -> list[Tensor | None]:
    """The op's backward: scales what the forward carried, or runs the loop again where other cotangents came in."""
    call = _Call(a)
    scale, *others = cotangents
    if scale is None or not carry.numel() or any(c is not None for c in others):
        if all(c is None for c in cotangents):
            cotangents = (torch.zeros(call.tasks, dtype=call.dtype, device="cpu"), None, None, None)
        carry, scale = call.carry(), None
        call.run(call.inputs(carry, cotangents), [0, 0, 0, 0])
    grads = [
        torch.empty(t.shape, dtype=call.dtype, device="cpu") if t is not None and asked else None
        for t, asked in zip(a.differentiable, a.asks(), strict=True)
    ]
    if call.tasks:
        inputs = call.inputs(carry, (scale, None, None, None))
        engine().head_chain(call.sizes, call.numbers, inputs, addresses_of(grads))
        return grads
    return [None if g is None else g.zero_() for g in grads]
