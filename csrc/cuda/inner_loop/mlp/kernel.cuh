// The inner loop of a multi-layer perceptron, a block a task, there and back:
//
//   for k = 0 .. K-1:   samples of the support set there and back | W -= rate g
//   the query set likewise                                        | lambda = g
//   for k = K-1 .. 0:   tangents along -rate lambda               | lambda += H (-rate lambda)
//
// | is a barrier of the block; what is left of it needs none between layers. What a step has left goes to the history,
// which stays in the second-level cache, and comes back while the step behind it is at work.
#pragma once

#include "cuda/inner_loop/mlp/io.cuh"
#include "cuda/inner_loop/mlp/samples.cuh"
#include "cuda/inner_loop/mlp/sums.cuh"
#include "cuda/inner_loop/mlp/weights.cuh"

namespace mtmlk {

// Samples that a plane has room for.
MTMLK_ANYWHERE int room_of(const MtmlkMlpCall& c) { return c.support > c.query ? c.support : c.query; }

// A block's arrays on the chip.
template <class T, class S>
struct MlpMemory {
  T *steps[2], *lambda, *moving, *support_x, *query_x, *support_y, *query_y, *each, *dots, *rates, *rate_grads, *ones;

  __host__ __device__ static MlpMemory of(SharedCarver& carver, const MtmlkMlpCall& c) {
    const int room = room_of(c);
    const size_t step = size_t(S::step(room)), rates = size_t(c.steps) * 2 * S::kLayers;
    MlpMemory m = {};
    m.steps[0] = carver.take<T>(step);
    m.steps[1] = c.sets > 1 ? carver.take<T>(step) : m.steps[0];
    m.lambda = carver.take<T>(S::kParams);
    m.moving = carver.take<T>(size_t(S::values(room)));
    m.support_x = carver.take<T>(size_t(c.support) * row_of(S::width(0)));
    m.query_x = carver.take<T>(size_t(c.query) * row_of(S::width(0)));
    m.support_y = carver.take<T>(size_t(c.support) * S::width(S::kLayers));
    m.query_y = carver.take<T>(size_t(c.query) * S::width(S::kLayers));
    m.each = carver.take<T>(size_t(room));
    m.dots = carver.take<T>(size_t(c.wants_rates ? room * S::kDots : 0));
    m.rates = carver.take<T>(rates);
    m.rate_grads = carver.take<T>(rates);
    m.ones = carver.take<T>(2 * kVector);
    return m;
  }
};

template <class T, class S, int kR>
struct MlpLoop {
  static constexpr int kSide = kR < 8 ? 4 : 8;  // of tiles: one for each of many threads, or few that read less
  MlpTask<T, S> t;
  MlpStep<T, S> step, other;  // the one at work, and the one that comes next on the way back
  MlpSet<T> support, query;

  DEV T* record(int k) const { return t.history + int64_t(k) * step.size(); }

  // --- in and out ----------------------------------------------------------------------------------------------------

  DEV void load() const {
    load_parameters(t, step);
    load_samples(t, support, t.call.support_x, t.call.support_y, int64_t(t.task) * support.samples);
    load_samples(t, query, t.call.query_x, t.call.query_y, int64_t(t.task) * query.samples);
    load_rates(t);
    set_ones(t);
    copy_async_wait_all();
  }
  template <int l = 1>
  DEV void store_lambda(T* to) const {
    constexpr int kI = S::width(l - 1), kO = S::width(l);
    for (int e = t.rank; e < kO * kI; e += t.threads) {
      const int o = e / kI;
      to[S::plain_weight(l) + e] = t.lambda[S::weight(l) + o * row_of(kI) + e - o * kI];
    }
    for (int o = t.rank; o < kO; o += t.threads) to[S::plain_weight(l) + kO * kI + o] = t.lambda[S::bias(l) + o];
    if constexpr (l < S::kLayers) store_lambda<l + 1>(to);
  }

  // --- history -------------------------------------------------------------------------------------------------------

  DEV bool goes_back() const { return t.call.wants_gradient && !t.call.first_order; }
  // The set's values; the parameters go where they change.
  DEV void keep_values(int k) const {
    store_vectors(t, record(k) + S::kParams, step.values().at, step.values().size());
  }
  DEV void fetch(int k, const MlpStep<T, S>& to) const { load_vectors(t, to.at, record(k), to.size()); }

  // --- phases --------------------------------------------------------------------------------------------------------

  DEV void there(const MlpSet<T>& set, bool back) const {
    each_rows<kR>(t, step, set, [&](const Samples<T, S, kR>& rows) {
      rows.forward();
      rows.losses();
      if (back) rows.backward();
    });
  }
  DEV void inner_step(int k) const {
    there(support, true);
    __syncthreads();
    T* const kept = goes_back() ? record(k) : nullptr;
    if (kept) keep_values(k);
    sum_losses(t, support, static_cast<T*>(t.call.support_losses) + int64_t(k) * t.call.tasks + t.task);
    Weights<T, S, kSide>{t, step, support.x, support.samples}.template tiles<Becomes::kStep>(t.rank, k, kept);
    __syncthreads();
  }
  DEV void query_set() const {
    there(query, t.call.wants_gradient);
    __syncthreads();
    sum_losses(t, query, static_cast<T*>(t.call.loss) + t.task);
    store_output(t, step, int64_t(t.task) * query.samples, query.samples);
    if (t.call.wants_gradient)
      Weights<T, S, kSide>{t, step, query.x, query.samples}.template tiles<Becomes::kStart>(t.rank, 0, nullptr);
  }
  DEV void step_back(int k) const {
    each_rows<kR>(t, step, support, [&](const Samples<T, S, kR>& rows) {
      rows.forward_tangent(k);
      rows.loss_tangents();
      rows.backward_tangent(k);
    });
    __syncthreads();
    if (t.call.wants_rates) {
      rate_gradients(t, step, support.samples, k);
      __syncthreads();  // lambda is read no more
    }
    Weights<T, S, kSide>{t, step, support.x, support.samples}.template tiles<Becomes::kBack>(t.rank, k, nullptr);
  }
  DEV void way_back() {
    const bool ahead = t.call.sets > 1;
    for (int k = t.call.steps - 1; k >= 0; --k) {
      if (!ahead) {
        __syncthreads();  // what the step behind has left is read no more
        fetch(k, other);
      }
      copy_async_wait_all();
      __syncthreads();
      const MlpStep<T, S> before = step;
      step = other, other = ahead ? before : step;
      if (ahead && k > 0) fetch(k - 1, other);
      step_back(k);
    }
  }

  // Of what is loaded the task before, if there was one, has read nothing since its last barrier.
  DEV void run() {
    load();
    __syncthreads();
    for (int k = 0; k < t.call.steps; ++k) inner_step(k);
    const bool back = goes_back() && t.call.steps > 0;
    if (back && t.call.sets > 1) fetch(t.call.steps - 1, other);
    query_set();
    if (back) way_back();
    if (!t.call.wants_gradient) return;
    __syncthreads();
    T* const parts = static_cast<T*>(t.call.parts) + int64_t(t.task) * (S::kPlainParams + t.call.n_rates);
    store_lambda(parts);
    store_rates<S>(t.call, parts + S::kPlainParams, t.rate_grads, t.rank, t.threads);
  }
};

template <class T, class S, int kR>
__global__ void __launch_bounds__(256, 1) mlp_kernel(const __grid_constant__ MtmlkMlpCall call) {
  SharedCarver carver(dynamic_shared());
  const MlpMemory<T, S> m = MlpMemory<T, S>::of(carver, call);
  const int room = room_of(call);
  T* const history = static_cast<T*>(call.history) + int64_t(blockIdx.x) * call.steps * S::step(room);
  for (int task = int(blockIdx.x); task < call.tasks; task += int(gridDim.x)) {
    const auto on = [](T* p) { return OnChip<T>::of(p); };
    const T low = kept(call.act == kRelu ? T(0) : T(call.c0));
    const MlpTask<T, S> t = {call,       int(threadIdx.x), int(blockDim.x),      task,
                             low,        on(m.lambda),     {on(m.moving), room}, on(m.each),
                             on(m.dots), on(m.rates),      on(m.rate_grads),     on(m.ones),
                             history};
    const auto set = [&](T* x, T* y, const MtmlkMlpLoss& loss, int samples) {
      return MlpSet<T>{on(x), on(y), kept(loss.kind), kept(T(loss.p0)), kept(T(loss.weight)), kept(samples)};
    };
    MlpLoop<T, S, kR>{t,
                      {on(m.steps[0]), room},
                      {on(m.steps[1]), room},
                      set(m.support_x, m.support_y, call.support_loss, call.support),
                      set(m.query_x, m.query_y, call.query_loss, call.query)}
        .run();
  }
}

}  // namespace mtmlk
