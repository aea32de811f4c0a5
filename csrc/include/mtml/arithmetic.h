// Mathematics that is written once for all: for vectors of the CPU, for scalars of a host or of a CUDA device.
//
// A formula is a template over an arithmetic M: M::Value is what it computes with, M::Scalar what constants are. Both
// know + - * / and comparisons, whose result chooses with ?:, and M has exp, tanh, logistic (1 / (1 + e^-x)), erf,
// log1p_exp (log(1 + e^x)), sin_cos, sqrt, rsqrt and abs. ScalarMath (scalar_math.h) is one, VectorMath (cpu/simd/vmath.h)
// the other.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MTMLK_ANYWHERE __host__ __device__ __forceinline__
#else
#define MTMLK_ANYWHERE inline __attribute__((always_inline))
#endif
