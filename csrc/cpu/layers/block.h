// A block of samples and its planes: what every node works on.
#pragma once

#include <stdint.h>

#include "simd/simd.h"
#include "runtime/stops.h"
#include "runtime/watch.h"
#include "inner_loop/plan/plan.h"

namespace mtmlk {
namespace {

template <class T>
struct ParamPtr {
  const T* value;       // packed
  const T* transposed;  // packed transposed copy, where the plan has one
};

// Where the parameter gradients of a pass go: dst = (first block ? init : dst) + beta * gradient. All are [n_params];
// dst nullptr: not wanted; init nullptr: zero.
template <class T>
struct Sink {
  T* const* dst;
  const T* const* init;
  const T* beta;
  bool first;
};

template <class T>
struct LowRank;

template <class T>
struct Block {
  const Plan* plan;
  int64_t samples;
  const T* const* inputs;  // [n_inputs] at the block's first sample, [samples, size]
  T* planes[kPlanes];      // of batched values
  T* fixed[kPlanes];       // of unbatched values
  int64_t stride;          // samples that the planes have room for
  const ParamPtr<T>* params;
  const ParamPtr<T>* direction;  // V, for the tangent passes
  const LowRank<T>* low;         // of the weights in low-rank form, see low_rank.h
  int64_t pass;                  // there: the support set's step, or the number of steps for the query set
  bool tangent;                  // false: V = 0 (first order)
  bool remake;                   // outputs of `remade` convolutions have no plane: they are made where they are needed
  int workers;                   // threads that may share the block's nodes
  Watch* watch;                  // of the call, where a pass takes long enough to be looked at inside
  T* scratch;                    // [plan->scratch_size], of the block
  T* own;                        // [workers, plan->worker_scratch_size]
};

// body(i, worker) for i < n, less what is left when the call is stopped. What i covers never depends on how many
// workers there are.
template <class T, class Body>
void share(const Block<T>& b, int64_t n, const Body& body) {
  each_piece(b.workers, n, b.watch, body);
}

// An input from sample `at` on; of ids, which are as wide in either dtype, the address alone.
template <class T>
MTMLK_INLINE const T* input_at(const InputPlan& input, const void* x, int64_t at) {
  const int64_t bytes = input.ids ? int64_t(sizeof(int64_t)) : int64_t(sizeof(T));
  return reinterpret_cast<const T*>(static_cast<const char*>(x) + at * input.size * bytes);
}

template <class T>
MTMLK_INLINE T* plane_of(const Block<T>& b, int32_t value, Plane plane) {
  const ValuePlan& v = b.plan->values[value];
  if (v.direct_input && plane == kPrimal) return const_cast<T*>(b.inputs[v.kind]);
  return v.batched ? b.planes[plane] + v.offset[plane] * b.stride : b.fixed[plane] + v.offset[plane];
}

template <class T>
MTMLK_INLINE int64_t rows_of(const Block<T>& b, const ValuePlan& v) {
  return v.batched ? v.rows * b.samples : v.rows;
}

template <class T>
MTMLK_INLINE bool has_tangent(const Block<T>& b, int32_t value) {
  return b.tangent && b.plan->values[value].tan;
}

// dst += beta * column sums of src [rows, ld], or dst = init + ...
template <class T>
void sum_rows(const T* src, int64_t rows, int64_t ld, const T* init, T beta, T* dst) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t col = 0; col < ld; col += kLanes) {
    VecOf<T> even = {}, odd = {};
    int64_t r = 0;
    for (; r + 1 < rows; r += 2) {
      even += load<T>(src + r * ld + col);
      odd += load<T>(src + (r + 1) * ld + col);
    }
    if (r < rows) even += load<T>(src + r * ld + col);
    const VecOf<T> start = init ? load<T>(init + col) : VecOf<T>{};
    store<T>(dst + col, multiply_add<T>(splat<T>(beta), even + odd, start));
  }
}

template <class T>
MTMLK_INLINE const T* sink_init(const Sink<T>& sink, int32_t param, bool add) {
  return add || !sink.first ? sink.dst[param] : sink.init[param];
}

// What a node's gradient goes to.
template <class T>
struct Targets {
  const Sink<T>& sink;
  bool to_a, to_b;  // the operands that take part
  bool inner;       // of the inner loop's gradient: only what depends on adapted parameters takes part
};

// The four functions of a layer, over a block of samples:
//   forward            value                                kPrimal
//   backward           gradient with respect to it          kDelta
//   tangent            derivative along a direction V       kTangent         (f' at theta + eps V)
//   tangent backward   the same derivative of the gradient  kDeltaTangent
// Both ways back are one function: what is linear in its operands does the same twice, and the rest has a second
// product. nullptr: of an input, which has no tangent and sends its gradient nowhere.
template <class T>
struct LayerKernels {
  void (*forward)(const Block<T>&, const ValuePlan&);
  void (*tangent)(const Block<T>&, const ValuePlan&);
  void (*backward)(const Block<T>&, const ValuePlan&, Plane, const Targets<T>&);
};

}  // namespace
}  // namespace mtmlk
