// What a CUDA error is called in the C ABI.
#pragma once

#include <cstdio>

#include "mtml/cuda_device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace mtmlk {

// MtmlkCudaStatus of a cudaError_t, with its words.
inline int status_of(int error, MtmlkReason* reason) {
  if (error == 0) return MTMLK_CUDA_OK;
#if defined(__CUDACC__)
  const cudaError_t code = cudaError_t(error);
  snprintf(reason->text, sizeof reason->text, "%s: %s", cudaGetErrorName(code), cudaGetErrorString(code));
  // The second: there is PTX, but of a newer CUDA than the driver's.
  const bool no_code = code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion;
  return no_code ? MTMLK_CUDA_NO_CODE : MTMLK_CUDA_FAILED;
#else
  snprintf(reason->text, sizeof reason->text, "CUDA error %d", error);
  return MTMLK_CUDA_FAILED;
#endif
}

}  // namespace mtmlk
