// The perceptrons' kernels for a library on the CPU, in double too.
#include "cuda/inner_loop/mlp/in_float.cu"
#include "cuda/inner_loop/mlp/part.cuh"

extern "C" {

MTMLK_API int64_t mlp_shared_bytes_in_double(int32_t shape, const MtmlkMlpCall* call) {
  return mtmlk::mlp_shared_bytes<double>(shape, *call);
}
MTMLK_API int64_t mlp_record_in_double(int32_t shape, const MtmlkMlpCall* call) {
  return mtmlk::mlp_record<double>(shape, *call);
}
MTMLK_API int run_mlp_in_double(const MtmlkMlpLaunch* launch, const MtmlkMlpCall* call, void* stream,
                                MtmlkReason* reason) {
  return mtmlk::status_of(mtmlk::run_mlp<double>(*launch, *call, stream), reason);
}
MTMLK_API int64_t mlp_call_bytes() { return int64_t(sizeof(MtmlkMlpCall)); }
}
