// Sums over tasks of what each of them left.
#pragma once

#include <stdint.h>

#include "cuda/device_api.h"
#include "cuda/inner_loop/program.h"

namespace mtmlk {

template <class T>
struct TaskSums {
  const T* parts;  // [T, elements]
  const T* scale;  // [T] or nullptr
  int64_t elements;
  int32_t tasks, n_results;
  T* results[kMostResults];
  int64_t begins[kMostResults];
};

// Of result i, of which e is element e - begins[i]: the last that begins at e or before.
template <class T>
DEV int result_of(const TaskSums<T>& s, int64_t e) {
  int low = 0, high = s.n_results;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (s.begins[middle] <= e)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// result[e] = sum over tasks, in their order, of scale[t] parts[t, e]
template <class T>
__global__ void __launch_bounds__(256) sum_over_tasks(const __grid_constant__ TaskSums<T> s) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= s.elements) return;
  const int which = result_of(s, e);
  if (!s.results[which]) return;
  T sum = s.scale ? s.scale[0] * s.parts[e] : s.parts[e];
  for (int t = 1; t < s.tasks; ++t) {
    const T part = s.parts[t * s.elements + e];
    sum += s.scale ? s.scale[t] * part : part;
  }
  s.results[which][e - s.begins[which]] = sum;
}

}  // namespace mtmlk
