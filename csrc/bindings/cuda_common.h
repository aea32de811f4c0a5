// What the bindings of builds with CUDA share.
#pragma once

#include <stdexcept>

#include "mtml/cuda_device.h"

namespace mtmlk {

// No code for a device; mtml_kernels/native/cuda_device.py says what to do.
struct NoDeviceCode : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check_cuda(int status, const MtmlkReason& reason) {
  if (status == MTMLK_CUDA_NO_CODE) throw NoDeviceCode(reason.text);
  if (status != MTMLK_CUDA_OK) throw std::runtime_error(reason.text);
}

}  // namespace mtmlk
