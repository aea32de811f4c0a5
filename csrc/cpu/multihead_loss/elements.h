// Losses element by element; mse, l1 and huber are in loss.h.
//
//   bce_with_logits   (1 - y) z + q log(1 + e^-z)        dz = (1 - y) - q s(-z)      q = 1 + (pos_weight - 1) y
//   gaussian_nll      (w + (y - m)^2 e^-w) / 2           dm = (m - y) e^-w           dw = (1 - (y - m)^2 e^-w) / 2
// A row's loss is the mean over its elements, or their sum.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "inner_loop/loss.h"
#include "multihead_loss/call.h"
#include "multihead_loss/math.h"
#include "multihead_loss/softmax_rows.h"

namespace mtmlk {
namespace {

template <class T, int kKind>
MTMLK_INLINE Element<T> multihead_element(VecOf<T> z, VecOf<T> y, VecOf<T> pos, T delta) {
  if constexpr (kKind == kHeadBce) {
    const VecOf<T> q = T(1) + (pos - T(1)) * y, rest = T(1) - y;
    return {rest * z + q * log1p_exp<T>(-z), rest - q * logistic<T>(-z), VecOf<T>{}};
  }
  if constexpr (kKind == kHeadMse) return element_loss<T, kMse>(z, y, delta);
  if constexpr (kKind == kHeadL1) return element_loss<T, kL1>(z, y, delta);
  return element_loss<T, kHuber>(z, y, delta);
}

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
      const VecOf<T> weights = kKind == kHeadBce && pos ? load_some<T>(pos + at, n) : splat<T>(T(1));
      const Element<T> e =
          multihead_element<T, kKind>(load_some<T>(z + at, n), load_some<T>(y + at, n), weights, delta);
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
    const VecOf<T> w = load_some<T>(z + outputs + at, n), r = load_some<T>(z + at, n) - load_some<T>(y + at, n);
    const VecOf<T> precision = exponential<T>(-w), spread = r * r * precision;
    total += double(sum_lanes<T>(keep_lanes<T>(T(0.5) * (w + spread), n)));
    if (!g) return;
    store_some<T>(g + at, scale * (r * precision), n);
    store_some<T>(g + outputs + at, scale * (T(0.5) * (T(1) - spread)), n);
  });
  return total;
}

template <class T>
double element_row(const MtmlkHead& h, const T* z, const T* y, T* g, int64_t from, int64_t to, T scale) {
  switch (h.kind) {
    case kHeadBce:
      return element_part<T, kHeadBce>(h, z, y, g, from, to, scale);
    case kHeadMse:
      return element_part<T, kHeadMse>(h, z, y, g, from, to, scale);
    case kHeadL1:
      return element_part<T, kHeadL1>(h, z, y, g, from, to, scale);
    case kHeadHuber:
      return element_part<T, kHeadHuber>(h, z, y, g, from, to, scale);
    default:
      return gaussian_part<T>(z, y, g, h.classes / 2, from, to, scale);
  }
}

template <class T>
double element_rows(const MtmlkHead& h, const MultiheadUnit& u, double inverse) {
  const int64_t each = h.kind == kHeadGaussian ? h.classes / 2 : h.classes;
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
    if (g && h.kind == kHeadGaussian) clear_row<T>(g + each + u.col0, u.col1 - u.col0);
  }
  return total;
}

}  // namespace
}  // namespace mtmlk
