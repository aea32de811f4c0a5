// Activations; their formulas are in include/mtml/pointwise.h.
//
//   forward           a = f(z)
//   backward          dz = da f'(z)
//   tangent           at = f'(z) zt
//   tangent backward  dzt = dat f'(z) + da f''(z) zt
//
// For kInPlace kinds all of it is written in a (relu, leaky_relu, tanh, sigmoid); f''(z) zt is then (f''/f')(a) at.
#pragma once

#include <stdint.h>

#include "mtml/pointwise.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

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
    const Jet<VecOf<T>> jet = act_jet<VectorMath<T>>(kKind, load<T>(p.z + i), p.c0, p.c1);
    store<T>(p.a + i, jet.value);
    if (p.mode == kSlopeOver) store<T>(p.z + i, jet.slope);
  }
}

template <class T, int kKind>
MTMLK_INLINE VecOf<T> act_slope(const ActPlanes<T>& p, int64_t i) {
  if (p.mode == kInPlace) return slope_of_output<VectorMath<T>>(kKind, load<T>(p.a + i), p.c0);
  if (p.mode == kSlopeOver) return load<T>(p.z + i);
  return act_jet<VectorMath<T>>(kKind, load<T>(p.z + i), p.c0, p.c1).slope;
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
  for (int64_t i = 0; i < p.n; i += Simd<T>::kLanes) {
    VecOf<T> dzt = times_slope<T, kKind>(p, load<T>(p.dat + i), i);
    if (!is_straight(kKind) && curved) {
      VecOf<T> bend;  // f''(z) zt
      if (p.mode == kInPlace) {
        bend = bend_of_output<VectorMath<T>>(kKind, load<T>(p.a + i)) * load<T>(p.at + i);
      } else if (p.mode == kSlopeOver) {
        bend = curvature_of_output<VectorMath<T>>(load<T>(p.a + i), p.c0) * load<T>(p.zt + i);
      } else {
        bend = act_jet<VectorMath<T>>(kKind, load<T>(p.z + i), p.c0, p.c1).curvature * load<T>(p.zt + i);
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
template <class T, int kKind = 0>
void act_pass_any(const ActPlanes<T>& p, Plane plane, bool curved) {
  if constexpr (kKind < kActCount) {
    if (p.kind == kKind) return act_pass<T, kKind>(p, plane, curved);
    act_pass_any<T, kKind + 1>(p, plane, curved);
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

template <class T>
void act_forward(const Block<T>& b, const ValuePlan& v) {
  act_node<T>(b, v, kPrimal);
}

template <class T>
void act_tangent(const Block<T>& b, const ValuePlan& v) {
  act_node<T>(b, v, kTangent);
}

template <class T>
void act_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (to.to_a) act_node<T>(b, v, plane);
}

template <class T>
constexpr LayerKernels<T> kActLayer = {act_forward<T>, act_tangent<T>, act_backward<T>};

}  // namespace
}  // namespace mtmlk
