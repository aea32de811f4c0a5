// Between the module's tensors and the engine's layouts.
//
// A linear weight [O, I] is kept packed as [I, O] panels (gemm.h); its transposed copy, which input gradients need, as
// [O, I] panels. Narrow weights and other parameters are rows padded to vectors. Padding is zero and stays zero.
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"
#include "simd/gemm.h"
#include "simd/simd.h"

namespace mtmlk {
namespace {

template <class T>
constexpr int64_t kPanelWidth = kPanelVecs * Simd<T>::kLanes;

// Calls body(panel start, column, width) for each panel of a packed matrix with `k` rows and `n` columns.
template <class T, class Body>
MTMLK_INLINE void each_panel(int64_t k, int64_t n, Body body) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t padded = round_up(n, kLanes);
  int64_t start = 0;
  for (int64_t col = 0; col < padded;) {
    const int64_t width = panel_vecs((padded - col) / kLanes) * kLanes;
    body(start, col, width);
    start += k * width;
    col += width;
  }
}

// kLanes x kLanes block by log2(kLanes) rounds of interleaving rows i and i + kLanes / 2: after all rounds each element
// has rotated from (i, j) to (j, i). Addresses need no alignment.
template <class T>
MTMLK_INLINE void transpose_block(const T* src, int64_t src_ld, T* dst, int64_t dst_ld) {
  constexpr int kLanes = Simd<T>::kLanes, kHalf = kLanes / 2;
  VecOf<T> row[kLanes], next[kLanes];
  for (int i = 0; i < kLanes; ++i) row[i] = load_anywhere<T>(src + i * src_ld);
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kHalf; ++i) interleave<T>(row[i], row[i + kHalf], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < kLanes; ++i) row[i] = next[i];
  }
  for (int i = 0; i < kLanes; ++i) store_anywhere<T>(dst + i * dst_ld, row[i]);
}

// Calls block(o, i) for each whole kLanes x kLanes block of the panel's real outputs and inputs, element(o, i) for
// every other element of the panel, padding included; o counts from the panel's first column.
template <class T, class BlockFn, class ElementFn>
MTMLK_INLINE void each_block(int64_t outputs, int64_t width, int64_t inputs, BlockFn block, ElementFn element) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t whole_o = (outputs < width ? outputs : width) / kLanes * kLanes, whole_i = inputs / kLanes * kLanes;
  for (int64_t i = 0; i < whole_i; i += kLanes)
    for (int64_t o = 0; o < whole_o; o += kLanes) block(o, i);
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t o = i < whole_i ? whole_o : 0; o < width; ++o) element(o, i);
}

// from [O, I] -> to [I, width], the transpose, with zeros behind O where width is more
template <class T>
void transpose_into(const T* from, int64_t outputs, int64_t inputs, T* to, int64_t width) {
  each_block<T>(
      outputs, width, inputs,
      [&](int64_t o, int64_t i) { transpose_block<T>(from + o * inputs + i, inputs, to + i * width + o, width); },
      [&](int64_t o, int64_t i) { to[i * width + o] = o < outputs ? from[o * inputs + i] : T(0); });
}

// from [I, width] -> to [O, I], as many as there are
template <class T>
void transpose_out_of(const T* from, int64_t width, int64_t outputs, int64_t inputs, T* to) {
  each_block<T>(
      outputs, width, inputs,
      [&](int64_t o, int64_t i) { transpose_block<T>(from + i * width + o, width, to + o * inputs + i, inputs); },
      [&](int64_t o, int64_t i) {
        if (o < outputs) to[o * inputs + i] = from[i * width + o];
      });
}

// weight [O, I] -> packed [I, O]
template <class T>
void pack_weight(const T* weight, int64_t outputs, int64_t inputs, T* packed) {
  each_panel<T>(inputs, outputs, [&](int64_t start, int64_t col, int64_t width) {
    transpose_into<T>(weight + col * inputs, outputs - col, inputs, packed + start, width);
  });
}

// packed [I, O] -> weight [O, I]
template <class T>
void unpack_weight(const T* packed, int64_t outputs, int64_t inputs, T* weight) {
  each_panel<T>(inputs, outputs, [&](int64_t start, int64_t col, int64_t width) {
    transpose_out_of<T>(packed + start, width, outputs - col, inputs, weight + col * inputs);
  });
}

// packed [K, N] -> packed [N, K], where both are blocks of rows of taller packed matrices: rows src_row ... of one with
// src_rows rows, and likewise for dst.
template <class T>
void transpose_packed(const T* src, int64_t k, int64_t n, int64_t src_rows, int64_t dst_rows, int64_t src_row,
                      int64_t dst_row, T* dst) {
  constexpr int kLanes = Simd<T>::kLanes;
  T block[kLanes * kLanes] __attribute__((aligned(kVecBytes)));
  T zero_rows[kLanes * kLanes] __attribute__((aligned(kVecBytes)));
  each_panel<T>(dst_rows, k, [&](int64_t dst_panel, int64_t row0, int64_t dst_width) {
    const int64_t dst_start = dst_panel + dst_row * dst_width;
    each_panel<T>(src_rows, n, [&](int64_t src_panel, int64_t col0, int64_t src_width) {
      const int64_t src_start = src_panel + src_row * src_width;
      for (int64_t r = 0; r < dst_width; r += kLanes)
        for (int64_t c = 0; c < src_width; c += kLanes) {
          const int64_t rows = k - row0 - r < kLanes ? k - row0 - r : kLanes;
          const int64_t cols = n - col0 - c < kLanes ? n - col0 - c : kLanes;
          const T* from = src + src_start + (row0 + r) * src_width + c;
          int64_t from_ld = src_width;
          if (rows < kLanes) {  // rows beyond K do not exist: read zeros instead
            for (int64_t i = 0; i < kLanes; ++i)
              store<T>(zero_rows + i * kLanes, i < rows ? load<T>(from + i * src_width) : VecOf<T>{});
            from = zero_rows, from_ld = kLanes;
          }
          T* to = dst + dst_start + (col0 + c) * dst_width + r;
          if (cols == kLanes) {
            transpose_block<T>(from, from_ld, to, dst_width);
            continue;
          }
          transpose_block<T>(from, from_ld, block, kLanes);
          for (int64_t i = 0; i < cols; ++i) store<T>(to + i * dst_width, load<T>(block + i * kLanes));
        }
    });
  });
}

// [rows, cols] -> rows padded to vectors, and back
template <class T>
void pack_rows(const T* src, int64_t rows, int64_t cols, T* dst) {
  const int64_t ld = round_up(cols, Simd<T>::kLanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; ++c) dst[r * ld + c] = c < cols ? src[r * cols + c] : T(0);
}

template <class T>
void unpack_rows(const T* src, int64_t rows, int64_t cols, T* dst) {
  const int64_t ld = round_up(cols, Simd<T>::kLanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[r * cols + c] = src[r * ld + c];
}

// v[i][j] <- v[j][i]: perfect shuffles, log2(lanes) rounds.
template <class T>
MTMLK_INLINE void transpose_square(VecOf<T> (&v)[Simd<T>::kLanes]) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    VecOf<T> next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) interleave<T>(v[i], v[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

template <class T>
void fill_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) store<T>(p + i, VecOf<T>{});
}

}  // namespace
}  // namespace mtmlk
