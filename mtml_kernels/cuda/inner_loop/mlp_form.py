"""Which calls are those of a multi-layer perceptron, as the kernels of csrc/cuda/inner_loop/mlp take it."""

from __future__ import annotations

import functools
from typing import NamedTuple

from mtml_kernels.program.activations import Act
from mtml_kernels.program.encoding import LAYOUT_LINEAR, Encoded, Node, constants_of, decode
from mtml_kernels.program.ops import Op
from mtml_kernels.schema.inner_loop import KEEP_NONE, NEED_LR, NEED_PARAMS, PLAIN, InnerLoopArgs
from mtml_kernels.schema.losses import KINDS

__all__ = ["Form", "form_of", "why_not"]

_STRAIGHT = (Act.RELU, Act.LEAKY_RELU)
_OF_ELEMENTS = tuple(KINDS.index(name) for name in ("mse", "bce_with_logits", "huber", "l1"))


class Form(NamedTuple):
    """A perceptron: its widths, the positions of W_1, b_1, W_2, ... among the parameters, and its activation."""

    widths: tuple[int, ...]
    tensors: tuple[int, ...]
    act: Act
    constants: tuple[float, float]

    @property
    def bent(self) -> bool:
        """Whether f'' is not 0 everywhere."""
        return self.act not in _STRAIGHT


def form_of(a: InnerLoopArgs) -> Form | None:
    """The perceptron that a call is of, where its options are those of the kernels."""
    return None if why_not(a) else _form(tuple(a.spec.program), tuple(a.spec.consts))


def why_not(a: InnerLoopArgs) -> str:
    """What of a call the kernels of perceptrons do not take, in words; "" for nothing, but perhaps its widths."""
    if options := _refused_options(a):
        return options
    if _form(tuple(a.spec.program), tuple(a.spec.consts)) is None:
        return "the network is no perceptron: linear layers with a bias each, one activation between them"
    return ""


def _refused_options(a: InnerLoopArgs) -> str:
    spec, losses = a.spec, {a.spec.support_loss[0], a.spec.query_loss[0]}
    refused = {
        "the update is not plain gradient descent": spec.update != PLAIN,
        "steps have data or starts of their own": bool(spec.axes),
        "adapted parameters are handed out": spec.keep != KEEP_NONE,
        "not all parameters are adapted": not all(spec.adapted),
        "there are masks": a.support_mask is not None or a.query_mask is not None,
        "the losses of all steps are weighed": a.step_weights is not None,
        "gradients of data are wanted": bool(a.needs & ~(NEED_PARAMS | NEED_LR)),
        # which are made on the way back of second order
        "gradients of rates are wanted of first order": bool(spec.first_order and a.needs & NEED_LR),
        "there is no query set": a.query_y is None,
        "sets have several inputs": (len(a.support_x), len(a.query_x)) != (1, 1),
        "elements of a tensor have rates of their own": any(rate.ndim != 1 for rate in a.lr),
        f"a loss is not one of elements ({', '.join(KINDS[kind] for kind in _OF_ELEMENTS)})": (
            not losses <= set(_OF_ELEMENTS)
        ),
        "a set has no targets": not a.support_y.numel() or (a.query_y is not None and not a.query_y.numel()),
    }
    return next((why for why, holds in refused.items() if holds), "")


@functools.lru_cache(maxsize=256)
def _form(ints: tuple[int, ...], consts: tuple[float, ...]) -> Form | None:
    """Linear layers, each with a bias, with one activation between them; the output last."""
    program = decode(ints)
    nodes, widths = program.nodes, list(program.input_sizes)
    tensors: list[int] = []
    acts: list[tuple[int, tuple[float, ...]]] = []
    if len(widths) != 1 or program.output != len(nodes) - 1 or any(node.rows != 1 for node in nodes):
        return None
    if nodes[0].op != Op.INPUT or nodes[0].features != widths[0]:
        return None
    for at, node in enumerate(nodes[1:], 1):
        wanted = Op.LINEAR if at % 2 else Op.ACT
        if node.op != wanted or node.a != at - 1:
            return None
        if at % 2 and not _is_whole(program, node):
            return None
        if at % 2:
            widths.append(node.features)
            tensors += [node.weight, node.bias]
        else:
            acts.append((node.b, constants_of(node, consts)))
    if len(nodes) % 2 or len(set(tensors)) < len(tensors) or len(tensors) < len(program.params) or len(set(acts)) > 1:
        return None
    kind, constants = acts[0] if acts else (int(Act.RELU), ())
    c0, c1 = constants or (1.0, 0.0)
    if kind == Act.LEAKY_RELU and c0 <= 0:  # the sign of what it gives is not that of what it takes
        return None
    return Form(tuple(widths), tuple(tensors), Act(kind), (c0, c1))


def _is_whole(program: Encoded, node: Node) -> bool:
    """Whether a linear layer has a weight as PyTorch lays it out, and a bias."""
    return node.bias >= 0 and program.params[node.weight][0] == LAYOUT_LINEAR
