// Softmax losses of rows of many classes, one at a time; the formulas are in math.h.
//
// Three passes over a row that stays in the second-level cache: its largest logit; the exponentials and their sum; the
// gradient, which is stored past the caches where it is too large to be found there again.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "simd/simd.h"
#include "multihead_loss/call.h"
#include "multihead_loss/math.h"

namespace mtmlk {
namespace {

// f(at, n, whole vector?) over [0, size).
template <class T, class F>
MTMLK_INLINE void each_vector(int64_t size, F f) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) f(at, int64_t(kLanes));
  if (at < size) f(at, size - at);
}

// The largest lane by halves; a lane after the other takes 16 dependent steps, as long as the rest of a row of 70.
template <class T>
MTMLK_INLINE T top_lane(VecOf<T> v) {
  T tmp[Simd<T>::kLanes] __attribute__((aligned(kVecBytes)));
  store<T>(tmp, v);
  for (int width = Simd<T>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) tmp[i] = tmp[i + width] > tmp[i] ? tmp[i + width] : tmp[i];
  return tmp[0];
}

template <class T>
T row_top(const T* z, int64_t classes) {
  constexpr int kLanes = Simd<T>::kLanes, kStep = 4 * kLanes;
  VecOf<T> top[4];
  for (int v = 0; v < 4; ++v) top[v] = splat<T>(z[0]);
  int64_t at = 0;
  for (; at + kStep <= classes; at += kStep)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) top[v] = larger<T>(load_anywhere<T>(z + at + v * kLanes), top[v]);
  for (; at + kLanes <= classes; at += kLanes) top[0] = larger<T>(load_anywhere<T>(z + at), top[0]);
  VecOf<T> all = larger<T>(larger<T>(top[0], top[1]), larger<T>(top[2], top[3]));
  if (at < classes) {
    const VecOf<T> rest = load_first<T>(z + at, classes - at);
    all = larger<T>(iota<T>() < T(classes - at) ? rest : all, all);
  }
  return top_lane<T>(all);
}

// Sums of one row: of exponentials, of B, of B (z - top), of t log t.
template <class T>
struct RowSums {
  double sum, a, cross, extra;
};

// B of a vector of classes, without what belongs to the label alone
template <class T, bool kIds>
MTMLK_INLINE VecOf<T> spread_target(const Softmax<T>& s, const T* t, int64_t at, int64_t n) {
  const VecOf<T> c = s.c ? load_some<T>(s.c + at, n) : splat<T>(T(1));
  if constexpr (kIds) return c * s.smooth;
  return c * (s.hit * load_some<T>(t + at, n) + s.smooth);
}

// e <- exp(z - top). The sums are gathered in double every kPart vectors: long chains of additions lose digits.
template <class T, bool kIds>
RowSums<T> row_exponentials(const Softmax<T>& s, const T* z, const T* t, T top, T* e) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int64_t kPart = 64 * kLanes;
  const bool dense = !kIds || s.smooth != T(0);
  RowSums<T> r = {};
  for (int64_t part = 0; part < s.classes; part += kPart) {
    const int64_t end = part + kPart < s.classes ? part + kPart : s.classes;
    VecOf<T> sum[4] = {}, a = {}, cross = {}, extra = {};
    int64_t at = part;
    if (!dense)
      for (; at + 4 * kLanes <= end; at += 4 * kLanes)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const VecOf<T> x = exponential_below<T>(load_anywhere<T>(z + at + v * kLanes) - top);
          sum[v] += x;
          store_anywhere<T>(e + at + v * kLanes, x);
        }
    const T *const z0 = z + at, *const t0 = t;
    const int64_t first = at;
    each_vector<T>(end - first, [&](int64_t i, int64_t n) {
      const VecOf<T> d = load_some<T>(z0 + i, n) - top, x = exponential_below<T>(d);
      sum[0] += keep_lanes<T>(x, n);
      store_some<T>(e + first + i, x, n);
      if (!dense) return;
      const VecOf<T> b = keep_lanes<T>(spread_target<T, kIds>(s, t0, first + i, n), n);
      a += b;
      cross += keep_lanes<T>(b * d, n);
      if (!kIds && s.kl) extra += times_log<T>(load_some<T>(t0 + first + i, n));
    });
    r.sum += double(sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])));
    if (!dense) continue;
    r.a += double(sum_lanes<T>(a)), r.cross += double(sum_lanes<T>(cross)), r.extra += double(sum_lanes<T>(extra));
  }
  return r;
}

// g = by e - scale B
template <class T, bool kIds>
void row_gradient(const Softmax<T>& s, const T* e, const T* t, T by, T scale, T* g, bool past) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (kIds && s.smooth == T(0)) {
    int64_t at = 0;
    if (past && is_aligned(g))
      for (; at + kLanes <= s.classes; at += kLanes) stream<T>(g + at, by * load_anywhere<T>(e + at));
    each_vector<T>(s.classes - at,
                   [&](int64_t i, int64_t n) { store_some<T>(g + at + i, by * load_some<T>(e + at + i, n), n); });
    return;
  }
  each_vector<T>(s.classes, [&](int64_t i, int64_t n) {
    store_some<T>(g + i, by * load_some<T>(e + i, n) - scale * spread_target<T, kIds>(s, t, i, n), n);
  });
}

// One row; returns weight * loss. `e` is scratch [C], or g itself.
template <class T, bool kIds>
double softmax_row_loss(const Softmax<T>& s, const T* z, const T* t, int64_t label, T weight, T inverse, T* e, T* g,
                        bool past) {
  const T top = row_top<T>(z, s.classes);
  const T own = kIds ? s.hit * (s.c ? s.c[label] : T(1)) : T(0), picked = kIds ? z[label] : T(0);  // before g == z goes
  RowSums<T> r = row_exponentials<T, kIds>(s, z, t, top, e);
  if constexpr (kIds) r.a = double(own) + double(s.spread), r.cross += double(own) * (double(picked) - double(top));
  const double loss = r.a * __builtin_log(r.sum) - r.cross + r.extra;
  if (g) {
    const T scale = weight * inverse;
    row_gradient<T, kIds>(s, e, t, T(double(scale) * r.a / r.sum), scale, g, past);
    if constexpr (kIds) g[label] -= scale * own;
  }
  return double(weight) * loss;
}

template <class T>
void clear_row(T* g, int64_t n) {
  for (int64_t i = 0; g && i < n; ++i) g[i] = T(0);
}

template <class T>
double softmax_long(const MtmlkHead& h, int64_t row0, int64_t row1, T inverse, bool past, T* scratch) {
  const Softmax<T> s = softmax_of<T>(h);
  double total = 0;
  for (int64_t row = row0; row < row1; ++row) {
    const T* z = static_cast<const T*>(h.logits) + row * h.ld;
    T* g = h.gradient ? static_cast<T*>(h.gradient) + row * h.ld : nullptr;
    const int64_t label = h.ids ? static_cast<const int64_t*>(h.target)[row] : 0;
    const T weight = h.ids && label == h.ignore_index ? T(0) : weight_of<T>(h, row);
    if (weight == T(0)) {
      clear_row<T>(g, h.classes);
      continue;
    }
    T* e = g && !past ? g : scratch;
    total += h.ids ? softmax_row_loss<T, true>(s, z, nullptr, label, weight, inverse, e, g, past)
                   : softmax_row_loss<T, false>(s, z, static_cast<const T*>(h.target) + row * h.classes, 0, weight,
                                                inverse, e, g, past);
    if (counts_nothing(inverse)) clear_row<T>(g, h.classes);
  }
  return total;
}

}  // namespace
}  // namespace mtmlk
