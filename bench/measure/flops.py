"""FLOPs and bytes of a meta-step, by formula.

The counting rule. A *product* is one pass of a linear or convolution layer over one sample: out x in multiply-adds, of
2 FLOPs each. Only products are counted; activations, losses, normalisation, pooling and the update are not.

====================================  ==========  ==================================
a layer costs, per sample             first layer  any later layer
====================================  ==========  ==================================
forward                               1           1: A Wt
gradient step (forward + backward)    2           3: A Wt, the dW and the dX
H v (tangents of the three)           2           6: each by the product rule, A' Wt + A Vt and so on
====================================  ==========  ==================================

The first layer's input depends on no parameter, so its tangent A' is zero and nobody asks for its dX: only products
that exist are counted. Where gradients with respect to the inputs are wanted, the first layer's dX exists on the query
samples (3 products) and its tangent on the support samples (4 in H v). A meta-step is ``steps`` x (gradient step + H v)
on the support samples plus one gradient step on the query samples, times the tasks.

A single linear layer is counted in its Gram form where that is the cheaper exact one (``gram_head``): 0.325 GFLOP for
anil_head, where the loop over per-task weights takes 0.883.

Taps of a convolution that fall outside the image multiply zeros and are not counted (``taps="inside"``: 38.4 GFLOP for
omniglot_conv, 85.3 for mini_conv). ``taps="all"`` counts them, as a dense im2col product computes them: 45.2 and 88.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bench.workloads import Workload
from bench.workloads.inner import InnerWorkload

Taps = Literal["inside", "all"]
Mode = Literal["adapt", "forward", "forward+backward"]


@dataclass(frozen=True)
class Layer:
    """One product layer: multiply-adds per sample, and whether its input depends on no parameter."""

    macs: int
    first: bool

    def gradient_step(self, inputs: bool) -> int:
        """Multiply-adds of forward + dW + dX (no dX in a first layer unless the inputs want one)."""
        return self.macs * (2 if self.first and not inputs else 3)

    def tangent(self, inputs: bool) -> int:
        """Multiply-adds of H v: the tangents of forward, dW and dX."""
        if self.first:
            return self.macs * (4 if inputs else 2)
        return self.macs * 6


def taps_along(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """How many (output position, tap) pairs of one image axis lie inside the image."""
    return sum(0 <= o * stride - pad + k * dilation < size for o in range(out) for k in range(kernel))


def _ints(values: object) -> list[int]:
    assert isinstance(values, tuple)
    return [int(v) for v in values]


def _conv_macs(layer: nn.Conv2d, x: Tensor, y: Tensor, taps: Taps) -> int:
    kernel, stride, pad, dilation = (_ints(v) for v in (layer.kernel_size, layer.stride, layer.padding, layer.dilation))
    pairs = 1
    for axis in range(2):
        size, out = x.shape[2 + axis], y.shape[2 + axis]
        inside = taps_along(size, out, kernel[axis], stride[axis], pad[axis], dilation[axis])
        pairs *= inside if taps == "inside" else out * kernel[axis]
    return pairs * layer.in_channels // layer.groups * layer.out_channels


def product_layers(net: nn.Module, x: tuple[int, ...], taps: Taps = "inside") -> list[Layer]:
    """The product layers of a network in the order they run on one sample of shape ``x``."""
    found: list[Layer] = []

    def record(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            macs = layer.in_features * layer.out_features * (args[0][0].numel() // layer.in_features)
        else:
            assert isinstance(layer, nn.Conv2d)
            macs = _conv_macs(layer, args[0], out, taps)
        found.append(Layer(macs, first=not found))

    hooks = [m.register_forward_hook(record) for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        net(torch.empty(2, *x, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def on_meta(w: Workload) -> nn.Module:
    """The workload's network without storage: shapes only."""
    return w.build().to("meta")


def gram_head(w: Workload, features: int, mode: Mode = "forward+backward") -> int:
    """FLOPs of one meta-step of a linear head whose K steps live in the S x S Gram matrix of its support features.

    Per task, multiply-adds with D features and C outputs: forward the Gram matrix, F_s W0t, the adapted weight W_K =
    W0 - A F_s and the query set's logits; in the small space S x S x C for every step but the first (there A is 0),
    twice more in reverse. Backward P = dq^T F_q, P F_s^T and dW0; where the features want gradients dq W_K, and for
    F_s the terms through the Gram matrix (symmetric: one product), through W0 and through W_K.
    """
    s, q, c = w.support, w.query, w.out
    large = s * s + 2 * s * c + (q * c if mode != "adapt" else 0)
    small = max(w.steps - 1, 0) * s * s * c
    if mode == "forward+backward":
        large += q * c + 2 * s * c
        small *= 3
        if w.inputs:
            large += q * c + s * s + 2 * s * c
    return 2 * w.tasks * (large * features + small)


def weight_space(w: Workload, layers: list[Layer], mode: Mode = "forward+backward", second_order: bool = True) -> int:
    """FLOPs of a meta-step (or a part of it: ``mode``) that keeps per-task weights."""
    inner = sum(layer.gradient_step(inputs=False) for layer in layers)
    tangent = sum(layer.tangent(w.inputs) for layer in layers) if second_order else 0
    query_forward = sum(layer.macs for layer in layers)
    query = sum(layer.gradient_step(w.inputs) for layer in layers)
    support = w.tasks * w.support * w.steps
    if mode == "adapt":
        return 2 * support * inner
    if mode == "forward":
        return 2 * (support * inner + w.tasks * w.query * query_forward)
    return 2 * (support * (inner + tangent) + w.tasks * w.query * query)


def meta_step(w: Workload, taps: Taps = "inside", mode: Mode = "forward+backward") -> int:
    """FLOPs of one meta-step by the rule of this module's docstring.

    >>> from bench.workloads import WORKLOADS
    >>> round(meta_step(WORKLOADS["omniglot_mlp"]) / 1e9, 2)
    2.97
    """
    net = on_meta(w)
    flops = weight_space(w, product_layers(net, w.x, taps), mode)
    leaves = [m for m in net.modules() if not list(m.children())]
    if w.steps and len(leaves) == 1 and isinstance(leaves[0], nn.Linear):
        return min(flops, gram_head(w, leaves[0].in_features, mode))
    return flops


def inner_loop(w: InnerWorkload) -> int:
    """FLOPs of a call of an inner-loop workload; the update, however many operations it is, is not counted.

    Gradients for the support inputs cost the first layer what the last rows of the table say. Where the inner loop
    changes a latent that shifts the layers, its steps need no dW and its tangents pass no tangent of a weight: 1 + 1
    products for the gradient step, then 1 + 1 for the tangents and 2 for dW; of the first layer 1, and 1 for dW. What
    is computed from the latent alone, once a task, counts nothing. Where the last layer alone adapts, the others have
    one gradient step on both sets.

    >>> from bench.workloads.inner import WORKLOADS
    >>> round(inner_loop(WORKLOADS["fedavg"]) / 1e9, 1)
    49.4
    """
    layers = product_layers(on_meta(w), w.x)
    if w.goal == "adapt":
        return weight_space(w, layers, "adapt")
    if w.head:
        return _on_features(w, layers)
    if w.goal == "expert":
        inner = sum(layer.gradient_step(inputs=False) + layer.tangent(inputs=True) for layer in layers)
        return 2 * w.tasks * w.support * w.steps * inner
    if not w.adapted:
        return weight_space(w, layers)
    step = sum(layer.macs * (2 if layer.first else 6) for layer in layers)
    query = sum(layer.gradient_step(inputs=False) for layer in layers)
    return 2 * w.tasks * (w.support * w.steps * step + w.query * query)


def _on_features(w: InnerWorkload, layers: list[Layer]) -> int:
    """FLOPs where the last layer alone adapts: one gradient step of the rest, and a head that wants its inputs'."""
    samples, head = w.tasks * (w.support + w.query), replace(w, inputs=True)
    trunk = 2 * samples * sum(layer.gradient_step(inputs=False) for layer in layers[:-1])
    by_weights = weight_space(head, [Layer(layers[-1].macs, first=True)])
    return trunk + min(by_weights, gram_head(head, layers[-1].macs // w.out))


def meta_step_bytes(w: Workload, itemsize: int = 4, mode: Mode = "forward+backward") -> int:
    """Compulsory traffic: every input read once, every result written once, nothing in between."""
    params = sum(p.numel() for p in on_meta(w).parameters())
    sample = 1
    for size in w.x:
        sample *= size
    target = w.out * itemsize if w.loss == "mse" else 8
    support, query = w.tasks * w.support, w.tasks * w.query
    if mode == "adapt":
        return support * (sample * itemsize + target) + (1 + w.tasks) * params * itemsize
    read = (support + query) * (sample * itemsize + target) + params * itemsize
    written = (query * w.out + w.tasks) * itemsize
    if mode == "forward+backward":
        written += params * itemsize + ((support + query) * sample * itemsize if w.inputs else 0)
    return read + written


def inner_loop_bytes(w: InnerWorkload, itemsize: int = 4) -> int:
    """Compulsory traffic of a call of an inner-loop workload."""
    params = sum(p.numel() for p in on_meta(w).parameters())
    sample = math.prod(w.x) * itemsize + (w.out * itemsize if w.loss == "mse" else 8)
    support = w.tasks * w.support * (w.steps if w.per_step else 1)
    params *= 1 + (w.steps if w.rates else 0)
    read = (support + w.tasks * w.query) * sample + (w.tasks if w.own_starts else 1) * params * itemsize
    if w.goal == "expert":
        return read + (params + support * math.prod(w.x)) * itemsize
    return read + (w.tasks if w.goal == "adapt" else 1) * params * itemsize
