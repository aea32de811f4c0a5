"""csrc/include/mtml/sin_cos.h against exact values, at every size of argument, and on devices without local memory."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases.triton_process import CAPABILITIES
from mpmath import mp, mpf
from torch import Tensor

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
BOUND = 1.25  # ulp

HOST = """
#include "mtml/sin_cos.h"

template <class T>
static void both(long n, const T* x, T* out) {
  for (long i = 0; i < n; ++i) {
    const auto t = mtmlk::scalar_sin_cos(x[i]);
    out[i] = t.sin, out[n + i] = t.cos;
  }
}

extern "C" void both_float32(long n, const float* x, float* out) { both(n, x, out); }
extern "C" void both_float64(long n, const double* x, double* out) { both(n, x, out); }
"""

DEVICE = """
#include "mtml/scalar_math.h"

template <class T>
__global__ void own(const T* x, T* out) {
  const auto t = mtmlk::ScalarMath<T>::sin_cos(x[threadIdx.x]);
  out[threadIdx.x] = t.sin + t.cos;
}

template <class T>
__global__ void with_an_array(const T* x, T* out) {
  T a[8] = {};
  for (int i = 0; i < 64; ++i) a[int(x[i]) & 7] += x[i];
  out[threadIdx.x] = a[threadIdx.x & 7];
}

__global__ void fusible(float x, float* out) { *out = x * x + *out; }

template __global__ void own<float>(const float*, float*);
template __global__ void own<double>(const double*, double*);
template __global__ void with_an_array<float>(const float*, float*);
"""

DTYPES = [torch.float32, torch.float64]
DIGITS = {torch.float32: 24, torch.float64: 53}  # of the fraction, in bits
LARGEST = {torch.float32: 128, torch.float64: 1024}  # all numbers are less than 2^this
SMALLEST = {torch.float32: -149, torch.float64: -1074}  # the least one is 2^this
Function = Callable[[Tensor], Tensor]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Digits enough: mpmath adds those that an argument's size costs."""
    with mp.workprec(200):
        yield


@pytest.fixture(scope="module")
def sin_cos(tmp_path_factory: pytest.TempPathFactory) -> Function:
    """[2, n]: sine and cosine of x [n]."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler {command[0]}")
    source = tmp_path_factory.mktemp("sin_cos") / "host.cpp"
    source.write_text(HOST)
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        f"-I{INCLUDE}",
    ]
    subprocess.run([*command, *flags, str(source), "-o", str(source.with_suffix(".so"))], check=True)
    library = ctypes.CDLL(str(source.with_suffix(".so")))

    def call(x: Tensor) -> Tensor:
        out = torch.full((2, len(x)), torch.nan, dtype=x.dtype)
        entry = getattr(library, f"both_{str(x.dtype)[6:]}")
        entry(ctypes.c_long(len(x)), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        return out

    return call


def errors(x: Tensor, found: Tensor) -> list[float]:
    """The distances of `found` [2, n] from sine and cosine of x [n], in units of the exact values' last place."""
    exacts = [f(mpf(v)) for f in (mp.sin, mp.cos) for v in x.tolist()]
    pairs = zip(found.flatten().tolist(), exacts, strict=True)
    return [float(abs(value - e) / unit(e, x.dtype)) for value, e in pairs]


def unit(value: mpf, dtype: torch.dtype) -> mpf:
    return mpf(2) ** max(mp.frexp(value)[1] - DIGITS[dtype], SMALLEST[dtype])


def assert_exact(sin_cos: Function, x: Tensor) -> None:
    found = errors(x, sin_cos(x))
    assert len(found) > 0 and all(e < BOUND for e in found), max(found)


def spread(dtype: torch.dtype, low: int, high: int, n: int) -> Tensor:
    """[n] of both signs, between 2^low and 2^high, no size preferred."""
    generator = torch.Generator().manual_seed(0)
    sign, digits, size = torch.rand(3, n, generator=generator, dtype=torch.float64)
    exponents = low + (size * (high - low)).floor()
    return torch.ldexp(torch.where(sign < 0.5, -1 - digits, 1 + digits), exponents.to(torch.int32)).to(dtype)


def nearest_to_quarters(dtype: torch.dtype) -> Iterator[float]:
    """The m 2^e nearest to a multiple of pi/2, for each e: m is the denominator of a convergent of 2^e 2/pi."""
    bits, scale = DIGITS[dtype], 1400
    with mp.workprec(scale):
        two_over_pi = int(mp.floor(mpf(2) ** scale * 2 / mp.pi))
    for e in range(-bits, LARGEST[dtype] - bits + 1):
        above, below = two_over_pi << max(e, 0), 1 << scale - min(e, 0)
        last, m = 0, 1
        while m < 2**bits:
            above, below = below, above % below
            last, m = m, (above // below) * m + last
        yield math.ldexp(last, e)


@every_dtype
def test_every_size(sin_cos: Function, dtype: torch.dtype) -> None:
    for low, high in ((-4, 3), (3, 16), (16, LARGEST[dtype])):
        assert_exact(sin_cos, spread(dtype, low, high, 300))


@every_dtype
def test_where_nothing_of_the_argument_is_left(sin_cos: Function, dtype: torch.dtype) -> None:
    x = torch.tensor(list(nearest_to_quarters(dtype)), dtype=dtype)
    smaller = torch.minimum(*sin_cos(x).abs())
    assert smaller.min() < 2.0 ** -(DIGITS[dtype] + 5)  # as near as they come
    assert_exact(sin_cos, torch.cat([x, -x[::7]]))


def test_the_bits_of_two_over_pi() -> None:
    text = (INCLUDE / "mtml" / "sin_cos.h").read_text()
    words = re.findall(r"0x[0-9a-f]{16}\b", text)
    with mp.workprec(1400):
        exact = int(mp.floor(mpf(2) ** (64 * (len(words) - 1)) * 2 / mp.pi))
    assert len(words) == 20 and int("".join(word[2:] for word in words), 16) == exact


@every_dtype
def test_near_every_quarter(sin_cos: Function, dtype: torch.dtype) -> None:
    n = torch.cat([torch.arange(1, 40), torch.randint(40, 63663, (200,), generator=torch.Generator().manual_seed(0))])
    x = (n.double() * (math.pi / 2)).to(dtype)
    assert_exact(sin_cos, torch.cat([x, torch.nextafter(x, x + 1), -torch.nextafter(x, x - 1)]))


@every_dtype
def test_where_reductions_meet_and_numbers_end(sin_cos: Function, dtype: torch.dtype) -> None:
    edges = torch.tensor([math.pi / 4, 3 * math.pi / 4, 1e5, torch.finfo(dtype).max], dtype=dtype)
    assert_exact(
        sin_cos, torch.cat([edges, torch.nextafter(edges, edges * 0), torch.nextafter(edges[:3], edges[:3] * 2)])
    )


@every_dtype
def test_tiny_numbers_are_their_sine(sin_cos: Function, dtype: torch.dtype) -> None:
    x = torch.cat(
        [spread(dtype, SMALLEST[dtype], -DIGITS[dtype] // 2 - 1, 200), torch.tensor([0.0, -0.0], dtype=dtype)]
    )
    assert (x.abs() < torch.finfo(dtype).tiny).sum() > 10  # denormal ones among them
    sine, cosine = sin_cos(x)
    assert torch.equal(sine, x) and torch.equal(sine.signbit(), x.signbit())
    assert torch.equal(cosine, torch.ones_like(x))


@every_dtype
def test_what_is_no_number_has_no_sine(sin_cos: Function, dtype: torch.dtype) -> None:
    assert sin_cos(torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)).isnan().all()


@every_dtype
def test_a_wrong_bit_is_found(dtype: torch.dtype) -> None:
    x = spread(dtype, -2, 10, 20)
    found = torch.tensor([[f(v) for v in x.tolist()] for f in (math.sin, math.cos)], dtype=torch.float64).to(dtype)
    assert max(errors(x, found)) < 0.75
    for _ in range(2):
        found = torch.nextafter(found, torch.full_like(found, math.inf))
    assert min(errors(x, found)) > BOUND


def compiled(folder: Path, capability: int, *flags: str) -> tuple[bytes, str]:
    """What nvcc makes of DEVICE (ELF), and what it says."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source, target = folder / "device.cu", folder / "device.cubin"
    source.write_text(DEVICE)
    command = ["nvcc", "-std=c++17", "-Werror", "all-warnings", f"-arch=sm_{capability}", f"-I{INCLUDE}", *flags]
    done = subprocess.run([*command, "-cubin", str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target.read_bytes(), done.stdout + done.stderr


def instructions(elf: bytes) -> dict[str, bytes]:
    """The machine code of each kernel, by its section's name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<I20x2Q", elf, table + size * k) for k in range(count)]
    texts = headers[names][1]
    named = {elf[texts + name : elf.index(b"\0", texts + name)].decode(): (at, n) for name, at, n in headers}
    return {name: elf[at : at + n] for name, (at, n) in named.items() if name.startswith(".text.")}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_local_memory_on_devices(capability: int, tmp_path: Path) -> None:
    report = compiled(tmp_path, capability, "-Xptxas", "-v")[1]
    entry = re.compile(r"entry function '\w*(own|with_an_array)I(\w).*?(\d+) bytes stack frame", re.DOTALL)
    frames = {(kernel, dtype): int(size) for kernel, dtype, size in entry.findall(report)}
    assert frames.pop(("with_an_array", "f")) > 0
    assert frames == {("own", "f"): 0, ("own", "d"): 0}


def test_devices_round_as_hosts_do(tmp_path: Path) -> None:
    """The code is the same where the compiler may fuse products into sums and where it may not."""
    free, bound = (instructions(compiled(tmp_path, 90, f"-fmad={fuse}")[0]) for fuse in ("true", "false"))
    fused = [name for name in free if free[name] != bound[name]]
    assert len(free) == 4 and len(fused) == 1 and "fusible" in fused[0]
