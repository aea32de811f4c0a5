// The persistent inner loop's entry: checks, then the launch.
#include "mtml/cuda_inner_loop.h"

#include "cuda/inner_loop/launches.h"
#include "cuda/status.h"

namespace mtmlk {
namespace {

bool is_sound(const MtmlkSchedule& s, MtmlkReason* reason) {
  const bool threads = s.threads >= 32 && s.threads <= 256 && (s.threads & (s.threads - 1)) == 0;
  if (threads && s.blocks > 0 && s.n_tensors >= 0 && s.n_tensors <= kMostTensors && s.first_words <= kPhaseWords)
    return true;
  snprintf(
      reason->text, sizeof reason->text,
      "run_schedule: expected 32 to 256 threads (a power of two), blocks, at most %d tensors and %d words, got %d, "
      "%d, %d and %d",
      kMostTensors, int(kPhaseWords), int(s.threads), int(s.blocks), int(s.n_tensors), int(s.first_words));
  return false;
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
  return mtmlk::status_of(
      s->dtype == MTMLK_F32 ? mtmlk::run_schedule<float>(*s, on) : mtmlk::run_schedule<double>(*s, on), reason);
}

int mtmlk_sum_over_tasks(const MtmlkTaskSums* s, void* stream, MtmlkReason* reason) {
  if (s->elements == 0 || s->tasks == 0 || s->n_results == 0) return MTMLK_CUDA_OK;
  if (s->n_results > mtmlk::kMostResults) {
    snprintf(reason->text, sizeof reason->text, "sum_over_tasks: expected at most %d results, got %d",
             mtmlk::kMostResults, int(s->n_results));
    return MTMLK_CUDA_FAILED;
  }
  const auto on = static_cast<mtmlk::Stream>(stream);
  return mtmlk::status_of(s->dtype == MTMLK_F32 ? mtmlk::sum_tasks<float>(*s, on) : mtmlk::sum_tasks<double>(*s, on),
                          reason);
}
}
