"""The doctor's self-test: a small meta-step on every backend that can run here, beside the reference in float64.

Run as a child process, which prints one line of JSON. It shows that what is installed computes what it should on this
machine (a wrong instruction set, a stale build); the proofs of exactness are in tests/.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.ops.inner_loop import BACKENDS, inner_loop_call
from mtml_kernels.program import trace
from mtml_kernels.registry import REFERENCE
from mtml_kernels.schema.inner_loop import InnerLoopSpec
from mtml_kernels.schema.losses import LossSpec

__all__ = ["check_backend", "main", "meta_step"]

TASKS, SHOTS, STEPS, FEATURES, WIDTH, OUTPUTS = 3, 5, 2, 3, 17, 2
# Rounding of a few thousand operations, with room; a wrong kernel is off by orders of magnitude more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


def meta_step(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of every task [T], and the exact meta-gradient of their mean as one vector [P]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, OUTPUTS))
    program = trace(model, [(FEATURES,)])
    loss = LossSpec("mse")
    spec = InnerLoopSpec.of(program, [True] * len(program.params), (loss, loss), steps=STEPS)
    params = [(random(*info.shape) / 2).requires_grad_() for info in program.params]
    x, y = random(2, TASKS, SHOTS, FEATURES), random(2, TASKS, SHOTS, OUTPUTS)
    rate = torch.tensor([0.1], dtype=dtype)
    losses, *_ = inner_loop_call(spec, params, [x[0]], y[0], [x[1]], y[1], None, None, [rate], None, backend)
    grads = torch.autograd.grad(losses.mean(), params)
    return losses.detach().double(), torch.cat([grad.flatten() for grad in grads]).double()


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).abs().max() / truth.abs().max())


def check_backend(name: str) -> dict[str, Any]:
    """Relative errors of loss and gradient in each dtype, and whether they are small."""
    truth = meta_step(REFERENCE, torch.float64)
    errors, good = {}, True
    for dtype, tolerance in TOLERANCE.items():
        found = [relative_error(value, true) for value, true in zip(meta_step(name, dtype), truth, strict=True)]
        errors[str(dtype).removeprefix("torch.")] = {"loss": found[0], "gradient": found[1]}
        good = good and all(error <= tolerance for error in found)  # NaN compares false
    return {"ok": good, "errors": errors}


def main() -> None:
    """Prints {backend: {"ok", "errors"} or {"ok", "error"}} for the inner loop's backends that can run on the CPU."""
    results: dict[str, dict[str, Any]] = {}
    for name in BACKENDS.names():
        if BACKENDS.named(name).refusal("cpu", torch.float32) is not None:
            continue
        try:
            results[name] = check_backend(name)
        except Exception as error:
            results[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
