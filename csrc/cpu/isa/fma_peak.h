// The machine's multiply-add peak, measured: independent chains that stay in registers.
#pragma once

#include <stdint.h>
#include <time.h>

#include <atomic>

#include "mtml/abi.h"
#include "runtime/team.h"
#include "simd/simd.h"

namespace mtmlk {
namespace {

template <class T>
double fma_burst(int64_t rounds) {
  constexpr int kChains = sizeof(VecOf<T>) == 64 ? 24 : 12;
  VecOf<T> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = splat<T>(T(i));
  VecOf<T> a = splat<T>(T(0.999)), b = splat<T>(T(1e-3));
  __asm__ volatile("" : "+x"(a), "+x"(b));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = multiply_add<T>(acc[i], a, b);
  VecOf<T> sum = {};
  for (int i = 0; i < kChains; ++i) sum += acc[i];
  volatile T sink = sum_lanes<T>(sum);
  (void)sink;
  return double(rounds) * kChains * Simd<T>::kLanes * 2;
}

inline double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// GFLOP/s of all threads together: the best of many short bursts, each long enough to be timed.
inline double measure_fma_peak(int32_t dtype, int threads, double seconds) {
  const int64_t rounds = 1 << 15;
  double best = 0;
  const double stop = seconds_now() + seconds;
  do {
    std::atomic<int64_t> flops{0};
    const double start = seconds_now();
    each_piece(threads, threads, nullptr, [&](int64_t, int) {
      flops += int64_t(dtype == MTMLK_F32 ? fma_burst<float>(rounds) : fma_burst<double>(rounds));
    });
    const double rate = double(flops) / (seconds_now() - start) * 1e-9;
    best = rate > best ? rate : best;
  } while (seconds_now() < stop);
  return best;
}

}  // namespace
}  // namespace mtmlk
