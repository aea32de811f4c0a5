// Linear layers by the transpose of a weight W [O, I] that other layers read as it is: tied autoencoders.
//
//   z = a W + b      da = dz W^T                dW = dz^T a                db = sum dz
//   zt = at W + a V + vb     dat = dzt W^T + dz V^T     dWt = dzt^T a + dz^T at     dbt = sum dzt
// The products of linear.h with each other's copy of the weight; none of these weights is narrow (plan.cpp).
#pragma once

#include <stdint.h>

#include "simd/gemm.h"
#include "simd/layout.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

template <class T>
void linear_transposed_forward(const Block<T>& b, const ValuePlan& v) {
  const ValuePlan& a = b.plan->values[v.a];
  Gemm<T> g = {};
  g.c = plane_of(b, v.self, kPrimal), g.ldc = v.ld, g.beta = T(1);
  g.d = v.bias >= 0 ? b.params[v.bias].value : nullptr;
  g.p1 = {plane_of(b, v.a, kPrimal), a.ld, b.params[v.weight].transposed, 0, a.features};
  multiply_packed<T>(rows_of(b, v), v.ld, g);
}

template <class T>
void linear_transposed_tangent(const Block<T>& b, const ValuePlan& v) {
  const ValuePlan& a = b.plan->values[v.a];
  const bool bias_moves = v.bias >= 0 && b.plan->params[v.bias].adapted;
  Gemm<T> g = {};
  g.c = plane_of(b, v.self, kTangent), g.ldc = v.ld, g.beta = T(1);
  g.d = bias_moves ? b.direction[v.bias].value : nullptr;
  if (has_tangent(b, v.a)) g.p1 = {plane_of(b, v.a, kTangent), a.ld, b.params[v.weight].transposed, 0, a.features};
  if (b.plan->params[v.weight].adapted)
    g.p2 = {plane_of(b, v.a, kPrimal), a.ld, b.direction[v.weight].transposed, 0, a.features};
  multiply_packed<T>(rows_of(b, v), v.ld, g);
}

// a's padding need not be 0, a weight's must.
template <class T>
void clear_outputs_past_end(const ParamPlan& w, T* packed) {
  each_panel<T>(w.cols, w.rows, [&](int64_t start, int64_t col, int64_t width) {
    for (int64_t i = 0; col + width > w.rows && i < w.cols; ++i)
      for (int64_t o = w.rows - col; o < width; ++o) packed[start + i * width + o] = T(0);
  });
}

template <class T>
void linear_transposed_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  const Sink<T>& sink = to.sink;
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  const int64_t rows = rows_of(b, v);
  const T *dz = plane_of(b, v.self, plane), *primal_dz = plane_of(b, v.self, kDelta);
  if (sink.dst[v.weight]) {
    Gemm<T> g = {};
    T* const dw = g.c = sink.dst[v.weight];
    g.d = sink_init(sink, v.weight, v.add_weight), g.beta = sink.beta[v.weight];
    g.p1 = {dz, v.ld, plane_of(b, v.a, kPrimal), a.ld, rows};
    if (plane == kDeltaTangent && has_tangent(b, v.a)) g.p2 = {primal_dz, v.ld, plane_of(b, v.a, kTangent), a.ld, rows};
    multiply_transposed<T>(w.cols, a.ld, g);
    clear_outputs_past_end<T>(w, dw);
  }
  if (v.bias >= 0 && sink.dst[v.bias])
    sum_rows<T>(dz, rows, v.ld, sink_init(sink, v.bias, v.add_bias), sink.beta[v.bias], sink.dst[v.bias]);
  if (!to.to_a) return;
  Gemm<T> g = {};
  g.c = plane_of(b, v.a, plane), g.ldc = a.ld, g.d = v.add_a ? g.c : nullptr, g.ldd = a.ld, g.beta = T(1);
  g.p1 = {dz, v.ld, b.params[v.weight].value, 0, w.cols};
  if (plane == kDeltaTangent && b.tangent && w.adapted)
    g.p2 = {primal_dz, v.ld, b.direction[v.weight].value, 0, w.cols};
  multiply_packed<T>(rows, a.ld, g);
}

template <class T>
constexpr LayerKernels<T> kLinearTransposedLayer = {linear_transposed_forward<T>, linear_transposed_tangent<T>,
                                                    linear_transposed_backward<T>};

}  // namespace
}  // namespace mtmlk
