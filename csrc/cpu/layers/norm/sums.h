// Sums of gradients that normalisations need.
//
//   dy'  = dy (slope where y <= 0)              the activation's derivative
//   s1   = sum dy'        s2  = sum dy' xhat                                   over a set, feature by feature
//   m1   = mean gamma dy' m2  = mean gamma dy' xhat                            over what shares a mean
//   s1t  = sum dyt'       s2t = sum dyt' xhat + dy' xhatt
// With max-pooling behind it, dy lies at the pooled places, and z there is the peak.
#pragma once

#include <stdint.h>

#include "simd/simd.h"
#include "layers/block.h"
#include "layers/norm/stats.h"

namespace mtmlk {
namespace {

template <class T>
struct NormPlanes {
  const T *z, *zt;  // at the places of y: the value itself, or its peaks
  const T *dy, *dyt;
  T slope;
};

template <class T>
NormPlanes<T> norm_planes(const Block<T>& b, const ValuePlan& v) {
  const NormPlan& n = *v.norm;
  NormPlanes<T> p = {plane_of(b, v.a, kPrimal), plane_of(b, v.a, kTangent), plane_of(b, n.tail, kDelta),
                     plane_of(b, n.tail, kDeltaTangent), T(n.slope)};
  if (n.pooled) p.z = b.planes[kPrimal] + n.peak * b.stride, p.zt = b.planes[kTangent] + n.peak_tangent * b.stride;
  return p;
}

// 0 times an infinite gradient would be NaN where relu's is 0.
template <class T>
MTMLK_INLINE VecOf<T> times_slope(T slope, VecOf<T> x) {
  return slope == T(0) ? VecOf<T>{} : slope * x;
}

// act'(x) g at the activation's input x, which is made again from z rather than y read: planes come from far.
template <class T>
MTMLK_INLINE VecOf<T> masked(VecOf<T> x, VecOf<T> g, T slope) {
  return x <= T(0) ? times_slope<T>(slope, g) : g;
}

// slot <- s1, s2 of rows that lie one after another, V vectors of each; `g` is dy or dyt
template <class T, int V>
void panel_sums(const NormPlanes<T>& p, const T* g, int64_t at, int64_t rows, int64_t ld, const Coefs<T>& k,
                int64_t col, T* slot) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> mean[V], rest[V], s1[V], s2[V], scale[V], shift[V];
  for (int v = 0; v < V; ++v) {
    mean[v] = load<T>(k.mean + col + v * kLanes), rest[v] = load<T>(k.rest + col + v * kLanes);
    scale[v] = load<T>(k.scale + col + v * kLanes), shift[v] = load<T>(k.shift + col + v * kLanes);
    s1[v] = s2[v] = VecOf<T>{};
  }
  for (int64_t i = at + col; i < at + rows * ld + col; i += ld)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const VecOf<T> x = load<T>(p.z + i + v * kLanes) - mean[v];
      const VecOf<T> d = masked<T>(multiply_add<T>(scale[v], x, shift[v]), load<T>(g + i + v * kLanes), p.slope);
      s1[v] += d;
      s2[v] = multiply_add<T>(d, x - rest[v], s2[v]);
    }
  for (int v = 0; v < V; ++v) {
    store<T>(slot + col + v * kLanes, s1[v]);
    store<T>(slot + ld + col + v * kLanes, s2[v] * load<T>(k.r + col + v * kLanes));
  }
}

// slot <- s1t, s2t;  xhatt = r (zt - mean') + r' (z - mean)
template <class T, int V>
void panel_sums_tangent(const NormPlanes<T>& p, int64_t at, int64_t rows, int64_t ld, const Coefs<T>& k,
                        const Coefs<T>& kt, int64_t col, T* slot) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> s1[V], s2[V];
  for (int v = 0; v < V; ++v) s1[v] = s2[v] = VecOf<T>{};
  for (int64_t i = at + col; i < at + rows * ld + col; i += ld)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t e = i + v * kLanes, c = col + v * kLanes;
      const VecOf<T> x = load<T>(p.z + e) - load<T>(k.mean + c), centred = x - load<T>(k.rest + c);
      const VecOf<T> y = multiply_add<T>(load<T>(k.scale + c), x, load<T>(k.shift + c)), r = load<T>(k.r + c);
      const VecOf<T> dt = masked<T>(y, load<T>(p.dyt + e), p.slope), d = masked<T>(y, load<T>(p.dy + e), p.slope);
      const VecOf<T> moved = load<T>(p.zt + e) - load<T>(kt.mean + c) - load<T>(kt.rest + c);
      const VecOf<T> xhat_t = multiply_add<T>(r, moved, load<T>(kt.r + c) * centred);
      s1[v] += dt;
      s2[v] = multiply_add<T>(dt, centred * r, multiply_add<T>(d, xhat_t, s2[v]));
    }
  for (int v = 0; v < V; ++v) {
    store<T>(slot + col + v * kLanes, s1[v]);
    store<T>(slot + ld + col + v * kLanes, s2[v]);
  }
}

// Whole rows at once: column by column, every pass would read the lines between again (256 rows do not stay in the
// first-level cache).
template <class T>
void row_sums(const NormPlanes<T>& p, const T* g, int64_t at, int64_t rows, int64_t ld, const Coefs<T>& k, T* slot) {
  each_panel<T>(ld,
                [&](int64_t c, auto vecs) { panel_sums<T, decltype(vecs)::kVecs>(p, g, at, rows, ld, k, c, slot); });
}

template <class T>
void row_sums_tangent(const NormPlanes<T>& p, int64_t at, int64_t rows, int64_t ld, const Coefs<T>& k,
                      const Coefs<T>& kt, T* slot) {
  each_panel<T>(
      ld, [&](int64_t c, auto vecs) { panel_sums_tangent<T, decltype(vecs)::kVecs>(p, at, rows, ld, k, kt, c, slot); });
}

// m1, m2 of a set from s1, s2, or their tangents from s1t, s2t and the first ones:  m1t = mean gamma s1t + gamma' s1
template <class T>
void group_means(const SetView& s, const T* gamma, const T* gamma_t, const double* s1, const double* s2,
                 const Coefs<T>& first, T* m1, T* m2) {
  for (int64_t g = 0; g < s.groups; ++g) {
    double sum1 = 0, sum2 = 0;
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) {
      const double by = gamma ? double(gamma[c]) : 1;
      sum1 += by * s1[c], sum2 += by * s2[c];
      if (gamma_t) sum1 += double(gamma_t[c]) * double(first.s1[c]), sum2 += double(gamma_t[c]) * double(first.s2[c]);
    }
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c)
      m1[c] = T(sum1 / s.count), m2[c] = T(sum2 / s.count);
  }
}

}  // namespace
}  // namespace mtmlk
