// Embeddings: rows of a table at ids.
//
//   forward   z[r] = W[id_r]                 tangent            zt[r] = V[id_r]
//   backward  dW[id_r] += dz[r]              tangent backward   dWt[id_r] += dzt[r]          rows in their order
// The row of the padding id is read like any other and has no derivative: its tangent is 0, and it takes no gradient.
// Ids were checked before (api.cpp).
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

template <class T>
MTMLK_INLINE const int64_t* ids_of(const Block<T>& b, const ValuePlan& v) {
  return reinterpret_cast<const int64_t*>(b.inputs[v.kind]);
}

// Where row `id` of a table begins and how far apart its elements are: a table that a linear layer reads as well is
// held in that layer's panels.
struct TableRow {
  int64_t at, step;
};

template <class T>
MTMLK_INLINE TableRow table_row(const ParamPlan& p, int64_t id) {
  constexpr int64_t kLanes = Simd<T>::kLanes, kPanel = kPanelVecs * kLanes;
  if (p.layout != kLinearWeight || p.narrow) return {id * round_up(p.cols, kLanes), 1};
  const int64_t start = id / kPanel * kPanel, left = round_up(p.rows, kLanes) - start;
  return {start * p.cols + id - start, left < kPanel ? left : kPanel};
}

// z (or zt, of the direction) from the table; `padding`: the id whose rows are 0, or -1.
template <class T>
void read_table(const Block<T>& b, const ValuePlan& v, const T* table, int64_t padding, T* out) {
  const ParamPlan& p = b.plan->params[v.weight];
  const int64_t* ids = ids_of(b, v);
  for (int64_t r = 0; r < rows_of(b, v); ++r, out += v.ld) {
    fill_zero<T>(out, v.ld);
    if (ids[r] == padding) continue;
    const TableRow row = table_row<T>(p, ids[r]);
    for (int64_t c = 0; c < v.features; ++c) out[c] = table[row.at + c * row.step];
  }
}

template <class T>
void embedding_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  const Sink<T>& sink = to.sink;
  T* dst = sink.dst[v.weight];
  if (!dst) return;
  const ParamPlan& p = b.plan->params[v.weight];
  const T* init = sink_init(sink, v.weight, v.add_weight);
  if (!init) fill_zero<T>(dst, p.size);
  if (init && init != dst) __builtin_memcpy(dst, init, sizeof(T) * size_t(p.size));
  const int64_t *ids = ids_of(b, v), padding = int64_t(v.c0);
  const T *g = plane_of(b, v.self, plane), beta = sink.beta[v.weight];
  for (int64_t r = 0; r < rows_of(b, v); ++r, g += v.ld) {
    if (ids[r] == padding) continue;
    const TableRow row = table_row<T>(p, ids[r]);
    for (int64_t c = 0; c < v.features; ++c) dst[row.at + c * row.step] += beta * g[c];
  }
}

template <class T>
void embedding_forward(const Block<T>& b, const ValuePlan& v) {
  read_table<T>(b, v, b.params[v.weight].value, -1, plane_of(b, v.self, kPrimal));
}

template <class T>
void embedding_tangent(const Block<T>& b, const ValuePlan& v) {
  read_table<T>(b, v, b.direction[v.weight].value, int64_t(v.c0), plane_of(b, v.self, kTangent));
}

template <class T>
constexpr LayerKernels<T> kEmbeddingLayer = {embedding_forward<T>, embedding_tangent<T>, embedding_backward<T>};

}  // namespace
}  // namespace mtmlk
