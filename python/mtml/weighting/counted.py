"""Random numbers that are a function of a seed and of a count which is a tensor, so that graphs draw anew at each run.

A generator has no place in a graph of torch.compile, and the number that seeds one would be a constant there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["counted_normal"]

_WORD = 2**32 - 1


def counted_normal(seed: int, count: Tensor, size: int) -> Tensor:
    """`size` independent standard normal numbers, float64, of the 32-bit words of (seed, count, index).

    By the transform of Box and Muller, 1958.
    """
    start = _mixed(_mixed(torch.full_like(count, seed & _WORD)) + count & _WORD)
    words = _mixed(start + torch.arange(2 * size, device=count.device) & _WORD)
    first, second = ((words.double() + 0.5) / 2.0**32).chunk(2)
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


def _mixed(words: Tensor) -> Tensor:
    """A bijection of 32-bit words, in int64, in which every bit depends on all: shifts and multiplications in turn.

    Factors below 2^31 keep the products in range.
    """
    words = words ^ (words >> 16)
    for factor in (0x21F0AAAD, 0x735A2D97):
        words = words * factor & _WORD
        words = words ^ (words >> 15)
    return words
