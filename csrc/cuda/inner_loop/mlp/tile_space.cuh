// Where the numbers of a call lie whose tasks are cut into tiles of samples: in global memory, which the second-level
// cache holds, between one launch and the next.
#pragma once

#include "cuda/inner_loop/mlp/shape.cuh"
#include "mtml/cuda_mlp.h"

namespace mtmlk {

MTMLK_ANYWHERE bool goes_back(const MtmlkMlpCall& c) { return c.wants_gradient && !c.first_order && c.steps > 0; }
MTMLK_ANYWHERE int tiles_of(int samples, int tile) { return (samples + tile - 1) / tile; }

template <class T, class S, int kTile>
struct TileSpace {
  // A tile's sums: gradients like the parameters, behind them the loss, then the gradients of rates.
  static constexpr int kLoss = S::kParams, kRates = kLoss + 4, kSums = kRates + whole_vectors(2 * S::kLayers);

  T* at;
  int tasks, steps, tiles;
  bool back;

  __host__ __device__ static TileSpace of(const MtmlkMlpCall& c) {
    const int most = c.support > c.query ? c.support : c.query;
    return {static_cast<T*>(c.history), c.tasks, c.steps, tiles_of(most, kTile), goes_back(c)};
  }
  // Parameters of a task before step k; after the last one behind them.
  MTMLK_ANYWHERE T* theta(int k, int task) const { return at + (int64_t(k) * tasks + task) * S::kParams; }
  MTMLK_ANYWHERE T* lambda(int task) const { return theta(steps + 1, task); }
  // The planes that step k has left of a tile.
  MTMLK_ANYWHERE T* values(int k, int task, int tile) const {
    return theta(steps + 2, 0) + ((int64_t(k) * tasks + task) * tiles + tile) * S::values(kTile);
  }
  MTMLK_ANYWHERE T* sums(int task, int tile) const {
    return values(back ? steps : 0, 0, 0) + (int64_t(task) * tiles + tile) * kSums;
  }
  MTMLK_ANYWHERE T* rate_grads(int task) const { return sums(tasks, 0) + int64_t(task) * steps * 2 * S::kLayers; }
  MTMLK_ANYWHERE int64_t size() const { return rate_grads(tasks) - at; }
};

}  // namespace mtmlk
