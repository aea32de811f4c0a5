// The arithmetic of float and double, see arithmetic.h.
#pragma once

#include <math.h>

#include "mtml/arithmetic.h"
#include "mtml/sin_cos.h"

namespace mtmlk {

template <class T>
struct ScalarMath {
  using Scalar = T;
  using Value = T;

  static MTMLK_ANYWHERE T exp(T x) { return ::exp(x); }
  static MTMLK_ANYWHERE T tanh(T x) { return ::tanh(x); }
  static MTMLK_ANYWHERE T logistic(T x) { return T(1) / (::exp(-x) + T(1)); }
  static MTMLK_ANYWHERE T erf(T x) { return ::erf(x); }
  static MTMLK_ANYWHERE T log1p_exp(T x) { return (x < T(0) ? T(0) : x) + ::log1p(::exp(-::fabs(x))); }
  static MTMLK_ANYWHERE ScalarSinCos<T> sin_cos(T x) { return scalar_sin_cos(x); }
  static MTMLK_ANYWHERE T sqrt(T x) { return ::sqrt(x); }
  static MTMLK_ANYWHERE T rsqrt(T x) { return T(1) / ::sqrt(x); }
  static MTMLK_ANYWHERE T abs(T x) { return ::fabs(x); }
};

}  // namespace mtmlk
