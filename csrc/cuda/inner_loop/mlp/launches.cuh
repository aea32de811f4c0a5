// Launches of the perceptrons' kernels, in one type of numbers.
#pragma once

#include "cuda/inner_loop/mlp/kernel.cuh"
#include "cuda/inner_loop/mlp/list.cuh"
#include "cuda/launch.h"

namespace mtmlk {

constexpr int kNoSuchMlp = 1;  // cudaErrorInvalidValue

template <class T>
int64_t mlp_shared_bytes(int32_t shape, const MtmlkMlpCall& call) {
  return with_mlp(shape, Mlps{}, int64_t(0), [&](auto listed) {
    SharedCarver carver;
    MlpMemory<T, typename decltype(listed)::S>::of(carver, call);
    return int64_t(carver.bytes());
  });
}

inline int64_t mlp_record(int32_t shape, const MtmlkMlpCall& call) {
  return with_mlp(shape, Mlps{}, int64_t(0),
                  [&](auto listed) { return int64_t(decltype(listed)::S::step(room_of(call))); });
}

template <class T>
int run_mlp(const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream) {
  Launch launch;
  launch.grid = dim3(unsigned(l.blocks)), launch.block = dim3(unsigned(l.threads)), launch.stream = stream;
  launch.shared_bytes = size_t(mlp_shared_bytes<T>(l.shape, call));
  return with_mlp(l.shape, Mlps{}, kNoSuchMlp, [&](auto listed) {
    using Listed = decltype(listed);
    constexpr int kFew = Listed::kRows[0], kMany = Listed::kRows[1];
    if (l.rows == kFew) return start(mlp_kernel<T, typename Listed::S, kFew>, launch, call);
    if (l.rows == kMany) return start(mlp_kernel<T, typename Listed::S, kMany>, launch, call);
    return kNoSuchMlp;
  });
}

}  // namespace mtmlk
