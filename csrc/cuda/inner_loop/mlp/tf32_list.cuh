// The perceptrons that have kernels on matrix units: those of list.cuh that are cut into tiles, by one term and by three.
#pragma once

#include "cuda/inner_loop/mlp/list.cuh"

namespace mtmlk {

// Warps take eight rows: a fragment.
template <class S, int kTile, int kTerms>
using Tf32Mlp = TiledMlp<InTf32<S, kTerms>, kTile, 8, 8>;

using Tf32Images = MlpShape<false, 2, 64, 64, 64, 3>;
using Tf32BentImages = MlpShape<true, 2, 64, 64, 64, 3>;
using Tf32Mlps = MlpList<Tf32Mlp<Tf32Images, 32, 1>, Tf32Mlp<Tf32Images, 32, 3>,  //
                         Tf32Mlp<Tf32BentImages, 16, 1>, Tf32Mlp<Tf32BentImages, 16, 3>>;

}  // namespace mtmlk
