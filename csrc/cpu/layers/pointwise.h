// Activations: value, slope f' and curvature f''.
//
//   forward           a = f(z)
//   backward          dz = da f'(z)
//   tangent           at = f'(z) zt
//   tangent backward  dzt = dat f'(z) + da f''(z) zt
//
// For kInPlace kinds all of it is written in a (relu, leaky_relu, tanh, sigmoid); f''(z) zt is then (f''/f')(a) at.
#pragma once

#include <stdint.h>

#include "simd/simd.h"
#include "simd/vmath.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

template <class T>
struct Jet {
  VecOf<T> value, slope, curvature;
};

template <class T>
MTMLK_INLINE Jet<T> act_jet(int kind, VecOf<T> z, T c0, T c1) {
  using V = VecOf<T>;
  const V one = splat<T>(T(1)), zero = {};
  switch (kind) {
    case kRelu:
      return {z <= T(0) ? zero : z, z <= T(0) ? zero : one, zero};
    case kLeakyRelu:
      return {z > T(0) ? z : z * c0, z > T(0) ? one : splat<T>(c0), zero};
    case kTanh: {
      const V a = hyperbolic_tangent<T>(z), slope = T(1) - a * a;
      return {a, slope, T(-2) * a * slope};
    }
    case kSigmoid: {
      const V a = logistic<T>(z), slope = a * (T(1) - a);
      return {a, slope, slope * (T(1) - T(2) * a)};
    }
    case kGeluErf: {
      const V phi = exponential<T>(T(-0.5) * z * z) * T(0.39894228040143267794);
      const V cdf = T(0.5) * (T(1) + error_function<T>(z * T(0.70710678118654752440)));
      return {z * cdf, cdf + z * phi, phi * (T(2) - z * z)};
    }
    case kGeluTanh: {
      const T k = T(0.79788456080286535588), c = T(0.044715);
      const V t = hyperbolic_tangent<T>(k * (z + c * z * z * z)), sech2 = T(1) - t * t;
      const V u1 = k * (T(1) + T(3) * c * z * z), u2 = T(6) * k * c * z;
      return {T(0.5) * z * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * z * sech2 * u1,
              sech2 * u1 + T(0.5) * z * sech2 * (u2 - T(2) * t * u1 * u1)};
    }
    case kSilu: {
      const V s = logistic<T>(z), q = T(1) - s;
      return {z * s, s * (T(1) + z * q), s * q * (T(2) + z * (q - s))};
    }
    case kSoftplus: {  // linear above the threshold, as PyTorch
      const V scaled = z * c0, s = logistic<T>(scaled);
      const IntOf<T> linear = scaled > c1;
      return {linear ? z : log1p_exp<T>(scaled) / c0, linear ? one : s, linear ? zero : c0 * s * (T(1) - s)};
    }
    case kSin: {
      const SinCos<T> t = sin_cos<T>(z * c0);
      return {t.sin, c0 * t.cos, -c0 * c0 * t.sin};
    }
    case kRsqrt: {
      V a = z + c0;
      for (int i = 0; i < Simd<T>::kLanes; ++i) a[i] = T(1) / T(__builtin_sqrt(double(a[i])));
      const V cube = a * a * a;
      return {a, T(-0.5) * cube, T(0.75) * cube * a * a};
    }
    default: {
      const SinCos<T> t = sin_cos<T>(z * c0);
      return {t.cos, -c0 * t.sin, -c0 * c0 * t.cos};
    }
  }
}

// Slope and f''/f' from the output of a kInPlace kind.
template <class T>
MTMLK_INLINE VecOf<T> slope_of_output(int kind, VecOf<T> a, T c0) {
  switch (kind) {
    case kRelu:
      return a <= T(0) ? VecOf<T>{} : splat<T>(T(1));
    case kLeakyRelu:
      return a > T(0) ? splat<T>(T(1)) : splat<T>(c0);
    case kTanh:
      return T(1) - a * a;
    default:
      return a * (T(1) - a);
  }
}

template <class T>
MTMLK_INLINE VecOf<T> bend_of_output(int kind, VecOf<T> a) {
  return kind == kTanh ? T(-2) * a : T(1) - T(2) * a;
}

// What one pass over an activation reads and writes; all planes are n elements, whole vectors.
template <class T>
struct ActPlanes {
  int kind, mode;
  T c0, c1;
  int64_t n;
  T *z, *a;      // equal when in place
  T *dz, *da;    // deltas
  T *zt, *at;    // tangents
  T *dzt, *dat;  // tangents of the deltas
  bool add;      // dz (dzt) is added to
};

template <class T, int kKind>
void act_forward_kind(const ActPlanes<T> p) {
  for (int64_t i = 0; i < p.n; i += Simd<T>::kLanes) {
    const Jet<T> jet = act_jet<T>(kKind, load<T>(p.z + i), p.c0, p.c1);
    store<T>(p.a + i, jet.value);
    if (p.mode == kSlopeOver) store<T>(p.z + i, jet.slope);
  }
}

template <class T, int kKind>
MTMLK_INLINE VecOf<T> act_slope(const ActPlanes<T>& p, int64_t i) {
  if (p.mode == kInPlace) return slope_of_output<T>(kKind, load<T>(p.a + i), p.c0);
  if (p.mode == kSlopeOver) return load<T>(p.z + i);
  return act_jet<T>(kKind, load<T>(p.z + i), p.c0, p.c1).slope;
}

// g f'(z). relu selects instead of multiplying: 0 times an infinite gradient would be NaN where PyTorch has 0.
template <class T, int kKind>
MTMLK_INLINE VecOf<T> times_slope(const ActPlanes<T>& p, VecOf<T> g, int64_t i) {
  if constexpr (kKind == kRelu) return load<T>(p.a + i) <= T(0) ? VecOf<T>{} : g;
  return g * act_slope<T, kKind>(p, i);
}

template <class T, int kKind>
void act_backward_kind(const ActPlanes<T> p) {
  for (int64_t i = 0; i < p.n; i += Simd<T>::kLanes) {
    VecOf<T> dz = times_slope<T, kKind>(p, load<T>(p.da + i), i);
    if (p.add) dz += load<T>(p.dz + i);
    store<T>(p.dz + i, dz);
  }
}

template <class T, int kKind>
void act_tangent_kind(const ActPlanes<T> p) {
  for (int64_t i = 0; i < p.n; i += Simd<T>::kLanes) store<T>(p.at + i, times_slope<T, kKind>(p, load<T>(p.zt + i), i));
}

template <class T, int kKind>
void act_tangent_backward_kind(const ActPlanes<T> p, bool curved) {
  constexpr bool kStraight = kKind == kRelu || kKind == kLeakyRelu;
  for (int64_t i = 0; i < p.n; i += Simd<T>::kLanes) {
    VecOf<T> dzt = times_slope<T, kKind>(p, load<T>(p.dat + i), i);
    if (!kStraight && curved) {
      VecOf<T> bend;  // f''(z) zt
      if (p.mode == kInPlace) {
        bend = bend_of_output<T>(kKind, load<T>(p.a + i)) * load<T>(p.at + i);
      } else if (p.mode == kSlopeOver) {  // sin'' = -w0^2 sin, and cos likewise
        bend = -p.c0 * p.c0 * load<T>(p.a + i) * load<T>(p.zt + i);
      } else {
        bend = act_jet<T>(kKind, load<T>(p.z + i), p.c0, p.c1).curvature * load<T>(p.zt + i);
      }
      dzt += load<T>(p.da + i) * bend;
    }
    if (p.add) dzt += load<T>(p.dzt + i);
    store<T>(p.dzt + i, dzt);
  }
}

template <class T, int kKind>
void act_pass(const ActPlanes<T>& p, Plane plane, bool curved) {
  switch (plane) {
    case kPrimal:
      return act_forward_kind<T, kKind>(p);
    case kDelta:
      return act_backward_kind<T, kKind>(p);
    case kTangent:
      return act_tangent_kind<T, kKind>(p);
    default:
      return act_tangent_backward_kind<T, kKind>(p, curved);
  }
}

// `plane` names what is computed: the value, its gradient, its tangent, or the tangent of the gradient (whose second
// term is there only if `curved`, that is if z has a tangent).
template <class T>
void act_pass_any(const ActPlanes<T>& p, Plane plane, bool curved = false) {
  switch (p.kind) {
    case kRelu:
      return act_pass<T, kRelu>(p, plane, curved);
    case kLeakyRelu:
      return act_pass<T, kLeakyRelu>(p, plane, curved);
    case kTanh:
      return act_pass<T, kTanh>(p, plane, curved);
    case kSigmoid:
      return act_pass<T, kSigmoid>(p, plane, curved);
    case kGeluErf:
      return act_pass<T, kGeluErf>(p, plane, curved);
    case kGeluTanh:
      return act_pass<T, kGeluTanh>(p, plane, curved);
    case kSilu:
      return act_pass<T, kSilu>(p, plane, curved);
    case kSoftplus:
      return act_pass<T, kSoftplus>(p, plane, curved);
    case kSin:
      return act_pass<T, kSin>(p, plane, curved);
    case kRsqrt:
      return act_pass<T, kRsqrt>(p, plane, curved);
    default:
      return act_pass<T, kCos>(p, plane, curved);
  }
}

template <class T>
void act_node(const Block<T>& b, const ValuePlan& v, Plane plane) {
  const bool forward = plane == kPrimal || plane == kTangent;
  if (forward ? v.gated_before : v.gated_after) return;  // a relu that the products around it apply
  ActPlanes<T> p = {};
  p.kind = v.kind, p.mode = v.act_mode, p.c0 = T(v.c0), p.c1 = T(v.c1), p.n = rows_of(b, v) * v.ld;
  p.z = plane_of(b, v.a, kPrimal), p.a = plane_of(b, v.self, kPrimal);
  p.dz = plane_of(b, v.a, kDelta), p.da = plane_of(b, v.self, kDelta);
  p.zt = plane_of(b, v.a, kTangent), p.at = plane_of(b, v.self, kTangent);
  p.dzt = plane_of(b, v.a, kDeltaTangent), p.dat = plane_of(b, v.self, kDeltaTangent);
  p.add = v.add_a;
  act_pass_any<T>(p, plane, has_tangent(b, v.a));
}

}  // namespace
}  // namespace mtmlk
