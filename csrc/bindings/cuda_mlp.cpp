// The inner loop of perceptrons of known widths, in builds with CUDA. Structures come as addresses; the caller keeps them
// and what they point to alive, and makes the tensors' device the current one.
#include "bindings/common.h"
#include "bindings/cuda_common.h"
#include "mtml/cuda_mlp.h"

namespace mtmlk {
namespace {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

bool mlp_shape(int32_t index, int64_t shape) { return mtmlk_mlp_shape(index, at<MtmlkMlpShape>(shape)) != 0; }

int64_t mlp_shared_bytes(int32_t shape, int64_t call) {
  return mtmlk_mlp_shared_bytes(shape, at<const MtmlkMlpCall>(call));
}

int64_t mlp_record(int32_t shape, int64_t call) { return mtmlk_mlp_record(shape, at<const MtmlkMlpCall>(call)); }

bool tf32_mlp_shape(int32_t index, int64_t shape) { return mtmlk_tf32_mlp_shape(index, at<MtmlkMlpShape>(shape)) != 0; }

int64_t tf32_mlp_shared_bytes(int32_t shape, int64_t call) {
  return mtmlk_tf32_mlp_shared_bytes(shape, at<const MtmlkMlpCall>(call));
}

int64_t tf32_mlp_record(int32_t shape, int64_t call) {
  return mtmlk_tf32_mlp_record(shape, at<const MtmlkMlpCall>(call));
}

template <auto kRun>
void run_mlp(int64_t launch, int64_t call, int64_t stream) {
  MtmlkReason reason = {};
  check_cuda(kRun(at<const MtmlkMlpLaunch>(launch), at<const MtmlkMlpCall>(call), at<void>(stream), &reason), reason);
}

}  // namespace

void bind_cuda_mlp(py::module_& m) {
  m.def("mlp_shape", &mlp_shape);
  m.def("mlp_shared_bytes", &mlp_shared_bytes);
  m.def("mlp_record", &mlp_record);
  m.def("run_mlp", &run_mlp<&mtmlk_run_mlp>);
  m.def("mlp_launch", [] { return reinterpret_cast<Address>(&mtmlk_run_mlp); });
  m.def("tf32_mlp_shape", &tf32_mlp_shape);
  m.def("tf32_mlp_shared_bytes", &tf32_mlp_shared_bytes);
  m.def("tf32_mlp_record", &tf32_mlp_record);
  m.def("tf32_run_mlp", &run_mlp<&mtmlk_run_tf32_mlp>);
  m.def("tf32_mlp_launch", [] { return reinterpret_cast<Address>(&mtmlk_run_tf32_mlp); });
}

}  // namespace mtmlk
