// What one task works with: its memory, and the passes that task.h runs in their order.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "runtime/carver.h"
#include "runtime/stops.h"
#include "runtime/watch.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/low_rank.h"
#include "inner_loop/loss.h"

namespace mtmlk {
namespace {

// What tasks have in common.
template <class T>
struct Shared {
  T* packed;          // theta_0, then its transposes
  ParamPtr<T>* base;  // [n_params] into packed
  T* rates;           // packed
  T* ones;            // [n_params]
  int workers;        // threads that share one task
};

template <class T>
struct Worker {
  T* planes;   // transient
  T* scratch;  // of its chunk's nodes
  T* own;
  T** dst;  // [n_params] each
  const T** init;
};

template <class T>
struct Runner {
  const Plan* plan;
  const MtmlkCall* call;
  const Shared<T>* shared;
  Watch* watch;
  int64_t task;
  T* losses;  // [steps + 1] of this task: support losses, then the query loss

  T* states;       // [slots, state_size]; in low-rank form the planes of the query set behind them
  T* checkpoints;  // [segments, own + own_t]
  T* lambda;       // [carry_cols] full layout, then the rates' gradients
  T* direction;    // V: own + own_t
  T* fixed_query[2];
  T* fixed_tangent[2];
  T* chunk_grads;      // [chunks, chunk_size]
  T* coef[2];          // weights of support and query samples
  T* negative_rate;    // [n_params]
  T* negative_rates;   // [steps, n_params] in low-rank form
  Factor<T>* factors;  // theta's, then lambda's
  Block<T>* passes;    // [steps + 1] of the task; these, its inputs and its states belong to the driver
  LowRank<T> low;
  double* chunk_loss;
  ParamPtr<T>*now, *along;  // [n_params]: theta_k and V
  Worker<T>* workers;
  const T** inputs;  // [workers, n_inputs], or in low-rank form [steps + 1, n_inputs]

  void carve(Carver& carver, const Plan& p, int worker_count);
  void run(T* carry_row);

 private:
  struct Phase {
    bool query;
    const Cut* cut;
    MtmlkLoss loss;
    const void* const* x;
    const void* y;
    const T* coef;
  };

  Phase support() const;
  Phase query() const;
  T cotangent() const { return call->grad_loss ? static_cast<const T*>(call->grad_loss)[task] : T(1); }
  T step_weight(int64_t k) const;
  bool differentiate() const { return call->differentiate != 0; }
  // Of short passes, only some are followed by a look.
  bool stops_at(int64_t k) const { return (plan->watched || k % 16 == 0) && stops(watch); }
  bool segmented() const { return plan->needs && plan->slots < plan->steps; }

  T* state(int64_t k) const { return states + k % plan->slots * plan->state_size; }
  const T* theta(int64_t k) const;       // own layout; nullptr at k = 0
  void point_to(int64_t k, bool query);  // now = theta_k
  void point_along(int64_t k);           // the direction V of low weights at step k
  T* gradient_of(T* base, int64_t i, int64_t k, bool query) const;
  int64_t step_row(const ParamPlan& p, int64_t k, bool query) const;
  const T* rate(const ParamPlan& p, int64_t k) const;
  void sample_weights(bool query, T* out) const;

  template <class Body>
  void each_chunk(const Cut& cut, Body body);
  Block<T> block(const Phase& phase, int64_t chunk, int64_t index, int worker, int64_t k, bool kept);
  T* aux_of(const Block<T>& b) const { return b.planes[kPrimal] - plan->out_rows * plan->out_ld * b.stride; }
  LossBlock<T> loss_of(const Phase& phase, const Block<T>& b, int64_t chunk, int64_t index, T scale) const;
  void fixed_nodes(const Phase& phase, int64_t k, Plane plane, const Sink<T>* sink, bool inner);
  T* fixed_plane(const Phase& phase, int64_t k, Plane plane) const;
  T* begin_chunk(const Cut& cut, int64_t chunk, Plane plane);
  double sum_losses(const Cut& cut) const;
  void sum_chunks(int64_t chunks, int64_t n, const T* init, T* dst) const;
  template <class Aim>
  void finish_chunks(const Phase& phase, int64_t k, Plane plane, const T* beta, bool inner, Aim aim);

  void inner_step(int64_t k, bool record);
  void take_step(int64_t k);
  void query_pass(int64_t k, bool add);
  void make_direction(int64_t k);
  void tangent_pass(int64_t k, T seed);
  void rate_gradients(int64_t k);
  void add_external(int64_t k);
  void reverse(T* carry_row);
  void replay(int64_t segment_start, int64_t end);
  void write_adapted(int64_t k) const;
  void collect_input_gradient(const Phase& phase, const Block<T>& b, int64_t chunk, int64_t index, Plane plane,
                              void* out);
};

}  // namespace
}  // namespace mtmlk
