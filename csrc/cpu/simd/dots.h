// Products whose long side is summed: rows times a handful of rows.
#pragma once

#include <stdint.h>

#include "simd/gemm.h"
#include "simd/simd.h"

namespace mtmlk {
namespace {

// Rows of X and of W at once: 20 accumulators of 32 registers, or 10 of 16. Five is what few-shot classes come in.
constexpr int kDotClasses = 5;
#if defined(MTMLK_ISA_AVX512)
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 2;
#endif

// Rows of any address: `count` of them, `ld` apart.
template <class T>
struct RowsOf {
  const T* at;
  int64_t ld, count;
};

// out[c, r] += <x_r, w_c> over columns begin ... end for a block of rows of X and N rows of W; out's steps are given, a
// missing row of X repeats the last.
template <class T, int N>
void dot_block(const T* const (&x)[kDotRows], const RowsOf<T>& X, const RowsOf<T>& W, int64_t c0, int64_t begin,
               int64_t end, T* out, int64_t step_c, int64_t step_r, int64_t count) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const T* w = W.at + c0 * W.ld;
  VecOf<T> acc[kDotRows][N] = {};
  const auto step = [&](int64_t d, auto read) {
    VecOf<T> row[kDotRows];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) {
      __builtin_prefetch(x[r] + kDotRows * X.ld + d, 0, 2);  // the next block's: features come from memory here
      row[r] = read(x[r] + d);
    }
#pragma GCC unroll 5
    for (int c = 0; c < N; ++c) {
      const VecOf<T> by = read(w + c * W.ld + d);
#pragma GCC unroll 4
      for (int r = 0; r < kDotRows; ++r) acc[r][c] = multiply_add<T>(row[r], by, acc[r][c]);
    }
  };
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) step(d, [](const T* p) { return load_anywhere<T>(p); });
  if (d < end) step(d, [&](const T* p) { return load_first<T>(p, end - d); });
  constexpr int kSums = (kDotRows * N + kLanes - 1) / kLanes;
  T sums[kSums * kLanes] __attribute__((aligned(kVecBytes)));
  VecOf<T>* flat = &acc[0][0];
#pragma GCC unroll 5
  for (int s = 0; s < kSums; ++s) {
    VecOf<T> some[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int at = s * int(kLanes) + i;
      some[i] = at < kDotRows * N ? flat[at] : VecOf<T>{};
    }
    store<T>(sums + s * kLanes, sum_each<T>(some));
  }
  for (int64_t r = 0; r < count; ++r)
    for (int c = 0; c < N; ++c) out[c * step_c + r * step_r] += sums[r * N + c];
}

// out[c, r] += <x_r, w_c> over D columns: lanes run along D, so that 5 rows of W cost 5, not a vector.
template <class T>
void row_dots(const RowsOf<T>& X, const RowsOf<T>& W, int64_t D, T* out, int64_t step_c, int64_t step_r) {
  constexpr int64_t kPart = kChain * Simd<T>::kLanes;  // longer chains of additions lose digits
  for (int64_t r = 0; r < X.count; r += kDotRows) {
    const int64_t count = X.count - r < kDotRows ? X.count - r : kDotRows;
    const T* x[kDotRows];
    for (int i = 0; i < kDotRows; ++i) x[i] = X.at + (r + (i < count ? i : count - 1)) * X.ld;
    T* to = out + r * step_r;
    for (int64_t begin = 0; begin < D; begin += kPart) {
      const int64_t end = D - begin < kPart ? D : begin + kPart;
      int64_t c = 0;
      for (; c + kDotClasses <= W.count; c += kDotClasses)
        dot_block<T, kDotClasses>(x, X, W, c, begin, end, to + c * step_c, step_c, step_r, count);
      for (; c < W.count; ++c) dot_block<T, 1>(x, X, W, c, begin, end, to + c * step_c, step_c, step_r, count);
    }
  }
}

}  // namespace
}  // namespace mtmlk
