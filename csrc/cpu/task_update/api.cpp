// The C ABI of update rules for many tasks.
#include "mtml/abi.h"
#include "runtime/crew.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "isa/dispatch.h"

using namespace mtmlk;

namespace {

constexpr int64_t kParallel = int64_t(1) << 16;  // elements worth the threads' start

int run(const MtmlkTaskUpdate& call, bool backward) {
  int64_t elements = 0;
  for (int64_t i = 0; i < call.n; ++i) elements += call.sizes[i];
  const bool is_long = call.tasks * elements >= kParallel;
  Watch watch = start_watch();
  const Crew crew = {is_long ? usable_threads(call.threads) : 1, is_long ? &watch : nullptr, nullptr, 0};
  const TaskKernels& kernels = task_kernels_of(call.dtype);
  (backward ? kernels.update_backward : kernels.update_forward)(call, crew);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

}  // namespace

extern "C" {

int mtmlk_task_update(const MtmlkTaskUpdate* call) { return run(*call, false); }
int mtmlk_task_update_back(const MtmlkTaskUpdate* call) { return run(*call, true); }

}  // extern "C"
