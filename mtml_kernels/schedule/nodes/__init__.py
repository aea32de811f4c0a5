"""How each operation of the layer program is written down as parts; importing it fills `passes.NODES`."""

from mtml_kernels.schedule.nodes import moves, norm, pointwise, products, rows

__all__ = ["moves", "norm", "pointwise", "products", "rows"]
