// Launches of the perceptrons' kernels, in one type of numbers.
#pragma once

#include "cuda/inner_loop/mlp/kernel.cuh"
#include "cuda/inner_loop/mlp/list.cuh"
#include "cuda/inner_loop/mlp/tile_launches.cuh"
#include "cuda/launch.h"

namespace mtmlk {

constexpr int kNoSuchMlp = 1;  // cudaErrorInvalidValue

template <class T>
int64_t mlp_shared_bytes(int32_t shape, const MtmlkMlpCall& call) {
  return with_mlp(shape, Mlps{}, int64_t(0), [&](auto listed) {
    using Listed = decltype(listed);
    if constexpr (Listed::kTile != 0) return int64_t(TileLaunches<T, Listed>::shared_bytes(call, goes_back(call)));
    SharedCarver carver;
    MlpMemory<T, typename Listed::S>::of(carver, call);
    return int64_t(carver.bytes());
  });
}

template <class T>
int64_t mlp_record(int32_t shape, const MtmlkMlpCall& call) {
  return with_mlp(shape, Mlps{}, int64_t(0), [&](auto listed) {
    using Listed = decltype(listed);
    if constexpr (Listed::kTile != 0) return TileLaunches<T, Listed>::space(call);
    return int64_t(Listed::S::step(room_of(call)));
  });
}

// The launches of a shape of this part; defined by part.cuh.
template <class T, int kPart>
int run_mlp_part(const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream);

template <class T, int kPart = 0>
int run_mlp(const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream) {
  if constexpr (kPart < kMlpParts) {
    if (l.shape % kMlpParts != kPart) return run_mlp<T, kPart + 1>(l, call, stream);
    return run_mlp_part<T, kPart>(l, call, stream);
  }
  return kNoSuchMlp;
}

}  // namespace mtmlk
