// The launches of some of the perceptrons' kernels, which are compiled where this is included: by the files part_<i>.cu.
#pragma once

#include "cuda/inner_loop/mlp/launches.cuh"

namespace mtmlk {

template <class T, class Listed>
int run_listed(const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream) {
  Launch launch;
  launch.grid = dim3(unsigned(l.blocks)), launch.block = dim3(unsigned(l.threads)), launch.stream = stream;
  launch.shared_bytes = size_t(mlp_shared_bytes<T>(l.shape, call));
  if constexpr (Listed::kTile != 0) {
    return TileLaunches<T, Listed>{call, launch, l.blocks, l.back_threads, l.overlaps != 0}.run();
  } else {
    constexpr int kFew = Listed::kRows[0], kMany = Listed::kRows[1];
    if (l.rows == kFew) return start(mlp_kernel<T, typename Listed::S, kFew>, launch, call);
    if (l.rows == kMany) return start(mlp_kernel<T, typename Listed::S, kMany>, launch, call);
    return kNoSuchMlp;
  }
}

// Of the entries from kIndex on.
template <class T, int kPart, int kIndex>
int run_among(MlpList<>, const MtmlkMlpLaunch&, const MtmlkMlpCall&, Stream) {
  return kNoSuchMlp;
}
template <class T, int kPart, int kIndex, class First, class... Rest>
int run_among(MlpList<First, Rest...>, const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream) {
  if constexpr (kIndex % kMlpParts == kPart)
    if (l.shape == kIndex) return run_listed<T, First>(l, call, stream);
  return run_among<T, kPart, kIndex + 1>(MlpList<Rest...>{}, l, call, stream);
}

template <class T, int kPart>
int run_mlp_part(const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream) {
  return run_among<T, kPart, 0>(Mlps{}, l, call, stream);
}

}  // namespace mtmlk
