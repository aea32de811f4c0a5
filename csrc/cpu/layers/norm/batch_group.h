// Batch, group and instance normalisation with the relu and the max-pooling after it.
//
//   forward            xhat = r (z - mean)                 y   = act(gamma xhat + beta), pooled
//   backward           dz   = r (gamma dy' - m1 - xhat m2)              dgamma  = s2     dbeta  = s1
//   tangent            yt   = act' (gamma xhatt + gamma' xhat + beta')
//   tangent backward   dzt  = r' / r dz + r (gamma dyt' + gamma' dy' - m1t - xhatt m2 - xhat m2t)
//                                                                       dgammat = s2t    dbetat = s1t
// Everything is linear in z - mean, zt, dy' and dyt' with coefficients of the feature alone, so that each pass reads
// its planes once. dy' is 0 but at the places that won their pooling windows; the winner is the first that equals the
// peak.
#pragma once

#include <stdint.h>

#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/conv/products.h"
#include "layers/norm/stats.h"
#include "layers/norm/sums.h"

namespace mtmlk {
namespace {

// One output of a stream: out = centre (z - mean) + tangent (zt - mean') + grad dy' + grad_t dyt' + shift, rows of ld.
// Those that a pass does not need are not read.
template <class T>
struct Affine {
  T *centre, *tangent, *grad, *grad_t, *shift;
};

template <class T>
Affine<T> affine_at(T* p, int64_t ld) {
  return {p, p + ld, p + 2 * ld, p + 3 * ld, p + 4 * ld};
}

// Windows of cells_y x cells_x pixels, side by side from the image's upper left corner.
struct PoolShape {
  int64_t width, out_height, out_width, cells_y, cells_x, height;
};

MTMLK_INLINE PoolShape pool_shape(const Plan& plan, const NormPlan& n) {
  const int64_t* w = plan.values[n.tail].window;
  return {w[kWidth], w[kOutHeight], w[kOutWidth], w[kKernelY], w[kKernelX], w[kHeight]};
}

template <class T>
MTMLK_INLINE VecOf<T> activated(VecOf<T> x, T slope) {
  return x <= T(0) ? times_slope<T>(slope, x) : x;
}

// body(column, rows): column by column, so that its coefficients stay in registers, of few enough rows that their lines
// stay in the first-level cache until the last column.
template <class T, class Body>
MTMLK_INLINE void each_column(Range rows, int64_t ld, Body body) {
  constexpr int64_t kRows = 16;
  for (int64_t first = rows.first; first < rows.end; first += kRows)
    for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) body(c, clipped(first, kRows, rows.end));
}

// y of one sample
template <class T>
void norm_sample_forward(const T* z, const Coefs<T>& s, int64_t rows, int64_t ld, T slope, T* y) {
  each_column<T>({0, rows}, ld, [&](int64_t c, Range some) {
    const VecOf<T> m = load<T>(s.mean + c), scale = load<T>(s.scale + c), shift = load<T>(s.shift + c);
    for (int64_t at = some.first * ld + c; at < some.end * ld; at += ld)
      store<T>(y + at, activated<T>(multiply_add<T>(scale, load<T>(z + at) - m, shift), slope));
  });
}

// The first z of the largest y of a window of `from`, whose rows are `row` apart.
template <class T>
MTMLK_INLINE VecOf<T> window_peak(const T* from, const PoolShape& p, int64_t row, int64_t ld, VecOf<T> sign) {
  VecOf<T> top = load<T>(from);
  for (int64_t cy = 0; cy < p.cells_y; ++cy)
    for (int64_t cx = cy == 0; cx < p.cells_x; ++cx) {
      const VecOf<T> x = load<T>(from + cy * row + cx * ld);
      top = sign * x > sign * top ? x : top;
    }
  return top;
}

// peak <- of each window the z of the largest y, which grows with z where gamma > 0, falls where gamma < 0, and is the
// same everywhere (the first counts) where gamma = 0; the windows of the image rows `rows`, z where they begin. A NaN
// need not win: its set has no other mean.
template <class T>
void pool_sample_peaks(const T* z, const T* gamma, const PoolShape& p, Range rows, int64_t ld, T* peak) {
  const int64_t end = rows.end / p.cells_y < p.out_height ? rows.end / p.cells_y : p.out_height;
  const int64_t row = p.width * ld;
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> one = splat<T>(T(1)), g = gamma ? load<T>(gamma + c) : one;
    const VecOf<T> sign = g > T(0) ? one : g < T(0) ? -one : VecOf<T>{};
    for (int64_t oy = rows.first / p.cells_y; oy < end; ++oy) {
      const T* from = z + (oy * p.cells_y - rows.first) * row + c;
      T* to = peak + oy * p.out_width * ld + c;
      for (int64_t ox = 0; ox < p.out_width; ++ox, from += p.cells_x * ld, to += ld)
        store<T>(to, window_peak<T>(from, p, row, ld, sign));
    }
  }
}

// yt of one sample: tangent, centre and shift of `k`
template <class T>
void norm_sample_tangent(const T* z, const T* zt, const Coefs<T>& s, const T* mean_t, const Affine<T>& k, int64_t rows,
                         int64_t ld, T slope, T* yt) {
  each_column<T>({0, rows}, ld, [&](int64_t c, Range some) {
    const VecOf<T> m = load<T>(s.mean + c), scale = load<T>(s.scale + c), offset = load<T>(s.shift + c);
    const VecOf<T> centre = load<T>(k.centre + c), shift = load<T>(k.shift + c);
    const VecOf<T> mt = load<T>(mean_t + c), tangent = load<T>(k.tangent + c);
    for (int64_t at = some.first * ld + c; at < some.end * ld; at += ld) {
      const VecOf<T> x = load<T>(z + at) - m;
      VecOf<T> value = multiply_add<T>(centre, x, shift);
      if (zt) value = multiply_add<T>(tangent, load<T>(zt + at) - mt, value);
      store<T>(yt + at, masked<T>(multiply_add<T>(scale, x, offset), value, slope));
    }
  });
}

// peak_t <- zt at the winners of the image rows `rows`; z, zt where they begin
template <class T>
void pool_sample_tangent(const T* z, const T* zt, const PoolShape& p, Range rows, int64_t ld, const T* peak,
                         T* peak_t) {
  using Mask = IntOf<T>;
  const int64_t end = rows.end / p.cells_y < p.out_height ? rows.end / p.cells_y : p.out_height;
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes)
    for (int64_t oy = rows.first / p.cells_y; oy < end; ++oy)
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        const int64_t from = ((oy * p.cells_y - rows.first) * p.width + ox * p.cells_x) * ld + c,
                      at = (oy * p.out_width + ox) * ld + c;
        const VecOf<T> top = load<T>(peak + at);
        VecOf<T> found = load<T>(zt + from);
        Mask open = ~(Mask)(load<T>(z + from) == top);
        for (int64_t cy = 0; cy < p.cells_y; ++cy)
          for (int64_t cx = cy == 0; cx < p.cells_x; ++cx) {
            const int64_t cell = from + (cy * p.width + cx) * ld;
            const Mask wins = (Mask)(load<T>(z + cell) == top) & open;
            found = wins ? load<T>(zt + cell) : found;
            open &= ~wins;
          }
        store<T>(peak_t + at, found);
      }
}

}  // namespace
}  // namespace mtmlk
