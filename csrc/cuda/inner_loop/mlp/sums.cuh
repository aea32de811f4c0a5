// What is summed over samples in their order: losses, and gradients of rates
//
//   d loss / d rate_k = -<g_k, lambda_{k+1}>:   of W_l the dots <dz_l, a_{l-1} lambda_l^T>, of b_l <dz_l, lambda_b>
#pragma once

#include "cuda/inner_loop/mlp/task.cuh"
#include "cuda/inner_loop/rows.cuh"

namespace mtmlk {

// The weighed sum of the samples' losses, by one warp.
template <class T, class S>
DEV void sum_losses(const MlpTask<T, S>& t, const MlpSet<T>& set, T* to) {
  if (t.warp() != t.warps() - 1) return;
  const T sum = row_sum<T>(set.samples, t.lane(), [&](int n) { return t.each[n]; });
  if (t.lane() == 0) *to = set.weight * sum;
}

template <class T, class S, int l>
DEV T rate_of_weight(const MlpTask<T, S>& t, int samples) {
  constexpr int kCols = S::dots_of(l);
  return row_sum<T>(samples * kCols, t.lane(), [&](int e) {
    const int n = e / kCols;
    return t.dots[n * S::kDots + S::dots(l) + e - n * kCols];
  });
}
template <class T, class S, int l>
DEV T rate_of_bias(const MlpTask<T, S>& t, const MlpStep<T, S>& step, int samples) {
  constexpr int kCols = S::width(l);
  const T *dz = step.plane(S::kDz, l), *lambda = t.lambda + S::bias(l);
  return row_sum<T>(samples * kCols, t.lane(), [&](int e) {
    const int n = e / kCols, col = e - n * kCols;
    return dz[n * row_of(kCols) + col] * lambda[col];
  });
}

// Of step k, before lambda moves: a warp a tensor, the last warps first, for the first ones have tiles.
template <class T, class S, int l = 1>
DEV void rate_gradients(const MlpTask<T, S>& t, const MlpStep<T, S>& step, int samples, int k) {
  constexpr int kTensor = 2 * l - 2;
  const int turn = t.warps() - 1 - t.warp();
  T* const to = t.rate_grads + k * 2 * S::kLayers + kTensor;
  if (turn == kTensor % t.warps()) {
    const T sum = rate_of_weight<T, S, l>(t, samples);
    if (t.lane() == 0) to[0] = -sum;
  }
  if (turn == (kTensor + 1) % t.warps()) {
    const T sum = rate_of_bias<T, S, l>(t, step, samples);
    if (t.lane() == 0) to[1] = -sum;
  }
  if constexpr (l < S::kLayers) rate_gradients<T, S, l + 1>(t, step, samples, k);
}

}  // namespace mtmlk
