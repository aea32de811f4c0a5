// The gradient streams of normalisations.
//
//   dz (or dzt) = centre (z - mean) + tangent (zt - mean') + shift + act' (grad dy + grad_t dyt)
// where the last term is at the winners only, with max-pooling.
#pragma once

#include <stdint.h>

#include "simd/simd.h"
#include "layers/conv/products.h"
#include "layers/norm/batch_group.h"
#include "layers/norm/stats.h"
#include "layers/norm/sums.h"

namespace mtmlk {
namespace {

// One sample; the planes start where it does.
template <class T>
struct GradStream {
  const T *z, *zt;    // zt nullptr: no tangent
  const T *dy, *dyt;  // at the tail's places; one of them may be nullptr
  const T* peak;
  Coefs<T> s;
  const T* mean_t;
  Affine<T> k;
  T slope;
  bool add;
  T* out;
};

// Which terms there are, known where the loops are compiled: they run at two vectors a nanosecond.
template <bool kZt_, bool kDy_, bool kDyt_, bool kAdd_>
struct Terms {
  static constexpr bool kZt = kZt_, kDy = kDy_, kDyt = kDyt_, kAdd = kAdd_;
};

template <class T, class Body>
MTMLK_INLINE void with_terms(const GradStream<T>& s, Body body) {
  const auto with_add = [&](auto yes) {
    constexpr bool kAdd = decltype(yes)::kAdd;
    if (s.zt) return body(Terms<true, true, true, kAdd>());
    if (s.dy && s.dyt) return body(Terms<false, true, true, kAdd>());
    if (s.dyt) return body(Terms<false, false, true, kAdd>());
    body(Terms<false, true, false, kAdd>());
  };
  if (s.add)
    with_add(Terms<false, false, false, true>());
  else
    with_add(Terms<false, false, false, false>());
}

// A stream's vector of features `c`, with its coefficients in registers.
template <class T, class Has>
struct StreamColumn {
  const T *z, *zt, *dy, *dyt;
  T *out, slope;
  VecOf<T> mean, scale, offset, mean_t, centre, tangent, shift, grad, grad_t;

  MTMLK_INLINE StreamColumn(const GradStream<T>& s, int64_t c) {
    z = s.z + c, out = s.out + c, slope = s.slope;
    mean = load<T>(s.s.mean + c), scale = load<T>(s.s.scale + c), offset = load<T>(s.s.shift + c);
    centre = load<T>(s.k.centre + c), shift = load<T>(s.k.shift + c);
    if constexpr (Has::kZt) zt = s.zt + c, mean_t = load<T>(s.mean_t + c), tangent = load<T>(s.k.tangent + c);
    if constexpr (Has::kDy) dy = s.dy + c, grad = load<T>(s.k.grad + c);
    if constexpr (Has::kDyt) dyt = s.dyt + c, grad_t = load<T>(s.k.grad_t + c);
  }

  // What comes from the statistics, at a place of z.
  MTMLK_INLINE VecOf<T> base(int64_t at, VecOf<T> x) const {
    VecOf<T> value = multiply_add<T>(centre, x - mean, shift);
    if constexpr (Has::kZt) value = multiply_add<T>(tangent, load<T>(zt + at) - mean_t, value);
    if constexpr (Has::kAdd) value += load<T>(out + at);
    return value;
  }

  // What comes from a place of y, made of z = x.
  MTMLK_INLINE VecOf<T> tail(int64_t at, VecOf<T> x) const {
    VecOf<T> g = {};
    if constexpr (Has::kDy) g = grad * load<T>(dy + at);
    if constexpr (Has::kDyt) g = multiply_add<T>(grad_t, load<T>(dyt + at), g);
    return masked<T>(multiply_add<T>(scale, x - mean, offset), g, slope);
  }
};

// Pixels [rows.first, rows.end).
template <class T>
void norm_sample_backward(const GradStream<T>& s, Range rows, int64_t ld) {
  with_terms<T>(s, [&](auto has) {
    each_column<T>(rows, ld, [&](int64_t c, Range some) {
      const StreamColumn<T, decltype(has)> col(s, c);
      for (int64_t at = some.first * ld; at < some.end * ld; at += ld) {
        const VecOf<T> x = load<T>(col.z + at);
        store<T>(col.out + at, col.base(at, x) + col.tail(at, x));
      }
    });
  });
}

template <class T, class Has>
MTMLK_INLINE void window_backward(const StreamColumn<T, Has>& col, int64_t corner, int64_t output, VecOf<T> top,
                                  const PoolShape& p, int64_t ld) {
  using Mask = IntOf<T>;
  const Mask grad = (Mask)col.tail(output, top);
  Mask open = ~Mask{};
  for (int64_t cy = 0; cy < p.cells_y; ++cy)
    for (int64_t cx = 0; cx < p.cells_x; ++cx) {
      const int64_t cell = corner + (cy * p.width + cx) * ld;
      const VecOf<T> x = load<T>(col.z + cell);
      const Mask wins = (Mask)(x == top) & open;
      open &= ~wins;
      store<T>(col.out + cell, col.base(cell, x) + (VecOf<T>)(grad & wins));
    }
}

// Image rows [rows.first, rows.end), which begin and, but for the last, end with a window. Pixels that pooling leaves
// out still count in the statistics.
template <class T>
void pool_sample_backward(const GradStream<T>& s, const PoolShape& p, Range rows, int64_t ld) {
  with_terms<T>(s, [&](auto has) {
    for (int64_t y = rows.first; y < rows.end; ++y) {
      const bool used = y < p.out_height * p.cells_y;
      const bool windows = used && y % p.cells_y == 0;
      for (int64_t ox = 0; windows && ox < p.out_width; ++ox) {
        const int64_t output = (y / p.cells_y * p.out_width + ox) * ld;
        for (int64_t c = 0; c < ld; c += Simd<T>::kLanes)
          window_backward<T>(StreamColumn<T, decltype(has)>(s, c), (y * p.width + ox * p.cells_x) * ld, output,
                             load<T>(s.peak + output + c), p, ld);
      }
      for (int64_t x = used ? p.out_width * p.cells_x : 0; x < p.width; ++x)
        for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
          const StreamColumn<T, decltype(has)> col(s, c);
          const int64_t at = (y * p.width + x) * ld;
          store<T>(col.out + at, col.base(at, load<T>(col.z + at)));
        }
    }
  });
}

}  // namespace
}  // namespace mtmlk
