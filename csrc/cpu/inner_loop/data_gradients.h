// What a block of samples sends to its targets and to the weights of its samples.
//
// With l_n the loss of a sample before it is weighed, c its weight in the task's loss (loss.h) and zt a tangent of z,
//   to y_n        seed c dl_n/dy + c (d2l_n/dy dz) zt
//   of sample n   seed l_n + <dl_n/dz, zt>
// of which the latter becomes the gradient of w_n where all samples are at hand: Runner::weight_gradients. Of
// cross_entropy, with e the label smoothing, dl/dy = -(1 - e) log p, and along zt (1 - e) (<p, zt> - zt).
#pragma once

#include <stdint.h>

#include "mtml/losses.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "inner_loop/loss.h"

namespace mtmlk {
namespace {

template <class T>
struct DataSink {
  T* y;     // added to; at the block's first sample, nullptr: not wanted
  T* each;  // [samples], written; likewise
};

template <class T>
MTMLK_INLINE void add_some(VecOf<T> v, int64_t n, T* p) {
  store_some<T>(p, load_some<T>(p, n) + v, n);
}

template <class T, int kKind>
void element_data(const LossBlock<T>& b, const T* zt, T seed, const DataSink<T>& to) {
  using M = VectorMath<T>;
  const T* y = static_cast<const T*>(b.y);
  for (int64_t n = 0; n < b.samples; ++n) {
    VecOf<T> sum = {};
    for (int64_t row = n * b.rows; row < (n + 1) * b.rows; ++row)
      for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes) {
        const int64_t left = b.features - f, at = row * b.ld + f, own = row * b.features + f;
        const VecOf<T> z = load<T>(b.z + at), v = zt ? load<T>(zt + at) : VecOf<T>{};
        const auto e = element_loss<M, kKind>(z, load_some<T>(y + own, left), T(b.loss.p0));
        const auto target = target_element<M, kKind>(z, e);
        if (to.y) add_some<T>(b.weight[n] * (seed * target.slope + v * target.mixed), left, to.y + own);
        sum += keep_lanes<T>(seed * e.value + v * e.slope, left);
      }
    if (to.each) to.each[n] = sum_lanes<T>(sum);
  }
}

template <class T>
void class_data(const LossBlock<T>& b, const T* zt, T seed, const DataSink<T>& to) {
  const T hit = T(1) - T(b.loss.p0);
  for (int64_t n = 0; n < b.samples; ++n) {
    const int64_t at = n * b.ld;
    const LogitsRow<T> row = softmax_row<T>(b.z + at, b.features, b.aux + at);
    VecOf<T> products = {}, sum = {};
    for (int64_t f = 0; zt && f < b.features; f += Simd<T>::kLanes)
      products += keep_lanes<T>(load<T>(b.aux + at + f) * load<T>(zt + at + f), b.features - f);
    const T mean = sum_lanes<T>(products);
    for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes) {
      const int64_t left = b.features - f;
      const VecOf<T> v = zt ? mean - load<T>(zt + at + f) : VecOf<T>{};
      const VecOf<T> slope = v - seed * row.log_p(load<T>(b.z + at + f));  // of the loss in t, and along zt
      if (to.y) add_some<T>(b.weight[n] * hit * slope, left, to.y + n * b.features + f);
      sum += keep_lanes<T>(class_target(b, n, f, left) * slope, left);
    }
    if (to.each) to.each[n] = sum_lanes<T>(sum);
  }
}

template <class T, int kKind = 0>
void data_gradients(const LossBlock<T>& b, const T* zt, T seed, const DataSink<T>& to) {
  if constexpr (kKind < kLossCount) {
    if (b.loss.kind != kKind) return data_gradients<T, kKind + 1>(b, zt, seed, to);
    if constexpr (is_of_classes(kKind))
      class_data<T>(b, zt, seed, to);
    else
      element_data<T, kKind>(b, zt, seed, to);
  }
}

}  // namespace
}  // namespace mtmlk
