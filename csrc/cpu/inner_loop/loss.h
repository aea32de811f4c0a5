// Losses of a block of samples.
//
// With c the weight of a sample (its mask over the sum of masks, and over the elements for means):
//   mse               c (z - y)^2              dz = 2 c (z - y)          dzt = 2 c zt
//   bce_with_logits   c (log(1 + e^z) - z y)   dz = c (s - y)            dzt = c s (1 - s) zt        s = sigmoid(z)
//   huber             c h(z - y)               dz = c clamp(z - y, d)    dzt = c [|z - y| < d] zt
//   l1                c |z - y|                dz = c sign(z - y)        dzt = 0
//   cross_entropy     c (m lse(z) - <t, z>)    dz = c (m p - t)          dzt = c m p (zt - <p, zt>)  p = softmax(z)
// t = (1 - e) y + e / C, where y is one-hot of class ids and e smooths the labels; m is the sum of t, 1 of class ids.
// `aux` keeps c times the curvature (p for cross_entropy).
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/losses.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "simd/vmath.h"

namespace mtmlk {
namespace {

template <class T>
struct LossBlock {
  MtmlkLoss loss;
  int64_t samples, rows, features, ld;  // rows a sample
  const T* z;                           // [samples * rows, ld]
  T* dz;                                // nullptr: value only
  T* aux;
  const void* y;    // at the block's first sample: int64 ids or values [samples * rows, features]
  const T* weight;  // [samples]
  T scale;          // of dz, not of the value: what the task's loss counts for
};

template <class T, int kKind>
double element_losses(const LossBlock<T> b) {
  const T* y = static_cast<const T*>(b.y);
  VecOf<T> total = {};
  for (int64_t row = 0; row < b.samples * b.rows; ++row) {
    const T c = b.weight[b.rows == 1 ? row : row / b.rows];
    for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes) {
      const int64_t left = b.features - f, at = row * b.ld + f;
      const auto e = element_loss<VectorMath<T>, kKind>(load<T>(b.z + at), load_some<T>(y + row * b.features + f, left),
                                                        T(b.loss.p0));
      total += keep_lanes<T>(c * e.value, left);
      if (!b.dz) continue;
      store<T>(b.dz + at, keep_lanes<T>(b.scale * c * e.slope, left));
      store<T>(b.aux + at, keep_lanes<T>(c * e.curvature, left));
    }
  }
  return double(sum_lanes<T>(total));
}

template <class T>
struct LogitsRow {
  T top;           // the largest z
  double log_sum;  // of e^(z - top)

  double lse() const { return double(top) + log_sum; }
  VecOf<T> log_p(VecOf<T> z) const { return z - top - T(log_sum); }
};

// Of one row, and p into aux.
template <class T>
MTMLK_INLINE LogitsRow<T> softmax_row(const T* z, int64_t classes, T* p) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> high = splat<T>(z[0]);
  for (int64_t f = 0; f < classes; f += kLanes) {
    VecOf<T> v = load<T>(z + f);
    if (classes - f < kLanes) v = iota<T>() < T(classes - f) ? v : high;
    high = (v > high || v != v) ? v : high;
  }
  const T top = max_lanes<T>(high);
  VecOf<T> sum = {};
  for (int64_t f = 0; f < classes; f += kLanes) {
    const VecOf<T> e = keep_lanes<T>(exponential<T>(load<T>(z + f) - top), classes - f);
    store<T>(p + f, e);
    sum += e;
  }
  const T total = sum_lanes<T>(sum);
  for (int64_t f = 0; f < classes; f += kLanes) store<T>(p + f, load<T>(p + f) / total);
  return {top, __builtin_log(double(total))};
}

template <class T>
double cross_entropies(const LossBlock<T>& b) {
  const int64_t* y = static_cast<const int64_t*>(b.y);
  const T smooth = T(b.loss.p0) / T(b.features), hit = T(1) - T(b.loss.p0);
  double total = 0;
  for (int64_t n = 0; n < b.samples; ++n) {
    const T* z = b.z + n * b.ld;
    T* p = b.aux + n * b.ld;
    const T c = b.weight[n];
    const int64_t label = y[n] < 0 ? 0 : y[n];  // -100 (ignored) comes with weight 0
    double loss = softmax_row<T>(z, b.features, p).lse() - double(hit) * double(z[label]);
    if (smooth != 0) {
      VecOf<T> sum = {};
      for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes) sum += keep_lanes<T>(load<T>(z + f), b.features - f);
      loss -= double(smooth) * double(sum_lanes<T>(sum));
    }
    total += c == 0 ? 0 : double(c) * loss;
    if (!b.dz) continue;
    T* dz = b.dz + n * b.ld;
    const T scaled = b.scale * c;
    for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes)
      store<T>(dz + f, keep_lanes<T>(scaled * (load<T>(p + f) - smooth), b.features - f));
    dz[label] -= scaled * hit;
  }
  return total;
}

// Lanes [f, f + left) of t, of sample n.
template <class T>
MTMLK_INLINE VecOf<T> class_target(const LossBlock<T>& b, int64_t n, int64_t f, int64_t left) {
  const T smooth = T(b.loss.p0) / T(b.features), hit = T(1) - T(b.loss.p0);
  VecOf<T> y;
  if (b.loss.kind == kSoftCrossEntropy)
    y = load_some<T>(static_cast<const T*>(b.y) + n * b.features + f, left);
  else
    y = iota<T>() == T(static_cast<const int64_t*>(b.y)[n] - f) ? splat<T>(1) : VecOf<T>{};
  return hit * y + smooth;
}

// The sum of t.
template <class T>
T class_mass(const LossBlock<T>& b, int64_t n) {
  if (b.loss.kind == kCrossEntropy) return T(1);
  VecOf<T> sum = {};
  for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes)
    sum += keep_lanes<T>(class_target(b, n, f, b.features - f), b.features - f);
  return sum_lanes<T>(sum);
}

template <class T>
double soft_cross_entropies(const LossBlock<T>& b) {
  double total = 0;
  for (int64_t n = 0; n < b.samples; ++n) {
    const int64_t at = n * b.ld;
    const LogitsRow<T> row = softmax_row<T>(b.z + at, b.features, b.aux + at);
    const T c = b.weight[n], mass = class_mass(b, n);
    VecOf<T> loss = {};
    for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes) {
      const int64_t left = b.features - f;
      const VecOf<T> t = class_target(b, n, f, left);
      loss -= keep_lanes<T>(t * row.log_p(load<T>(b.z + at + f)), left);
      if (b.dz) store<T>(b.dz + at + f, keep_lanes<T>(b.scale * c * (mass * load<T>(b.aux + at + f) - t), left));
    }
    total += c == 0 ? 0 : double(c) * double(sum_lanes<T>(loss));
  }
  return total;
}

template <class T, int kKind = 0>
double loss_block(const LossBlock<T>& b) {
  if constexpr (kKind < kLossCount) {
    if (b.loss.kind != kKind) return loss_block<T, kKind + 1>(b);
    if constexpr (kKind == kCrossEntropy)
      return cross_entropies<T>(b);
    else if constexpr (kKind == kSoftCrossEntropy)
      return soft_cross_entropies<T>(b);
    else
      return element_losses<T, kKind>(b);
  }
  return 0;
}

// dzt = (second derivative) zt + seed dz; zt may be nullptr (no tangent reaches the output).
template <class T>
void loss_tangent(const LossBlock<T>& b, const T* zt, T seed, T* dzt) {
  for (int64_t row = 0; row < b.samples * b.rows; ++row) {
    const int64_t at = row * b.ld;
    T mean = 0;
    const bool softmax = is_of_classes(b.loss.kind);
    if (softmax && zt) {
      VecOf<T> sum = {};
      for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes)
        sum += keep_lanes<T>(load<T>(b.aux + at + f) * load<T>(zt + at + f), b.features - f);
      mean = sum_lanes<T>(sum);
    }
    const T c = softmax ? b.weight[row] * class_mass(b, row) : T(1);
    for (int64_t f = 0; f < b.features; f += Simd<T>::kLanes) {
      VecOf<T> v = seed == 0 ? VecOf<T>{} : seed * load<T>(b.dz + at + f);
      if (zt) v += keep_lanes<T>(c * load<T>(b.aux + at + f) * (load<T>(zt + at + f) - mean), b.features - f);
      store<T>(dzt + at + f, v);
    }
  }
}

}  // namespace
}  // namespace mtmlk
