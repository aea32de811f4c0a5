// The functions of every operation, and the nodes of a program that run them.
#pragma once

#include <stdint.h>

#include "mtml/program.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/node.h"
#include "layers/elementwise.h"
#include "layers/embedding.h"
#include "layers/linear.h"
#include "layers/linear_transposed.h"
#include "layers/norm/node.h"
#include "layers/pointwise.h"
#include "layers/pool.h"
#include "layers/shapes.h"
#include "layers/softmax.h"

namespace mtmlk {
namespace {

template <class T>
struct LayerTable {
  LayerKernels<T> of[kOpCount] = {};

  constexpr LayerTable() {
    of[kInput] = kInputLayer<T>;
    of[kParam] = kParamLayer<T>;
    of[kView] = kViewLayer<T>;
    of[kLinear] = kLinearLayer<T>;
    of[kAct] = kActLayer<T>;
    of[kAdd] = kAddLayer<T>;
    of[kMul] = kMulLayer<T>;
    of[kCat] = kCatLayer<T>;
    of[kExpand] = kExpandLayer<T>;
    of[kAffine] = kAffineLayer<T>;
    of[kTranspose] = kTransposeLayer<T>;
    of[kConv] = kConvLayer<T>;
    of[kNorm] = kNormLayer<T>;
    of[kPool] = kPoolLayer<T>;
    of[kEmbedding] = kEmbeddingLayer<T>;
    of[kSlice] = kSliceLayer<T>;
    of[kSoftmax] = kSoftmaxLayer<T>;
    of[kLinearTransposed] = kLinearTransposedLayer<T>;
  }
};

template <class T>
constexpr LayerTable<T> kLayers;

template <class T>
void node_forward(const Block<T>& b, int32_t i) {
  const ValuePlan& v = b.plan->values[i];
  if (!v.in_chain) kLayers<T>.of[v.op].forward(b, v);
}

template <class T>
void node_tangent(const Block<T>& b, int32_t i) {
  const ValuePlan& v = b.plan->values[i];
  if (has_tangent(b, i) && !v.in_chain) kLayers<T>.of[v.op].tangent(b, v);
}

// Sends the gradient (plane kDelta or kDeltaTangent) of node i to its operands and parameters. Only values in the set
// take part: those that depend on adapted parameters (`inner`), or on anything a meta-gradient is wanted for.
template <class T>
void node_backward(const Block<T>& b, int32_t i, Plane plane, const Sink<T>& sink, bool inner) {
  const ValuePlan& v = b.plan->values[i];
  const auto in_set = [&](int32_t value) {
    return value >= 0 && (inner ? b.plan->values[value].tan : b.plan->values[value].meta);
  };
  const auto backward = kLayers<T>.of[v.op].backward;
  if (!in_set(i) || v.in_chain || v.streamed || !backward) return;
  backward(b, v, plane, Targets<T>{sink, in_set(v.a), in_set(v.b), inner});
}

}  // namespace
}  // namespace mtmlk
