// The persistent inner loop's entry: checks, then the launch.
#include "mtml/cuda_inner_loop.h"

#include "cuda/inner_loop/interpreter.cuh"
#include "cuda/inner_loop/task_sums.cuh"
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

bool is_sound(const MtmlkSchedule& s, MtmlkReason* reason) {
  const bool threads = s.threads >= 32 && s.threads <= 256 && (s.threads & (s.threads - 1)) == 0;
  if (threads && s.blocks > 0 && s.n_tensors >= 0 && s.n_tensors <= kMostTensors && s.first_words <= kPhaseWords)
    return true;
  snprintf(reason->text, sizeof reason->text,
           "run_schedule: expected 32 to 256 threads (a power of two), blocks, at most %d tensors and %d words, got %d, "
           "%d, %d and %d",
           kMostTensors, int(kPhaseWords), int(s.threads), int(s.blocks), int(s.n_tensors), int(s.first_words));
  return false;
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
int sum(const MtmlkTaskSums& given, Stream stream) {
  TaskSums<T> s = {};
  s.parts = static_cast<const T*>(given.parts), s.scale = static_cast<const T*>(given.scale);
  s.elements = given.elements, s.tasks = given.tasks, s.n_results = given.n_results;
  for (int i = 0; i < given.n_results; ++i) s.results[i] = static_cast<T*>(given.results[i]), s.begins[i] = given.begins[i];
  Launch launch;
  launch.grid = dim3(unsigned((given.elements + kThreadsOfASum - 1) / kThreadsOfASum));
  launch.block = dim3(kThreadsOfASum), launch.stream = stream;
  return start(sum_over_tasks<T>, launch, s);
}

}  // namespace
}  // namespace mtmlk

extern "C" {

int64_t mtmlk_schedule_shared_bytes(int32_t dtype, int32_t chip_elements) {
  return int64_t(mtmlk::shared_bytes(chip_elements, dtype == MTMLK_F32 ? 4 : 8));
}

int mtmlk_run_schedule(const MtmlkSchedule* s, void* stream, MtmlkReason* reason) {
  if (s->tasks == 0) return MTMLK_CUDA_OK;
  if (!mtmlk::is_sound(*s, reason)) return MTMLK_CUDA_FAILED;
  const auto on = static_cast<mtmlk::Stream>(stream);
  return mtmlk::status_of(s->dtype == MTMLK_F32 ? mtmlk::run<float>(*s, on) : mtmlk::run<double>(*s, on), reason);
}

int mtmlk_sum_over_tasks(const MtmlkTaskSums* s, void* stream, MtmlkReason* reason) {
  if (s->elements == 0 || s->tasks == 0 || s->n_results == 0) return MTMLK_CUDA_OK;
  if (s->n_results > mtmlk::kMostResults) {
    snprintf(reason->text, sizeof reason->text, "sum_over_tasks: expected at most %d results, got %d",
             mtmlk::kMostResults, int(s->n_results));
    return MTMLK_CUDA_FAILED;
  }
  const auto on = static_cast<mtmlk::Stream>(stream);
  return mtmlk::status_of(s->dtype == MTMLK_F32 ? mtmlk::sum<float>(*s, on) : mtmlk::sum<double>(*s, on), reason);
}
}
