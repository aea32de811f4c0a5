"""Linear maps of matrices, X -> L X R: Kronecker products of small factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KroneckerLSTM", "KroneckerLinear", "KroneckerRNN"]


class KroneckerLinear(nn.Module):
    """X -> L X R + B on [..., n, m], with L [n, n] and R [m, m], the identity at first.

    On a vector [n m], which is X column by column, it is (R^T kron L) x + b.

    Args:
        n, m: the sizes.
        bias: whether there is a B [n, m], zero at first.
        psd: L^T L and R^T R in the place of L and R.
        device: of the parameters.

    Raises:
        ValueError: an input of other sizes.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.nn import KroneckerLinear
        >>> KroneckerLinear(2, 3)(torch.ones(5, 2, 3)).shape
        torch.Size([5, 2, 3])

    Paper: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015.
    """

    def __init__(self, n: int, m: int, bias: bool = True, psd: bool = False, device: Any = None) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd

    def forward(self, x: Tensor) -> Tensor:
        n, m = self.left.shape[0], self.right.shape[0]
        if x.ndim == 1:
            if x.shape[0] != n * m:
                raise ValueError(f"x: expected a vector of n*m={n * m} or [..., {n}, {m}], got {list(x.shape)}")
            return self._product(x.reshape(m, n).t()).t().flatten()
        if x.shape[-2:] != (n, m):
            raise ValueError(f"x: expected [..., {n}, {m}] or a vector of n*m={n * m}, got {list(x.shape)}")
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        left: Tensor = self.left
        right: Tensor = self.right
        if self.psd:
            left, right = left.t() @ left, right.t() @ right
        found = left @ x.to(left.device) @ right
        if self.bias is not None:
            found = found + self.bias
        return found.to(x.device)


class KroneckerRNN(nn.Module):
    """h' = sigma(W_h x + U_h h), y = W_y h', each a `KroneckerLinear` of matrices [..., n, m].

    Args:
        n, m, bias: of the maps.
        sigma: a module; None for tanh.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: nn.Module | None = None) -> None:
        super().__init__()
        self.W_h = KroneckerLinear(n, m, bias=bias)
        self.U_h = KroneckerLinear(n, m, bias=bias)
        self.W_y = KroneckerLinear(n, m, bias=bias)
        self.sigma = nn.Tanh() if sigma is None else sigma

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(y, h')"""
        new = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(new), new


class KroneckerLSTM(nn.Module):
    """An LSTM cell whose eight maps are `KroneckerLinear` of matrices [..., n, m].

    Args:
        n, m, bias: of the maps.
        sigma: of the gates, a module; None for sigmoid.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: nn.Module | None = None) -> None:
        super().__init__()
        for gate in "ifgo":
            for source in "ih":
                self.add_module(f"W_{source}{gate}", KroneckerLinear(n, m, bias=bias))
        self.sigma = nn.Sigmoid() if sigma is None else sigma
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(h', (h', c')) from x and (h, c)."""
        h, c = hidden
        maps = self._modules
        i, f, g, o = (maps[f"W_i{gate}"](x) + maps[f"W_h{gate}"](h) for gate in "ifgo")  # type: ignore[misc]
        c = self.sigma(f) * c + self.sigma(i) * self.tanh(g)
        h = self.sigma(o) * self.tanh(c)
        return h, (h, c)
