// Normalisations as nodes: each row by itself, or (with a NormPlan) over samples or images.
#pragma once

#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/norm/layer.h"
#include "layers/norm/passes.h"

namespace mtmlk {
namespace {

template <class T>
void norm_node_forward(const Block<T>& b, const ValuePlan& v) {
  v.norm ? norm_forward<T>(b, v) : layer_forward<T>(b, v, kPrimal, plane_of(b, v.self, kPrimal));
}

template <class T>
void norm_node_tangent(const Block<T>& b, const ValuePlan& v) {
  v.norm ? norm_tangent<T>(b, v) : layer_forward<T>(b, v, kTangent, plane_of(b, v.self, kTangent));
}

template <class T>
void norm_node_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  v.norm ? norm_backward<T>(b, v, plane, to.sink, to.to_a, to.inner) : layer_backward<T>(b, v, plane, to.sink, to.to_a);
}

template <class T>
constexpr LayerKernels<T> kNormLayer = {norm_node_forward<T>, norm_node_tangent<T>, norm_node_backward<T>};

}  // namespace
}  // namespace mtmlk
