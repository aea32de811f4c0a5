// The loss of a sample, by one lane: the sum over its elements, with slope and slope of the tangent. Losses of elements
// only; classes go to the interpreter.
#pragma once

#include "cuda/inner_loop/mlp/task.cuh"
#include "mtml/losses.h"
#include "mtml/scalar_math.h"

namespace mtmlk {

template <class T>
DEV Element<T> element_of(int kind, T z, T y, T p0) {
  using M = ScalarMath<T>;
  if (kind == kMse) return element_loss<M, kMse>(z, y, p0);
  if (kind == kBce) return element_loss<M, kBce>(z, y, p0);
  if (kind == kHuber) return element_loss<M, kHuber>(z, y, p0);
  return element_loss<M, kL1>(z, y, p0);
}

// dz = weight dl/dz
template <class T, int kWidth>
DEV T sample_loss(const MlpSet<T>& set, const T* z, const T* y, T* dz) {
  T sum = 0;
  for (int j = 0; j < kWidth; ++j) {
    const Element<T> e = element_of(set.kind, z[j], y[j], set.p0);
    sum += e.value, dz[j] = set.weight * e.slope;
  }
  return sum;
}

// dzt = weight d2l zt
template <class T, int kWidth>
DEV void sample_loss_tangent(const MlpSet<T>& set, const T* z, const T* y, const T* zt, T* dzt) {
  for (int j = 0; j < kWidth; ++j) dzt[j] = set.weight * element_of(set.kind, z[j], y[j], set.p0).curvature * zt[j];
}

}  // namespace mtmlk
