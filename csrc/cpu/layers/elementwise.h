// Sums and products that broadcast, and affine maps. Nodes that are linear in their operands send dz and dzt back
// alike, so one function serves both planes.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

// How an operand lies under the output's rows: row i reads its row (i % period), splatted where it has one feature.
template <class T>
struct Operand {
  T* p;
  int64_t ld, period;
  bool splat_row;
};

template <class T>
Operand<T> operand_of(const Block<T>& b, const ValuePlan& out, int32_t value, Plane plane) {
  const ValuePlan& v = b.plan->values[value];
  return {plane_of(b, value, plane), v.ld, rows_of(b, v), v.features == 1 && out.features != 1};
}

template <class T>
MTMLK_INLINE T* operand_row(const Operand<T>& o, int64_t row) {
  return o.p + (o.period == 1 ? 0 : row % o.period) * o.ld;
}

template <class T>
MTMLK_INLINE VecOf<T> read_operand(const Operand<T>& o, const T* row, int64_t col) {
  return o.splat_row ? splat<T>(row[0]) : load<T>(row + col);
}

// out = x + y, or x * y; y nullptr is the neutral element.
template <class T, bool kProduct>
void combine(const Operand<T>& x, const Operand<T>* y, T* out, int64_t rows, int64_t ld, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* left = operand_row(x, r);
    const T* right = y ? operand_row(*y, r) : nullptr;
    for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
      VecOf<T> value = read_operand<T>(x, left, c);
      if (y) value = kProduct ? value * read_operand<T>(*y, right, c) : value + read_operand<T>(*y, right, c);
      T* to = out + r * ld + c;
      store<T>(to, add ? load<T>(to) + value : value);
    }
  }
}

template <class T, bool kProduct>
void combine_nodes(const Block<T>& b, const ValuePlan& v, Plane plane_a, Plane plane_b, T* out, bool add) {
  const Operand<T> y = operand_of(b, v, v.b, plane_b);
  combine<T, kProduct>(operand_of(b, v, v.a, plane_a), &y, out, rows_of(b, v), v.ld, add);
}

// The gradient g (times factor's row, if any) of the output's rows, summed back into an operand.
template <class T>
void send_back(const T* g, int64_t rows, int64_t ld, const Operand<T>* factor, const Operand<T>& to, bool add) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (!add) fill_zero<T>(to.p, to.period * to.ld);
  for (int64_t r = 0; r < rows; ++r) {
    T* dst = operand_row(to, r);
    const T* by = factor ? operand_row(*factor, r) : nullptr;
    VecOf<T> sum = {};
    for (int64_t c = 0; c < ld; c += kLanes) {
      VecOf<T> value = load<T>(g + r * ld + c);
      if (factor) value = value * read_operand<T>(*factor, by, c);
      if (to.splat_row)
        sum += value;
      else
        store<T>(dst + c, load<T>(dst + c) + value);
    }
    if (to.splat_row) dst[0] += sum_lanes<T>(sum);
  }
}

template <class T>
void add_tangent(const Block<T>& b, const ValuePlan& v) {
  T* out = plane_of(b, v.self, kTangent);
  bool add = false;
  const int32_t operands[2] = {v.a, v.b};
  for (const int32_t operand : operands) {
    if (!has_tangent(b, operand)) continue;
    combine<T, false>(operand_of(b, v, operand, kTangent), nullptr, out, rows_of(b, v), v.ld, add);
    add = true;
  }
}

template <class T>
void mul_tangent(const Block<T>& b, const ValuePlan& v) {
  T* out = plane_of(b, v.self, kTangent);
  if (has_tangent(b, v.a)) combine_nodes<T, true>(b, v, kTangent, kPrimal, out, false);
  if (has_tangent(b, v.b)) combine_nodes<T, true>(b, v, kPrimal, kTangent, out, has_tangent(b, v.a));
}

template <class T>
void pair_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& targets) {
  const int64_t rows = rows_of(b, v);
  const T* g = plane_of(b, v.self, plane);
  const bool product = v.op == kMul;
  const auto send = [&](int32_t to, int32_t other, bool add) {
    const Operand<T> dst = operand_of(b, v, to, plane);
    const Operand<T> factor = operand_of(b, v, other, kPrimal);
    send_back<T>(g, rows, v.ld, product ? &factor : nullptr, dst, add);
    if (product && plane == kDeltaTangent && has_tangent(b, other)) {
      const Operand<T> moved = operand_of(b, v, other, kTangent);
      send_back<T>(plane_of(b, v.self, kDelta), rows, v.ld, &moved, dst, true);
    }
  };
  if (targets.to_a) send(v.a, v.b, v.add_a);
  if (targets.to_b) send(v.b, v.a, v.add_b);
}

template <class T>
void affine(const T* src, int64_t n, T scale, T shift, bool add, T* dst) {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) {
    const VecOf<T> value = multiply_add<T>(load<T>(src + i), splat<T>(scale), splat<T>(shift));
    store<T>(dst + i, add ? load<T>(dst + i) + value : value);
  }
}

template <class T, bool kProduct>
void pair_forward(const Block<T>& b, const ValuePlan& v) {
  combine_nodes<T, kProduct>(b, v, kPrimal, kPrimal, plane_of(b, v.self, kPrimal), false);
}

template <class T>
constexpr LayerKernels<T> kAddLayer = {pair_forward<T, false>, add_tangent<T>, pair_backward<T>};

template <class T>
constexpr LayerKernels<T> kMulLayer = {pair_forward<T, true>, mul_tangent<T>, pair_backward<T>};

template <class T, Plane kPlane>
void expand_node(const Block<T>& b, const ValuePlan& v) {
  combine<T, false>(operand_of(b, v, v.a, kPlane), nullptr, plane_of(b, v.self, kPlane), rows_of(b, v), v.ld, false);
}

template <class T>
void expand_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (to.to_a)
    send_back<T>(plane_of(b, v.self, plane), rows_of(b, v), v.ld, nullptr, operand_of(b, v, v.a, plane), v.add_a);
}

template <class T>
constexpr LayerKernels<T> kExpandLayer = {expand_node<T, kPrimal>, expand_node<T, kTangent>, expand_backward<T>};

template <class T, Plane kPlane>
void affine_node(const Block<T>& b, const ValuePlan& v) {
  affine<T>(plane_of(b, v.a, kPlane), rows_of(b, v) * v.ld, T(v.c0), T(kPlane == kPrimal ? v.c1 : 0), false,
            plane_of(b, v.self, kPlane));
}

template <class T>
void affine_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (to.to_a)
    affine<T>(plane_of(b, v.self, plane), rows_of(b, v) * v.ld, T(v.c0), T(0), v.add_a, plane_of(b, v.a, plane));
}

template <class T>
constexpr LayerKernels<T> kAffineLayer = {affine_node<T, kPrimal>, affine_node<T, kTangent>, affine_backward<T>};

}  // namespace
}  // namespace mtmlk
