// From the caller's tensors onto the chip.
#pragma once

#include <type_traits>

#include "cuda/inner_loop/matmul.cuh"
#include "cuda/inner_loop/mlp/task.cuh"

namespace mtmlk {

// T, where an array on the chip becomes a pointer.
template <class T>
using Of = std::enable_if_t<true, T>;

// [rows, kWidth] of the caller's, into rows of kRow.
template <int kWidth, int kRow, class T, class S>
DEV void load_rows(const MlpTask<T, S>& t, Of<T>* to, const void* from, int64_t first, int rows) {
  const T* const x = static_cast<const T*>(from) + first * kWidth;
  for (int e = t.rank; e < rows * kWidth; e += t.threads) {
    const int n = e / kWidth;
    copy_async_one(to + n * kRow + e - n * kWidth, x + e);
  }
}

template <int l = 1, class T, class S>
DEV void load_parameters(const MlpTask<T, S>& t, const MlpStep<T, S>& step) {
  constexpr int kI = S::width(l - 1), kO = S::width(l);
  load_rows<kI, row_of(kI)>(t, step.weight(l), t.call.theta[2 * l - 2], 0, kO);
  load_rows<kO, kO>(t, step.bias(l), t.call.theta[2 * l - 1], 0, 1);
  if constexpr (l < S::kLayers) load_parameters<l + 1>(t, step);
}

// A set's samples from `first` of all tasks' on.
template <class T, class S>
DEV void load_samples(const MlpTask<T, S>& t, const MlpSet<T>& set, const void* x, const void* y, int64_t first) {
  constexpr int kI = S::width(0), kO = S::width(S::kLayers);
  load_rows<kI, row_of(kI)>(t, set.x, x, first, set.samples);
  load_rows<kO, kO>(t, set.y, y, first, set.samples);
}

// Of all steps; and what a bias has for an input.
template <class T, class S>
DEV void load_rates(const MlpTask<T, S>& t) {
  for (int e = t.rank; e < t.call.steps * 2 * S::kLayers; e += t.threads) {
    const int k = e / (2 * S::kLayers), tensor = e - k * 2 * S::kLayers;
    copy_async_one(t.rates + e, static_cast<const T*>(t.call.rates[tensor]) + k * t.call.rate_stride[tensor]);
  }
}
template <class T, class S>
DEV void set_ones(const MlpTask<T, S>& t) {
  if (t.rank < 2 * kVector) t.ones[t.rank] = T(t.rank < kVector);
}

// Whole vectors from one place to another.
template <class T, class S>
DEV void load_vectors(const MlpTask<T, S>& t, Of<T>* to, const Of<T>* from, int count) {
  constexpr int kOf16 = 16 / int(sizeof(T));
  for (int e = kOf16 * t.rank; e < count; e += kOf16 * t.threads) copy_async_16(to + e, from + e);
}
template <class T, class S>
DEV void store_vectors(const MlpTask<T, S>& t, Of<T>* to, const Of<T>* from, int count) {
#pragma unroll 4
  for (int e = 4 * t.rank; e < count; e += 4 * t.threads) *reinterpret_cast<Four<T>*>(to + e) = four(from + e);
}

// The output of a set's samples, from `first` of all tasks' on.
template <class T, class S>
DEV void store_output(const MlpTask<T, S>& t, const MlpStep<T, S>& step, int64_t first, int samples) {
  constexpr int kO = S::width(S::kLayers);
  T* const output = static_cast<T*>(t.call.output) + first * kO;
  for (int e = t.rank; e < samples * kO; e += t.threads) {
    const int n = e / kO;
    output[e] = step.plane(S::kZ, S::kLayers)[n * row_of(kO) + e - n * kO];
  }
}

// Of each number of the rates, the sum over the steps and tensors that it is for; of_steps [K, 2 L].
template <class S, class T>
DEV void store_rates(const MtmlkMlpCall& call, T* to, const Of<T>* of_steps, int rank, int threads) {
  for (int e = rank; e < call.n_rates; e += threads) {
    T sum = 0;
    for (int k = 0; k < call.steps; ++k)
      for (int tensor = 0; tensor < 2 * S::kLayers; ++tensor)
        if (call.rate_at[tensor] + k * call.rate_stride[tensor] == e) sum += of_steps[k * 2 * S::kLayers + tensor];
    to[e] = sum;
  }
}

}  // namespace mtmlk
