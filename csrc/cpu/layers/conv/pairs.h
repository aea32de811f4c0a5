// Convolutions with three taps a row, two pixels at a time: four products instead of six (Winograd 1980, F(2, 3) along
// the rows of the image).
//
// For the pixels 2j and 2j + 1 of a row, with d_i = a[2j - pad + i] (0 outside the image) and the taps g_0, g_1, g_2:
//   u = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)          h = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   m_i = sum over kernel rows and channels of u_i h_i
//   z[2j] = m0 + m1 + m2                              z[2j + 1] = m1 - m2 - m3
// and of the transposed map, which gives the weight's gradient:
//   e = (dz0, dz0 + dz1, dz0 - dz1, -dz1)             dh_i = sum u_i^T e_i
//   dg = (dh0 + (dh1 + dh2) / 2, (dh1 - dh2) / 2, (dh1 + dh2) / 2 + dh3)
// The gradient of the input is the same map with the taps in reverse order. Sums over channels are products.h's on
// planes of pairs, u_i and m_i and e_i each [rows, pairs, ld].
#pragma once

#include <stdint.h>

#include "simd/gemm.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/conv/products.h"

namespace mtmlk {
namespace {

constexpr int kPairPlanes = 4;

// Rows of an image as pairs: `width` pixels, the first pair's first source `pad` pixels to the left.
struct PairRow {
  int64_t width, pairs, pad;
};

// u of image rows [rows.first, rows.end) of `a` (one sample), into planes `plane` elements apart.
template <class T>
void pair_inputs(const T* a, const PairRow& p, int64_t row, int64_t ld, Range rows, int64_t plane, T* u) {
  for (int64_t y = rows.first; y < rows.end; ++y)
    for (int64_t j = 0; j < p.pairs; ++j) {
      const int64_t x = 2 * j - p.pad;
      const auto pixel = [&](int64_t i, int64_t c) {
        return x + i >= 0 && x + i < p.width ? load<T>(a + y * row + (x + i) * ld + c) : VecOf<T>{};
      };
      T* to = u + ((y - rows.first) * p.pairs + j) * ld;
      for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
        const VecOf<T> d0 = pixel(0, c), d1 = pixel(1, c), d2 = pixel(2, c), d3 = pixel(3, c);
        store<T>(to + c, d0 - d2), store<T>(to + plane + c, d1 + d2);
        store<T>(to + 2 * plane + c, d2 - d1), store<T>(to + 3 * plane + c, d1 - d3);
      }
    }
}

// e of image rows, likewise.
template <class T>
void pair_gradients(const T* dz, const PairRow& p, int64_t row, int64_t ld, Range rows, int64_t plane, T* e) {
  for (int64_t y = rows.first; y < rows.end; ++y)
    for (int64_t j = 0; j < p.pairs; ++j) {
      const T* from = dz + y * row + 2 * j * ld;
      T* to = e + ((y - rows.first) * p.pairs + j) * ld;
      const bool second = 2 * j + 1 < p.width;
      for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
        const VecOf<T> z0 = load<T>(from + c), z1 = second ? load<T>(from + ld + c) : VecOf<T>{};
        store<T>(to + c, z0), store<T>(to + plane + c, z0 + z1);
        store<T>(to + 2 * plane + c, z0 - z1), store<T>(to + 3 * plane + c, -z1);
      }
    }
}

// z of image rows from m: z = start + ..., where start is z itself (`add`), a row of bias, or 0.
template <class T>
void unpair_outputs(const T* m, const PairRow& p, int64_t ld, int64_t rows, int64_t plane, const T* bias, bool add,
                    int64_t row, T* z) {
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t j = 0; j < p.pairs; ++j) {
      const T* from = m + (y * p.pairs + j) * ld;
      T* to = z + y * row + 2 * j * ld;
      const bool second = 2 * j + 1 < p.width;
      for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
        const VecOf<T> m1 = load<T>(from + plane + c), m2 = load<T>(from + 2 * plane + c);
        const VecOf<T> start = bias ? load<T>(bias + c) : VecOf<T>{};
        const VecOf<T> z0 = load<T>(from + c) + (m1 + m2), z1 = (m1 - m2) - load<T>(from + 3 * plane + c);
        store<T>(to + c, (add ? load<T>(to + c) : start) + z0);
        if (second) store<T>(to + ld + c, (add ? load<T>(to + ld + c) : start) + z1);
      }
    }
}

// body(first column, width) for the panels of a packed matrix of n columns; the rows of a panel follow each other.
template <class T, class Body>
MTMLK_INLINE void each_packed_panel(int64_t n, Body body) {
  constexpr int64_t kPanel = kPanelVecs * Simd<T>::kLanes;
  for (int64_t start = 0; start < n; start += kPanel) body(start, n - start < kPanel ? n - start : kPanel);
}

// h of a packed weight [kernel_y * 3 * channels, n]: four packed matrices [kernel_y * channels, n].
template <class T>
void pair_weights(const T* w, int64_t kernel_y, int64_t channels, int64_t n, bool reverse, T* h) {
  const int64_t rows = kernel_y * channels, size = rows * n, first = reverse ? 2 : 0, last = reverse ? 0 : 2;
  each_packed_panel<T>(n, [&](int64_t start, int64_t width) {
    for (int64_t ky = 0; ky < kernel_y; ++ky) {
      const T* from = w + start * 3 * rows + ky * 3 * channels * width;
      T* to = h + start * rows + ky * channels * width;
      for (int64_t i = 0; i < channels * width; i += Simd<T>::kLanes) {
        const VecOf<T> g0 = load<T>(from + first * channels * width + i), g1 = load<T>(from + channels * width + i);
        const VecOf<T> g2 = load<T>(from + last * channels * width + i), outer = g0 + g2;
        store<T>(to + i, g0), store<T>(to + size + i, T(0.5) * (outer + g1));
        store<T>(to + 2 * size + i, T(0.5) * (outer - g1)), store<T>(to + 3 * size + i, g2);
      }
    }
  });
}

// dw += what dh gives
template <class T>
void unpair_weight_gradient(const T* dh, int64_t kernel_y, int64_t channels, int64_t n, T* dw) {
  const int64_t rows = kernel_y * channels, size = rows * n;
  each_packed_panel<T>(n, [&](int64_t start, int64_t width) {
    for (int64_t ky = 0; ky < kernel_y; ++ky) {
      const T* from = dh + start * rows + ky * channels * width;
      T* to = dw + start * 3 * rows + ky * 3 * channels * width;
      for (int64_t i = 0; i < channels * width; i += Simd<T>::kLanes) {
        const VecOf<T> h1 = load<T>(from + size + i), h2 = load<T>(from + 2 * size + i), half = T(0.5) * (h1 + h2);
        const VecOf<T> g0 = load<T>(from + i) + half, g2 = half + load<T>(from + 3 * size + i);
        T *to0 = to + i, *to1 = to0 + channels * width, *to2 = to1 + channels * width;
        store<T>(to0, load<T>(to0) + g0), store<T>(to1, load<T>(to1) + T(0.5) * (h1 - h2));
        store<T>(to2, load<T>(to2) + g2);
      }
    }
  });
}

// Rows of the source that rows [r.first, r.end) of the destination read.
MTMLK_INLINE Range source_rows(const PairPlan& p, Range r) {
  const auto up = [](int64_t x, int64_t by) { return x >= 0 ? (x + by - 1) / by : -(-x / by); };
  int64_t first = p.forward ? r.first * p.stride - p.pad_y : up(r.first + p.pad_y - p.reach, p.stride);
  int64_t end = p.forward ? (r.end - 1) * p.stride - p.pad_y + p.reach + 1 : (r.end - 1 + p.pad_y) / p.stride + 1;
  if (first < 0) first = 0;
  if (end > p.source_height) end = p.source_height;
  return {first, end > first ? end : first};
}

// As `gather`; h1 and h2 are the transformed weights of g.p1 and g.p2. `own`: a worker's planes of pairs.
template <class T>
void gather_pairs(const PairPlan& p, const Gather<T>& g, const T* h1, const T* h2, Range samples, Range rows, T* own) {
  const int64_t n = samples.end - samples.first, source_ld = g.from.pixel, size = p.weight_rows * g.n;
  for (int64_t first = rows.first; first < rows.end; first += p.band_rows) {
    const Range band = clipped(first, p.band_rows, rows.end), from = source_rows(p, band);
    const int64_t sample_u = (from.end - from.first) * p.pairs * source_ld, plane_u = n * sample_u;
    const T *sources[2] = {g.p1.a, g.p2.a}, *weights[2] = {h1, h2};
    T* u[2] = {own, own + kPairPlanes * plane_u};
    for (int s = 0; s < 2; ++s)
      for (int64_t i = 0; sources[s] && i < n; ++i)
        pair_inputs<T>(sources[s] + (samples.first + i) * g.from.sample, {p.source_width, p.pairs, p.pad_x}, g.from.row,
                       source_ld, from, plane_u, u[s] + i * sample_u);
    T* m = own + (sources[1] ? 2 : 1) * kPairPlanes * plane_u;
    for (int64_t at = band.first; at < band.end; at += p.step_rows) {
      const Range step = clipped(at, p.step_rows, band.end);
      const int64_t height = step.end - step.first, row_m = p.pairs * g.n, sample_m = height * row_m,
                    plane_m = n * sample_m;
      for (int i = 0; i < kPairPlanes; ++i) {
        Gather<T> part = {};
        part.c = m + i * plane_m - step.first * row_m, part.to = {sample_m, row_m, g.n};
        part.from = {sample_u, p.pairs * source_ld, source_ld}, part.weight_rows = p.weight_rows, part.n = g.n;
        TapProduct<T>* to[2] = {&part.p1, &part.p2};
        for (int s = 0; s < 2; ++s)
          if (sources[s]) *to[s] = {u[s] + i * plane_u - from.first * p.pairs * source_ld, weights[s] + i * size};
        gather<T>(p.taps, part, {0, n}, step);
      }
      for (int64_t i = 0; i < n; ++i)
        unpair_outputs<T>(m + i * sample_m, {p.width, p.pairs, 0}, g.n, height, plane_m, g.bias, g.add, g.to.row,
                          g.c + (samples.first + i) * g.to.sample + step.first * g.to.row);
    }
  }
}

// As `conv_grad`, into the transformed gradient `dh`.
template <class T>
void grad_pairs(const PairPlan& p, const ConvGrad<T>& g, Range samples, Range rows, T* dh, T* own) {
  const int64_t n = samples.end - samples.first, source_ld = g.a.pixel, row_u = p.pairs * source_ld,
                row_e = p.pairs * g.n;
  const Range from = source_rows(p, rows);
  const int64_t sample_u = (from.end - from.first) * row_u, sample_e = (rows.end - rows.first) * row_e;
  T *u = own, *e = own + kPairPlanes * n * sample_u;
  const GradProduct<T>* products[2] = {&g.p1, &g.p2};
  for (const GradProduct<T>* product : products) {
    if (!product->a) continue;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = samples.first + i;
      pair_inputs<T>(product->a + at * g.a.sample, {p.source_width, p.pairs, p.pad_x}, g.a.row, source_ld, from,
                     n * sample_u, u + i * sample_u);
      pair_gradients<T>(product->b + at * g.b.sample, {p.width, p.pairs, 0}, g.b.row, g.n, rows, n * sample_e,
                        e + i * sample_e);
    }
    for (int64_t i = 0; i < kPairPlanes; ++i) {
      ConvGrad<T> part = {};
      part.c = dh + i * p.weight_rows * g.n, part.weight_rows = p.weight_rows, part.n = g.n;
      part.a = {sample_u, row_u, source_ld}, part.b = {sample_e, row_e, g.n};
      part.p1 = {u + i * n * sample_u - from.first * row_u, e + i * n * sample_e - rows.first * row_e};
      conv_grad<T>(p.taps, part, {0, n}, rows);
    }
  }
}

}  // namespace
}  // namespace mtmlk
