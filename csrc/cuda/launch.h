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
  // It may begin before the launch before it has ended: its kernel calls wait_for_earlier_launches(), and so does that of
  // the launch before it, if that overlaps too. By code for sm_90 and later; else it begins when that has ended.
  bool overlaps = false;
};

#if defined(__CUDACC__)

// Whether the code of a kernel on this device is for sm_90 or later. What was compiled for less does not wait for the
// launch before it, also where a driver makes it code for a later GPU.
template <class... P>
bool waits_for_earlier(void (*kernel)(P...)) {
  cudaFuncAttributes found = {};
  return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.ptxVersion >= 90 && found.binaryVersion >= 90;
}

// 0, or the cudaError_t of the step that failed. Errors of the kernel itself come with a later call of the stream.
template <class... P, class... A>
[[nodiscard]] int start(void (*kernel)(P...), const Launch& launch, A&&... arguments) {
  constexpr size_t kWithoutAsking = 32 * 1024;  // 48 KB with the arrays that have a name
  if (launch.shared_bytes > kWithoutAsking) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, limit, int(launch.shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {unsigned(launch.cluster), 1, 1};
  }
  if (launch.overlaps && waits_for_earlier(kernel)) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid, config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes, config.stream = launch.stream;
  config.attrs = attributes, config.numAttrs = count;
  return int(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

#else

template <class... P, class... A>
[[nodiscard]] int start(void (*kernel)(P...), const Launch& launch, A&&... arguments) {
  const host::Shape shape = {launch.grid, launch.block, launch.shared_bytes, launch.cluster, launch.overlaps};
  return host::start(kernel, shape, std::forward<A>(arguments)...);
}

#endif

}  // namespace mtmlk
