"""Multi-head losses as definitions: losses of all heads, and the gradients of their sum."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.export import code
from bench.export.definition import Definition, Exports, Sized, tensor
from bench.gpu.multihead_loss import CASES, Heads
from bench.workloads.heads import Draw

NAMES = ("vocab", "segmentation", "linear_many")


def _draw(case: str) -> Heads:
    return CASES[case](Draw(torch.float32, "cpu", 0))


def _gradient(d: Definition, name: str) -> None:
    d.outputs[f"{name}_grad"] = {**d.inputs[name], "description": f"gradient of the losses' sum for {name}"}


def _losses(d: Definition, heads: int) -> None:
    d.outputs["loss"] = tensor([d.size(heads)], torch.float32, "mean cross-entropy of each head")


def logits(case: str) -> tuple[Definition, list[Sized]]:
    """Cross-entropy of given logits [rows, classes, ...]."""
    own = _draw(case)
    z, y, ignored = own.leaves[0], own.targets[0], own.specs[0].ignore_index
    about = f"Cross-entropy of logits {list(z.shape)} and its gradient, class {ignored} ignored."
    d = Definition(f"cross_entropy_{case}", "multihead_loss", about, code.LOGITS.format(ignored=ignored))
    rows = d.variable("rows", "samples")
    inner = [d.size(n) for n in z.shape[2:]]
    d.inputs["logits"] = tensor([rows, d.size(z.shape[1]), *inner], torch.float32, "logits, classes second")
    d.inputs["labels"] = tensor([rows, *inner], torch.int64, f"class ids below {z.shape[1]}")
    _losses(d, 1)
    _gradient(d, "logits")
    return d, [Sized({"rows": n}, {}, {"labels": y[:n]}) for n in (len(y), max(len(y) // 4, 1))]


def linear(case: str) -> tuple[Definition, list[Sized]]:
    """Cross-entropy of linear heads on shared features."""
    own = _draw(case)
    weights = {f"weight_{i}": w.detach() for i, w in enumerate(own.leaves[1:])}
    labels = {f"labels_{i}": y for i, y in enumerate(own.targets)}
    arguments = ["features", *weights, *labels]
    lists = {"weights": ", ".join(weights), "labels": ", ".join(labels)}
    text = code.LINEAR.format(arguments=", ".join(arguments), **lists)
    about = f"Cross-entropy of {len(weights)} linear heads on shared features, and its gradients."
    d = Definition(f"linear_cross_entropy_{case}", "multihead_loss", about, text)
    rows = d.variable("rows", "samples")
    shape = [rows, d.size(own.leaves[0].shape[1])]
    d.inputs["features"] = tensor(shape, torch.float32, "features that all heads share")
    for name, w in weights.items():
        d.inputs[name] = tensor([d.size(n) for n in w.shape], torch.float32, "a head's weight")
    for name, w in zip(labels, weights.values(), strict=True):
        d.inputs[name] = tensor([rows], torch.int64, f"class ids below {len(w)}")
    _losses(d, len(weights))
    for name in ("features", *weights):
        _gradient(d, name)
    return d, [Sized({"rows": len(own.targets[0])}, {}, {**weights, **labels})]


def exports(names: Iterable[str] = NAMES) -> Exports:
    """Definitions of these cases."""
    for case in names:
        yield linear(case) if _draw(case).linear else logits(case)
