// How a kernel is started, on a device or on the CPU.
#pragma once

#include <stddef.h>

#include <utility>

#include "cuda/device_api.h"

#if !defined(__CUDACC__)
#include "cuda/host/launch.h"
#endif

namespace mtmlk {

#if defined(__CUDACC__)
using Stream = cudaStream_t;
#endif

struct Launch {
  dim3 grid, block;         // blocks, threads
  size_t shared_bytes = 0;  // dynamic, of a block
  int cluster = 1;          // blocks, along x; more than one need sm_90
  Stream stream = nullptr;
};

#if defined(__CUDACC__)

// 0, or the cudaError_t of the step that failed. Errors of the kernel itself come with a later call of the stream.
template <class... P, class... A>
[[nodiscard]] int start(void (*kernel)(P...), const Launch& launch, A&&... arguments) {
  constexpr size_t kWithoutAsking = 32 * 1024;  // 48 KB with the arrays that have a name
  if (launch.shared_bytes > kWithoutAsking) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, limit, int(launch.shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(launch.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid, config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes, config.stream = launch.stream;
  config.attrs = &cluster, config.numAttrs = launch.cluster > 1 ? 1 : 0;
  return int(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

#else

template <class... P, class... A>
[[nodiscard]] int start(void (*kernel)(P...), const Launch& launch, A&&... arguments) {
  const host::Shape shape = {launch.grid, launch.block, launch.shared_bytes, launch.cluster};
  return host::start(kernel, shape, std::forward<A>(arguments)...);
}

#endif

}  // namespace mtmlk
