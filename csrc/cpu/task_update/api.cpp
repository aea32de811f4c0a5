// The C ABI of update rules for many tasks.
#include "mtml/abi.h"
#include "runtime/crew.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "isa/dispatch.h"

using namespace mtmlk;

namespace {

constexpr double kElement = 8;  // multiply-adds that take as long as an element

int run(const MtmlkTaskUpdate& call, bool backward) {
  int64_t elements = 0;
  for (int64_t i = 0; i < call.n; ++i) elements += call.sizes[i];
  const double work = kElement * double(call.tasks * elements);
  Watch watch = start_watch();
  const Crew crew = {threads_for(work, call.threads), is_long(work) ? &watch : nullptr, nullptr, 0};
  const TaskKernels& kernels = task_kernels_of(call.dtype);
  (backward ? kernels.update_backward : kernels.update_forward)(call, crew);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

}  // namespace

extern "C" {

int mtmlk_task_update(const MtmlkTaskUpdate* call) { return run(*call, false); }
int mtmlk_task_update_back(const MtmlkTaskUpdate* call) { return run(*call, true); }

}  // extern "C"
