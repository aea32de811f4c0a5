// The GPUs of this machine, and a kernel that tells whether this build has code for them.
#include "mtml/cuda_device.h"

#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/status.h"

namespace {

using mtmlk::status_of;

// architecture = 10 * compute capability that this body was compiled for
__global__ void probe_kernel(int32_t* architecture) {
#ifdef __CUDA_ARCH__
  *architecture = __CUDA_ARCH__ / 10;
#endif
}

// One number in the device's memory.
class Cell {
 public:
  Cell() = default;
  ~Cell() { cudaFree(data_); }
  Cell(const Cell&) = delete;
  Cell& operator=(const Cell&) = delete;
  cudaError_t allocate() { return cudaMalloc(&data_, sizeof *data_); }
  int32_t* data() const { return data_; }

 private:
  int32_t* data_ = nullptr;
};

// On the current device, and on a stream that waits for nobody else's work.
cudaError_t run_probe(int32_t* architecture) {
  Cell cell;
  if (const cudaError_t error = cell.allocate()) return error;
  probe_kernel<<<1, 1, 0, cudaStreamPerThread>>>(cell.data());
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (const cudaError_t error =
          cudaMemcpyAsync(architecture, cell.data(), sizeof *architecture, cudaMemcpyDeviceToHost, cudaStreamPerThread))
    return error;
  return cudaStreamSynchronize(cudaStreamPerThread);
}

cudaError_t describe(int32_t index, MtmlkCudaDevice* device) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index)) return error;
  snprintf(device->name, sizeof device->name, "%s", properties.name);
  device->major = properties.major, device->minor = properties.minor;
  device->multiprocessors = properties.multiProcessorCount;
  device->shared_bytes = int64_t(properties.sharedMemPerBlockOptin);
  device->memory_bytes = int64_t(properties.totalGlobalMem);
  return cudaSuccess;
}

}  // namespace

int mtmlk_cuda_versions(int32_t* driver, int32_t* runtime, MtmlkReason* reason) {
  if (const cudaError_t error = cudaDriverGetVersion(driver)) return status_of(error, reason);
  return status_of(cudaRuntimeGetVersion(runtime), reason);
}

int mtmlk_cuda_device_count(int32_t* count, MtmlkReason* reason) {
  *count = 0;
  int32_t driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver)) return status_of(error, reason);
  if (driver == 0) return MTMLK_CUDA_OK;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) cudaGetLastError();  // or the next call of anyone here reports it once more
  return error == cudaErrorNoDevice ? MTMLK_CUDA_OK : status_of(error, reason);
}

int mtmlk_cuda_device(int32_t index, MtmlkCudaDevice* device, MtmlkReason* reason) {
  return status_of(describe(index, device), reason);
}

int mtmlk_cuda_probe(int32_t index, int32_t* architecture, MtmlkReason* reason) {
  int before = 0;
  if (const cudaError_t error = cudaGetDevice(&before)) return status_of(error, reason);
  if (const cudaError_t error = cudaSetDevice(index)) return status_of(error, reason);
  const int status = status_of(run_probe(architecture), reason);
  cudaGetLastError();
  const cudaError_t back = cudaSetDevice(before);
  return status != MTMLK_CUDA_OK ? status : status_of(back, reason);
}
