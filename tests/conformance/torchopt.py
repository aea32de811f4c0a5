"""TorchOpt's own tests against mtml.compat.torchopt; needs pytest alone (its helpers use the library's own pytrees)."""

from __future__ import annotations

from harness import main

TESTS = ["conftest", "helpers", "test_alias", "test_clip", "test_combine", "test_hook", "test_meta_optim", "test_optim"]
TESTS += ["test_pytree", "test_schedule", "test_transform", "test_utils", "test_accelerated_op", "test_import"]
SKIPPED = {
    "test_import.py::test_accelerated_op_import": "AdamOp is the original's fused operation, not its interface",
    "test_import.py::test_diff_import": "implicit and zero-order gradients are not here",
    "test_import.py::test_distributed_import": "RPC is not here",
    "test_import.py::test_linalg_import": "linear solvers are not here",
    "test_import.py::test_linear_solve_import": "linear solvers are not here",
    "test_import.py::test_nn_import": "modules of implicit and zero-order gradients are not here",
    "test_import.py::test_typing_import": "types of what is not here",
    "test_import.py::test_visual_import": "graphs are not drawn here",
}

if __name__ == "__main__":
    main("torchopt", [f"tests/{name}.py" for name in TESTS], SKIPPED, {})
