"""Every op in plain PyTorch: any dtype, any device, differentiable any number of times.

These files are the specification: an engine is right where it agrees with them in float64. Each is also a backend that
can be asked for by name (`backend="reference"`).
"""
