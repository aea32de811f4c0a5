// CUDA's built-in variables and functions.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/host/exchange.h"

#define threadIdx (::mtmlk::host::thread_index())
#define blockIdx (::mtmlk::host::block_index())
#define blockDim (::mtmlk::host::shape().block)
#define gridDim (::mtmlk::host::shape().grid)

namespace mtmlk {
namespace host {

inline const dim3& thread_index() { return self().index; }
inline const dim3& block_index() { return self().block->index; }
inline const Shape& shape() { return self().engine->shape(); }

}  // namespace host
}  // namespace mtmlk

inline void __syncthreads(mtmlk::host::Place place = mtmlk::host::here()) {
  mtmlk::host::tsan::Quiet quiet;
  mtmlk::host::Thread& t = mtmlk::host::self();
  t.engine->meet(t.block->barrier, place);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, mtmlk::host::Place place = mtmlk::host::here()) {
  mtmlk::host::tsan::Quiet quiet;
  mtmlk::host::Exchange(mask, place).meet(true);
}
inline void __threadfence() {
  mtmlk::host::tsan::Quiet quiet;
  mtmlk::host::self().engine->fence();
}
inline void __threadfence_block() { __threadfence(); }

template <class V>
V __shfl_sync(uint32_t mask, V v, int source, int width = 32, mtmlk::host::Place place = mtmlk::host::here()) {
  const int lane = mtmlk::host::self().lane;
  return mtmlk::host::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), width, place);
}
template <class V>
V __shfl_xor_sync(uint32_t mask, V v, int bits, int width = 32, mtmlk::host::Place place = mtmlk::host::here()) {
  return mtmlk::host::shuffle(mask, v, mtmlk::host::self().lane ^ bits, width, place);
}
template <class V>
V __shfl_down_sync(uint32_t mask, V v, unsigned by, int width = 32, mtmlk::host::Place place = mtmlk::host::here()) {
  return mtmlk::host::shuffle(mask, v, mtmlk::host::self().lane + int(by), width, place);
}
template <class V>
V __shfl_up_sync(uint32_t mask, V v, unsigned by, int width = 32, mtmlk::host::Place place = mtmlk::host::here()) {
  return mtmlk::host::shuffle(mask, v, mtmlk::host::self().lane - int(by), width, place);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, mtmlk::host::Place place = mtmlk::host::here()) {
  mtmlk::host::tsan::Quiet quiet;
  mtmlk::host::Exchange lanes(mask, place);
  lanes.show(predicate);
  uint32_t bits = 0;
  lanes.each<int>([&](int lane, int value) { bits |= uint32_t(value != 0) << lane; });
  return bits;
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t v, mtmlk::host::Place place = mtmlk::host::here()) {
  mtmlk::host::tsan::Quiet quiet;
  mtmlk::host::Exchange lanes(mask, place);
  lanes.show(v);
  uint32_t sum = 0;
  lanes.each<uint32_t>([&](int, uint32_t value) { sum += value; });
  return sum;
}

// Numbers of 4 and 8 bytes; relaxed, as CUDA's.
template <class V>
V atomicAdd(V* p, V v) {
  V old, sum;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    sum = old + v;
  } while (!__atomic_compare_exchange(p, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
