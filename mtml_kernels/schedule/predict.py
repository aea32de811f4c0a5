"""The time that a schedule takes on a GPU, predicted: a roof line for each call, and its launch.

    time        launch + max(arithmetic, latency, memory)
    arithmetic  products / (share * peak * occupancy) + others / (share * fp32 peak)
    occupancy   the part of the tiles that is no padding * min(1, tiles / processors)
    latency     (220 + 33 * depth / 4) / clock
    memory      bytes / bandwidth, of the L2 cache where all of them fit it

A product's tile has up to 64 x 64 elements, 16 at least each way, and one multiprocessor; where there are fewer tiles
than multiprocessors, its k-loop is cut into pieces of at least 256. Latency is that of a kernel's start and of shared
memory in a k-loop of four a turn, which nothing hides when there is one tile to a multiprocessor (both in clocks, from
a look at compiled kernels, not measured). Shares, peaks and bandwidths are in `devices.py`.

Left out: that tiles read their operands again from L2; partial sums of a k-loop that was cut; what the L2 still holds
of the call before, and the cold start of arguments that fit it; waves of tiles that do not come out even; half
precision's own units; the host, which a CUDA graph hides and eager launches do not (5 to 10 us a call in PyTorch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mtml_kernels.schedule.cost import Cost, Product
from mtml_kernels.schedule.devices import LAUNCH_SECONDS, SHARE, Device, Precision

__all__ = ["BOUNDS", "Prediction", "by_bound", "occupancy", "predict"]

BOUNDS = ("launch", "arithmetic", "latency", "bytes")  # in the order of a prediction's fields

LARGEST_TILE, SMALLEST_TILE = 64, 16  # elements each way; tl.dot takes no less than 16
PIECE = 256  # of a k-loop
PHASE_CLOCKS, TURN_CLOCKS, TURN_DEPTH = 220, 33, 4


class Prediction(NamedTuple):
    """Seconds of one call: its launch, and beside each other what may hold it up."""

    launch: float
    arithmetic: float
    latency: float
    memory: float

    @property
    def seconds(self) -> float:
        """From its start to the start of the next one."""
        return self.launch + max(self.arithmetic, self.latency, self.memory)

    @property
    def bound(self) -> str:
        """What takes most of it, one of `BOUNDS`."""
        return max(zip(self, BOUNDS, strict=True))[1]


def _side(size: int) -> int:
    """One side of a tile."""
    return min(max(1 << max(size - 1, 0).bit_length(), SMALLEST_TILE), LARGEST_TILE)


def _tiles(product: Product) -> tuple[int, float]:
    """(how many tiles it has, the part of them that is no padding)."""
    high, wide = _side(product.rows), _side(product.cols)
    count = product.batch * -(-product.rows // high) * -(-product.cols // wide)
    return count, product.batch * product.rows * product.cols / max(count * high * wide, 1)


def _pieces(product: Product) -> int:
    """Into how many pieces a k-loop may be cut."""
    return max(product.depth // PIECE, 1)


def occupancy(products: Sequence[Product], device: Device) -> float:
    """The share of the chip's products that are those of the call."""
    units = padded = useful = 0.0
    for product in products:
        tiles, share = _tiles(product)
        units += tiles * _pieces(product)
        useful += product.flops
        padded += product.flops / share if share else 0
    return min(1.0, units / device.processors) * useful / padded if padded else 1.0


def predict(cost: Cost, device: Device, precision: Precision = "fp32") -> Prediction:
    """One call's time."""
    flops = sum(product.flops for product in cost.products)
    rate = SHARE[precision] * device.peak(precision) * occupancy(cost.products, device)
    others = cost.others / (SHARE["fp32"] * device.peak("fp64" if precision == "fp64" else "fp32"))
    depth = max((min(product.depth, PIECE) for product in cost.products), default=0)
    latency = (PHASE_CLOCKS + TURN_CLOCKS * depth / TURN_DEPTH) / device.hertz
    bandwidth = device.l2_bandwidth if cost.bytes <= device.l2_bytes else device.bandwidth
    return Prediction(LAUNCH_SECONDS, flops / rate + others, latency, cost.bytes / bandwidth)


def by_bound(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The seconds of calls one after the other, split by what bounds each of them."""
    found = dict.fromkeys(BOUNDS, 0.0)
    for prediction in predictions:
        found[prediction.bound] += prediction.seconds
    return found
