// The passes of a normalisation, see norm/batch_group.h.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/layer.h"
#include "layers/norm/batch_group.h"
#include "layers/norm/stats.h"
#include "layers/norm/stream.h"
#include "layers/norm/sums.h"

namespace mtmlk {
namespace {

template <class T>
struct NormParams {
  const T *gamma, *beta;      // nullptr: 1, 0
  const T *gamma_t, *beta_t;  // nullptr: 0
};

template <class T>
NormParams<T> norm_params(const Block<T>& b, const ValuePlan& v) {
  const auto value = [&](int32_t p) { return p < 0 ? nullptr : b.params[p].value; };
  const auto moves = [&](int32_t p) { return p >= 0 && b.tangent && b.plan->params[p].adapted; };
  return {value(v.weight), value(v.bias), moves(v.weight) ? b.direction[v.weight].value : nullptr,
          moves(v.bias) ? b.direction[v.bias].value : nullptr};
}

template <class T>
MTMLK_INLINE VecOf<T> load_or(const T* p, int64_t c, T otherwise) {
  return p ? load<T>(p + c) : splat<T>(otherwise);
}

// ---- forward ----

// The peaks of one sample's image rows, `z` where they begin.
template <class T>
void norm_peaks(const Block<T>& b, const ValuePlan& v, int64_t sample, Range rows, const T* z) {
  const NormPlan& n = *v.norm;
  T* peak = b.planes[kPrimal] + n.peak * b.stride + sample * n.out_rows * v.ld;
  pool_sample_peaks<T>(z, norm_params(b, v).gamma, pool_shape(*b.plan, n), rows, v.ld, peak);
}

template <class T>
void norm_finish_forward(const Block<T>& b, const ValuePlan& v) {
  const NormPlan& n = *v.norm;
  const NormParams<T> p = norm_params(b, v);
  for (int64_t set = 0; set < set_count(b, n); ++set) {
    finish_moments(b, v, set);
    const Coefs<T> s = coefs_of(b, v, set);
    for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes) {
      const VecOf<T> scale = load_or<T>(p.gamma, c, T(1)) * load<T>(s.r + c);
      store<T>(s.scale + c, scale);
      store<T>(s.shift + c, load_or<T>(p.beta, c, T(0)) - scale * load<T>(s.rest + c));
    }
  }
}

// Moments of a value that no convolution has taken them of.
template <class T>
void norm_moments(const Block<T>& b, const ValuePlan& v) {
  const RowUnits& u = v.norm->stats;
  const T* z = plane_of(b, v.a, kPrimal);
  share(b, unit_count(u, b.samples), [&](int64_t unit, int) {
    Range n, r;
    unit_range(u, unit, b.samples, v.rows, n, r);
    row_moments<T>(z + (n.first * v.rows + r.first) * v.ld, (n.end - n.first) * (r.end - r.first), v.ld,
                   slot_of(b, v, unit));
  });
  norm_finish_forward(b, v);
}

template <class T>
void norm_forward(const Block<T>& b, const ValuePlan& v) {
  const NormPlan& n = *v.norm;
  if (!n.streamed) norm_moments(b, v);
  const T *z = plane_of(b, v.a, kPrimal), *peak = b.planes[kPrimal] + n.peak * b.stride;
  T* y = plane_of(b, n.tail, kPrimal);
  share(b, b.samples, [&](int64_t i, int) {
    const int64_t to = i * n.out_rows * v.ld;
    if (n.pooled && !n.streamed) norm_peaks<T>(b, v, i, {0, pool_shape(*b.plan, n).height}, z + i * v.rows * v.ld);
    const T* from = n.pooled ? peak + to : z + to;
    norm_sample_forward<T>(from, coefs_of(b, v, set_of(n, i)), n.out_rows, v.ld, T(n.slope), y + to);
  });
}

// ---- tangent ----

// The tangents at the peaks of one sample's image rows, z and zt where they begin.
template <class T>
void norm_peaks_tangent(const Block<T>& b, const ValuePlan& v, int64_t sample, Range rows, const T* z, const T* zt) {
  const NormPlan& n = *v.norm;
  const int64_t at = sample * n.out_rows * v.ld;
  pool_sample_tangent<T>(z, zt, pool_shape(*b.plan, n), rows, v.ld, b.planes[kPrimal] + n.peak * b.stride + at,
                         b.planes[kTangent] + n.peak_tangent * b.stride + at);
}

template <class T>
void norm_finish_tangent(const Block<T>& b, const ValuePlan& v) {
  for (int64_t set = 0; set < set_count(b, *v.norm); ++set) finish_moments_tangent(b, v, set);
}

template <class T>
void norm_moments_tangent(const Block<T>& b, const ValuePlan& v) {
  const RowUnits& u = v.norm->stats;
  const T *z = plane_of(b, v.a, kPrimal), *zt = plane_of(b, v.a, kTangent);
  share(b, unit_count(u, b.samples), [&](int64_t unit, int) {
    Range n, r;
    unit_range(u, unit, b.samples, v.rows, n, r);
    const int64_t at = (n.first * v.rows + r.first) * v.ld;
    row_moments_tangent<T>(z + at, zt + at, coefs_of(b, v, set_of(*v.norm, n.first)).mean,
                           (n.end - n.first) * (r.end - r.first), v.ld, slot_of(b, v, unit));
  });
  norm_finish_tangent(b, v);
}

template <class T>
void norm_tangent(const Block<T>& b, const ValuePlan& v) {
  const NormPlan& n = *v.norm;
  const bool moves = has_tangent(b, v.a);
  if (moves && !n.streamed) norm_moments_tangent(b, v);
  if (!moves)
    for (int64_t set = 0; set < set_count(b, n); ++set) fill_zero<T>(tangent_coefs_of(b, v, set).mean, 3 * v.ld);
  const NormParams<T> p = norm_params(b, v);
  const T *z = plane_of(b, v.a, kPrimal), *zt = moves ? plane_of(b, v.a, kTangent) : nullptr;
  const T* peak = b.planes[kPrimal] + n.peak * b.stride;
  const T* peak_t = b.planes[kTangent] + n.peak_tangent * b.stride;
  T* yt = plane_of(b, n.tail, kTangent);
  share(b, b.samples, [&](int64_t i, int worker) {
    const Affine<T> k = affine_at(scratch_of(b, worker), v.ld);
    const Coefs<T> s = coefs_of(b, v, set_of(n, i)), st = tangent_coefs_of(b, v, set_of(n, i));
    for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes) {
      const VecOf<T> gamma = load_or<T>(p.gamma, c, T(1)), gamma_t = load_or<T>(p.gamma_t, c, T(0));
      const VecOf<T> r = load<T>(s.r + c), centre = multiply_add<T>(gamma, load<T>(st.r + c), gamma_t * r);
      store<T>(k.tangent + c, gamma * r);
      store<T>(k.centre + c, centre);
      store<T>(k.shift + c,
               load_or<T>(p.beta_t, c, T(0)) - gamma * r * load<T>(st.rest + c) - centre * load<T>(s.rest + c));
    }
    const int64_t from = i * v.rows * v.ld, to = i * n.out_rows * v.ld;
    if (n.pooled && moves && !n.streamed)
      norm_peaks_tangent<T>(b, v, i, {0, pool_shape(*b.plan, n).height}, z + from, zt + from);
    const T* at_z = n.pooled ? peak + to : z + from;
    const T* at_zt = !moves ? nullptr : n.pooled ? peak_t + to : zt + from;
    norm_sample_tangent<T>(at_z, at_zt, s, st.mean, k, n.out_rows, v.ld, T(n.slope), yt + to);
  });
}

// ---- backward ----

// Whether the statistics or gamma have a tangent, so that the first gradient enters the tangent of the gradient.
template <class T>
bool norm_moves(const Block<T>& b, const ValuePlan& v, Plane plane) {
  const bool gamma = v.weight >= 0 && b.plan->params[v.weight].adapted;
  return plane == kDeltaTangent && b.tangent && (has_tangent(b, v.a) || gamma);
}

template <class T>
void norm_grad_sums(const Block<T>& b, const ValuePlan& v, Plane plane) {
  const NormPlan& n = *v.norm;
  const NormPlanes<T> p = norm_planes(b, v);
  const bool moves = plane == kDeltaTangent && has_tangent(b, v.a);
  share(b, unit_count(n.sums, b.samples), [&](int64_t unit, int) {
    Range s, r;
    unit_range(n.sums, unit, b.samples, n.out_rows, s, r);
    const int64_t at = (s.first * n.out_rows + r.first) * v.ld, rows = (s.end - s.first) * (r.end - r.first);
    const Coefs<T> k = coefs_of(b, v, set_of(n, s.first));
    T* slot = slot_of(b, v, unit);
    if (moves)
      row_sums_tangent<T>(p, at, rows, v.ld, k, tangent_coefs_of(b, v, set_of(n, s.first)), slot);
    else
      row_sums<T>(p, plane == kDelta ? p.dy : p.dyt, at, rows, v.ld, k, slot);
  });
}

// dgamma and dbeta: the sums over all sets.
template <class T>
void norm_param_gradients(const Block<T>& b, const ValuePlan& v, const Sink<T>& sink) {
  const Totals<T> t = totals_of(b, v.norm->sums, v.ld);
  add_units({0, unit_count(v.norm->sums, b.samples), 0, 0, 0}, v.ld, t);
  const auto send = [&](int32_t param, bool add, const double* sum) {
    if (param < 0 || !sink.dst[param]) return;
    const T* init = sink_init(sink, param, add);
    for (int64_t c = 0; c < v.ld; ++c)
      sink.dst[param][c] = (init ? init[c] : T(0)) + sink.beta[param] * (c < v.features ? T(sum[c]) : T(0));
  };
  send(v.weight, v.add_weight, t.second);
  send(v.bias, v.add_bias, t.first);
}

// Means that dz needs: of the first gradient they are kept, for the tangent pass.
template <class T>
void norm_grad_means(const Block<T>& b, const ValuePlan& v, Plane plane, bool moves) {
  const NormParams<T> p = norm_params(b, v);
  const Totals<T> t = totals_of(b, v.norm->sums, v.ld);
  for (int64_t set = 0; set < set_count(b, *v.norm); ++set) {
    const SetView s = set_view(b, v, v.norm->sums, set);
    add_units(s, v.ld, t);
    const Coefs<T> k = coefs_of(b, v, set);
    if (plane == kDelta) {
      fill_zero<T>(k.m1, 4 * v.ld);
      for (int64_t c = 0; c < v.features; ++c) k.s1[c] = T(t.first[c]), k.s2[c] = T(t.second[c]);
      group_means<T>(s, p.gamma, nullptr, t.first, t.second, k, k.m1, k.m2);
    } else {
      const Coefs<T> kt = tangent_coefs_of(b, v, set);
      fill_zero<T>(kt.m1, 2 * v.ld);
      group_means<T>(s, p.gamma, moves ? p.gamma_t : nullptr, t.first, t.second, k, kt.m1, kt.m2);
    }
  }
}

// dz = gamma r dy' - r^2 m2 (z - mean) - r m1; z - mean without its rest
template <class T>
void gradient_affine(const NormParams<T>& p, const Coefs<T>& s, const T* m1, const T* m2, int64_t ld,
                     const Affine<T>& k, T* of_grad) {
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> r = load<T>(s.r + c), centre = -r * r * load<T>(m2 + c);
    store<T>(of_grad + c, load_or<T>(p.gamma, c, T(1)) * r);
    store<T>(k.centre + c, centre);
    store<T>(k.shift + c, -r * load<T>(m1 + c) - centre * load<T>(s.rest + c));
  }
}

// dzt = gamma r dyt' + (gamma r' + gamma' r) dy' - (2 r r' m2 + r^2 m2t) (z - mean) - r^2 m2 (zt - mean')
//       - r' m1 - r m1t; z - mean and zt - mean' without their rests
template <class T>
void tangent_affine(const NormParams<T>& p, const Coefs<T>& s, const Coefs<T>& st, int64_t ld, const Affine<T>& k) {
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> gamma = load_or<T>(p.gamma, c, T(1)), gamma_t = load_or<T>(p.gamma_t, c, T(0));
    const VecOf<T> r = load<T>(s.r + c), rt = load<T>(st.r + c), m2 = load<T>(s.m2 + c);
    store<T>(k.grad_t + c, gamma * r);
    store<T>(k.grad + c, gamma * rt + gamma_t * r);
    const VecOf<T> centre = -(T(2) * r * rt * m2 + r * r * load<T>(st.m2 + c)), tangent = -r * r * m2;
    store<T>(k.centre + c, centre);
    store<T>(k.tangent + c, tangent);
    store<T>(k.shift + c, -rt * load<T>(s.m1 + c) - r * load<T>(st.m1 + c) - centre * load<T>(s.rest + c) -
                              tangent * load<T>(st.rest + c));
  }
}

// The gradient with respect to z, of plane kDelta or kDeltaTangent, of some samples and of these pixels of each, into
// (or added to) `out`, where the first of the samples begins, as it does in `z`. Pixels of a pooled value are whole
// image rows.
template <class T>
void norm_stream(const Block<T>& b, const ValuePlan& v, Plane plane, bool moves, Range samples, Range pixels, bool add,
                 T* coefs, const T* z, T* out) {
  const NormPlan& n = *v.norm;
  const NormParams<T> p = norm_params(b, v);
  const T *zt = plane_of(b, v.a, kTangent), *dy = plane_of(b, n.tail, kDelta);
  const T *dyt = plane_of(b, n.tail, kDeltaTangent), *peak = b.planes[kPrimal] + n.peak * b.stride;
  const Affine<T> k = affine_at(coefs, v.ld);
  for (int64_t i = samples.first; i < samples.end; ++i) {
    const Coefs<T> s = coefs_of(b, v, set_of(n, i));
    if (plane == kDelta) {
      gradient_affine<T>(p, s, s.m1, s.m2, v.ld, k, k.grad);
    } else {
      const Coefs<T> st = tangent_coefs_of(b, v, set_of(n, i));
      if (moves)
        tangent_affine<T>(p, s, st, v.ld, k);
      else
        gradient_affine<T>(p, s, st.m1, st.m2, v.ld, k, k.grad_t);
    }
    const int64_t at = i * n.out_rows * v.ld, own = (i - samples.first) * v.rows * v.ld;
    const bool tangent = plane == kDeltaTangent;
    const GradStream<T> g = {z + own,
                             tangent && moves && has_tangent(b, v.a) ? zt + i * v.rows * v.ld : nullptr,
                             !tangent || moves ? dy + at : nullptr,
                             tangent ? dyt + at : nullptr,
                             peak + at,
                             s,
                             tangent ? tangent_coefs_of(b, v, set_of(n, i)).mean : nullptr,
                             k,
                             T(n.slope),
                             add,
                             out + own};
    if (!n.pooled) {
      norm_sample_backward<T>(g, pixels, v.ld);
      continue;
    }
    const PoolShape p = pool_shape(*b.plan, n);
    pool_sample_backward<T>(g, p, {pixels.first / p.width, pixels.end / p.width}, v.ld);
  }
}

// Hands the gradient of the convolution's outputs over group by group; the tangent pass makes the first gradient again
// where its products need it.
template <class T>
void norm_into_conv(const Block<T>& b, const ValuePlan& v, Plane plane, bool moves, const Sink<T>& sink, bool inner) {
  const ValuePlan& conv = b.plan->values[v.a];
  const ValuePlan& input = b.plan->values[conv.a];
  const bool to_input = inner ? input.tan : input.meta;
  const bool again = plane == kDeltaTangent && b.tangent &&
                     (has_tangent(b, conv.a) || (to_input && b.plan->params[conv.weight].adapted));
  const int64_t width = conv.window[kOutWidth];
  const int64_t most = conv.conv->groups.samples < b.stride ? conv.conv->groups.samples : b.stride;
  const int64_t room = most * conv.conv->groups.rows * width * v.ld;
  const bool remade = conv.remade && b.remake;
  conv_backward<T>(b, conv, plane, sink, to_input, v.norm->kind != kBatchNorm, [&](Range n, Range rows, int worker) {
    T* coefs = scratch_of(b, worker);
    const Range pixels = {rows.first * width, rows.end * width};
    T *g = coefs + 8 * v.ld - pixels.first * v.ld, *primal = g + room, *own = primal + room;
    if (remade) conv_remake<T>(b, conv, n, rows, own + pixels.first * v.ld);
    const T* z = remade ? own : plane_of(b, v.a, kPrimal) + n.first * v.rows * v.ld;
    norm_stream<T>(b, v, plane, moves, n, pixels, false, coefs, z, g);
    if (again) norm_stream<T>(b, v, kDelta, false, n, pixels, false, coefs, z, primal);
    return OutputGrads<T>{g, primal};
  });
}

template <class T>
void norm_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input, bool inner) {
  const bool moves = norm_moves(b, v, plane);
  norm_grad_sums<T>(b, v, plane);
  norm_param_gradients<T>(b, v, sink);
  norm_grad_means<T>(b, v, plane, moves);
  if (!to_input) return;
  if (v.norm->streamed) return norm_into_conv<T>(b, v, plane, moves, sink, inner);
  const T* z = plane_of(b, v.a, kPrimal);
  T* out = plane_of(b, v.a, plane);
  share(b, b.samples, [&](int64_t i, int worker) {
    const int64_t own = i * v.rows * v.ld;
    norm_stream<T>(b, v, plane, moves, {i, i + 1}, {0, v.rows}, v.add_a, scratch_of(b, worker), z + own, out + own);
  });
}

}  // namespace
}  // namespace mtmlk
