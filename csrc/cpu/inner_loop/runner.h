// What one task works with: its memory, and the passes that task.h runs in their order.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/update.h"
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
  T* losses;  // [steps + 1] of this task: support losses, then the query loss, or one for every theta_k

  T* states;       // [slots, state_size]; in low-rank form the planes of the query set behind them
  T* checkpoints;  // [segments, own + own_t + the rule's moments]
  T* lambda;       // [carry_cols] full layout, then the rates' gradients
  T* direction;    // V: own + own_t
  T* fixed_query[2];
  T* fixed_tangent[2];
  T* chunk_grads;      // [chunks, chunk_size]
  T* coef[2];          // weights of support (of every set) and query samples
  T* each_sample;      // what a pass sends to the weight of each, where masks want gradients
  T* start;            // [own + own_t] of parameters that are each task's own at the start
  T* moments[2];       // [n_moments, own_size]: at the start; cotangents of the rule's moments
  T* clip;             // [steps] by which clipping scales the gradients
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
    int64_t set;  // which of the sets in x and y: one a task, or one a step of a task
    const void* mask;
    void *to_y, *to_mask;  // gradients of y and mask; NULL: not wanted
  };

  Phase support(int64_t k) const;
  Phase query() const;
  T cotangent(int64_t k) const {
    const int64_t at = (plan->query_steps ? k * call->tasks : 0) + task;
    return call->grad_loss ? static_cast<const T*>(call->grad_loss)[at] : T(1);
  }
  T step_weight(int64_t k) const;
  int64_t set_size() const { return plan->own_size + plan->own_t_size + plan->n_moments * plan->own_size; }
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
  T sample_weight(const Phase& phase, int64_t sample) const;
  double unit_weight(const Phase& phase, double* total) const;
  void sample_weights(const Phase& phase, T* out) const;

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
  T* gradient(int64_t k) const;
  const T* moments_before(int64_t k) const;
  UpdateStep<T> rule_at(int64_t k) const;
  void load_start();
  void load_moments();
  T clip_scale(int64_t k) const;
  void rule_step(int64_t k);
  void start_cotangents();
  void rule_adjoint(int64_t k);
  void unclip(int64_t k, double* hyper);
  void write_moments() const;
  void rate_gradients(int64_t k);
  void add_external(int64_t k);
  void reverse(T* carry_row);
  void replay(int64_t segment_start, int64_t end);
  void write_adapted(int64_t k) const;
  void collect_input_gradient(const Phase& phase, const Block<T>& b, int64_t chunk, int64_t index, Plane plane,
                              void* out);
  void clear_gradients() const;
  void collect_data_gradients(const Phase& phase, const LossBlock<T>& loss, const T* tangent, T seed, int64_t chunk,
                              int64_t index);
  void weight_gradients(const Phase& phase);
};

}  // namespace
}  // namespace mtmlk
