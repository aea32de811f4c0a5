// Layer normalisation and its kin: each row by itself, over its features.
//
//   forward            y   = gamma xhat + beta,   xhat = r (x - mean)
//   backward           dx  = r (g - m1 - xhat m2),   g = gamma dy,   m1 = mean g,   m2 = mean g xhat
//   tangent            yt  = gamma xhatt + gamma' xhat + beta',   xhatt = r (xt - mean') + r' (x - mean)
//   tangent backward   dxt = r'/r dx + r (gt - m1t - xhatt m2 - xhat m2t),   gt = gamma dyt + gamma' dy,
//                      m2t = mean gt xhat + g xhatt;      dgammat = sum dyt xhat + dy xhatt
// Without a centre (kRmsNorm) mean = mean' = m1 = m1t = 0; of unit length (kUnitNorm) sums take the place of the means
// too, and rows shorter than eps are divided by it: r' = 0, m2 = m2t = 0.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/layer.h"
#include "layers/norm/passes.h"

namespace mtmlk {
namespace {

struct RowMoments {
  double mean, r, mean_t, r_t;
  double count;  // that sums are divided by: n, or 1 where they take the place of the means
  bool centred;
  bool constant;  // r is 1 / eps
};

// eps of a root mean square that names none is the dtype's.
template <class T>
double norm_eps(const ValuePlan& v) {
  return v.c0 >= 0 ? v.c0 : sizeof(T) == 4 ? double(__FLT_EPSILON__) : __DBL_EPSILON__;
}

template <class T>
RowMoments layer_moments(const T* x, const T* xt, const ValuePlan& v) {
  const int64_t n = v.features;
  RowMoments m = {};
  m.centred = v.kind == kLayerNorm, m.count = v.kind == kUnitNorm ? 1 : double(n);
  double sum = 0, square = 0, sum_t = 0, product = 0;
  for (int64_t i = 0; m.centred && i < n; ++i) sum += double(x[i]);
  m.mean = sum / double(n);
  for (int64_t i = 0; i < n; ++i) square += (double(x[i]) - m.mean) * (double(x[i]) - m.mean);
  if (v.kind == kUnitNorm) {
    const double length = __builtin_sqrt(square);
    m.constant = length < v.c0, m.r = 1 / (m.constant ? v.c0 : length);
  } else {
    m.r = 1 / __builtin_sqrt(square / double(n) + norm_eps<T>(v));
  }
  if (!xt) return m;
  for (int64_t i = 0; m.centred && i < n; ++i) sum_t += double(xt[i]);
  for (int64_t i = 0; i < n; ++i) product += (double(x[i]) - m.mean) * double(xt[i]);
  m.mean_t = sum_t / double(n);
  m.r_t = m.constant ? 0 : -m.r * m.r * m.r * product / m.count;
  return m;
}

template <class T>
void layer_forward(const Block<T>& b, const ValuePlan& v, Plane plane, T* out) {
  const NormParams<T> p = norm_params(b, v);
  const bool moves = plane == kTangent && has_tangent(b, v.a);
  const T *x = plane_of(b, v.a, kPrimal), *xt = moves ? plane_of(b, v.a, kTangent) : nullptr;
  for (int64_t r = 0; r < rows_of(b, v); ++r) {
    const int64_t at = r * v.ld;
    const RowMoments m = layer_moments<T>(x + at, moves ? xt + at : nullptr, v);
    fill_zero<T>(out + at, v.ld);
    for (int64_t i = 0; i < v.features; ++i) {
      const double gamma = p.gamma ? double(p.gamma[i]) : 1, centred = double(x[at + i]) - m.mean;
      if (plane == kPrimal) {
        out[at + i] = T(gamma * m.r * centred + (p.beta ? double(p.beta[i]) : 0));
        continue;
      }
      const double xhat_t = moves ? m.r * (double(xt[at + i]) - m.mean_t) + m.r_t * centred : 0;
      const double gamma_t = p.gamma_t ? double(p.gamma_t[i]) : 0, beta_t = p.beta_t ? double(p.beta_t[i]) : 0;
      out[at + i] = T(gamma * xhat_t + gamma_t * m.r * centred + beta_t);
    }
  }
}

// One row of the backward pass and of its tangent. dy and xt are nullptr where they do not take part.
template <class T>
struct LayerRow {
  const T *x, *xt, *dy, *dyt, *gamma, *gamma_t;
  int64_t n;
  RowMoments m;

  double gamma_at(int64_t i) const { return gamma ? double(gamma[i]) : 1; }
  double xhat(int64_t i) const { return m.r * (double(x[i]) - m.mean); }
  double xhat_t(int64_t i) const { return xt ? m.r * (double(xt[i]) - m.mean_t) + m.r_t * (double(x[i]) - m.mean) : 0; }
  double first(int64_t i) const { return dy ? double(dy[i]) : 0; }
  double g(int64_t i) const { return gamma_at(i) * first(i); }
  double g_t(int64_t i) const { return gamma_at(i) * double(dyt[i]) + (gamma_t ? double(gamma_t[i]) * first(i) : 0); }
};

template <class T>
void layer_row_backward(const LayerRow<T>& w, bool tangent, bool add, T* out) {
  double m1 = 0, m2 = 0, m1_t = 0, m2_t = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    m1 += w.g(i), m2 += w.g(i) * w.xhat(i);
    if (tangent) m1_t += w.g_t(i), m2_t += w.g_t(i) * w.xhat(i) + w.g(i) * w.xhat_t(i);
  }
  const double n = w.m.count, r = w.m.r;
  m1 /= n, m2 /= n, m1_t /= n, m2_t /= n;
  if (!w.m.centred) m1 = m1_t = 0;
  if (w.m.constant) m2 = m2_t = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    double d = w.g(i) - m1 - w.xhat(i) * m2;
    d = tangent ? w.m.r_t * d + r * (w.g_t(i) - m1_t - w.xhat_t(i) * m2 - w.xhat(i) * m2_t) : r * d;
    out[i] = T(d + (add ? double(out[i]) : 0));
  }
}

template <class T>
void layer_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input) {
  const NormParams<T> p = norm_params(b, v);
  const bool tangent = plane == kDeltaTangent, moves = norm_moves(b, v, plane);
  const T* xt = tangent && has_tangent(b, v.a) ? plane_of(b, v.a, kTangent) : nullptr;
  const T *x = plane_of(b, v.a, kPrimal), *g = plane_of(b, v.self, plane), *dy = plane_of(b, v.self, kDelta);
  T* dx = to_input ? plane_of(b, v.a, plane) : nullptr;
  T *gamma_sum = b.own, *beta_sum = b.own + v.ld;
  fill_zero<T>(gamma_sum, 2 * v.ld);
  for (int64_t r = 0; r < rows_of(b, v); ++r) {
    const int64_t at = r * v.ld;
    LayerRow<T> w = {x + at,  xt ? xt + at : nullptr,      dy + at,    g + at,
                     p.gamma, moves ? p.gamma_t : nullptr, v.features, {}};
    if (tangent && !moves) w.dy = nullptr;
    w.m = layer_moments<T>(w.x, w.xt, v);
    for (int64_t i = 0; i < v.features; ++i) {
      gamma_sum[i] += T(double(g[at + i]) * w.xhat(i) + (tangent && moves ? w.first(i) * w.xhat_t(i) : 0));
      beta_sum[i] += g[at + i];
    }
    if (to_input && !v.add_a) fill_zero<T>(dx + at, v.ld);
    if (to_input) layer_row_backward<T>(w, tangent, v.add_a, dx + at);
  }
  const auto send = [&](int32_t param, bool add, const T* sum) {
    if (param >= 0 && sink.dst[param])
      store_parts<T>(sum, 1, 0, v.ld, sink_init(sink, param, add), sink.beta[param], sink.dst[param]);
  };
  send(v.weight, v.add_weight, gamma_sum);
  send(v.bias, v.add_bias, beta_sum);
}

}  // namespace
}  // namespace mtmlk
