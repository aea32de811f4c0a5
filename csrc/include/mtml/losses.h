// Losses of one element: value, slope and curvature in the prediction z, for any arithmetic (arithmetic.h). Losses of
// rows (cross-entropy) stand where their sums are taken.
#pragma once

#include <stdint.h>

#include "mtml/arithmetic.h"
#include "mtml/program.h"

namespace mtmlk {

template <class V>
struct Element {
  V value, slope, curvature;
};

// ---- of the inner loop: LossKind ----

// Those of a row of classes.
MTMLK_ANYWHERE constexpr bool is_of_classes(int kind) { return kind == kCrossEntropy || kind == kSoftCrossEntropy; }

//   mse               (z - y)^2             2 (z - y)              2
//   bce_with_logits   log(1 + e^z) - z y    s - y                  s (1 - s)          s = sigmoid(z)
//   huber             h(z - y)              clamp(z - y, delta)    [|z - y| < delta]
//   l1                |z - y|               sign(z - y)            0

template <class M, int kKind>
MTMLK_ANYWHERE Element<typename M::Value> element_loss(typename M::Value z, typename M::Value y,
                                                       typename M::Scalar delta) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  static_assert(kKind == kMse || kKind == kBce || kKind == kHuber || kKind == kL1, "no loss of one element");
  const V r = z - y, zero = {}, one = T(1) - zero;
  if constexpr (kKind == kMse) {
    return {r * r, T(2) * r, T(2) - zero};
  } else if constexpr (kKind == kBce) {
    const V s = M::logistic(z);
    return {M::log1p_exp(z) - z * y, s - y, s * (T(1) - s)};
  } else {
    const V size = M::abs(r), sign = r > T(0) ? one : r < T(0) ? -one : r * T(0);
    if constexpr (kKind == kL1) return {size, sign, zero};
    const auto inside = size < delta;
    return {inside ? T(0.5) * r * r : delta * (size - T(0.5) * delta), inside ? r : delta * sign, inside ? one : zero};
  }
}

template <class V>
struct TargetElement {
  V slope, mixed;
};

// How that loss moves with its target y, and how this slope moves with z. All but bce are functions of z - y.
template <class M, int kKind>
MTMLK_ANYWHERE TargetElement<typename M::Value> target_element(typename M::Value z,
                                                               const Element<typename M::Value>& e) {
  using T = typename M::Scalar;
  if constexpr (kKind == kBce)
    return {-z, T(-1) - typename M::Value{}};
  else
    return {-e.slope, -e.curvature};
}

// ---- of several heads: MultiheadKind ----
//
// No curvature: their second derivatives are PyTorch's.

// Those whose elements share a softmax.
MTMLK_ANYWHERE constexpr bool is_softmax(int kind) { return kind == kMultiheadCrossEntropy || kind == kMultiheadKl; }

// Targets a row of `classes` logits has.
MTMLK_ANYWHERE constexpr int64_t target_values(int kind, int64_t classes) {
  return kind == kMultiheadGaussian ? classes / 2 : classes;
}

//   bce_with_logits   (1 - y) z + q log(1 + e^-z)        (1 - y) - q s(-z)      q = 1 + (pos_weight - 1) y
// and mse, l1, huber as above.
template <class M, int kKind>
MTMLK_ANYWHERE Element<typename M::Value> multihead_element(typename M::Value z, typename M::Value y,
                                                            typename M::Value pos, typename M::Scalar delta) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  if constexpr (kKind == kMultiheadBce) {
    const V q = T(1) + (pos - T(1)) * y, rest = T(1) - y;
    return {rest * z + q * M::log1p_exp(-z), rest - q * M::logistic(-z), V{}};
  } else {
    constexpr int kSame = kKind == kMultiheadMse ? kMse : kKind == kMultiheadL1 ? kL1 : kHuber;
    static_assert(kSame != kHuber || kKind == kMultiheadHuber, "no loss of one element");
    return element_loss<M, kSame>(z, y, delta);
  }
}

//   gaussian_nll      (w + (y - m)^2 e^-w) / 2           dm = (m - y) e^-w           dw = (1 - (y - m)^2 e^-w) / 2
template <class V>
struct GaussianElement {
  V value, mean_slope, log_variance_slope;
};

template <class M>
MTMLK_ANYWHERE GaussianElement<typename M::Value> gaussian_element(typename M::Value mean, typename M::Value w,
                                                                   typename M::Value y) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  const V r = mean - y, precision = M::exp(-w), spread = r * r * precision;
  return {T(0.5) * (w + spread), r * precision, T(0.5) * (T(1) - spread)};
}

}  // namespace mtmlk
