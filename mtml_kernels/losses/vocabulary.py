"""The words in which a loss can be written so that it may turn out to be one of the table's.

Smooth functions of the output, so that two of them which agree on random inputs are the same; and the few piecewise
ones whose pieces are tried (abs, PyTorch's own losses). What draws random numbers, stops gradients, compares, clamps,
looks at values or changes anything is not here.
"""

from __future__ import annotations

from torch import nn

__all__ = ["BUILTINS", "LAYERS", "NAMES", "OPERATIONS", "OPERATORS"]

_ARITHMETIC = """
    add sub rsub subtract mul multiply div divide true_divide neg negative pow square abs absolute exp log logsumexp
    log_softmax softmax sigmoid logsigmoid log_sigmoid mean sum
"""
_LOSSES = """
    mse_loss l1_loss huber_loss smooth_l1_loss cross_entropy nll_loss binary_cross_entropy_with_logits
"""
_SHAPES = """
    reshape view view_as flatten unflatten squeeze unsqueeze expand expand_as contiguous permute transpose t T mT
    chunk split gather take_along_dim one_hot size shape dim ndim numel dtype device to type_as float double
    long is_floating_point arange zeros ones zeros_like ones_like tensor
"""

# What runs, by the name under which PyTorch calls it.
OPERATORS = {"__getitem__", "__len__", "__radd__", "__rsub__", "__rmul__", "__rdiv__", "__rtruediv__", "__rpow__"}
OPERATIONS = frozenset(f"{_ARITHMETIC} {_LOSSES} {_SHAPES}".split())

# Modules that hold no tensors; a loss's own forward is seen as the function that it calls.
LAYERS: tuple[type[nn.Module], ...] = (
    nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss,
    nn.LogSoftmax, nn.Softmax, nn.Sigmoid, nn.LogSigmoid, nn.Flatten, nn.Identity,
)  # fmt: skip

# Attributes that may stand in the code of a loss.
NAMES = OPERATIONS | {layer.__name__ for layer in LAYERS} | {"torch", "nn", "functional", "forward", "int64", "float64"}
BUILTINS = {
    "abs",
    "bool",
    "float",
    "int",
    "isinstance",
    "len",
    "max",
    "min",
    "pow",
    "range",
    "round",
    "sum",
    "super",
    "tuple",
}
