// Linear layers.
//
//   z = a W + b      da = dz W^T                dW = a^T dz                db = sum dz
//   zt = at W + a V + vb     dat = dzt W^T + dz V^T     dWt = a^T dzt + at^T dz     dbt = sum dzt
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"
#include "simd/dots.h"
#include "simd/gemm.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/low_rank.h"

namespace mtmlk {
namespace {

// z = bias + A1 W1 + A2 W2 (the products in g), for a packed or a narrow weight.
template <class T>
void apply_weight(const ParamPlan& w, int64_t rows, T* z, int64_t ld, const T* bias, Gemm<T>& g) {
  g.c = z, g.ldc = ld, g.d = bias, g.ldd = 0, g.beta = T(1);
  if (!w.narrow) return multiply_packed<T>(rows, ld, g);
  const int64_t padded = round_up(w.cols, Simd<T>::kLanes);
  g.p1.ldb = g.p2.ldb = padded;
  g.p1.k = g.p1.k ? padded : 0;
  g.p2.k = g.p2.k ? padded : 0;
  multiply_narrow<T>(rows, w.rows, z, ld, bias, g);
}

template <class T>
RowsOf<T> rows_in(const Block<T>& b, const ValuePlan& v, int32_t value, Plane plane) {
  const ValuePlan& x = b.plan->values[value];
  return {plane_of(b, value, plane), plane == kPrimal ? x.ld_primal : x.ld, rows_of(b, v)};
}

template <class T>
void linear_forward(const Block<T>& b, const ValuePlan& v) {
  T* z = plane_of(b, v.self, kPrimal);
  const ParamPlan& w = b.plan->params[v.weight];
  Gemm<T> g = {};
  g.p1.a = plane_of(b, v.a, kPrimal), g.p1.lda = b.plan->values[v.a].ld_primal;
  g.p1.b = b.params[v.weight].value, g.p1.k = w.cols;
  if (v.gate_output) g.gate = z, g.ldgate = v.ld;
  const T* bias = v.bias >= 0 ? b.params[v.bias].value : nullptr;
  if (!w.low) return apply_weight<T>(w, rows_of(b, v), z, v.ld, bias, g);
  g.c = z, g.ldc = v.ld, g.d = bias, g.beta = T(1);
  multiply_low_rank<T>(b, v, false, rows_of(b, v), v.ld, g,
                       {{rows_in(b, v, v.a, kPrimal), b.low->theta, w.adapted ? b.low->n_theta : 0}, {}});
}

template <class T>
void linear_tangent(const Block<T>& b, const ValuePlan& v) {
  T* zt = plane_of(b, v.self, kTangent);
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  const bool bias_moves = v.bias >= 0 && b.plan->params[v.bias].adapted, input_moves = has_tangent(b, v.a);
  Gemm<T> g = {};
  if (input_moves) {
    g.p1.a = plane_of(b, v.a, kTangent), g.p1.lda = a.ld, g.p1.b = b.params[v.weight].value, g.p1.k = w.cols;
  }
  if (w.adapted && !w.low) {
    Product<T>& p = input_moves ? g.p2 : g.p1;
    p.a = plane_of(b, v.a, kPrimal), p.lda = a.ld_primal, p.b = b.direction[v.weight].value, p.k = w.cols;
  }
  if (v.gate_output) g.gate = plane_of(b, v.self, kPrimal), g.ldgate = v.ld;
  const T* bias = bias_moves ? b.direction[v.bias].value : nullptr;
  if (!w.low) return apply_weight<T>(w, rows_of(b, v), zt, v.ld, bias, g);
  g.c = zt, g.ldc = v.ld, g.d = bias, g.beta = T(1);
  const Term<T> by_theta = {rows_in(b, v, v.a, kTangent), b.low->theta, w.adapted && input_moves ? b.low->n_theta : 0};
  const Term<T> by_v = {rows_in(b, v, v.a, kPrimal), b.low->along, w.adapted ? b.low->n_along : 0};
  multiply_low_rank<T>(b, v, false, rows_of(b, v), v.ld, g, {by_theta, by_v});
}

// dW = sink's start + beta (a^T dz + at^T dz2); a narrow weight is the transpose of a packed one. The products in g
// have the inputs as a and the deltas as b.
template <class T>
void weight_gradient(const ParamPlan& w, int64_t ld, const Sink<T>& sink, int32_t param, bool add, Gemm<T>& g) {
  g.c = sink.dst[param], g.d = sink_init(sink, param, add), g.beta = sink.beta[param];
  if (!w.narrow) return multiply_transposed<T>(w.cols, ld, g);
  Product<T>* products[2] = {&g.p1, &g.p2};
  for (Product<T>* p : products) {
    const T* a = p->a;
    const int64_t lda = p->lda;
    p->a = p->b, p->lda = p->ldb, p->b = a, p->ldb = lda;
  }
  T* const c = g.c;
  g.ldc = g.ldd = round_up(w.cols, Simd<T>::kLanes);
  multiply_rows<T, true>(w.rows, g.ldc, g);
  const int64_t last = g.ldc - Simd<T>::kLanes;  // a's padding need not be 0 (sigmoid(0) is not), the weight's must
  for (int64_t o = 0; o < w.rows; ++o) {
    T* end = c + o * g.ldc + last;
    store<T>(end, keep_lanes<T>(load<T>(end), w.cols - last));
  }
}

template <class T>
void clear_padding(T* rows, int64_t count, int64_t features, int64_t ld) {
  if (features == ld) return;
  const int64_t last = ld - Simd<T>::kLanes;
  for (int64_t r = 0; r < count; ++r) {
    T* end = rows + r * ld + last;
    store<T>(end, keep_lanes<T>(load<T>(end), features - last));
  }
}

template <class T>
void input_gradient(const Block<T>& b, const ValuePlan& v, Plane plane, const T* dz, const T* primal_dz) {
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  const auto weight = [&](const ParamPtr<T>& p) { return w.narrow ? p.value : p.transposed; };
  Gemm<T> g = {};
  g.c = plane_of(b, v.a, plane), g.ldc = a.ld, g.d = v.add_a ? g.c : nullptr, g.ldd = a.ld, g.beta = T(1);
  g.p1.a = dz, g.p1.lda = v.ld, g.p1.b = weight(b.params[v.weight]), g.p1.ldb = a.ld, g.p1.k = w.rows;
  const bool along = plane == kDeltaTangent && b.tangent && w.adapted;
  if (along && !w.low) {
    g.p2.a = primal_dz, g.p2.lda = v.ld, g.p2.b = weight(b.direction[v.weight]), g.p2.ldb = a.ld, g.p2.k = w.rows;
  }
  if (v.gate_input) g.gate = plane_of(b, v.a, kPrimal), g.ldgate = a.ld;
  if (w.low) {
    const int64_t rows = rows_of(b, v);
    multiply_low_rank<T>(b, v, true, rows, a.ld, g,
                         {{{dz, v.ld, rows}, b.low->theta, w.adapted ? b.low->n_theta : 0},
                          {{primal_dz, v.ld, rows}, b.low->along, along ? b.low->n_along : 0}});
    clear_padding<T>(g.c, rows, a.features, a.ld);  // of A: sigmoid(0) is not 0
  } else if (w.narrow)
    multiply_rows<T, false>(rows_of(b, v), a.ld, g);
  else
    multiply_packed<T>(rows_of(b, v), a.ld, g);
}

// `plane` is kDelta or kDeltaTangent; the latter has the second products.
template <class T>
void linear_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  const Sink<T>& sink = to.sink;
  const ValuePlan& a = b.plan->values[v.a];
  const int64_t rows = rows_of(b, v);
  const T *dz = plane_of(b, v.self, plane), *primal_dz = plane_of(b, v.self, kDelta);
  if (sink.dst[v.weight]) {
    Gemm<T> g = {};
    g.p1.a = plane_of(b, v.a, kPrimal), g.p1.lda = a.ld_primal, g.p1.b = dz, g.p1.ldb = v.ld, g.p1.k = rows;
    if (plane == kDeltaTangent && has_tangent(b, v.a)) {
      g.p2.a = plane_of(b, v.a, kTangent), g.p2.lda = a.ld, g.p2.b = primal_dz, g.p2.ldb = v.ld, g.p2.k = rows;
    }
    weight_gradient<T>(b.plan->params[v.weight], v.ld, sink, v.weight, v.add_weight, g);
  }
  if (v.bias >= 0 && sink.dst[v.bias])
    sum_rows<T>(dz, rows, v.ld, sink_init(sink, v.bias, v.add_bias), sink.beta[v.bias], sink.dst[v.bias]);
  if (to.to_a) input_gradient<T>(b, v, plane, dz, primal_dz);
}

template <class T>
constexpr LayerKernels<T> kLinearLayer = {linear_forward<T>, linear_tangent<T>, linear_backward<T>};

}  // namespace
}  // namespace mtmlk
