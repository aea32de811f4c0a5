// The inner loop of a multi-layer perceptron whose tasks have many samples: a block takes tiles of a task's samples,
// another kernel adds up what the tiles leave, and a launch ends where a block of kernel.cuh has a barrier:
//
//   for k = 0 .. K-1:   tiles of the support set there and back | theta_{k+1} = theta_k - rate sum over tiles of g
//   the query set likewise                                      | lambda = sum of g
//   for k = K-1 .. 0:   tangents along -rate lambda             | lambda += sum of H (-rate lambda)
//
// Tiles are added up in their order, whoever took them.
#pragma once

#include "cuda/inner_loop/mlp/io.cuh"
#include "cuda/inner_loop/mlp/samples.cuh"
#include "cuda/inner_loop/mlp/sums.cuh"
#include "cuda/inner_loop/mlp/tile_space.cuh"
#include "cuda/inner_loop/mlp/weights.cuh"

namespace mtmlk {

// A block's arrays on the chip; only the way back has lambda, tangents and rates.
template <class T, class S, int kTile>
struct TileMemory {
  T *step, *lambda, *moving, *x, *y, *each, *dots, *rates, *rate_grads, *ones;

  __host__ __device__ static TileMemory of(SharedCarver& carver, const MtmlkMlpCall& c, bool back) {
    const size_t rates = size_t(back ? c.steps * 2 * S::kLayers : 0);
    TileMemory m = {};
    m.step = carver.take<T>(size_t(S::step(kTile)));
    m.lambda = carver.take<T>(size_t(back ? S::kParams : 0));
    m.moving = carver.take<T>(size_t(back ? S::values(kTile) : 0));
    m.x = carver.take<T>(size_t(kTile) * row_of(S::width(0)));
    m.y = carver.take<T>(size_t(kTile) * S::width(S::kLayers));
    m.each = carver.take<T>(size_t(kTile));
    m.dots = carver.take<T>(size_t(back && c.wants_rates ? kTile * S::kDots : 0));
    m.rates = carver.take<T>(rates);
    m.rate_grads = carver.take<T>(rates);
    m.ones = carver.take<T>(2 * kVector);
    return m;
  }
};

// A block's tiles of one set, by kR rows of a warp.
template <class T, class S, int kTile, int kR>
struct TileLoop {
  static constexpr int kSide = kR < 8 || S::kTerms ? 4 : 8;  // of tiles of weights, those that a thread takes
  using Space = TileSpace<T, S, kTile>;
  MlpTask<T, S> t;
  MlpStep<T, S> step;
  MlpSet<T> set;  // a tile of it at a time
  Space space;
  int k;  // of the inner step, or K for the query set

  DEV bool is_query() const { return k == t.call.steps; }
  DEV bool wants_sums() const { return !is_query() || t.call.wants_gradient; }
  DEV int samples() const { return is_query() ? t.call.query : t.call.support; }
  DEV int64_t first(int tile) const { return int64_t(t.task) * samples() + tile * kTile; }

  DEV void load_tile(int tile) {
    set.samples = least(kTile, samples() - tile * kTile);
    const MtmlkMlpCall& c = t.call;
    load_samples(t, set, is_query() ? c.query_x : c.support_x, is_query() ? c.query_y : c.support_y, first(tile));
  }
  template <Becomes kBecomes>
  DEV void sums(T* to) const {
    const Weights<T, S, kSide, false> weights = {t, step, set.x, set.samples};
    weights.template tiles<kBecomes>(t.rank, k, to);
    weights.template biases<kBecomes>(t.threads - 1 - t.rank, to);
  }

  DEV void tile_there(int tile) const {
    each_rows<kR>(t, step, set, [&](const Samples<T, S, kR>& rows) {
      rows.forward();
      rows.losses();
      if (wants_sums()) rows.backward();
    });
    __syncthreads();
    T* const to = space.sums(t.task, tile);
    if (is_query())
      store_output(t, step, first(tile), set.samples);
    else if (space.back)
      store_vectors(t, space.values(k, t.task, tile), step.values().at, step.values().size());
    sum_losses(t, set, to + Space::kLoss);
    if (wants_sums()) sums<Becomes::kPart>(to);
  }
  DEV void tile_back(int tile) const {
    each_rows<kR>(t, step, set, [&](const Samples<T, S, kR>& rows) {
      rows.forward_tangent(k);
      rows.loss_tangents();
      rows.backward_tangent(k);
    });
    __syncthreads();
    T* const to = space.sums(t.task, tile);
    if (t.call.wants_rates) {
      rate_gradients(t, step, set.samples, k);
      __syncthreads();
      const T* const found = t.rate_grads + k * 2 * S::kLayers;
      if (t.rank < 2 * S::kLayers) to[Space::kRates + t.rank] = found[t.rank];
    }
    sums<Becomes::kPartOfBack>(to);
  }

  // The first step's parameters are the caller's; the block that has the first tile leaves them for other launches.
  DEV void load() const {
    if (k == 0)
      load_parameters(t, step);
    else
      load_vectors(t, step.at, space.theta(k, t.task), S::kParams);
  }
  DEV void load_back() const {
    load_vectors(t, step.at, space.theta(k, t.task), S::kParams);
    load_vectors(t, t.lambda, space.lambda(t.task), S::kParams);
  }

  template <bool kBack>
  DEV void run(int from, int by) {
    const int end = tiles_of(samples(), kTile);
    if (from < end) load_tile(from);  // the caller's data, which no launch of the call writes
    if (kBack) load_rates(t);
    set_ones(t);
    wait_for_earlier_launches();
    let_next_launch_begin();
    if (kBack)
      load_back();
    else
      load();
    for (int tile = from; tile < end; tile += by) {
      if (tile != from) load_tile(tile);
      if (kBack) load_vectors(t, step.values().at, space.values(k, t.task, tile), step.values().size());
      copy_async_wait_all();
      __syncthreads();
      if constexpr (kBack) {
        tile_back(tile);
      } else {
        if (k == 0 && tile == 0) store_vectors(t, space.theta(0, t.task), step.at, S::kParams);
        tile_there(tile);
      }
      __syncthreads();  // before the next tile takes its place
    }
  }
};

// Step k of some tiles of a task; k = K of the query set.
template <class T, class S, int kTile, int kR, bool kBack>
__global__ void __launch_bounds__(256, 1) mlp_tile_kernel(const __grid_constant__ MtmlkMlpCall call, int k) {
  SharedCarver carver(dynamic_shared());
  const auto m = TileMemory<T, S, kTile>::of(carver, call, kBack);
  const auto on = [](T* p) { return OnChip<T>::of(p); };
  const int of_task = int(gridDim.x) / call.tasks, task = int(blockIdx.x) / of_task;
  const MtmlkMlpLoss& loss = k == call.steps ? call.query_loss : call.support_loss;
  const T low = kept(call.act == kRelu ? T(0) : T(call.c0));
  const MlpTask<T, S> t = {call,       int(threadIdx.x), int(blockDim.x),       task,
                           low,        on(m.lambda),     {on(m.moving), kTile}, on(m.each),
                           on(m.dots), on(m.rates),      on(m.rate_grads),      on(m.ones),
                           nullptr};
  TileLoop<T, S, kTile, kR>{t,
                            {on(m.step), kTile},
                            {on(m.x), on(m.y), kept(loss.kind), kept(T(loss.p0)), kept(T(loss.weight)), 0},
                            TileSpace<T, S, kTile>::of(call),
                            k}
      .template run<kBack>(int(blockIdx.x) - task * of_task, of_task);
}

}  // namespace mtmlk
