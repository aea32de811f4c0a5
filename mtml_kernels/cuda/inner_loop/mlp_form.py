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
    spec = a.spec
    losses = {spec.support_loss[0], spec.query_loss[0]}
    refused = {
        "no momentum and no other update rule": spec.update != PLAIN,
        "rates of tensors or steps": any(rate.ndim != 1 for rate in a.lr) or bool(spec.axes),
        "adapted parameters that are not handed out": spec.keep != KEEP_NONE,
        "all parameters adapted": not all(spec.adapted),
        "no masks": a.support_mask is not None or a.query_mask is not None,
        "no losses of all steps": a.step_weights is not None,
        "gradients of parameters and rates alone": bool(a.needs & ~(NEED_PARAMS | NEED_LR)),
        # whose gradients are made on the way back of second order
        "rates without gradients where it is of first order": bool(spec.first_order and a.needs & NEED_LR),
        "one input, and a query set": a.query_y is None or len(a.support_x) != 1 or len(a.query_x) != 1,
        f"losses of elements ({', '.join(KINDS[kind] for kind in _OF_ELEMENTS)})": not losses <= set(_OF_ELEMENTS),
        "samples": not a.support_y.numel() or a.query_y is None or not a.query_y.numel(),
    }
    for wanted, missing in refused.items():
        if missing:
            return f"they take {wanted}"
    if _form(tuple(spec.program), tuple(spec.consts)) is None:
        return "they take linear layers with biases and one activation between them"
    return ""


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
