"""csrc/include/mtml/update.h as plain numbers: every rule's step and adjoint against autograd through the reference."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtml_kernels.reference.update import update
from mtml_kernels.schema.update import HYPERS, UpdateSpec

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
SOURCE = r"""
#include "mtml/scalar_math.h"
#include "mtml/update.h"
using namespace mtmlk;
using Plain = ScalarMath<double>;
extern "C" {
double step(int rule, int flags, const double* h, long k, double alpha, double theta, double g, double* s) {
  return update_forward<Plain>(update_at<double>(rule, flags, h, k), alpha, theta, g, s).theta;
}
void back(int rule, int flags, const double* h, long k, double alpha, double theta, double g, const double* s,
          double lambda, double* mu, double* hyper, double* out) {
  const auto r = update_adjoint<Plain>(update_at<double>(rule, flags, h, k), alpha, theta, g, s, lambda, mu, hyper);
  out[0] = r.theta, out[1] = r.g, out[2] = r.alpha;
}
}
"""
SPECS = [
    *(
        UpdateSpec("sgd", momentum=m, nesterov=n, decoupled=d, decayed=True)
        for m, n, d in itertools.product((False, True), repeat=3)
        if m or not n
    ),
    *(UpdateSpec("adam", decoupled=d, decayed=True) for d in (False, True)),
    *(UpdateSpec("rmsprop", momentum=m, centered=c, decayed=m) for m, c in itertools.product((False, True), repeat=2)),
]
Doubles = list[float]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("update")
    (folder / "update.cpp").write_text(SOURCE)
    words = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{INCLUDE}", "update.cpp"]
    subprocess.run([*words, "-o", "update.so"], cwd=folder, check=True)
    found = ctypes.CDLL(str(folder / "update.so"))
    found.step.restype = ctypes.c_double
    yield found


def _array(values: Doubles) -> Any:
    return (ctypes.c_double * len(values))(*values)


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_step_and_its_adjoint(engine: Any, spec: UpdateSpec, step: int) -> None:
    double = torch.float64
    for _ in range(20):
        hyper = torch.rand(len(HYPERS), dtype=double) * 0.5 + 0.3
        theta, g = torch.randn(2, dtype=double)
        alpha = torch.rand((), dtype=double)
        moments = [torch.rand((), dtype=double) + (5.0 if spec.centered and i == 0 else 0.5) for i in range(3)]
        own = moments[: len(spec.moments)]
        leaves = [t.detach().requires_grad_() for t in (theta, g, alpha, hyper, *own)]
        numbers = {name: leaves[3][i] for i, name in enumerate(HYPERS)}
        after, kept = update(spec, numbers, leaves[:1], leaves[1:2], leaves[2:3], [[m] for m in leaves[4:]], step)
        outputs = [after[0], *(plane[0] for plane in kept)]
        cotangents = [torch.randn((), dtype=double) for _ in outputs]
        wanted = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
        codes = (*spec.encode(), _array(hyper.tolist()), ctypes.c_long(step))
        values = [ctypes.c_double(float(t)) for t in (alpha, theta, g)]
        state = _array([float(m) for m in moments])
        found = [engine.step(*codes, *values, state), *state[: len(own)]]
        torch.testing.assert_close(torch.tensor(found, dtype=double), torch.stack(outputs).detach())
        mu = _array([*(float(c) for c in cotangents[1:]), 0.0, 0.0, 0.0][:3])
        to_hyper, out = _array([0.0] * len(HYPERS)), _array([0.0] * 3)
        state = _array([float(m) for m in moments])
        engine.back(*codes, *values, state, ctypes.c_double(float(cotangents[0])), mu, to_hyper, out)
        got = torch.tensor([*out, *to_hyper, *mu[: len(own)]], dtype=double)
        torch.testing.assert_close(got, torch.cat([w.reshape(-1) for w in wanted]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_gradients_leave_no_nan(engine: Any, spec: UpdateSpec) -> None:
    """Where nothing has ever moved the root and the divisor are 0, without an eps too."""
    hyper = [1.0, 0.0, 0.9, 0.0, 0.9, 0.99, 0.0, 0.0]
    codes = (*spec.encode(), _array(hyper), ctypes.c_long(0))
    values = [ctypes.c_double(v) for v in (0.1, 2.0, 0.0)]
    assert engine.step(*codes, *values, _array([0.0] * 3)) == 2.0
    mu, to_hyper, out = _array([0.0] * 3), _array([0.0] * len(HYPERS)), _array([0.0] * 3)
    engine.back(*codes, *values, _array([0.0] * 3), ctypes.c_double(1.0), mu, to_hyper, out)
    assert all(abs(x) < 10 for x in (*mu, *to_hyper, *out))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_same_code_is_cuda(tmp_path: Path) -> None:
    (tmp_path / "update.cu").write_text(SOURCE)
    command = ["nvcc", "-std=c++17", "-arch=sm_90", f"-I{INCLUDE}", "-c", "update.cu", "-o", "update.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
