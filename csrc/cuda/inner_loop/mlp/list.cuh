// The perceptrons that have a kernel of their own: a block a task, or of those that come with many samples a block for
// tiles of a task's.
//
// A new entry needs nothing else: the Python side reads the list, and the files part_0.cu, part_1.cu, ... share its
// kernels out among them. Widths are multiples of four, or fewer than four; the number of kernels is counted in
// tests/cuda/test_persistent_compiles.py.
#pragma once

#include "cuda/inner_loop/mlp/shape.cuh"
#include "mtml/cuda_mlp.h"

namespace mtmlk {

// Rows of a warp: where there are fewer tasks than multiprocessors, and where there are many.
template <class S_, int kFew, int kMany>
struct ListedMlp {
  using S = S_;
  static constexpr int kTile = 0;
  static constexpr int kRows[] = {kFew, kMany};
};

// Samples of a tile, so that the way back fits the chip; rows of a warp there and back.
template <class S_, int kTile_, int kThere, int kBack>
struct TiledMlp {
  using S = S_;
  static constexpr int kTile = kTile_;
  static constexpr int kRows[] = {kThere, kBack};
};

template <class... Entries>
struct MlpList {};

using Mlps = MlpList<ListedMlp<MlpShape<false, 1, 40, 40, 1>, 2, 10>,        // the MAML paper's sinusoids
                     ListedMlp<MlpShape<true, 1, 40, 40, 1>, 2, 10>,         //
                     ListedMlp<MlpShape<false, 2, 100, 100, 2>, 2, 6>,       // its policies
                     ListedMlp<MlpShape<true, 2, 100, 100, 2>, 2, 6>,        //
                     TiledMlp<MlpShape<false, 2, 64, 64, 64, 3>, 32, 8, 8>,  // images by coordinates
                     TiledMlp<MlpShape<true, 2, 64, 64, 64, 3>, 16, 4, 4>>;

// Files that compile the kernels, side by side: entry i is compiled by part_<i % kMlpParts>.cu.
constexpr int kMlpParts = 6;

// body(entry) of the entry at `index`, or `otherwise` beyond the end.
template <class R, class Body>
R with_mlp(int, MlpList<>, R otherwise, Body) {
  return otherwise;
}
template <class R, class Body, class First, class... Rest>
R with_mlp(int index, MlpList<First, Rest...>, R otherwise, Body body) {
  return index == 0 ? body(First{}) : with_mlp(index - 1, MlpList<Rest...>{}, otherwise, body);
}

}  // namespace mtmlk
