// The C ABI of linear layers of many tasks.
#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "runtime/crew.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "runtime/workspace.h"
#include "isa/dispatch.h"

using namespace mtmlk;

namespace {

int run(const MtmlkTaskLinear& call, bool backward) {
  const double work = double(call.tasks * call.rows) * double(call.inputs * call.outputs);
  const int threads = threads_for(work, call.threads);
  const TaskKernels& kernels = task_kernels_of(call.dtype);
  Watch watch = start_watch();
  const int64_t own = round_up(kernels.linear_bytes(call), 128), values = call.tasks * call.rows * call.outputs;
  const int64_t slopes = backward && call.activation >= 0 ? round_up(values * element_bytes(call.dtype), 128) : 0;
  const Workspace workspace(slopes + own * threads, &watch);
  if (!workspace.data()) return workspace.status();
  char* base = static_cast<char*>(workspace.data());
  const Crew crew = {threads, is_long(work) ? &watch : nullptr, base + slopes, own};
  if (backward)
    kernels.linear_backward(call, base, crew);
  else
    kernels.linear_forward(call, crew);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

}  // namespace

extern "C" {

int mtmlk_task_linear(const MtmlkTaskLinear* call) { return run(*call, false); }
int mtmlk_task_linear_back(const MtmlkTaskLinear* call) { return run(*call, true); }

}  // extern "C"
