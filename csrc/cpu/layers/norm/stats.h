// Statistics of normalisations.
//
// A set is what shares one mean: all samples (batch), or one sample (group, instance; then neighbouring features share
// it as well). What a set needs lies in rows of ld elements in the planes:
//   primal    mean | 1/sd = r | rest | m1 = mean gamma dy | m2 = mean gamma dy xhat | s1 = sum dy | s2 = sum dy xhat
//             | scale = gamma r | shift = beta - gamma r rest
//   tangent   the tangents of the first five
// `rest` is what the mean lost when it was rounded to T. Where means are large beside deviations (images that are not
// centred), an error that is the same at every place does not cancel in sums over them, so that it is taken off.
// Units of rows write partial sums into slots, each in T over at most a few hundred rows; their sum is taken in double.
#pragma once

#include <stdint.h>

#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/layer.h"
#include "layers/conv/products.h"

namespace mtmlk {
namespace {

template <class T>
struct Coefs {
  T *mean, *r, *rest, *m1, *m2, *s1, *s2, *scale, *shift;
};

template <class T>
Coefs<T> coefs_at(T* p, int64_t ld) {
  return {p, p + ld, p + 2 * ld, p + 3 * ld, p + 4 * ld, p + 5 * ld, p + 6 * ld, p + 7 * ld, p + 8 * ld};
}

template <class T>
MTMLK_INLINE Coefs<T> coefs_of(const Block<T>& b, const ValuePlan& v, int64_t set) {
  return coefs_at(b.planes[kPrimal] + v.norm->coefs * b.stride + set * 9 * v.ld, v.ld);
}

template <class T>
MTMLK_INLINE Coefs<T> tangent_coefs_of(const Block<T>& b, const ValuePlan& v, int64_t set) {
  return coefs_at(b.planes[kTangent] + v.norm->coefs_tangent * b.stride + set * 5 * v.ld, v.ld);
}

template <class T>
MTMLK_INLINE int64_t set_count(const Block<T>& b, const NormPlan& n) {
  return n.kind == kBatchNorm ? 1 : b.samples;
}

// Where a unit of v's rows writes its partial sums.
template <class T>
MTMLK_INLINE T* slot_of(const Block<T>& b, const ValuePlan& v, int64_t unit) {
  return b.scratch + unit * kSlotRows * v.ld;
}

MTMLK_INLINE int64_t set_of(const NormPlan& n, int64_t sample) { return n.kind == kBatchNorm ? 0 : sample; }

template <int V>
struct Vecs {
  static constexpr int kVecs = V;
};

// body(column, Vecs<4, 2 or 1>) for panels that cover ld.
template <class T, class Body>
MTMLK_INLINE void each_panel(int64_t ld, Body body) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t c = 0;
  for (; c + 4 * kLanes <= ld; c += 4 * kLanes) body(c, Vecs<4>());
  for (; c + 2 * kLanes <= ld; c += 2 * kLanes) body(c, Vecs<2>());
  if (c < ld) body(c, Vecs<1>());
}

// slot <- mean, sum of squares around it, and sum of differences from it (which is what it lost in rounding), of rows
// that lie one after another
template <class T>
void row_moments(const T* z, int64_t rows, int64_t ld, T* slot) {
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    VecOf<T> even = {}, odd = {};
    int64_t r = 0;
    for (; r + 1 < rows; r += 2) even += load<T>(z + r * ld + c), odd += load<T>(z + (r + 1) * ld + c);
    if (r < rows) even += load<T>(z + r * ld + c);
    const VecOf<T> mean = (even + odd) * (T(1) / T(rows));
    even = odd = VecOf<T>{};
    VecOf<T> even_lost = {}, odd_lost = {};
    for (r = 0; r + 1 < rows; r += 2) {
      const VecOf<T> x = load<T>(z + r * ld + c) - mean, y = load<T>(z + (r + 1) * ld + c) - mean;
      even = multiply_add<T>(x, x, even), odd = multiply_add<T>(y, y, odd);
      even_lost += x, odd_lost += y;
    }
    if (r < rows) {
      const VecOf<T> x = load<T>(z + r * ld + c) - mean;
      even = multiply_add<T>(x, x, even);
      even_lost += x;
    }
    store<T>(slot + c, mean);
    store<T>(slot + ld + c, even + odd);
    store<T>(slot + 2 * ld + c, even_lost + odd_lost);
  }
}

template <class T, int V>
void panel_moments_tangent(const T* z, const T* zt, const T* mean, int64_t rows, int64_t ld, T* slot) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> m[V], sum[V], product[V];
  for (int v = 0; v < V; ++v) m[v] = load<T>(mean + v * kLanes), sum[v] = product[v] = VecOf<T>{};
  for (int64_t i = 0; i < rows * ld; i += ld)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const VecOf<T> t = load<T>(zt + i + v * kLanes);
      sum[v] += t;
      product[v] = multiply_add<T>(load<T>(z + i + v * kLanes) - m[v], t, product[v]);
    }
  for (int v = 0; v < V; ++v) store<T>(slot + v * kLanes, sum[v]), store<T>(slot + ld + v * kLanes, product[v]);
}

// slot <- sum of zt, and of (z - mean) zt. z comes from far: it is read in its order, whole rows where they are short
// (column by column, mini_conv's meta-step took 2 % longer).
template <class T>
void row_moments_tangent(const T* z, const T* zt, const T* mean, int64_t rows, int64_t ld, T* slot) {
  each_panel<T>(ld, [&](int64_t c, auto vecs) {
    panel_moments_tangent<T, decltype(vecs)::kVecs>(z + c, zt + c, mean + c, rows, ld, slot + c);
  });
}

// The units of one set, and what shares its statistics.
struct SetView {
  int64_t first, units;       // of the units
  int64_t groups, per_group;  // features
  double count;               // elements of a group
};

template <class T>
SetView set_view(const Block<T>& b, const ValuePlan& v, const RowUnits& u, int64_t set) {
  const NormPlan& n = *v.norm;
  const bool batch = n.kind == kBatchNorm;
  const int64_t per_group = v.features / n.groups, samples = batch ? b.samples : 1;
  return {batch ? 0 : set * u.bands, batch ? unit_count(u, samples) : u.bands, n.groups, per_group,
          double(v.rows * per_group) * double(samples)};
}

MTMLK_INLINE double unit_rows(const RowUnits& u, int64_t unit, int64_t samples, int64_t rows) {
  Range n, r;
  unit_range(u, unit, samples, rows, n, r);
  return double((n.end - n.first) * (r.end - r.first));
}

// Sums of doubles behind the slots: two rows of ld.
template <class T>
struct Totals {
  const T* slots;
  double *first, *second;
};

template <class T>
Totals<T> totals_of(const Block<T>& b, const RowUnits& u, int64_t ld) {
  T* behind = b.scratch + unit_count(u, b.samples) * kSlotRows * ld;
  double* d = reinterpret_cast<double*>(behind);
  return {b.scratch, d, d + ld};
}

// first, second = the sums over a set's units of their two rows
template <class T>
void add_units(const SetView& s, int64_t ld, const Totals<T>& t) {
  for (int64_t c = 0; c < ld; ++c) t.first[c] = t.second[c] = 0;
  for (int64_t i = s.first; i < s.first + s.units; ++i) {
    const T* slot = t.slots + i * kSlotRows * ld;
    for (int64_t c = 0; c < ld; ++c) t.first[c] += double(slot[c]);
    for (int64_t c = 0; c < ld; ++c) t.second[c] += double(slot[ld + c]);
  }
}

// From the units' moments to mean and 1/sd. Sums of squares around different means are joined by Chan's formula.
template <class T>
void finish_moments(const Block<T>& b, const ValuePlan& v, int64_t set) {
  const NormPlan& n = *v.norm;
  const SetView s = set_view(b, v, n.stats, set);
  const Totals<T> t = totals_of(b, n.stats, v.ld);
  const Coefs<T> k = coefs_of(b, v, set);
  const int64_t ld = v.ld;
  for (int64_t c = 0; c < ld; ++c) t.first[c] = t.second[c] = 0;
  for (int64_t i = s.first; i < s.first + s.units; ++i) {
    const double rows = unit_rows(n.stats, i, b.samples, v.rows);
    const T* slot = t.slots + i * kSlotRows * ld;
    for (int64_t c = 0; c < ld; ++c) t.first[c] += rows * double(slot[c]) + double(slot[2 * ld + c]);
  }
  for (int64_t g = 0; g < s.groups; ++g) {
    double sum = 0;
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) sum += t.first[c];
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) t.first[c] = sum / s.count;
  }
  for (int64_t i = s.first; i < s.first + s.units; ++i) {
    const double rows = unit_rows(n.stats, i, b.samples, v.rows);
    const T* slot = t.slots + i * kSlotRows * ld;
    for (int64_t c = 0; c < ld; ++c) {
      const double off = double(slot[c]) - t.first[c];
      t.second[c] += double(slot[ld + c]) + off * (2 * double(slot[2 * ld + c]) + rows * off);
    }
  }
  fill_zero<T>(k.mean, 3 * ld);  // the padding's 1/sd too: 0, and nothing comes of it
  for (int64_t g = 0; g < s.groups; ++g) {
    double sum = 0;
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) sum += t.second[c];
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) {
      k.mean[c] = T(t.first[c]), k.rest[c] = T(t.first[c] - double(k.mean[c]));
      k.r[c] = T(1 / __builtin_sqrt(sum / s.count + n.eps));
    }
  }
}

// The tangents of mean and 1/sd = r:   mean' = sum zt / M,   var' = 2/M sum (z - mean) zt,   r' = -r^3 var' / 2
template <class T>
void finish_moments_tangent(const Block<T>& b, const ValuePlan& v, int64_t set) {
  const SetView s = set_view(b, v, v.norm->stats, set);
  const Totals<T> t = totals_of(b, v.norm->stats, v.ld);
  const Coefs<T> k = coefs_of(b, v, set), kt = tangent_coefs_of(b, v, set);
  add_units(s, v.ld, t);
  for (int64_t c = 0; c < v.ld; ++c) t.second[c] -= double(k.rest[c]) * t.first[c];
  fill_zero<T>(kt.mean, 3 * v.ld);
  for (int64_t g = 0; g < s.groups; ++g) {
    double sum = 0, product = 0;
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) sum += t.first[c], product += t.second[c];
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) {
      const double r = double(k.r[c]);
      kt.mean[c] = T(sum / s.count), kt.rest[c] = T(sum / s.count - double(kt.mean[c]));
      kt.r[c] = T(-r * r * r * product / s.count);
    }
  }
}

}  // namespace
}  // namespace mtmlk
