"""How a convolution's operands lie: (lines before, address, what else has to hold) of a block by rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mtml_kernels.program.layers.window import Window
from mtml_kernels.triton.inner_loop.jobs import Operand, Product, Space

__all__ = ["WAYS", "strides_of", "window_of"]


class Addresses(Protocol):
    """What is asked of a job's text."""

    space: Space

    @property
    def wide(self) -> str:
        """What makes an index of tasks one of 64 bits, where there is need."""
        ...

    def address(self, operand: Operand, indices: Sequence[str]) -> str:
        """name + the indices by their strides."""
        ...


Way = tuple[list[str], str, str]


def _patch(text: Addresses, operand: Operand, rows: str, cols: str, product: Product) -> Way:
    """The pixel under tap and channel `cols` of the window of point `rows`."""
    w = window_of(product)
    channels = operand.shape[3] // product.groups
    point = f"({rows} % {w.out[0] * w.out[1]})"
    lines = [
        f"tap = {cols} // {channels}",
        f"y = {point} // {w.out[1]} * {w.stride[0]} - {w.pad[0]} + tap // {w.kernel[1]} * {w.dilation[0]}",
        f"x = {point} % {w.out[1]} * {w.stride[1]} - {w.pad[1]} + tap % {w.kernel[1]} * {w.dilation[1]}",
    ]
    inside = f"(y >= 0) & (y < {w.size[0]}) & (x >= 0) & (x < {w.size[1]})"
    channel = f"(group * {channels} + {cols} % {channels})"
    task, sample = _task_and_sample(text, operand, rows, w.out[0] * w.out[1])
    return lines, text.address(operand, [task, sample, f"(y * {w.size[1]} + x)", channel]), inside


def _patch_by_weight(text: Addresses, operand: Operand, rows: str, cols: str, product: Product) -> Way:
    """The same with columns as the weights are stored: channel, then tap."""
    w = window_of(product)
    taps, channels = w.kernel[0] * w.kernel[1], operand.shape[3] // product.groups
    lines, address, inside = _patch(text, operand, rows, f"({cols} % {taps} * {channels} + {cols} // {taps})", product)
    return lines, address, inside


def _spread(text: Addresses, operand: Operand, rows: str, cols: str, product: Product) -> Way:
    """The cotangent of the point whose window has pixel `rows` under its tap; `cols`: tap and channel out."""
    w = window_of(product)
    channels = operand.shape[3] // product.groups
    pixel = f"({rows} % {w.size[0] * w.size[1]})"
    ky, kx = _taps(product, f"({cols} // {channels})")
    lines = [
        f"y = {pixel} // {w.size[1]} + {w.pad[0]} - {ky} * {w.dilation[0]}",
        f"x = {pixel} % {w.size[1]} + {w.pad[1]} - {kx} * {w.dilation[1]}",
    ]
    inside = f"(y >= 0) & (x >= 0) & (y < {w.out[0] * w.stride[0]}) & (x < {w.out[1] * w.stride[1]})"
    if strides_of(product) != w.stride:
        inside += f" & (y % {w.stride[0]} == 0) & (x % {w.stride[1]} == 0)"
    place = f"(y // {w.stride[0]} * {w.out[1]} + x // {w.stride[1]})"
    channel = f"(group * {channels} + {cols} % {channels})"
    task, sample = _task_and_sample(text, operand, rows, w.size[0] * w.size[1])
    return lines, text.address(operand, [task, sample, place, channel]), inside


def strides_of(product: Product) -> tuple[int, int]:
    """Between pixels of a phase, and between its taps."""
    w = window_of(product)
    return w.stride if w.dilation == (1, 1) else (1, 1)


def _taps(product: Product, tap: str) -> tuple[str, str]:
    """Row and column of a phase's tap in the window."""
    assert product.phase is not None
    (fy, fx), (sy, sx), width = product.phase.first, strides_of(product), max(1, product.phase.taps[1])
    return f"({tap} // {width} * {sy} + {fy})", f"({tap} % {width} * {sx} + {fx})"


def _kernel(text: Addresses, operand: Operand, rows: str, cols: str, product: Product) -> Way:
    """Weights [O, C / g * taps] by (tap and channel in, channel out)."""
    w = window_of(product)
    taps = w.kernel[0] * w.kernel[1]
    channels = operand.shape[2] // taps
    return [], text.address(operand, ["task", cols, f"({rows} % {channels} * {taps} + {rows} // {channels})"]), ""


def _kernel_back(text: Addresses, operand: Operand, rows: str, cols: str, product: Product) -> Way:
    """Weights by (tap and channel out, channel in)."""
    w = window_of(product)
    taps, outputs = w.kernel[0] * w.kernel[1], operand.shape[1] // product.groups
    inputs = operand.shape[2] // taps
    out = f"(group * {outputs} + {rows} % {outputs})"
    ky, kx = _taps(product, f"({rows} // {outputs})")
    return [], text.address(operand, ["task", out, f"({cols} % {inputs} * {taps} + {ky} * {w.kernel[1]} + {kx})"]), ""


def window_of(product: Product) -> Window:
    assert product.window is not None
    return product.window


def _task_and_sample(text: Addresses, operand: Operand, rows: str, points: int) -> tuple[str, str]:
    samples = operand.shape[1]
    if text.space.merged:
        return f"({rows} // {points * samples}){text.wide}", f"({rows} // {points} % {samples})"
    return "task", f"({rows} // {points})"


WAYS: dict[str, Callable[[Addresses, Operand, str, str, Product], Way]] = {
    "patch": _patch,
    "patch_by_weight": _patch_by_weight,
    "spread": _spread,
    "kernel": _kernel,
    "kernel_back": _kernel_back,
}
