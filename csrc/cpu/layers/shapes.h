// Nodes that move elements: inputs, parameters as values, views, concatenation, slices, transposes.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/elementwise.h"

namespace mtmlk {
namespace {

// Element e of a sample (row-major over its real rows and features) in a padded plane.
MTMLK_INLINE int64_t padded_index(const ValuePlan& v, int64_t e) { return e / v.features * v.ld + e % v.features; }

template <class T>
void copy_view(const ValuePlan& from, const T* src, const ValuePlan& to, T* dst, int64_t samples, bool add) {
  const int64_t run = from.features < to.features ? from.features : to.features;
  const int64_t unit = (from.features % run == 0 && to.features % run == 0) ? run : 1;
  const int64_t size = to.rows * to.features;
  for (int64_t n = 0; n < samples; ++n, src += from.rows * from.ld, dst += to.rows * to.ld) {
    if (!add) fill_zero<T>(dst, to.rows * to.ld);
    for (int64_t e = 0; e < size; e += unit) {
      const T* s = src + padded_index(from, e);
      T* d = dst + padded_index(to, e);
      for (int64_t i = 0; i < unit; ++i) d[i] = add ? d[i] + s[i] : s[i];
    }
  }
}

template <class T, Plane kPlane>
void cat_node(const Block<T>& b, const ValuePlan& v) {
  T* out = plane_of(b, v.self, kPlane);
  int64_t column = 0;
  fill_zero<T>(out, rows_of(b, v) * v.ld);
  const int32_t operands[2] = {v.a, v.b};
  for (const int32_t operand : operands) {
    const ValuePlan& x = b.plan->values[operand];
    if (kPlane == kPrimal || has_tangent(b, operand)) {
      const T* src = plane_of(b, operand, kPlane);
      for (int64_t r = 0; r < rows_of(b, v); ++r)
        for (int64_t f = 0; f < x.features; ++f) out[r * v.ld + column + f] = src[r * x.ld + f];
    }
    column += x.features;
  }
}

template <class T>
void cat_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  const T* g = plane_of(b, v.self, plane);
  int64_t column = 0;
  const auto send = [&](int32_t operand, bool wanted, bool add) {
    const ValuePlan& x = b.plan->values[operand];
    if (wanted) {
      T* dst = plane_of(b, operand, plane);
      if (!add) fill_zero<T>(dst, rows_of(b, x) * x.ld);
      for (int64_t r = 0; r < rows_of(b, x); ++r)
        for (int64_t f = 0; f < x.features; ++f) dst[r * x.ld + f] += g[r * v.ld + column + f];
    }
    column += x.features;
  };
  send(v.a, to.to_a, v.add_a);
  send(v.b, to.to_b, v.add_b);
}

// Features [c0, c1) of every row.
template <class T, Plane kPlane>
void slice_node(const Block<T>& b, const ValuePlan& v) {
  const ValuePlan& a = b.plan->values[v.a];
  const int64_t src_ld = kPlane == kPrimal ? a.ld_primal : a.ld;
  const T* src = plane_of(b, v.a, kPlane) + int64_t(v.c0);
  T* out = plane_of(b, v.self, kPlane);
  for (int64_t r = 0; r < rows_of(b, v); ++r, src += src_ld)
    for (int64_t f = 0; f < v.ld; f += Simd<T>::kLanes, out += Simd<T>::kLanes)
      store<T>(out, load_some<T>(src + f, v.features - f));
}

template <class T>
void slice_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (!to.to_a) return;
  const ValuePlan& a = b.plan->values[v.a];
  const T* g = plane_of(b, v.self, plane);
  T* dst = plane_of(b, v.a, plane);
  if (!v.add_a) fill_zero<T>(dst, rows_of(b, v) * a.ld);
  for (int64_t r = 0; r < rows_of(b, v); ++r)
    for (int64_t f = 0; f < v.features; ++f) dst[r * a.ld + int64_t(v.c0) + f] += g[r * v.ld + f];
}

template <class T>
void read_input(const Block<T>& b, const ValuePlan& v, T* out) {
  const T* src = b.inputs[v.kind];
  for (int64_t r = 0; r < rows_of(b, v); ++r)
    for (int64_t f = 0; f < v.ld; f += Simd<T>::kLanes)
      store<T>(out + r * v.ld + f, load_some<T>(src + r * v.features + f, v.features - f));
}

// dst [features, rows] = src [rows, features] per sample. Rows of `dst_ld` are filled up with zeros where they are read
// as vectors, left alone where they lie without a gap.
template <class T>
void transpose_rows(const T* src, int64_t src_ld, int64_t rows, int64_t features, bool add, T* dst, int64_t dst_ld) {
  for (int64_t f = 0; f < features; ++f) {
    T* to = dst + f * dst_ld;
    for (int64_t r = 0; r < rows; ++r) to[r] = add ? to[r] + src[r * src_ld + f] : src[r * src_ld + f];
    for (int64_t r = rows; r < dst_ld && !add; ++r) to[r] = T(0);
  }
}

template <class T, Plane kPlane>
void transpose_node(const Block<T>& b, const ValuePlan& v) {
  const ValuePlan& a = b.plan->values[v.a];
  const int64_t src_ld = kPlane == kPrimal ? a.ld_primal : a.ld, dst_ld = kPlane == kPrimal ? v.ld_primal : v.ld;
  const T* src = plane_of(b, v.a, kPlane);
  T* out = plane_of(b, v.self, kPlane);
  share(b, v.batched ? b.samples : 1, [&](int64_t n, int) {
    transpose_rows<T>(src + n * a.rows * src_ld, src_ld, a.rows, a.features, false, out + n * v.rows * dst_ld, dst_ld);
  });
}

template <class T>
void transpose_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (!to.to_a) return;
  const ValuePlan& a = b.plan->values[v.a];
  const T* src = plane_of(b, v.self, plane);
  T* dst = plane_of(b, v.a, plane);
  share(b, v.batched ? b.samples : 1, [&](int64_t n, int) {
    transpose_rows<T>(src + n * v.rows * v.ld, v.ld, v.rows, v.features, v.add_a, dst + n * a.rows * a.ld, a.ld);
  });
}

template <class T>
void input_node(const Block<T>& b, const ValuePlan& v) {
  if (!v.direct_input) read_input<T>(b, v, plane_of(b, v.self, kPrimal));
}

template <class T>
constexpr LayerKernels<T> kInputLayer = {input_node<T>, nullptr, nullptr};

template <class T, Plane kPlane>
void param_node(const Block<T>& b, const ValuePlan& v) {
  const ParamPtr<T>& p = (kPlane == kPrimal ? b.params : b.direction)[v.weight];
  affine<T>(p.value, rows_of(b, v) * v.ld, T(1), T(0), false, plane_of(b, v.self, kPlane));
}

template <class T>
void param_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  const Sink<T>& sink = to.sink;
  if (!sink.dst[v.weight]) return;
  const T *g = plane_of(b, v.self, plane), *init = sink_init(sink, v.weight, v.add_weight);
  for (int64_t r = 0; r < rows_of(b, v); ++r)  // rows of a parameter are laid out as the value is
    sum_rows<T>(g + r * v.ld, 1, v.ld, init ? init + r * v.ld : nullptr, sink.beta[v.weight],
                sink.dst[v.weight] + r * v.ld);
}

template <class T>
constexpr LayerKernels<T> kParamLayer = {param_node<T, kPrimal>, param_node<T, kTangent>, param_backward<T>};

template <class T, Plane kPlane>
void view_node(const Block<T>& b, const ValuePlan& v) {
  copy_view<T>(b.plan->values[v.a], plane_of(b, v.a, kPlane), v, plane_of(b, v.self, kPlane), v.batched ? b.samples : 1,
               false);
}

template <class T>
void view_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (to.to_a)
    copy_view<T>(v, plane_of(b, v.self, plane), b.plan->values[v.a], plane_of(b, v.a, plane), v.batched ? b.samples : 1,
                 v.add_a);
}

template <class T>
constexpr LayerKernels<T> kViewLayer = {view_node<T, kPrimal>, view_node<T, kTangent>, view_backward<T>};

template <class T>
constexpr LayerKernels<T> kCatLayer = {cat_node<T, kPrimal>, cat_node<T, kTangent>, cat_backward<T>};

template <class T>
constexpr LayerKernels<T> kSliceLayer = {slice_node<T, kPrimal>, slice_node<T, kTangent>, slice_backward<T>};

template <class T>
constexpr LayerKernels<T> kTransposeLayer = {transpose_node<T, kPrimal>, transpose_node<T, kTangent>,
                                             transpose_backward<T>};

}  // namespace
}  // namespace mtmlk
