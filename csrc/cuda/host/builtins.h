// CUDA's built-in variables and functions.
//
// Stricter than hardware: all threads that meet do so at one line of the source, and a mask names no lane that does
// not exist or has returned.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/host/engine.h"

#define threadIdx (::mtmlk::host::thread_index())
#define blockIdx (::mtmlk::host::block_index())
#define blockDim (::mtmlk::host::shape().block)
#define gridDim (::mtmlk::host::shape().grid)

namespace mtmlk {
namespace host {

inline const dim3& thread_index() { return self().index; }
inline const dim3& block_index() { return self().block->index; }
inline const Shape& shape() { return self().engine->shape(); }

// The meeting of a warp's lanes, as one of them sees it.
class Exchange {
 public:
  Exchange(uint32_t mask, Place place) : warp_(*self().warp), place_(place) {
    const Thread& t = self();
    if (!(mask >> t.lane & 1)) fault(place, "a _sync function whose mask %08x does not name its lane %d", mask, t.lane);
    if (mask & ~warp_.alive)
      fault(place, "mask %08x of a _sync function names lanes that do not exist or have returned", mask);
    number_ = warp_.find(mask);
  }
  ~Exchange() { --warp_.meetings[number_].leaving; }

  void meet(bool orders) { self().engine->meet(warp_, number_, place_, orders); }

  // Shows a value to the other lanes. As on hardware, this orders no accesses to memory.
  template <class V>
  void show(const V& value) {
    static_assert(sizeof(V) <= Warp::kValue, "a value of 32 bytes at most");
    memcpy(warp_.values[number_][self().lane], &value, sizeof(V));
    meet(false);
  }
  template <class V>
  V of(int lane) const {
    V value;
    memcpy(&value, warp_.values[number_][lane], sizeof(V));
    return value;
  }
  // For each lane of the mask.
  template <class V, class F>
  void each(F use) const {
    for (int i = 0; i < kLanes; ++i)
      if (warp_.meetings[number_].mask >> i & 1) use(i, of<V>(i));
  }
  bool has(int lane) const { return warp_.meetings[number_].mask >> lane & 1; }

 private:
  Warp& warp_;
  Place place_;
  int number_;
};

// The value of lane `source`; the own one where that lies outside of the lanes' group.
template <class V>
V shuffle(uint32_t mask, V value, int source, int width, Place place) {
  tsan::Quiet quiet;
  Exchange lanes(mask, place);
  lanes.show(value);
  const int first = self().lane & ~(width - 1);
  if (source < first || source >= first + width) return value;
  if (!lanes.has(source)) fault(place, "a shuffle reads lane %d, which its mask %08x does not name", source, mask);
  return lanes.of<V>(source);
}

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
