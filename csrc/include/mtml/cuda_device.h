// The C ABI of the CUDA part: which GPUs there are, and whether this build has code for them. In builds with CUDA only.
// All of it may be called on a machine without a GPU or a driver.
#pragma once

#include "mtml/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum MtmlkCudaStatus {
  MTMLK_CUDA_OK = 0,
  MTMLK_CUDA_NO_CODE = 32,  // this build has no code that the device, with its driver, can run
  MTMLK_CUDA_FAILED = 33    // whatever else CUDA complains of: MtmlkReason has its words
};

typedef struct {
  char name[256];
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  int64_t shared_bytes;  // the most that one block may ask for
  int64_t memory_bytes;
} MtmlkCudaDevice;

// 1000 * major + 10 * minor: of the newest CUDA that the driver supports (0: there is no driver), and of the run-time
// library within this module.
MTMLK_API int mtmlk_cuda_versions(int32_t* driver, int32_t* runtime, MtmlkReason* reason);

// 0 without a driver or a GPU.
MTMLK_API int mtmlk_cuda_device_count(int32_t* count, MtmlkReason* reason);

// Makes no context.
MTMLK_API int mtmlk_cuda_device(int32_t index, MtmlkCudaDevice* device, MtmlkReason* reason);

// Runs the smallest kernel on a device. architecture: 10 * capability of the code that ran; less than the device's where
// an older architecture's code, or PTX, serves it. The calling thread's current device is afterwards what it was.
MTMLK_API int mtmlk_cuda_probe(int32_t index, int32_t* architecture, MtmlkReason* reason);

#ifdef __cplusplus
}
#endif
