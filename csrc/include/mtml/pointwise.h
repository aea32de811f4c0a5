// Activations f: value, slope f' and curvature f'', for any arithmetic (arithmetic.h). A new one is an enumerator of
// Act and a case below.
#pragma once

#include <stdint.h>

#include "mtml/arithmetic.h"
#include "mtml/program.h"

namespace mtmlk {

template <class V>
struct Jet {
  V value, slope, curvature;
};

template <class M>
MTMLK_ANYWHERE Jet<typename M::Value> act_jet(int kind, typename M::Value z, typename M::Scalar c0,
                                              typename M::Scalar c1) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  const V zero = {}, one = T(1) - zero;
  switch (kind) {
    case kRelu:
      return {z <= T(0) ? zero : z, z <= T(0) ? zero : one, zero};
    case kLeakyRelu:
      return {z > T(0) ? z : z * c0, z > T(0) ? one : c0 - zero, zero};
    case kTanh: {
      const V a = M::tanh(z), slope = T(1) - a * a;
      return {a, slope, T(-2) * a * slope};
    }
    case kSigmoid: {
      const V a = M::logistic(z), slope = a * (T(1) - a);
      return {a, slope, slope * (T(1) - T(2) * a)};
    }
    case kGeluErf: {
      const V phi = M::exp(T(-0.5) * z * z) * T(0.39894228040143267794);
      const V cdf = T(0.5) * (T(1) + M::erf(z * T(0.70710678118654752440)));
      return {z * cdf, cdf + z * phi, phi * (T(2) - z * z)};
    }
    case kGeluTanh: {
      const T k = T(0.79788456080286535588), c = T(0.044715);
      const V t = M::tanh(k * (z + c * z * z * z)), sech2 = T(1) - t * t;
      const V u1 = k * (T(1) + T(3) * c * z * z), u2 = T(6) * k * c * z;
      return {T(0.5) * z * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * z * sech2 * u1,
              sech2 * u1 + T(0.5) * z * sech2 * (u2 - T(2) * t * u1 * u1)};
    }
    case kSilu: {
      const V s = M::logistic(z), q = T(1) - s;
      return {z * s, s * (T(1) + z * q), s * q * (T(2) + z * (q - s))};
    }
    case kSoftplus: {  // linear above the threshold, as PyTorch
      const V scaled = z * c0, s = M::logistic(scaled);
      const auto linear = scaled > c1;
      return {linear ? z : M::log1p_exp(scaled) / c0, linear ? one : s, linear ? zero : c0 * s * (T(1) - s)};
    }
    case kSin: {
      const auto t = M::sin_cos(z * c0);
      return {t.sin, c0 * t.cos, -c0 * c0 * t.sin};
    }
    case kCos: {
      const auto t = M::sin_cos(z * c0);
      return {t.cos, -c0 * t.sin, -c0 * c0 * t.cos};
    }
    case kRsqrt: {
      const V a = M::rsqrt(z + c0), cube = a * a * a;
      return {a, T(-0.5) * cube, T(0.75) * cube * a * a};
    }
    case kElu: {  // e^z - 1 by tanh, which loses nothing near 0
      const V t = M::tanh(T(0.5) * z), grown = c0 * M::exp(z);
      const auto linear = z > T(0);
      return {linear ? z : c0 * T(2) * t / (T(1) - t), linear ? one : grown, z < T(0) ? grown : zero};
    }
    default:
      return {zero, zero, zero};
  }
}

// What is left in memory for the derivatives where nothing else reads the input.
enum ActMode : int32_t {
  kInPlace = 0,    // the output over the input: derivatives come from the output
  kSlopeOver = 1,  // f'(z) over the input
  kKeepInput = 2   // the input
};

MTMLK_ANYWHERE constexpr int32_t best_act_mode(int kind, double c0) {
  return kind == kRelu || kind == kTanh || kind == kSigmoid || (kind == kLeakyRelu && c0 > 0) ? kInPlace
         : kind == kSin || kind == kCos                                                       ? kSlopeOver
                                                                                              : kKeepInput;
}

// f'' = 0 everywhere.
MTMLK_ANYWHERE constexpr bool is_straight(int kind) { return kind == kRelu || kind == kLeakyRelu; }

// f' from the output of a kInPlace kind.
template <class M>
MTMLK_ANYWHERE typename M::Value slope_of_output(int kind, typename M::Value a, typename M::Scalar c0) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  const V zero = {}, one = T(1) - zero;
  switch (kind) {
    case kRelu:
      return a <= T(0) ? zero : one;
    case kLeakyRelu:
      return a > T(0) ? one : c0 - zero;
    case kTanh:
      return T(1) - a * a;
    default:  // kSigmoid
      return a * (T(1) - a);
  }
}

// f'' / f' from the output of a curved kInPlace kind.
template <class M>
MTMLK_ANYWHERE typename M::Value bend_of_output(int kind, typename M::Value a) {
  using T = typename M::Scalar;
  return kind == kTanh ? T(-2) * a : T(1) - T(2) * a;
}

// f'' from the output of a kSlopeOver kind: sin'' = -c0^2 sin, and cos likewise.
template <class M>
MTMLK_ANYWHERE typename M::Value curvature_of_output(typename M::Value a, typename M::Scalar c0) {
  return -c0 * c0 * a;
}

}  // namespace mtmlk
