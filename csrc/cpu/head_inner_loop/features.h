// Products of features with a handful of class vectors.
//
// Features are the user's own rows [n, D]: any address, any D. What is multiplied by them stands in rows padded with
// zeros.
#pragma once

#include <stdint.h>

#include "simd/gemm.h"
#include "simd/layout.h"
#include "simd/simd.h"

namespace mtmlk {
namespace {

template <class T>
T head_sum(const T* a, int64_t n) {
  VecOf<T> sum = {};
  for (int64_t j = 0; j < n; j += Simd<T>::kLanes) sum += load<T>(a + j);
  return sum_lanes<T>(sum);
}

// [F_s; W]^T as panels: kLanes rows at a time through a block, so that rows may begin anywhere.
template <class T>
void pack_features(const T* features, int64_t samples, const T* weight, int64_t classes, int64_t D, T* packed) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  T from[kLanes * kLanes] __attribute__((aligned(kVecBytes))), to[kLanes * kLanes] __attribute__((aligned(kVecBytes)));
  each_panel<T>(D, samples + classes, [&](int64_t start, int64_t col, int64_t width) {
    for (int64_t d = 0; d < D; d += kLanes)
      for (int64_t o = 0; o < width; o += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = col + o + i, at = row - samples;
          const T* src = at < 0 ? features + row * D : at < classes ? weight + at * D : nullptr;
          store<T>(from + i * kLanes, src ? load_some<T>(src + d, D - d) : VecOf<T>{});
        }
        T* dst = packed + start + d * width + o;
        if (D - d >= kLanes) {
          transpose_block<T>(from, kLanes, dst, width);
          continue;
        }
        transpose_block<T>(from, kLanes, to, kLanes);
        for (int64_t i = 0; i < D - d; ++i) store<T>(dst + i * width, load<T>(to + i * kLanes));
      }
  });
}

// Columns col ... col + width of rows [n, D], zeros behind the end, to dst [n, width].
template <class T>
void fill_panel(const T* src, int64_t n, int64_t D, int64_t col, int64_t width, T* dst) {
  for (int64_t r = 0; r < n; ++r, dst += width)
    for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
      const int64_t left = D - col - j;
      store<T>(dst + j, left > 0 ? load_some<T>(src + r * D + col + j, left) : VecOf<T>{});
    }
}

// to [m, ld] += beta a X for rows X [n, D]; a [m, n] rows, or [n, m] where kColumns. rows: room for a panel of X.
template <class T, bool kColumns>
void add_rows(const T* a, int64_t lda, int64_t m, T beta, const T* X, int64_t n, int64_t D, T* rows, T* to,
              int64_t ld) {
  constexpr int64_t kWidth = kPanelVecs * Simd<T>::kLanes;
  for (int64_t col = 0; col < D; col += kWidth) {
    fill_panel<T>(X, n, D, col, kWidth, rows);
    Gemm<T> g = {to + col, ld, to + col, ld, beta, nullptr, 0, {a, lda, rows, kWidth, n}, {}};
    panel_any<T, kColumns>(int(kPanelVecs), m, g);
  }
}

}  // namespace
}  // namespace mtmlk
