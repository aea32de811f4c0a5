// Softmax losses with one row in every lane: pixels, and rows of few classes.
// The formulas are in math.h.
//
// A tile is z [C, ld] in a scratch of its own, a column a row of the head. Pixels are copied there because a stride of
// 64 KB between the classes puts them all into one set of the caches; rows of few classes are transposed.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "multihead_loss/call.h"
#include "multihead_loss/math.h"

namespace mtmlk {
namespace {

constexpr int kTileVecs = 4;    // columns worked on together, in vectors
constexpr int kPixelVecs = 16;  // columns copied together
constexpr int64_t kTileElements = 1 << 15;
constexpr int kShortVecs = 4;  // rows of up to so many vectors of classes are transposed

template <class T>
constexpr int64_t kTileCols = kPixelVecs * Simd<T>::kLanes;

// Of the columns of a tile: the weight, c_y, and the class, which is -1 where there is none.
template <class T>
struct alignas(kVecBytes) Columns {
  T weight[kTileCols<T>];
  T scale[kTileCols<T>];  // weight / norm; +0 where a column counts for nothing, and only there
  T own[kTileCols<T>];
  typename Simd<T>::Lane label[kTileCols<T>];
};

// z <- the gradient; returns the sum of weight * loss.
template <class T, int V, bool kIds>
double softmax_columns(const Softmax<T>& s, T* z, const T* t, int64_t ld, const Columns<T>& cols, int64_t at) {
  constexpr int kLanes = Simd<T>::kLanes;
  using Lane = typename Simd<T>::Lane;
  const bool dense = kIds && s.smooth != T(0);
  VecOf<T> top[V], picked[V], sum[V], cross[V], a[V], extra[V];
  IntOf<T> label[V];
  // Unrolled, or the compiler clears the arrays by string instructions, which take longer to start than to run.
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    top[v] = load<T>(z + v * kLanes);
    picked[v] = sum[v] = cross[v] = a[v] = extra[v] = VecOf<T>{};
    if constexpr (kIds) label[v] = *reinterpret_cast<const IntOf<T>*>(cols.label + at + v * kLanes);
  }
  for (int64_t k = 0; k < s.classes; ++k)
    for (int v = 0; v < V; ++v) {
      const VecOf<T> x = load<T>(z + k * ld + v * kLanes);
      top[v] = larger<T>(x, top[v]);
      if constexpr (kIds) picked[v] = label[v] == Lane(k) ? x : picked[v];
    }
  for (int64_t k = 0; k < s.classes; ++k) {
    const T c = s.c ? s.c[k] : T(1);
    for (int v = 0; v < V; ++v) {
      const VecOf<T> d = load<T>(z + k * ld + v * kLanes) - top[v], e = exponential_below<T>(d);
      store<T>(z + k * ld + v * kLanes, e);
      sum[v] += e;
      if constexpr (kIds) {
        if (dense) cross[v] = multiply_add<T>(splat<T>(c * s.smooth), d, cross[v]);
      } else {
        const VecOf<T> given = load<T>(t + k * ld + v * kLanes), b = c * (s.hit * given + s.smooth);
        a[v] += b;
        cross[v] = multiply_add<T>(b, d, cross[v]);
        if (s.kl) extra[v] += times_log<T>(given);
      }
    }
  }
  VecOf<T> total = {}, hit[V], scale[V], by[V];
  for (int v = 0; v < V; ++v) {
    const VecOf<T> w = load<T>(cols.weight + at + v * kLanes), log_sum = logarithm_or_nan<T>(sum[v]);
    hit[v] = s.hit * load<T>(cols.own + at + v * kLanes);
    if constexpr (kIds) a[v] = hit[v] + s.spread, cross[v] += hit[v] * (picked[v] - top[v]);
    total += w == T(0) ? VecOf<T>{} : w * (a[v] * log_sum - cross[v] + extra[v]);
    scale[v] = load<T>(cols.scale + at + v * kLanes);
    by[v] = scale[v] * a[v] / sum[v];
    hit[v] = scale[v] * hit[v];
  }
  if (s.classes == 1) {  // p = 1, and what is left of p A - B would be rounding
    for (int v = 0; v < V; ++v) {
      const VecOf<T> none = scale[v] * (T(0) * load<T>(z + v * kLanes));  // NaN where the logit is
      store<T>(z + v * kLanes, is_plus_zero<T>(scale[v]) ? VecOf<T>{} : none);
    }
    return double(sum_lanes<T>(total));
  }
  for (int64_t k = 0; k < s.classes; ++k) {
    const T c = s.c ? s.c[k] : T(1);
    for (int v = 0; v < V; ++v) {
      VecOf<T> g = by[v] * load<T>(z + k * ld + v * kLanes);
      if constexpr (kIds) {
        g -= label[v] == Lane(k) ? hit[v] : VecOf<T>{};
        if (dense) g -= scale[v] * (c * s.smooth);
      } else {
        g -= scale[v] * (c * (s.hit * load<T>(t + k * ld + v * kLanes) + s.smooth));
      }
      store<T>(z + k * ld + v * kLanes, is_plus_zero<T>(scale[v]) ? VecOf<T>{} : g);
    }
  }
  return double(sum_lanes<T>(total));
}

template <class T, bool kIds>
double softmax_tile(const Softmax<T>& s, T* z, T* t, int64_t ld, const Columns<T>& cols) {
  constexpr int64_t kStep = kTileVecs * Simd<T>::kLanes;
  double total = 0;
  int64_t at = 0;
  for (; at + kStep <= ld; at += kStep) total += softmax_columns<T, kTileVecs, kIds>(s, z + at, t + at, ld, cols, at);
  for (; at + kStep / 2 <= ld; at += kStep / 2)
    total += softmax_columns<T, kTileVecs / 2, kIds>(s, z + at, t + at, ld, cols, at);
  for (; at < ld; at += Simd<T>::kLanes) total += softmax_columns<T, 1, kIds>(s, z + at, t + at, ld, cols, at);
  return total;
}

// What is known of rows [row, row + n), in columns [0, ld); those behind n weigh nothing.
template <class T>
void fill_columns(const MtmlkHead& h, int64_t row, int64_t n, int64_t ld, T inverse, Columns<T>& cols) {
  const int64_t* y = static_cast<const int64_t*>(h.target) + row;
  const T* c = static_cast<const T*>(h.class_weights);
  for (int64_t i = 0; i < n; ++i) cols.weight[i] = T(1), cols.own[i] = T(1), cols.label[i] = -1;
  for (int64_t i = n; i < ld; ++i) cols.weight[i] = cols.own[i] = T(0), cols.label[i] = -1;
  if (h.sample_weights)
    for (int64_t i = 0; i < n; ++i) cols.weight[i] = weight_of<T>(h, row + i);
  if (h.ids) {
    for (int64_t i = 0; i < n; ++i) {
      const bool counted = y[i] != h.ignore_index;
      cols.weight[i] = counted ? cols.weight[i] : T(0);
      cols.label[i] = typename Simd<T>::Lane(counted ? y[i] : -1);
    }
    if (c)
      for (int64_t i = 0; i < n; ++i) cols.own[i] = cols.label[i] < 0 ? T(0) : c[cols.label[i]];
  }
  const bool nothing = counts_nothing(inverse);
  for (int64_t i = 0; i < ld; i += Simd<T>::kLanes) {
    const VecOf<T> w = load<T>(cols.weight + i), scale = inverse * w;
    const VecOf<T> signed_zero = scale == T(0) ? splat<T>(-T(0)) : scale;
    store<T>(cols.scale + i, nothing ? VecOf<T>{} : w == T(0) ? VecOf<T>{} : signed_zero);
  }
}

template <class T>
double softmax_scratch(const MtmlkHead& h, const Softmax<T>& s, T* z, T* t, int64_t ld, const Columns<T>& cols) {
  return h.ids ? softmax_tile<T, true>(s, z, t, ld, cols) : softmax_tile<T, false>(s, z, t, ld, cols);
}

// --- pixels ---

template <class T>
void copy_planes(const T* from, int64_t step, int64_t classes, int64_t n, T* to, int64_t ld) {
  for (int64_t k = 0; k < classes; ++k)
    for (int64_t i = 0; i < n; i += Simd<T>::kLanes)
      store<T>(to + k * ld + i, load_some<T>(from + k * step + i, n - i));
}

template <class T>
void put_planes(const T* from, int64_t ld, int64_t classes, int64_t n, T* to, int64_t step, bool past) {
  for (int64_t k = 0; k < classes; ++k) {
    T* row = to + k * step;
    if (past && n == ld && is_aligned(row))
      for (int64_t i = 0; i < n; i += Simd<T>::kLanes) stream<T>(row + i, load<T>(from + k * ld + i));
    else
      for (int64_t i = 0; i < n; i += Simd<T>::kLanes) store_some<T>(row + i, load<T>(from + k * ld + i), n - i);
  }
}

// Rows [row0, row1) of [outer, C, inner]; z and t are scratch [C, kTileCols].
template <class T>
double softmax_pixels(const MtmlkHead& h, int64_t row0, int64_t row1, T inverse, bool past, T* z, T* t) {
  const Softmax<T> s = softmax_of<T>(h);
  Columns<T> cols;
  int64_t most = kTileCols<T>;  // a tile of many classes is narrower, so that it stays in the second-level cache
  while (most > kTileVecs * Simd<T>::kLanes && most * h.classes > kTileElements) most /= 2;
  double total = 0;
  for (int64_t row = row0; row < row1;) {
    const int64_t pixel = row % h.inner, start = (row - pixel) * h.classes + pixel;
    int64_t n = row1 - row < most ? row1 - row : most;
    if (n > h.inner - pixel) n = h.inner - pixel;
    const int64_t ld = round_up(n, Simd<T>::kLanes);
    copy_planes<T>(static_cast<const T*>(h.logits) + start, h.inner, h.classes, n, z, ld);
    if (!h.ids) copy_planes<T>(static_cast<const T*>(h.target) + start, h.inner, h.classes, n, t, ld);
    fill_columns<T>(h, row, n, ld, inverse, cols);
    total += softmax_scratch<T>(h, s, z, t, ld, cols);
    if (h.gradient) put_planes<T>(z, ld, h.classes, n, static_cast<T*>(h.gradient) + start, h.inner, past);
    row += n;
  }
  return total;
}

// --- rows of few classes ---

// The class from which rows of 8 k + 2 classes, say, are moved one number at a time: a square for two is mostly empty.
template <class T>
int64_t squares_end(int64_t classes) {
  const int64_t rest = classes % Simd<T>::kLanes;
  return rest <= Simd<T>::kLanes / 4 ? classes - rest : classes;
}

// to [classes (whole vectors of them), cols] <- from [n, classes]; columns behind n are zero
template <class T>
void transpose_in(const T* from, int64_t step, int64_t classes, int64_t n, T* to, int64_t ld) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t end = squares_end<T>(classes);
  for (int64_t k = end; k < classes; ++k)
    for (int64_t row = 0; row < ld; ++row) to[k * ld + row] = row < n ? from[row * step + k] : T(0);
  for (int64_t row = 0; row < ld; row += kLanes)
    for (int64_t k = 0; k < end; k += kLanes) {
      VecOf<T> v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        v[i] = row + i < n ? load_some<T>(from + (row + i) * step + k, classes - k) : VecOf<T>{};
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store<T>(to + (k + i) * ld + row, v[i]);
    }
}

template <class T>
void transpose_out(const T* from, int64_t ld, int64_t classes, int64_t n, T* to, int64_t step) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t end = squares_end<T>(classes);
  for (int64_t k = end; k < classes; ++k)
    for (int64_t row = 0; row < n; ++row) to[row * step + k] = from[k * ld + row];
  for (int64_t row = 0; row < ld; row += kLanes)
    for (int64_t k = 0; k < end; k += kLanes) {
      VecOf<T> v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load<T>(from + (k + i) * ld + row);
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (row + i < n) store_some<T>(to + (row + i) * step + k, v[i], classes - k);
    }
}

template <class T>
double softmax_short(const MtmlkHead& h, int64_t row0, int64_t row1, T inverse, T* z, T* t) {
  const Softmax<T> s = softmax_of<T>(h);
  Columns<T> cols;
  double total = 0;
  constexpr int64_t kStep = kTileVecs * Simd<T>::kLanes;
  for (int64_t row = row0; row < row1; row += kStep) {
    const int64_t n = row1 - row < kStep ? row1 - row : kStep;
    const int64_t ld = round_up(n, Simd<T>::kLanes);
    transpose_in<T>(static_cast<const T*>(h.logits) + row * h.ld, h.ld, h.classes, n, z, ld);
    if (!h.ids) transpose_in<T>(static_cast<const T*>(h.target) + row * h.classes, h.classes, h.classes, n, t, ld);
    fill_columns<T>(h, row, n, ld, inverse, cols);
    total += softmax_scratch<T>(h, s, z, t, ld, cols);
    if (h.gradient) transpose_out<T>(z, ld, h.classes, n, static_cast<T*>(h.gradient) + row * h.ld, h.ld);
  }
  return total;
}

}  // namespace
}  // namespace mtmlk
