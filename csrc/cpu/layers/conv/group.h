// Grouped convolutions: output o reads the channels of its group only.
//
//   z[p, o] = b[o] + sum_tap sum_j a[p + tap, group(o) C + j] W[tap, j, o],     C channels a group
//
// Depthwise ones (one channel and one output a group) run in vectors along the channels; others element by element.
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/stops.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/layer.h"
#include "layers/conv/products.h"

namespace mtmlk {
namespace {

// Where (row, column) of a packed matrix lies.
template <class T>
MTMLK_INLINE int64_t packed_at(int64_t rows, int64_t padded, int64_t row, int64_t col) {
  constexpr int64_t kPanel = kPanelVecs * Simd<T>::kLanes;
  const int64_t start = col / kPanel * kPanel, width = padded - start < kPanel ? padded - start : kPanel;
  return start * rows + row * width + col - start;
}

MTMLK_INLINE bool is_depthwise(const ValuePlan& v) { return v.window[kGroups] == v.features && v.conv->channels == 1; }

// Calls pair(element of z, element of a, element of W) for all that the outputs of some samples read. For a depthwise
// convolution each stands for a vector of elements.
template <class T, bool kDepthwise, class Pair>
void each_pair(const Block<T>& b, const ValuePlan& v, Range samples, Pair pair) {
  const ValuePlan& a = b.plan->values[v.a];
  const Strides to = strides_of(v, v.window[kOutWidth], v.ld), from = strides_of(a, v.window[kWidth], a.ld);
  const int64_t outputs = v.features / v.window[kGroups], channels = v.conv->channels;
  const int64_t step = kDepthwise ? Simd<T>::kLanes : 1, rows = b.plan->params[v.weight].cols;
  for (int64_t i = 0; i < v.conv->forward.n_rects; ++i) {
    const TapRect& r = v.conv->forward.rects[i];
    for (int64_t n = samples.first; n < samples.end && !stops(b.watch); ++n)
      for (int64_t y = 0; y < r.y_count; ++y)
        for (int64_t x = 0; x < r.x_count; ++x) {
          const int64_t at_z = n * to.sample + (r.y + y * r.y_step) * to.row + (r.x + x * r.x_step) * to.pixel;
          const int64_t at_a = n * from.sample + y * r.y_source_step * from.row + x * r.x_source_step * from.pixel;
          for (int64_t run = 0; run < r.n_runs; ++run)
            for (int64_t j = 0; j < r.runs[run].k; ++j)
              for (int64_t o = 0; o < v.features; o += step)
                pair(at_z + o, at_a + r.runs[run].source + (kDepthwise ? o : o / outputs * channels) + j,
                     packed_at<T>(rows, v.ld, r.runs[run].weight_row + j, o));
        }
  }
}

// dst[i] += x[j] y[k], one element or a vector of them.
template <class T, bool kDepthwise>
MTMLK_INLINE void add_product(T* dst, const T* x, const T* y) {
  if constexpr (kDepthwise)
    store<T>(dst, multiply_add<T>(load<T>(x), load<T>(y), load<T>(dst)));
  else
    *dst += *x * *y;
}

template <class T, bool kDepthwise>
void group_forward(const Block<T>& b, const ValuePlan& v, T* z, const T* bias, TapProduct<T> p1, TapProduct<T> p2) {
  share(b, b.samples, [&](int64_t n, int) {
    for (int64_t r = 0; r < v.rows; ++r)
      for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes)
        store<T>(z + (n * v.rows + r) * v.ld + c, bias ? load<T>(bias + c) : VecOf<T>{});
    const TapProduct<T> products[2] = {p1, p2};
    for (const TapProduct<T>& p : products)
      if (p.a)
        each_pair<T, kDepthwise>(b, v, {n, n + 1}, [&](int64_t iz, int64_t ia, int64_t iw) {
          add_product<T, kDepthwise>(z + iz, p.a + ia, p.w + iw);
        });
  });
}

template <class T>
void group_conv_forward(const Block<T>& b, const ValuePlan& v, bool tangent) {
  const Gather<T> g = conv_gather(b, v, tangent);
  if (is_depthwise(v))
    group_forward<T, true>(b, v, g.c, g.bias, g.p1, g.p2);
  else
    group_forward<T, false>(b, v, g.c, g.bias, g.p1, g.p2);
}

template <class T, bool kDepthwise>
void group_weight_gradient(const Block<T>& b, const ValuePlan& v, const T* a, const T* dz, T* out) {
  if (!a) return;
  each_pair<T, kDepthwise>(b, v, {0, b.samples}, [&](int64_t iz, int64_t ia, int64_t iw) {
    add_product<T, kDepthwise>(out + iw, a + ia, dz + iz);
  });
}

template <class T, bool kDepthwise>
void group_input_gradient(const Block<T>& b, const ValuePlan& v, T* da, const T* dz, const T* weight) {
  if (!weight) return;
  share(b, b.samples, [&](int64_t n, int) {
    each_pair<T, kDepthwise>(b, v, {n, n + 1}, [&](int64_t iz, int64_t ia, int64_t iw) {
      add_product<T, kDepthwise>(da + ia, dz + iz, weight + iw);
    });
  });
}

template <class T, bool kDepthwise>
void group_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input) {
  const ParamPlan& w = b.plan->params[v.weight];
  const ValuePlan& a = b.plan->values[v.a];
  const T *dz = plane_of(b, v.self, plane), *primal_dz = plane_of(b, v.self, kDelta);
  const bool tangent = plane == kDeltaTangent;
  if (sink.dst[v.weight]) {
    fill_zero<T>(b.scratch, w.size);
    group_weight_gradient<T, kDepthwise>(b, v, plane_of(b, v.a, kPrimal), dz, b.scratch);
    if (tangent && has_tangent(b, v.a))
      group_weight_gradient<T, kDepthwise>(b, v, plane_of(b, v.a, kTangent), primal_dz, b.scratch);
    store_parts<T>(b.scratch, 1, 0, w.size, sink_init(sink, v.weight, v.add_weight), sink.beta[v.weight],
                   sink.dst[v.weight]);
  }
  if (v.bias >= 0 && sink.dst[v.bias])
    sum_rows<T>(dz, rows_of(b, v), v.ld, sink_init(sink, v.bias, v.add_bias), sink.beta[v.bias], sink.dst[v.bias]);
  if (!to_input) return;
  T* da = plane_of(b, v.a, plane);
  if (!v.add_a) fill_zero<T>(da, rows_of(b, a) * a.ld);
  group_input_gradient<T, kDepthwise>(b, v, da, dz, b.params[v.weight].value);
  if (tangent && b.tangent && w.adapted)
    group_input_gradient<T, kDepthwise>(b, v, da, primal_dz, b.direction[v.weight].value);
}

template <class T>
void group_conv_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input) {
  if (is_depthwise(v))
    group_backward<T, true>(b, v, plane, sink, to_input);
  else
    group_backward<T, false>(b, v, plane, sink, to_input);
}

}  // namespace
}  // namespace mtmlk
