// Launches of a call whose tasks are cut into tiles, on one stream.
#pragma once

#include "cuda/inner_loop/mlp/tile_kernel.cuh"
#include "cuda/inner_loop/mlp/tile_sums.cuh"
#include "cuda/launch.h"

namespace mtmlk {

template <class T, class Listed>
struct TileLaunches {
  using S = typename Listed::S;
  static constexpr int kTile = sizeof(T) == 4 ? Listed::kTile : Listed::kTile / 4;  // what the chip has room for
  using Space = TileSpace<T, S, kTile>;
  const MtmlkMlpCall& call;
  Launch launch;
  int blocks, back_threads;  // of a launch of the way back
  bool overlaps = false;     // but the first, which waits for what the caller has launched

  static size_t shared_bytes(const MtmlkMlpCall& call, bool back) {
    SharedCarver carver;
    TileMemory<T, S, kTile>::of(carver, call, back);
    return carver.bytes();
  }
  static int64_t space(const MtmlkMlpCall& call) { return Space::of(call).size(); }

  template <bool kBack>
  int tiles(int k) const {
    constexpr int kR = Listed::kRows[kBack];
    Launch own = launch;
    const int of_task = kBack ? blocks / call.tasks : tiles_of(k == call.steps ? call.query : call.support, kTile);
    own.grid = dim3(unsigned(of_task * call.tasks));
    own.shared_bytes = shared_bytes(call, kBack);
    if (kBack) own.block = dim3(unsigned(back_threads));
    own.overlaps = overlaps && (kBack || k > 0);
    return start(mlp_tile_kernel<T, S, kTile, kR, kBack>, own, call, k);
  }
  int sums(int k, bool back) const {
    Launch own = launch;
    own.grid = dim3(unsigned(sum_blocks<S>() * call.tasks)), own.block = dim3(unsigned(kSumThreads));
    own.overlaps = overlaps;
    return start(mlp_sum_kernel<T, typename S::Plain, kTile>, own, call, k, int(back));
  }
  int run() const {
    int status = 0;
    for (int k = 0; k <= call.steps; ++k) {
      if (!status) status = tiles<false>(k);
      if (!status) status = sums(k, false);
    }
    for (int k = call.steps - 1; k >= 0 && goes_back(call); --k) {
      if (!status) status = tiles<true>(k);
      if (!status) status = sums(k, true);
    }
    return status;
  }
};

}  // namespace mtmlk
