// Softmax and its logarithm, each row by itself, over its features. With p = softmax(z):
//
//                     softmax                                         log_softmax
//   forward           y   = p                                         y   = z - log sum e^z
//   tangent           yt  = p (zt - <p, zt>)                          yt  = zt - <p, zt>
//   backward          dz  = p (dy - <p, dy>)                          dz  = dy - p sum dy
//   tangent backward  dzt = p (dyt - <p, dyt> - <pt, dy>)             dzt = dyt - p sum dyt - pt sum dy
//                           + pt (dy - <p, dy>)
// All of it from y and yt: p = y, pt = yt, or p = e^y, pt = p yt. Sums are in double, as softmax's own.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

// sum of what `value` says of every vector at f, whose first `left` lanes count.
template <class T, class Each>
MTMLK_INLINE double sum_features(int64_t features, Each value) {
  double total = 0;
  for (int64_t f = 0; f < features; f += Simd<T>::kLanes)
    total += double(sum_lanes<T>(keep_lanes<T>(value(f), features - f)));
  return total;
}

template <class T, class Each>
MTMLK_INLINE void put_features(int64_t features, bool add, T* out, Each value) {
  for (int64_t f = 0; f < features; f += Simd<T>::kLanes) {
    const VecOf<T> v = keep_lanes<T>(value(f), features - f);
    store<T>(out + f, add ? load<T>(out + f) + v : v);
  }
}

template <class T>
T largest_feature(const T* z, int64_t features) {
  T top = z[0];
  for (int64_t f = 1; f < features; ++f) top = z[f] > top || z[f] != z[f] ? z[f] : top;
  return top;
}

template <class T>
void softmax_forward(const Block<T>& b, const ValuePlan& v) {
  const T* z = plane_of(b, v.a, kPrimal);
  T* y = plane_of(b, v.self, kPrimal);
  for (int64_t r = 0; r < rows_of(b, v); ++r, z += v.ld, y += v.ld) {
    const T top = largest_feature<T>(z, v.features);
    put_features<T>(v.features, false, y, [&](int64_t f) { return exponential<T>(load<T>(z + f) - top); });
    const double total = sum_features<T>(v.features, [&](int64_t f) { return load<T>(y + f); });
    const T shift = T(__builtin_log(total)), share = T(1 / total);
    if (v.kind == kLogSoftmax)
      put_features<T>(v.features, false, y, [&](int64_t f) { return load<T>(z + f) - top - shift; });
    else
      put_features<T>(v.features, false, y, [&](int64_t f) { return load<T>(y + f) * share; });
  }
}

// One row's y and yt, and p and pt from them.
template <class T>
struct SoftmaxRow {
  const T *y, *yt;
  bool log;

  MTMLK_INLINE VecOf<T> p(int64_t f) const { return log ? exponential<T>(load<T>(y + f)) : load<T>(y + f); }
  MTMLK_INLINE VecOf<T> pt(int64_t f) const { return log ? p(f) * load<T>(yt + f) : load<T>(yt + f); }
};

template <class T>
void softmax_tangent(const Block<T>& b, const ValuePlan& v) {
  const T *zt = plane_of(b, v.a, kTangent), *y = plane_of(b, v.self, kPrimal);
  T* yt = plane_of(b, v.self, kTangent);
  for (int64_t r = 0; r < rows_of(b, v); ++r, zt += v.ld, y += v.ld, yt += v.ld) {
    const SoftmaxRow<T> row = {y, nullptr, v.kind == kLogSoftmax};
    const T mean = T(sum_features<T>(v.features, [&](int64_t f) { return row.p(f) * load<T>(zt + f); }));
    put_features<T>(v.features, false, yt, [&](int64_t f) {
      const VecOf<T> moved = load<T>(zt + f) - mean;
      return row.log ? moved : row.p(f) * moved;
    });
  }
}

// g: this plane's gradient of y; dy: the first one, where the second terms are there.
template <class T>
void softmax_row_backward(const SoftmaxRow<T>& row, int64_t n, const T* g, const T* dy, bool add, T* out) {
  const auto weigh = [&](int64_t f) { return row.log ? load<T>(g + f) : row.p(f) * load<T>(g + f); };
  double total = sum_features<T>(n, weigh), first = 0;
  if (dy && row.log) first = sum_features<T>(n, [&](int64_t f) { return load<T>(dy + f); });
  if (dy && !row.log) {
    first = sum_features<T>(n, [&](int64_t f) { return row.p(f) * load<T>(dy + f); });
    total += sum_features<T>(n, [&](int64_t f) { return row.pt(f) * load<T>(dy + f); });
  }
  put_features<T>(n, add, out, [&](int64_t f) {
    const VecOf<T> own = row.log ? load<T>(g + f) - row.p(f) * T(total) : row.p(f) * (load<T>(g + f) - T(total));
    if (!dy) return own;
    return own + row.pt(f) * (row.log ? splat<T>(T(-first)) : load<T>(dy + f) - T(first));
  });
}

template <class T>
void softmax_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (!to.to_a) return;
  const bool moves = plane == kDeltaTangent && has_tangent(b, v.a);
  const T *y = plane_of(b, v.self, kPrimal), *yt = moves ? plane_of(b, v.self, kTangent) : nullptr;
  const T *g = plane_of(b, v.self, plane), *dy = moves ? plane_of(b, v.self, kDelta) : nullptr;
  T* out = plane_of(b, v.a, plane);
  for (int64_t r = 0, at = 0; r < rows_of(b, v); ++r, at += v.ld) {
    const SoftmaxRow<T> row = {y + at, moves ? yt + at : nullptr, v.kind == kLogSoftmax};
    softmax_row_backward<T>(row, v.features, g + at, moves ? dy + at : nullptr, v.add_a, out + at);
  }
}

template <class T>
constexpr LayerKernels<T> kSoftmaxLayer = {softmax_forward<T>, softmax_tangent<T>, softmax_backward<T>};

}  // namespace
}  // namespace mtmlk
