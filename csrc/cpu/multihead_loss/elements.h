// Losses element by element; the formulas are in include/mtml/losses.h.
//
// A row's loss is the mean over its elements, or their sum.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/losses.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "multihead_loss/call.h"
#include "multihead_loss/math.h"
#include "multihead_loss/softmax_rows.h"

namespace mtmlk {
namespace {

// Elements [from, to) of one row.
template <class T, int kKind>
double element_part(const MtmlkHead& h, const T* z, const T* y, T* g, int64_t from, int64_t to, T scale) {
  constexpr int64_t kPart = 64 * Simd<T>::kLanes;
  const T* pos = static_cast<const T*>(h.pos_weights);
  const T delta = T(h.p0);
  double total = 0;
  for (int64_t part = from; part < to; part += kPart) {
    VecOf<T> sum = {};
    each_vector<T>(to - part < kPart ? to - part : kPart, [&](int64_t i, int64_t n) {
      const int64_t at = part + i;
      const VecOf<T> weights = kKind == kMultiheadBce && pos ? load_some<T>(pos + at, n) : splat<T>(T(1));
      const auto e =
          multihead_element<VectorMath<T>, kKind>(load_some<T>(z + at, n), load_some<T>(y + at, n), weights, delta);
      sum += keep_lanes<T>(e.value, n);
      if (g) store_some<T>(g + at, scale * e.slope, n);
    });
    total += double(sum_lanes<T>(sum));
  }
  return total;
}

// Outputs [from, to) of one row of means and log variances.
template <class T>
double gaussian_part(const T* z, const T* y, T* g, int64_t outputs, int64_t from, int64_t to, T scale) {
  double total = 0;
  each_vector<T>(to - from, [&](int64_t i, int64_t n) {
    const int64_t at = from + i;
    const auto e = gaussian_element<VectorMath<T>>(load_some<T>(z + at, n), load_some<T>(z + outputs + at, n),
                                                   load_some<T>(y + at, n));
    total += double(sum_lanes<T>(keep_lanes<T>(e.value, n)));
    if (!g) return;
    store_some<T>(g + at, scale * e.mean_slope, n);
    store_some<T>(g + outputs + at, scale * e.log_variance_slope, n);
  });
  return total;
}

template <class T, int kKind = 0>
double element_row(const MtmlkHead& h, const T* z, const T* y, T* g, int64_t from, int64_t to, T scale) {
  if constexpr (kKind < kMultiheadCount) {
    if (h.kind != kKind) return element_row<T, kKind + 1>(h, z, y, g, from, to, scale);
    if constexpr (kKind == kMultiheadGaussian)
      return gaussian_part<T>(z, y, g, target_values(kKind, h.classes), from, to, scale);
    else if constexpr (!is_softmax(kKind))
      return element_part<T, kKind>(h, z, y, g, from, to, scale);
  }
  return 0;
}

template <class T>
double element_rows(const MtmlkHead& h, const MultiheadUnit& u, double inverse) {
  const int64_t each = target_values(h.kind, h.classes);
  const double share = h.mean ? 1 / double(each) : 1;
  double total = 0;
  for (int64_t row = u.row0; row < u.row1; ++row) {
    const T weight = weight_of<T>(h, row);
    const T* z = static_cast<const T*>(h.logits) + row * h.ld;
    T* g = h.gradient ? static_cast<T*>(h.gradient) + row * h.ld : nullptr;
    const T scale = T(double(weight) * inverse * share);
    if (weight != T(0))
      total += double(weight) * share *
               element_row<T>(h, z, static_cast<const T*>(h.target) + row * each, g, u.col0, u.col1, scale);
    if (weight != T(0) && !counts_nothing(inverse)) continue;
    if (g) clear_row<T>(g + u.col0, u.col1 - u.col0);
    if (g && h.kind == kMultiheadGaussian) clear_row<T>(g + each + u.col0, u.col1 - u.col0);
  }
  return total;
}

}  // namespace
}  // namespace mtmlk
