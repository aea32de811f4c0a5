// What becomes of the tiles' sums, added up in the order of the tiles: a thread a vector of four parameters, and a block
// more of each task for its loss and its gradients of rates.
#pragma once

#include "cuda/inner_loop/mlp/io.cuh"
#include "cuda/inner_loop/mlp/tile_space.cuh"

namespace mtmlk {

constexpr int kSumThreads = 64;

template <class S>
MTMLK_ANYWHERE constexpr int sum_blocks() {
  return (S::kParams / 4 + kSumThreads - 1) / kSumThreads + 1;
}

// The tensor that element e of the parameters is of, and its place among the caller's; -1: between two rows.
struct ParameterPlace {
  int tensor, plain;
};
template <class S, int l = 1>
DEV ParameterPlace place_of(int e) {
  constexpr int kI = S::width(l - 1), kO = S::width(l), kLd = row_of(kI);
  if (e < S::bias(l)) {
    const int at = e - S::weight(l), o = at / kLd, i = at - o * kLd;
    return {2 * l - 2, o < kO && i < kI ? S::plain_weight(l) + o * kI + i : -1};
  }
  if (l == S::kLayers || e < S::weight(l + 1)) {
    const int o = e - S::bias(l);
    return {2 * l - 1, o < kO ? S::plain_weight(l) + kO * kI + o : -1};
  }
  return place_of<S, least(l + 1, S::kLayers)>(e);
}

template <class T, class S, int kTile>
struct TileSums {
  using Space = TileSpace<T, S, kTile>;
  const MtmlkMlpCall& call;
  Space space;
  int task, tiles, k, rank;
  bool back;

  DEV bool is_query() const { return !back && k == call.steps; }
  DEV bool is_last() const { return back ? k == 0 : is_query() && !space.back; }
  DEV T* parts() const { return static_cast<T*>(call.parts) + int64_t(task) * (S::kPlainParams + call.n_rates); }

  DEV Four<T> total(int e) const {
    constexpr int kAtOnce = 16;  // reads on their way
    const T* const from = space.sums(task, 0) + e;
    Four<T> sum = four(from);
    for (int first = 1; first < tiles; first += kAtOnce) {
      Four<T> x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < tiles) x[i] = four(from + int64_t(first + i) * Space::kSums);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < tiles)
#pragma unroll
          for (int v = 0; v < 4; ++v) sum.v[v] += x[i].v[v];
    }
    return sum;
  }

  DEV void parameters(int e) const {
    Four<T> x = total(e), old = {};
    if (!back && !is_query()) {
      const int tensor = place_of<S>(e).tensor;
      const T rate = static_cast<const T*>(call.rates[tensor])[k * call.rate_stride[tensor]];
      old = four(space.theta(k, task) + e);
#pragma unroll
      for (int v = 0; v < 4; ++v) x.v[v] = old.v[v] - rate * x.v[v];
      *reinterpret_cast<Four<T>*>(space.theta(k + 1, task) + e) = x;
      return;
    }
    if (back) old = four(space.lambda(task) + e);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (back) x.v[v] += old.v[v];
      const int plain = is_last() ? place_of<S>(e + v).plain : -1;
      if (plain >= 0) parts()[plain] = x.v[v];
    }
    if (!is_last()) *reinterpret_cast<Four<T>*>(space.lambda(task) + e) = x;
  }

  DEV T total_of_one(int e) const {
    T sum = 0;
#pragma unroll 16
    for (int tile = 0; tile < tiles; ++tile) sum += space.sums(task, tile)[e];
    return sum;
  }
  DEV void others() const {
    if (!back) {
      T* const to =
          is_query() ? static_cast<T*>(call.loss) : static_cast<T*>(call.support_losses) + int64_t(k) * call.tasks;
      if (rank == 0) to[task] = total_of_one(Space::kLoss);
    } else if (call.wants_rates && rank < 2 * S::kLayers) {
      space.rate_grads(task)[k * 2 * S::kLayers + rank] = total_of_one(Space::kRates + rank);
    }
    if (!is_last() || !call.wants_gradient) return;
    __syncthreads();
    store_rates<S>(call, parts() + S::kPlainParams, space.rate_grads(task), rank, kSumThreads);
  }
};

// Behind the tiles of step k, or of the query set (k = K).
template <class T, class S, int kTile>
__global__ void __launch_bounds__(kSumThreads)
    mlp_sum_kernel(const __grid_constant__ MtmlkMlpCall call, int k, int back) {
  constexpr int kBlocks = sum_blocks<S>();
  const int task = int(blockIdx.x) / kBlocks, block = int(blockIdx.x) - task * kBlocks, rank = int(threadIdx.x);
  const int tiles = tiles_of(k == call.steps ? call.query : call.support, kTile);
  const TileSums<T, S, kTile> sums = {call, TileSpace<T, S, kTile>::of(call), task, tiles, k, rank, back != 0};
  wait_for_earlier_launches();
  let_next_launch_begin();
  if (block == kBlocks - 1) return sums.others();
  const int e = 4 * (block * kSumThreads + rank);
  if (e < S::kParams && (k < call.steps || call.wants_gradient)) sums.parameters(e);
}

}  // namespace mtmlk
