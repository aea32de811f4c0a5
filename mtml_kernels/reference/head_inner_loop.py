"""`mtml::head_inner_loop` in plain PyTorch: K gradient steps of a linear head on given features, for every task.

Two forms of the same function. In weight space, task by task (m = decay + proximal, W_0 = W, b_0 = b):

    z = F_s W_k^T + b_k;  L_k = loss(z)
    W_{k+1} = W_k - alpha_k (dL_k/dW + decay W_k + proximal (W_k - W_0)), and b with beta_k;  logits = F_q W_K^T + b_K

In the Gram matrix of the support features, where no task has a weight of its own. With A = 0, u = v = 1 at first,

    W_k = u_k W - A_k F_s;  b_k = v_k b - B_k 1                                 A, B [C, S], u, v [C]
    z_k = u_k Z_s + v_k b - A_k G - B_k 1 1^T       G = F_s F_s^T, Z = W F^T
    R_k = dL_k/dz_k = w (p(z_k) - y)
    A_{k+1} = (1 - alpha_k m) A_k + alpha_k R_k;  u_{k+1} = (1 - alpha_k m) u_k + alpha_k proximal;  B, v with beta_k
    logits = u_K Z_q + v_K b - A_K F_s F_q^T - B_K 1 1^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.losses.task import task_loss
from mtml_kernels.schema.head_inner_loop import HeadOptions
from mtml_kernels.schema.losses import GRAM_KINDS as KINDS
from mtml_kernels.schema.losses import IGNORED, LossSpec

__all__ = ["KINDS", "gram_form", "scales", "weight_space"]


def weight_space(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rates: Tensor,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification: every task's own weights, and autograd for the inner gradients.

    Args:
        support [T, S, D], query [T, Q, D]; labels [T, S] class ids or [T, S, C], query_labels likewise or None.
        weight [C, D], bias [C] or None; rates [1 or 2, K, C]: of both, or of the weight and of the bias.
        support_mask [T, S], query_mask [T, Q]: weights of the samples, or None.

    Returns:
        loss [T] ([0] without query labels), logits [T, Q, C], support_losses [K, T], weight [T, C, D], bias [T, C].
    """
    bias, rates = _with_bias(weight, bias, rates)
    tasks = []
    with torch.enable_grad():
        for t in range(support.shape[0]):
            mask = None if support_mask is None else support_mask[t]
            tasks.append(_adapt(support[t], labels[t], weight, bias, rates, mask, options))
    if not tasks:
        empty = support.new_zeros(0)
        shapes = ((0, query.shape[1], len(bias)), (rates.shape[1], 0), (0, *weight.shape), (0, len(bias)))
        return empty, *(empty.reshape(shape) for shape in shapes)  # type: ignore[return-value]
    weights, biases, losses = (torch.stack(parts) for parts in zip(*tasks, strict=True))
    logits = query @ weights.mT + biases[:, None]
    return _losses(options.query_loss, logits, query_labels, query_mask), logits, losses.T, weights, biases


def _adapt(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, mask: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """One task: its weight [C, D], bias [C] and support losses [K]. x [S, D]."""
    own_weight, own_bias = weight * 1, bias * 1  # autograd needs them apart from W_0 and b_0
    own_weight, own_bias = (t if t.requires_grad else t.requires_grad_() for t in (own_weight, own_bias))
    losses = []
    for alpha, beta in zip(rates[0], rates[-1], strict=True):
        loss = task_loss(options.support_loss, x @ own_weight.T + own_bias, y, mask)
        to_weight, to_bias = torch.autograd.grad(loss, (own_weight, own_bias), create_graph=True)
        to_weight = to_weight + options.decay * own_weight + options.proximal * (own_weight - weight)
        to_bias = to_bias + options.decay * own_bias + options.proximal * (own_bias - bias)
        own_weight, own_bias = own_weight - alpha[:, None] * to_weight, own_bias - beta * to_bias
        losses.append(loss)
    return own_weight, own_bias, torch.stack(losses) if losses else x.new_zeros(0)


def _losses(spec: LossSpec, logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """[T] task losses, or [0] where there is nothing to compare with."""
    if labels is None:
        return logits.new_zeros(0)
    rows = [task_loss(spec, logits[t], labels[t], None if mask is None else mask[t]) for t in range(len(logits))]
    return torch.stack(rows) if rows else logits.new_zeros(0)


def gram_form(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rates: Tensor,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in the Gram matrix, all tasks at once; arguments as `weight_space`.

    Returns:
        loss [T] ([0] without query labels), logits [T, Q, C], support_losses [K, T], coefficients [T, 1 or 2, C, S]:
        A_K, and B_K where rates are two.
    """
    groups = rates.shape[0]
    bias, rates = _with_bias(weight, bias, rates)
    gram, cross = support @ support.mT, support @ query.mT  # [T, S, S], [T, S, Q]
    z_support, z_query = weight @ support.mT, weight @ query.mT  # [T, C, S], [T, C, Q]
    target, weights = _target(options.support_loss, labels, support_mask, len(bias), support.dtype)
    a = b = torch.zeros_like(z_support)
    u, v = scales(rates, options.decay, options.proximal)  # [K + 1, C]
    shrink = options.decay + options.proximal
    prediction = options.support_loss.info.prediction
    assert prediction is not None
    losses = []
    for k in range(rates.shape[1]):
        alpha, beta = rates[0, k][:, None], rates[-1, k][:, None]
        z = u[k][:, None] * z_support + (v[k] * bias)[:, None] - a @ gram - b.sum(-1, keepdim=True)
        residual = weights * (prediction(z) - target)
        losses.append(_losses(options.support_loss, z.mT, labels, support_mask))
        a, b = (1 - alpha * shrink) * a + alpha * residual, (1 - beta * shrink) * b + beta * residual
    logits = (u[-1][:, None] * z_query + (v[-1] * bias)[:, None] - a @ cross - b.sum(-1, keepdim=True)).mT
    support_losses = torch.stack(losses) if losses else support.new_zeros((0, support.shape[0]))
    loss = _losses(options.query_loss, logits, query_labels, query_mask)
    return loss, logits, support_losses, torch.stack((a, b)[:groups], 1)


def _with_bias(weight: Tensor, bias: Tensor | None, rates: Tensor) -> tuple[Tensor, Tensor]:
    """No bias is one of zeros that never moves."""
    if bias is not None:
        return bias, rates
    return weight.new_zeros(weight.shape[0]), torch.stack((rates[0], torch.zeros_like(rates[0])))


def scales(rates: Tensor, decay: float, proximal: float) -> tuple[Tensor, Tensor]:
    """u, v [K + 1, C]: how much of W and of b is left after each step. rates [1 or 2, K, C]."""
    kept = [torch.ones_like(rates[:, 0]) if rates.shape[1] else rates.new_ones((rates.shape[0], rates.shape[2]))]
    for k in range(rates.shape[1]):
        kept.append((1 - rates[:, k] * (decay + proximal)) * kept[-1] + rates[:, k] * proximal)
    table = torch.stack(kept, 1)  # [1 or 2, K + 1, C]
    return table[0], table[-1]


def _target(
    spec: LossSpec, labels: Tensor, mask: Tensor | None, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y [T, C, S] and w [T, 1, S], such that dL/dz = w (p(z) - y)."""
    counts = torch.ones(labels.shape[:2], dtype=dtype, device=labels.device) if mask is None else mask.to(dtype)
    if spec.info.ids:
        valid = labels != IGNORED
        counts = counts * valid
        target = torch.nn.functional.one_hot(labels.where(valid, torch.zeros_like(labels)), classes).to(dtype)
        target = (1 - spec.label_smoothing) * target + spec.label_smoothing / classes
    else:
        target = labels
        counts = counts * spec.info.slope
    if spec.reduction == "mean":
        elements = 1 if spec.info.classes else classes
        total = (counts.sum(1, keepdim=True) / spec.info.slope) * elements
        counts = torch.where(total == 0, torch.zeros_like(counts), counts / torch.where(total == 0, 1, total))
    return target.mT, counts[:, None]
