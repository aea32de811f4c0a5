// The persistent inner loop's entry: checks, then the launch.
#include "mtml/cuda_inner_loop.h"

#include "cuda/inner_loop/interpreter.cuh"
#include "cuda/launch.h"
#include "cuda/status.h"

namespace mtmlk {
namespace {

constexpr int kThreadsOfASum = 256;

size_t shared_bytes(int32_t chip_elements, size_t element) {
  SharedCarver carver;
  carver.take<int32_t>(2 * kPhaseWords);
  if (element == 4)
    carver.take<float>(size_t(chip_elements));
  else
    carver.take<double>(size_t(chip_elements));
  return carver.bytes();
}

template <class T>
int run(const MtmlkSchedule& s, Stream stream) {
  ScheduleCall call = {};
  call.program = s.program, call.workspace = s.workspace, call.workspace_elements = s.workspace_elements;
  call.first_words = s.first_words, call.chip_elements = s.chip_elements, call.tasks = s.tasks;
  for (int i = 0; i < s.n_tensors; ++i) call.tensors[i] = {s.tensors[i], s.strides[i]};
  Launch launch;
  launch.grid = dim3(unsigned(s.blocks)), launch.block = dim3(unsigned(s.threads)), launch.stream = stream;
  launch.shared_bytes = shared_bytes(s.chip_elements, sizeof(T));
  return s.full ? start(inner_loop_kernel<T, kFullKernel>, launch, call)
                : start(inner_loop_kernel<T, kPlainKernel>, launch, call);
}

template <class T>
int sum(const void* parts, const void* scale, int32_t tasks, int64_t elements, void* out, Stream stream) {
  Launch launch;
  launch.grid = dim3(unsigned((elements + kThreadsOfASum - 1) / kThreadsOfASum)), launch.block = dim3(kThreadsOfASum);
  launch.stream = stream;
  return start(sum_over_tasks<T>, launch, static_cast<const T*>(parts), static_cast<const T*>(scale), tasks, elements,
               static_cast<T*>(out));
}

}  // namespace
}  // namespace mtmlk

extern "C" {

int64_t mtmlk_schedule_shared_bytes(int32_t dtype, int32_t chip_elements) {
  return int64_t(mtmlk::shared_bytes(chip_elements, dtype == MTMLK_F32 ? 4 : 8));
}

int mtmlk_run_schedule(const MtmlkSchedule* s, void* stream, MtmlkReason* reason) {
  if (s->tasks == 0) return MTMLK_CUDA_OK;
  const auto on = static_cast<mtmlk::Stream>(stream);
  return mtmlk::status_of(s->dtype == MTMLK_F32 ? mtmlk::run<float>(*s, on) : mtmlk::run<double>(*s, on), reason);
}

int mtmlk_sum_over_tasks(int32_t dtype, const void* parts, const void* scale, int32_t tasks, int64_t elements,
                         void* out, void* stream, MtmlkReason* reason) {
  if (elements == 0) return MTMLK_CUDA_OK;
  const auto on = static_cast<mtmlk::Stream>(stream);
  const int error = dtype == MTMLK_F32 ? mtmlk::sum<float>(parts, scale, tasks, elements, out, on)
                                       : mtmlk::sum<double>(parts, scale, tasks, elements, out, on);
  return mtmlk::status_of(error, reason);
}
}
