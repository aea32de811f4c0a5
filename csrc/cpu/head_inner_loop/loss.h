// Losses of a linear head's task, the classes as rows and the samples as lanes: [C, ld], ld the samples padded to
// vectors. Nothing is summed across lanes, and 5 classes of 25 samples take 10 vectors where rows of samples take 25.
//
// Three losses have one form, with w a sample's weight and y its target (one-hot, smoothed, or values):
//   cross_entropy     p = softmax(z)    L = sum w (lse(z) - <y, z>)        c = mean weight
//   bce_with_logits   p = sigmoid(z)    L = sum w (log(1 + e^z) - z y)     c = mean weight / classes
//   mse               p = z             L = sum w (z - y)^2 / 2            c = 2 mean weight / classes
//   dL/dz = w (p - y);   its tangent along x = w p (x - <p, x>) | w p (1 - p) x | w x
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/program.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "simd/vmath.h"

namespace mtmlk {
namespace {

template <class T>
struct HeadTaskLoss {
  int32_t kind;
  int64_t classes, ld;
  T* y;  // [classes, ld], 0 in padding
  T* w;  // [ld], 0 in padding
};

// y and w from labels (int64 ids [samples], or values [samples, classes]) and the mask [samples] or nullptr.
template <class T>
void head_targets(const MtmlkLoss& loss, int64_t samples, const void* labels, const T* mask,
                  const HeadTaskLoss<T>& to) {
  const bool ids = loss.kind == kCrossEntropy, mse = loss.kind == kMse;
  const int64_t *y = static_cast<const int64_t*>(labels), classes = to.classes;
  const T* values = static_cast<const T*>(labels);
  const T smooth = T(loss.p0) / T(classes), hit = T(1) - T(loss.p0);
  fill_zero<T>(to.y, classes * to.ld);
  fill_zero<T>(to.w, to.ld);
  double total = 0;
  for (int64_t s = 0; s < samples; ++s) {
    const bool ignored = ids && y[s] < 0;
    to.w[s] = ignored ? T(0) : mask ? mask[s] : T(1);
    total += double(to.w[s]);
    for (int64_t c = 0; c < classes; ++c)
      to.y[c * to.ld + s] = !ids ? values[s * classes + c] : ignored ? T(0) : smooth + (y[s] == c ? hit : T(0));
  }
  const double mean = loss.reduction ? 1 : ids ? total : total * double(classes);
  const T by = mean == 0 ? T(0) : T((mse ? 2 : 1) / mean);
  for (int64_t s = 0; s < samples; ++s) to.w[s] *= by;
}

// z -> p in place for one vector of samples; returns their weighted losses, less the factor w.
template <class T>
MTMLK_INLINE VecOf<T> softmax_lanes(const HeadTaskLoss<T>& l, T* z, const T* y) {
  VecOf<T> top = load<T>(z);
  for (int64_t c = 1; c < l.classes; ++c) {
    const VecOf<T> v = load<T>(z + c * l.ld);
    top = (v > top || v != v) ? v : top;
  }
  VecOf<T> sum = {}, dot = {};
  for (int64_t c = 0; c < l.classes; ++c) {
    const VecOf<T> d = load<T>(z + c * l.ld) - top, e = exponential<T>(d);
    store<T>(z + c * l.ld, e);
    sum += e;
    dot = multiply_add<T>(load<T>(y + c * l.ld), d, dot);
  }
  const VecOf<T> by = T(1) / sum;
  for (int64_t c = 0; c < l.classes; ++c) store<T>(z + c * l.ld, load<T>(z + c * l.ld) * by);
  return logarithm<T>(sum) - dot;
}

template <class T>
MTMLK_INLINE VecOf<T> elementwise_lanes(const HeadTaskLoss<T>& l, T* z, const T* y) {
  VecOf<T> value = {};
  for (int64_t c = 0; c < l.classes; ++c) {
    const VecOf<T> v = load<T>(z + c * l.ld), target = load<T>(y + c * l.ld), r = v - target;
    if (l.kind == kMse) {
      value = multiply_add<T>(T(0.5) * r, r, value);
      continue;
    }
    value += log1p_exp<T>(v) - v * target;
    store<T>(z + c * l.ld, logistic<T>(v));
  }
  return value;
}

// z [C, ld] -> p in place; returns the loss, kLanes partial sums of it.
template <class T>
VecOf<T> head_predict(const HeadTaskLoss<T>& l, T* z) {
  VecOf<T> total = {};
  for (int64_t j = 0; j < l.ld; j += Simd<T>::kLanes) {
    const VecOf<T> value =
        l.kind == kCrossEntropy ? softmax_lanes<T>(l, z + j, l.y + j) : elementwise_lanes<T>(l, z + j, l.y + j);
    const VecOf<T> w = load<T>(l.w + j);
    total += w == T(0) ? VecOf<T>{} : w * value;
  }
  return total;
}

// p -> dz in place, the tangent along x plus seed times the residual. x and p [C, ld].
template <class T>
void head_curve(const HeadTaskLoss<T>& l, const T* x, T seed, T* p) {
  for (int64_t j = 0; j < l.ld; j += Simd<T>::kLanes) {
    VecOf<T> mean = {};
    if (l.kind == kCrossEntropy)
      for (int64_t c = j; c < l.classes * l.ld; c += l.ld) mean = multiply_add<T>(load<T>(p + c), load<T>(x + c), mean);
    const VecOf<T> w = load<T>(l.w + j);
    for (int64_t c = j; c < l.classes * l.ld; c += l.ld) {
      const VecOf<T> prob = load<T>(p + c), along = load<T>(x + c);
      const VecOf<T> curve = l.kind == kMse   ? along
                             : l.kind == kBce ? prob * (T(1) - prob) * along
                                              : prob * (along - mean);
      const VecOf<T> slope = seed == T(0) ? VecOf<T>{} : seed * (prob - load<T>(l.y + c));
      store<T>(p + c, w * (curve + slope));
    }
  }
}

}  // namespace
}  // namespace mtmlk
