// Convolutions as nodes: grouped, alone, or with the normalisation after them.
#pragma once

#include <stdint.h>

#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/group.h"
#include "layers/conv/layer.h"
#include "layers/conv/products.h"
#include "layers/norm/passes.h"
#include "layers/norm/stats.h"

namespace mtmlk {
namespace {

// A convolution whose outputs' statistics and peaks are wanted takes them while the outputs are in cache.
template <class T>
void conv_node_forward(const Block<T>& b, const ValuePlan& v) {
  if (v.window[kGroups] > 1) return group_conv_forward<T>(b, v, false);
  if (!v.streamed) return conv_forward<T>(b, v, false, [](int64_t, Range, Range, const T*) {});
  const ValuePlan& norm = b.plan->values[v.norm->self];
  const int64_t width = v.window[kOutWidth];
  conv_forward<T>(b, v, false, [&](int64_t unit, Range n, Range rows, const T* z) {
    row_moments<T>(z, (n.end - n.first) * (rows.end - rows.first) * width, v.ld, slot_of(b, v, unit));
    for (int64_t i = 0; v.norm->pooled && i < n.end - n.first; ++i)
      norm_peaks<T>(b, norm, n.first + i, rows, z + i * v.rows * v.ld);
  });
  norm_finish_forward<T>(b, norm);
}

template <class T>
void conv_node_tangent(const Block<T>& b, const ValuePlan& v) {
  if (v.window[kGroups] > 1) return group_conv_forward<T>(b, v, true);
  if (!v.streamed) return conv_forward<T>(b, v, true, [](int64_t, Range, Range, const T*) {});
  const ValuePlan& norm = b.plan->values[v.norm->self];
  const T* z = plane_of(b, v.self, kPrimal);
  const int64_t width = v.window[kOutWidth];
  conv_forward<T>(b, v, true, [&](int64_t unit, Range n, Range rows, const T* zt) {
    const int64_t at = (n.first * v.rows + rows.first * width) * v.ld;
    row_moments_tangent<T>(z + at, zt, coefs_of(b, norm, set_of(*v.norm, n.first)).mean,
                           (n.end - n.first) * (rows.end - rows.first) * width, v.ld, slot_of(b, v, unit));
    for (int64_t i = 0; v.norm->pooled && i < n.end - n.first; ++i)
      norm_peaks_tangent<T>(b, norm, n.first + i, rows, z + at + i * v.rows * v.ld, zt + i * v.rows * v.ld);
  });
  norm_finish_tangent<T>(b, norm);
}

template <class T>
void conv_node_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (v.window[kGroups] > 1)
    group_conv_backward<T>(b, v, plane, to.sink, to.to_a);
  else
    plain_conv_backward<T>(b, v, plane, to.sink, to.to_a);
}

template <class T>
constexpr LayerKernels<T> kConvLayer = {conv_node_forward<T>, conv_node_tangent<T>, conv_node_backward<T>};

}  // namespace
}  // namespace mtmlk
