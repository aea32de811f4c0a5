"""A fused path for models that are one linear layer: their inner loop in the Gram matrix of the support inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.paths.batch import Batch
from mtml.paths.fused import Fused
from mtml.paths.path import Outcome, in_our_words
from mtml_kernels.checks import Sizes
from mtml_kernels.functional.head_forms import gram_is_cheaper
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.head_inner_loop import head_inner_loop_call
from mtml_kernels.precision import plainly
from mtml_kernels.program import LAYOUT_LINEAR, Op, Program
from mtml_kernels.reference.head_inner_loop import KINDS
from mtml_kernels.schema.head_inner_loop import HeadArgs, HeadOptions, encode_options
from mtml_kernels.schema.inner_loop import KEEP_STEPS, InnerLoopSpec

__all__ = ["FusedHead", "is_head"]


def is_head(program: Program, spec: InnerLoopSpec, rates: Sequence[Tensor], losses: Any, sizes: Sizes) -> bool:
    """Whether `FusedHead` computes the same as `Fused`, at a lower cost."""
    if [node.op for node in program.nodes] != [Op.INPUT, Op.LINEAR] or len(program.output_shape) != 1:
        return False
    layer = program.nodes[1]
    adapted = spec.adapted[layer.weight] and program.params[layer.weight].layout == LAYOUT_LINEAR
    if not adapted or spec.first_order or spec.keep == KEEP_STEPS or any(rate.ndim > 1 for rate in rates):
        return False
    known = all(isinstance(loss, LossSpec) and loss.kind in KINDS for loss in losses)
    if not known or len(program.inputs) != 1:
        return False
    return gram_is_cheaper(sizes.support, sizes.query, program.nodes[0].features, layer.features, spec.steps)


class FusedHead(Fused):
    """One call of `mtml::head_inner_loop`. Made like a `Fused`, which it falls back to for a multi-step loss."""

    how = ", in the Gram matrix of the support inputs"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        layer, spec = self.program.nodes[1], self.spec
        losses = [
            LossSpec.decode(codes[0], codes[1], p0)
            for codes, p0 in zip((spec.support_loss, spec.query_loss), spec.loss_args, strict=True)
        ]
        self.options = encode_options(HeadOptions(losses[0], losses[1]))
        self.shape = self.params[layer.weight].shape
        self.at = layer.weight, layer.bias
        self.moves = layer.bias >= 0 and spec.adapted[layer.bias]

    def low_rank(self, sizes: Sizes) -> int:
        return 0

    def predicted(self, sizes: Sizes) -> tuple[str, list[dict[str, Any]]]:
        return "", []  # its op runs by no schedule

    def launched(self, sizes: Sizes) -> str:
        return ""

    def __call__(self, batch: Batch) -> Outcome:
        if batch.weights is not None:
            return super().__call__(batch)
        if self.float32:
            batch = batch.in_float32()
        params, (weight, bias) = self.tensors(), self.at
        head = params[weight], None if bias < 0 else params[bias]
        sx, sy, qx, qy, *given = batch.parts()
        if self.classes != (0, 0):
            sy, qy = self._labels(sy, qy)
        support = self._rows(sx, self.support_names)
        query = support[:, :0] if qx is None else self._rows(qx, self.query_names)
        masks = (m if m is None or m.dtype is self.dtype else m.to(self.dtype) for m in given)
        tensors = (support, query, *head, self._table(), sy, qy, *masks)
        args = HeadArgs._make((*tensors, self.options, 0))
        try:
            loss, logits, support_losses, coefficients = head_inner_loop_call(args, self.backend)
        except (TypeError, ValueError) as error:
            raise in_our_words(error) from None
        kept = self._kept(*head, support, coefficients) if self.spec.keep else []
        return Outcome(loss, logits, support_losses, self._named(kept, batch)[0] if self.spec.keep else {})

    def _rows(self, x: Any, names: Any) -> Tensor:
        """The model's input [T, N, ...] as [T, N, D]."""
        found = self.inputs(x, names)[0]
        return found if found.ndim == 3 else found.reshape(*found.shape[:2], self.shape[1])

    def _table(self) -> Tensor:
        """The rates as the op takes them, [1 or 2, K, C]."""
        rates = [rate.expand(self.spec.steps) for rate in self.rates()]
        if self.at[1] >= 0 and not self.moves:
            rates = [rates[0], torch.zeros_like(rates[0])]
        elif len(rates) == 2 and self.adapted[0] != self.program.params[self.program.nodes[1].weight].name:
            rates.reverse()
        return torch.stack(rates)[:, :, None].expand(-1, -1, self.shape[0])

    def _kept(self, weight: Tensor, bias: Tensor | None, support: Tensor, coefficients: Tensor) -> list[Tensor]:
        """The adapted parameters [T, *shape], in the order of `adapted`; support [T, S, D]."""
        weight_name = self.program.params[self.at[0]].name
        with plainly(weight):
            own = weight - coefficients[:, 0] @ support
        return [own if name == weight_name else _own_bias(bias, coefficients) for name in self.adapted]


def _own_bias(bias: Tensor | None, coefficients: Tensor) -> Tensor:
    assert bias is not None
    return bias - coefficients[:, -1].sum(-1)
