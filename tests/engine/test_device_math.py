"""Formulas of activations and losses that the CPU's vectors and CUDA kernels share (csrc/include/mtml).

As plain scalars they agree with PyTorch's values and derivatives, and nvcc compiles them for a device.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases.engine import constants
from torch import Tensor

from mtml_kernels.program import Act
from mtml_kernels.schema.losses import KINDS, LOSSES

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"

HOST = """
#include "mtml/losses.h"
#include "mtml/pointwise.h"
#include "mtml/scalar_math.h"

using namespace mtmlk;

template <class T, int kKind>
static void losses(int kind, long n, const T* z, const T* y, T delta, T* out) {
  if constexpr (kKind < kLossCount) {
    if constexpr (!is_of_classes(kKind))
      for (long i = 0; kind == kKind && i < n; ++i) {
        const Element<T> e = element_loss<ScalarMath<T>, kKind>(z[i], y[i], delta);
        const TargetElement<T> target = target_element<ScalarMath<T>, kKind>(z[i], e);
        out[i] = e.value, out[n + i] = e.slope, out[2 * n + i] = e.curvature;
        out[3 * n + i] = target.slope, out[4 * n + i] = target.mixed;
      }
    losses<T, kKind + 1>(kind, n, z, y, delta, out);
  }
}

template <class T>
static void acts(int kind, long n, const T* z, T c0, T c1, T* out) {
  for (long i = 0; i < n; ++i) {
    const Jet<T> jet = act_jet<ScalarMath<T>>(kind, z[i], c0, c1);
    out[i] = jet.value, out[n + i] = jet.slope, out[2 * n + i] = jet.curvature;
  }
}

template <class T>
static void pairs(long n, const T* z, const T* y, const T* pos, T* out) {
  for (long i = 0; i < n; ++i) {
    const Element<T> bce = multihead_element<ScalarMath<T>, kMultiheadBce>(z[i], y[i], pos[i], T(1));
    const GaussianElement<T> g = gaussian_element<ScalarMath<T>>(z[i], pos[i], y[i]);
    out[i] = bce.value, out[n + i] = bce.slope;
    out[2 * n + i] = g.value, out[3 * n + i] = g.mean_slope, out[4 * n + i] = g.log_variance_slope;
  }
}

#define EXPORT(T, NAME)                                                                                          \\
  extern "C" void acts_##NAME(int k, long n, const T* z, T c0, T c1, T* out) { acts<T>(k, n, z, c0, c1, out); }  \\
  extern "C" void losses_##NAME(int k, long n, const T* z, const T* y, T d, T* out) {                            \\
    losses<T, 0>(k, n, z, y, d, out);                                                                            \\
  }                                                                                                              \\
  extern "C" void pairs_##NAME(long n, const T* z, const T* y, const T* p, T* out) { pairs<T>(n, z, y, p, out); }
EXPORT(float, float32)
EXPORT(double, float64)
"""

DEVICE = """
#include "mtml/losses.h"
#include "mtml/pointwise.h"
#include "mtml/scalar_math.h"

using namespace mtmlk;

template <class T>
__global__ void acts(int kind, const T* z, T c0, T c1, T* out) {
  using M = ScalarMath<T>;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const Jet<T> jet = act_jet<M>(kind, z[i], c0, c1);
  out[i] = jet.value + jet.slope + jet.curvature + slope_of_output<M>(kind, z[i], c0) + bend_of_output<M>(kind, z[i]) +
           curvature_of_output<M>(z[i], c0) + T(is_straight(kind) + best_act_mode(kind, 1.0));
}

template <class T, int kKind>
__device__ T one(int kind, T z, T y, T delta) {
  if constexpr (kKind < kLossCount) {
    if constexpr (!is_of_classes(kKind))
      if (kind == kKind) {
        const Element<T> e = element_loss<ScalarMath<T>, kKind>(z, y, delta);
        const TargetElement<T> target = target_element<ScalarMath<T>, kKind>(z, e);
        return e.value + e.slope + e.curvature + target.slope + target.mixed;
      }
    return one<T, kKind + 1>(kind, z, y, delta);
  }
  return T(0);
}

template <class T, int kKind>
__device__ T several(int kind, T z, T y, T pos) {
  if constexpr (kKind < kMultiheadCount) {
    if constexpr (!is_softmax(kKind) && kKind != kMultiheadGaussian)
      if (kind == kKind) return multihead_element<ScalarMath<T>, kKind>(z, y, pos, T(1)).slope;
    return several<T, kKind + 1>(kind, z, y, pos);
  }
  const GaussianElement<T> g = gaussian_element<ScalarMath<T>>(z, pos, y);
  return g.value + g.mean_slope + g.log_variance_slope;
}

template <class T>
__global__ void losses(int kind, const T* z, const T* y, T delta, T* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = one<T, 0>(kind, z[i], y[i], delta) + several<T, 0>(kind, z[i], y[i], delta);
}

template __global__ void acts<float>(int, const float*, float, float, float*);
template __global__ void acts<double>(int, const double*, double, double, double*);
template __global__ void losses<float>(int, const float*, const float*, float, float*);
template __global__ void losses<double>(int, const double*, const double*, double, double*);
"""

TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
every_dtype = pytest.mark.parametrize("dtype", list(TYPES), ids=["float32", "float64"])


def kinds(enum: str) -> dict[str, int]:
    """Enumerators of program.h without their k, the count left out."""
    body = re.search(rf"enum {enum} : int32_t {{(.*?)}};", (INCLUDE / "mtml" / "program.h").read_text(), re.DOTALL)
    assert body is not None
    found = {name: int(value) for name, value in re.findall(r"k(\w+) = (\d+)", body.group(1))}
    return {name: value for name, value in found.items() if not name.endswith("Count")}


def compiled(command: list[str], text: str, source: Path) -> Path:
    """The object that `command` makes of a program text."""
    source.write_text(text)
    target = source.with_suffix(".so")
    done = subprocess.run([*command, f"-I{INCLUDE}", str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler {command[0]}")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-ffp-contract=off"]
    return ctypes.CDLL(str(compiled([*command, *flags], HOST, tmp_path_factory.mktemp("math") / "host.cpp")))


def call(library: ctypes.CDLL, name: str, planes: int, *arguments: Tensor | float, kind: int | None = None) -> Tensor:
    """Runs a function of HOST: [planes, n] from tensors [n] and numbers."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    dtype, n = tensors[0].dtype, tensors[0].numel()
    out = torch.full((planes, n), torch.nan, dtype=dtype)
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else TYPES[dtype](a) for a in arguments]
    first = [] if kind is None else [ctypes.c_int(kind)]
    getattr(library, f"{name}_{str(dtype)[6:]}")(*first, ctypes.c_long(n), *given, ctypes.c_void_p(out.data_ptr()))
    return out


def derivatives(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """[3, n]: f, f' and f'' at z [n] by autograd in float64, rounded to z's dtype."""
    x = z.double().requires_grad_()
    value = f(x)
    slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    bent = torch.autograd.grad(slope.sum(), x, allow_unused=True)[0] if slope.requires_grad else None
    curvature = torch.zeros_like(x) if bent is None else bent
    return torch.stack([value, slope, curvature]).detach().to(z.dtype)


def points(dtype: torch.dtype) -> Tensor:
    """No kink among them."""
    return torch.linspace(-4, 4, 98, dtype=dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-11 if actual.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_dtype
@pytest.mark.parametrize("name", list(kinds("Act")))
def test_activations_as_scalars(host: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    kind = Act(kinds("Act")[name])
    c0, c1 = constants(kind) or (1.0, 0.0)
    z = points(dtype)
    expected = derivatives(lambda x: kind.info.formula(x, c0, c1), z)
    assert_near(call(host, "acts", 3, z, c0, c1, kind=int(kind)), expected)


@every_dtype
@pytest.mark.parametrize("name", [name for name in kinds("LossKind") if not name.endswith("CrossEntropy")])
def test_losses_as_scalars(host: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    z = points(dtype)
    y = (z * 0.37).sin().abs()
    kind = kinds("LossKind")[name]
    out = call(host, "losses", 5, z, y, 0.7, kind=kind)
    formula = LOSSES[KINDS[kind]].formula
    assert_near(out[:3], derivatives(lambda x: formula(x, y.double(), 0.7), z))

    def slope_in_target(x: Tensor) -> Tensor:
        target = y.double().requires_grad_()
        return torch.autograd.grad(formula(x, target, 0.7).sum(), target, create_graph=True)[0]

    assert_near(out[3:], derivatives(slope_in_target, z)[:2])


@every_dtype
def test_losses_of_heads_as_scalars(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    z = points(dtype)
    y, pos = (z * 0.37).sin().abs(), (z * 0.9).cos() + 1.5
    out = call(host, "pairs", 5, z, y, pos)

    def bce(x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, y.double(), pos_weight=pos.double(), reduction="none")

    def gaussian(mean: Tensor, w: Tensor) -> Tensor:
        return (w + (y.double() - mean) ** 2 * (-w).exp()) / 2

    assert_near(out[:2], derivatives(bce, z)[:2])
    assert_near(out[2:4], derivatives(lambda mean: gaussian(mean, pos.double()), z)[:2])
    assert_near(out[4], derivatives(lambda w: gaussian(z.double(), w), pos)[1])


def test_a_wrong_derivative_is_found(host: ctypes.CDLL) -> None:
    z = points(torch.float64)
    with pytest.raises(AssertionError):
        assert_near(call(host, "acts", 3, z, 1.0, 0.0, kind=kinds("Act")["Silu"]), derivatives(F.gelu, z))


def test_nvcc_compiles_them(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    compiled(["nvcc", "-std=c++17", "-arch=sm_90", "-c"], DEVICE, tmp_path / "device.cu")
