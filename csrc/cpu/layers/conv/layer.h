// Convolutions, the four functions; see products.h for the products.
//
//   forward            z[p]   = b + sum_tap a[p + tap] W[tap]
//   backward           da[q]  = sum_tap dz[q - tap] W[tap]^T         dW[tap] = sum_p a[p + tap]^T dz[p]  db = sum dz
//   tangent            zt     = vb + sum_tap at W + a V
//   tangent backward   dat    = sum_tap dzt W^T + dz V^T             dWt     = a^T dzt + at^T dz         dbt = sum dzt
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/stops.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/pairs.h"
#include "layers/conv/products.h"

namespace mtmlk {
namespace {

MTMLK_INLINE Strides strides_of(const ValuePlan& v, int64_t width, int64_t ld) { return {v.rows * ld, width * ld, ld}; }

template <class T>
MTMLK_INLINE T* scratch_of(const Block<T>& b, int worker) {
  return b.own + worker * b.plan->worker_scratch_size;
}

MTMLK_INLINE int64_t unit_count(const RowUnits& u, int64_t samples) {
  return (samples + u.samples - 1) / u.samples * u.bands;
}

// The samples and rows (of `rows` in all) of one unit.
MTMLK_INLINE void unit_range(const RowUnits& u, int64_t unit, int64_t samples, int64_t rows, Range& n, Range& r) {
  n = clipped(unit / u.bands * u.samples, u.samples, samples);
  r = clipped(unit % u.bands * u.rows, u.rows, rows);
}

// What a convolution of one group gathers for z (or zt) from a (and at).
template <class T>
Gather<T> conv_gather(const Block<T>& b, const ValuePlan& v, bool tangent) {
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  Gather<T> g = {};
  g.c = plane_of(b, v.self, tangent ? kTangent : kPrimal);
  g.to = strides_of(v, v.window[kOutWidth], v.ld), g.from = strides_of(a, v.window[kWidth], a.ld_primal);
  g.weight_rows = w.cols, g.n = v.ld;
  const bool bias = v.bias >= 0 && (!tangent || b.plan->params[v.bias].adapted);
  if (bias) g.bias = (tangent ? b.direction : b.params)[v.bias].value;
  if (!tangent) {
    g.p1 = {plane_of(b, v.a, kPrimal), b.params[v.weight].value};
    return g;
  }
  if (has_tangent(b, v.a)) g.p1 = {plane_of(b, v.a, kTangent), b.params[v.weight].value};
  if (w.adapted) (g.p1.a ? g.p2 : g.p1) = TapProduct<T>{plane_of(b, v.a, kPrimal), b.direction[v.weight].value};
  return g;
}

// The transformed weights of a gather's products, made once a call; nullptr where there is no such product.
template <class T>
struct PairWeights {
  const T *h1, *h2;
};

template <class T>
PairWeights<T> pair_weights_of(const Block<T>& b, const PairPlan& p, const Gather<T>& g) {
  T* h = b.scratch + b.plan->pair_weights;
  const int64_t size = kPairPlanes * p.weight_rows * g.n;
  const T* weights[2] = {g.p1.w, g.p2.w};
  for (int s = 0; s < 2; ++s)
    if (weights[s]) pair_weights<T>(weights[s], p.kernel_y, p.weight_rows / p.kernel_y, g.n, !p.forward, h + s * size);
  return {h, h + size};
}

template <class T>
MTMLK_INLINE T* pair_scratch(const Block<T>& b, int worker) {
  return scratch_of(b, worker) + b.plan->worker_pairs;
}

// Samples `n`, image rows `rows` of z, into `out`, where row rows.first of sample n.first lies.
template <class T>
void conv_remake(const Block<T>& b, const ValuePlan& v, Range n, Range rows, T* out) {
  Gather<T> g = conv_gather(b, v, false);
  g.c = out - n.first * g.to.sample - rows.first * g.to.row;
  gather<T>(v.conv->forward, g, n, rows);
}

// Fills z (or zt) unit by unit and hands each unit on while it is in cache: after(unit, samples, image rows, z) where z
// (or zt) points to the unit. A unit of a remade convolution lives no longer than that.
template <class T, class After>
void conv_forward(const Block<T>& b, const ValuePlan& v, bool tangent, After after) {
  const ConvPlan& conv = *v.conv;
  const Gather<T> g = conv_gather(b, v, tangent);
  const bool remade = v.remade && b.remake;
  PairWeights<T> h = {};
  if (conv.in_pairs) h = pair_weights_of<T>(b, conv.pairs_forward, g);
  share(b, unit_count(conv.units, b.samples), [&](int64_t unit, int worker) {
    Range n, rows;
    unit_range(conv.units, unit, b.samples, v.window[kOutHeight], n, rows);
    T* out = remade ? scratch_of(b, worker) : g.c + n.first * g.to.sample + rows.first * g.to.row;
    if (remade)
      conv_remake<T>(b, v, n, rows, out);
    else if (conv.in_pairs)
      gather_pairs<T>(conv.pairs_forward, g, h.h1, h.h2, n, rows, pair_scratch(b, worker));
    else
      gather<T>(conv.forward, g, n, rows);
    after(unit, n, rows, out);
  });
}

// Gradients of a group's outputs: dz or dzt, and in the tangent pass dz as well. They point to where the group's first
// sample begins, or would begin if all its rows were there.
template <class T>
struct OutputGrads {
  const T *g, *primal;
};

// What the gradient of a convolution's input gathers; its sources are set group by group.
template <class T>
Gather<T> input_gather(const Block<T>& b, const ValuePlan& v, Plane plane) {
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  Gather<T> g = {};
  g.to = strides_of(a, v.window[kWidth], a.ld), g.from = strides_of(v, v.window[kOutWidth], v.ld);
  g.c = plane_of(b, v.a, plane), g.add = v.add_a;
  g.weight_rows = w.taps * w.rows, g.n = a.ld;
  g.p1.w = b.params[v.weight].transposed;
  if (plane == kDeltaTangent && b.tangent && w.adapted) g.p2.w = b.direction[v.weight].transposed;
  return g;
}

template <class T>
void gather_input_gradient(const Block<T>& b, const ValuePlan& v, Gather<T> g, const PairWeights<T>& h,
                           const OutputGrads<T>& d, Range n, int worker) {
  g.c += n.first * g.to.sample;
  g.p1.a = d.g, g.p2.a = g.p2.w ? d.primal : nullptr;
  const Range all = {0, n.end - n.first}, rows = {0, v.window[kHeight]};
  if (v.conv->in_pairs)
    gather_pairs<T>(v.conv->pairs_backward, g, h.h1, h.h2, all, rows, pair_scratch(b, worker));
  else
    gather<T>(v.conv->backward, g, all, rows);
}

template <class T>
void add_weight_gradient(const Block<T>& b, const ValuePlan& v, Plane plane, const OutputGrads<T>& d, Range n,
                         Range rows, T* out, int worker) {
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  const ConvPlan& conv = *v.conv;
  ConvGrad<T> g = {};
  g.c = out, g.weight_rows = w.cols, g.n = v.ld;
  T* dh = out + w.size + v.ld;
  g.a = strides_of(a, v.window[kWidth], a.ld_primal), g.b = strides_of(v, v.window[kOutWidth], v.ld);
  g.p1 = {plane_of(b, v.a, kPrimal) + n.first * g.a.sample, d.g};
  if (plane == kDeltaTangent && has_tangent(b, v.a))
    g.p2 = {plane_of(b, v.a, kTangent) + n.first * g.a.sample, d.primal};
  const int64_t samples = n.end - n.first, height = rows.end - rows.first;
  const RowUnits pieces = {conv.grad_samples, (height + conv.grad_rows - 1) / conv.grad_rows, conv.grad_rows};
  for (int64_t piece = 0; piece < unit_count(pieces, samples); ++piece) {
    Range some, r;
    unit_range(pieces, piece, samples, height, some, r);
    const Range image = {rows.first + r.first, rows.first + r.end};
    if (conv.in_pairs)
      grad_pairs<T>(conv.pairs_forward, g, some, image, dh, pair_scratch(b, worker));
    else
      conv_grad<T>(conv.forward, g, some, image);
  }
}

// dst = start + beta * (the parts' buffers, in their order)
template <class T>
void store_parts(const T* parts, int64_t count, int64_t stride, int64_t n, const T* start, T beta, T* dst) {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) {
    VecOf<T> sum = load<T>(parts + i);
    for (int64_t p = 1; p < count; ++p) sum += load<T>(parts + p * stride + i);
    store<T>(dst + i, multiply_add<T>(splat<T>(beta), sum, start ? load<T>(start + i) : VecOf<T>{}));
  }
}

// One buffer of gradients for every 32 million multiply-adds (a quarter of a millisecond), up to kMaxParts.
MTMLK_INLINE int64_t part_count(const ConvPlan& conv, const ValuePlan& v, int64_t samples, int64_t groups) {
  const int64_t work = samples * v.rows * v.features * conv.taps * conv.channels / (32 << 20);
  const int64_t most = groups < kMaxParts ? groups : kMaxParts;
  return work < 1 ? 1 : work < most ? work : most;
}

// grads(samples, image rows, worker) returns the OutputGrads of a group. `sum_bias`: false where the gradient of the
// bias is 0 whatever the outputs' gradients are.
template <class T, class Grads>
void conv_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input,
                   bool sum_bias, Grads grads) {
  const ConvPlan& conv = *v.conv;
  const ParamPlan& w = b.plan->params[v.weight];
  const bool to_weight = sink.dst[v.weight] != nullptr, to_bias = v.bias >= 0 && sink.dst[v.bias];
  const int64_t groups = unit_count(conv.groups, b.samples), width = v.window[kOutWidth];
  const int64_t parts = part_count(conv, v, b.samples, groups);
  const int64_t transformed = conv.in_pairs ? kPairPlanes * (w.size / 3) : 0, size = w.size + v.ld + transformed;
  const Gather<T> g = to_input ? input_gather<T>(b, v, plane) : Gather<T>{};
  PairWeights<T> h = {};
  if (to_input && conv.in_pairs) h = pair_weights_of<T>(b, conv.pairs_backward, g);
  const int64_t each = (groups + parts - 1) / parts;
  share(b, parts, [&](int64_t part, int worker) {
    T* own = b.scratch + part * size;
    fill_zero<T>(own, size);
    for (int64_t group = part * each; group < groups && group < (part + 1) * each && !stops(b.watch); ++group) {
      Range n, rows;
      unit_range(conv.groups, group, b.samples, v.window[kOutHeight], n, rows);
      const OutputGrads<T> d = grads(n, rows, worker);
      if (to_weight) add_weight_gradient<T>(b, v, plane, d, n, rows, own, worker);
      if (to_bias && sum_bias)
        sum_rows<T>(d.g + rows.first * width * v.ld, (n.end - n.first) * (rows.end - rows.first) * width, v.ld,
                    own + w.size, T(1), own + w.size);
      if (to_input) gather_input_gradient<T>(b, v, g, h, d, n, worker);
    }
    if (to_weight && conv.in_pairs)
      unpair_weight_gradient<T>(own + w.size + v.ld, v.window[kKernelY], conv.channels, v.ld, own);
  });
  if (to_weight)
    store_parts<T>(b.scratch, parts, size, w.size, sink_init(sink, v.weight, v.add_weight), sink.beta[v.weight],
                   sink.dst[v.weight]);
  if (to_bias)
    store_parts<T>(b.scratch + w.size, parts, size, v.ld, sink_init(sink, v.bias, v.add_bias), sink.beta[v.bias],
                   sink.dst[v.bias]);
}

template <class T>
void plain_conv_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input) {
  const T *g = plane_of(b, v.self, plane), *primal = plane_of(b, v.self, kDelta);
  conv_backward<T>(b, v, plane, sink, to_input, true, [&](Range n, Range, int) {
    const int64_t at = n.first * v.rows * v.ld;
    return OutputGrads<T>{g + at, primal + at};
  });
}

}  // namespace
}  // namespace mtmlk
