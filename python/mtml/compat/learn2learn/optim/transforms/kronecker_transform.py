"""Kronecker-factored transforms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mtml.compat.learn2learn.optim.transforms.module_transform import ReshapedTransform

__all__ = ["KroneckerTransform"]


class KroneckerTransform:
    """For each parameter ``kronecker_cls(n=, m=, bias=, psd=)`` on its gradient as [-1, n, m].

    n and m are the sizes of a matrix [n, m]; of a bias [n], m = 1; of a convolution's weight [O, I, kh, kw] n = I,
    m = kh kw.

    Args:
        kronecker_cls: such as `mtml.compat.learn2learn.nn.KroneckerLinear`.
        bias, psd: passed on.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
        >>> transform(torch.nn.Parameter(torch.ones(4, 3, 5, 5)))(torch.ones(4, 3, 5, 5)).shape
        torch.Size([4, 3, 5, 5])

    Paper: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot", 2021 (arXiv:1910.13603).
    """

    def __init__(self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True) -> None:
        self.kronecker_cls, self.bias, self.psd = kronecker_cls, bias, psd

    def __call__(self, param: Tensor) -> ReshapedTransform:
        n, m = _sizes(param)
        return ReshapedTransform(self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd), (-1, n, m))


def _sizes(param: Tensor) -> tuple[int, int]:
    shape = param.shape
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 4:
        return shape[1], shape[2] * shape[3]
    raise NotImplementedError(
        f"param: expected one of 1, 2 or 4 dimensions, got {list(shape)}; give it another transform in a "
        "TransformDictionary"
    )
