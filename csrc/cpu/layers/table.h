// Which function each node runs, for each plane.
#pragma once

#include <stdint.h>

#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/group.h"
#include "layers/conv/layer.h"
#include "layers/elementwise.h"
#include "layers/embedding.h"
#include "layers/linear.h"
#include "layers/norm/layer.h"
#include "layers/norm/passes.h"
#include "layers/pointwise.h"
#include "layers/pool.h"
#include "layers/shapes.h"

namespace mtmlk {
namespace {

template <class T>
void view_node(const Block<T>& b, const ValuePlan& v, Plane plane, T* out) {
  copy_view<T>(b.plan->values[v.a], plane_of(b, v.a, plane), v, out, v.batched ? b.samples : 1, false);
}

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
void conv_node_backward_any(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input) {
  if (v.window[kGroups] > 1)
    group_conv_backward<T>(b, v, plane, sink, to_input);
  else
    conv_node_backward<T>(b, v, plane, sink, to_input);
}

template <class T>
void norm_node(const Block<T>& b, const ValuePlan& v, Plane plane, T* out) {
  if (!v.norm) return layer_forward<T>(b, v, plane, out);
  if (plane == kPrimal)
    norm_forward<T>(b, v);
  else
    norm_tangent<T>(b, v);
}

template <class T>
void node_forward(const Block<T>& b, int32_t i) {
  const ValuePlan& v = b.plan->values[i];
  if (v.in_chain) return;
  T* out = plane_of(b, i, kPrimal);
  const int64_t rows = rows_of(b, v);
  switch (v.op) {
    case kInput:
      if (!v.direct_input) read_input<T>(b, v, out);
      return;
    case kParam:
      return affine<T>(b.params[v.weight].value, rows * v.ld, T(1), T(0), false, out);
    case kView:
      return view_node<T>(b, v, kPrimal, out);
    case kLinear:
      return linear_forward<T>(b, v, out);
    case kAct:
      return act_node<T>(b, v, kPrimal);
    case kAdd:
      return combine_nodes<T, false>(b, v, kPrimal, kPrimal, out, false);
    case kMul:
      return combine_nodes<T, true>(b, v, kPrimal, kPrimal, out, false);
    case kCat:
      return cat_forward<T>(b, v, kPrimal, out);
    case kExpand:
      return combine<T, false>(operand_of(b, v, v.a, kPrimal), nullptr, out, rows, v.ld, false);
    case kTranspose:
      return transpose_forward<T>(b, v, kPrimal, out);
    case kConv:
      return conv_node_forward<T>(b, v);
    case kNorm:
      return norm_node<T>(b, v, kPrimal, out);
    case kPool:
      return pool_forward<T>(b, v, kPrimal, out);
    case kEmbedding:
      return read_table<T>(b, v, b.params[v.weight].value, -1, out);
    default:
      return affine<T>(plane_of(b, v.a, kPrimal), rows * v.ld, T(v.c0), T(v.c1), false, out);
  }
}

template <class T>
void node_tangent(const Block<T>& b, int32_t i) {
  const ValuePlan& v = b.plan->values[i];
  if (!has_tangent(b, i) || v.in_chain) return;
  T* out = plane_of(b, i, kTangent);
  const int64_t rows = rows_of(b, v);
  switch (v.op) {
    case kParam:
      return affine<T>(b.direction[v.weight].value, rows * v.ld, T(1), T(0), false, out);
    case kView:
      return view_node<T>(b, v, kTangent, out);
    case kLinear:
      return linear_tangent<T>(b, v, out);
    case kAct:
      return act_node<T>(b, v, kTangent);
    case kAdd:
      return add_tangent<T>(b, v, out);
    case kMul:
      return mul_tangent<T>(b, v, out);
    case kCat:
      return cat_forward<T>(b, v, kTangent, out);
    case kExpand:
      return combine<T, false>(operand_of(b, v, v.a, kTangent), nullptr, out, rows, v.ld, false);
    case kTranspose:
      return transpose_forward<T>(b, v, kTangent, out);
    case kConv:
      return conv_node_tangent<T>(b, v);
    case kNorm:
      return norm_node<T>(b, v, kTangent, out);
    case kPool:
      return pool_forward<T>(b, v, kTangent, out);
    case kEmbedding:
      return read_table<T>(b, v, b.direction[v.weight].value, int64_t(v.c0), out);
    case kAffine:
      return affine<T>(plane_of(b, v.a, kTangent), rows * v.ld, T(v.c0), T(0), false, out);
    default:
      return;
  }
}

// Sends the gradient (plane kDelta or kDeltaTangent) of node i to its operands and parameters. Only values in the set
// take part: those that depend on adapted parameters (`inner`), or on anything a meta-gradient is wanted for.
template <class T>
void node_backward(const Block<T>& b, int32_t i, Plane plane, const Sink<T>& sink, bool inner) {
  const ValuePlan& v = b.plan->values[i];
  const auto in_set = [&](int32_t value) {
    return value >= 0 && (inner ? b.plan->values[value].tan : b.plan->values[value].meta);
  };
  if (!in_set(i) || v.in_chain || v.streamed) return;
  const bool to_a = in_set(v.a), to_b = in_set(v.b);
  const T* g = plane_of(b, i, plane);
  const int64_t rows = rows_of(b, v);
  switch (v.op) {
    case kInput:
      return;
    case kParam:
      if (sink.dst[v.weight])  // rows of a parameter are laid out as the value is
        for (int64_t r = 0; r < rows; ++r) {
          const T* init = sink_init(sink, v.weight, v.add_weight);
          sum_rows<T>(g + r * v.ld, 1, v.ld, init ? init + r * v.ld : nullptr, sink.beta[v.weight],
                      sink.dst[v.weight] + r * v.ld);
        }
      return;
    case kLinear:
      return linear_backward<T>(b, v, plane, sink, to_a);
    case kAct:
      return to_a ? act_node<T>(b, v, plane) : void();
    case kAdd:
    case kMul:
      return pair_backward<T>(b, v, plane, to_a, to_b);
    case kCat:
      return cat_backward<T>(b, v, plane, to_a, to_b);
    case kConv:
      return conv_node_backward_any<T>(b, v, plane, sink, to_a);
    case kNorm:
      return v.norm ? norm_backward<T>(b, v, plane, sink, to_a, inner) : layer_backward<T>(b, v, plane, sink, to_a);
    case kPool:
      return to_a ? pool_backward<T>(b, v, plane) : void();
    case kTranspose:
      return to_a ? transpose_backward<T>(b, v, plane) : void();
    case kEmbedding:
      return embedding_backward<T>(b, v, plane, sink);
    default:
      break;
  }
  if (!to_a) return;
  const ValuePlan& a = b.plan->values[v.a];
  if (v.op == kView) return copy_view<T>(v, g, a, plane_of(b, v.a, plane), v.batched ? b.samples : 1, v.add_a);
  if (v.op == kExpand) return send_back<T>(g, rows, v.ld, nullptr, operand_of(b, v, v.a, plane), v.add_a);
  affine<T>(g, rows * v.ld, T(v.c0), T(0), v.add_a, plane_of(b, v.a, plane));
}

}  // namespace
}  // namespace mtmlk
