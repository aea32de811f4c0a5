// The perceptrons that have a kernel of their own. Rows of a warp: where there are fewer tasks than multiprocessors, and
// where there are many.
//
// A new entry needs nothing else: the Python side reads the list.
#pragma once

#include "cuda/inner_loop/mlp/shape.cuh"
#include "mtml/cuda_mlp.h"

namespace mtmlk {

template <class S_, int kFew, int kMany>
struct ListedMlp {
  using S = S_;
  static constexpr int kRows[] = {kFew, kMany};
};

template <class... Entries>
struct MlpList {};

using Mlps = MlpList<ListedMlp<MlpShape<false, 1, 40, 40, 1>, 2, 10>,   // the MAML paper's sinusoids
                     ListedMlp<MlpShape<true, 1, 40, 40, 1>, 2, 10>,    //
                     ListedMlp<MlpShape<false, 2, 100, 100, 2>, 2, 6>,  // its policies
                     ListedMlp<MlpShape<true, 2, 100, 100, 2>, 2, 6>>;  //

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
