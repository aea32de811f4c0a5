// The C ABI of convolutions of many tasks.
#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "runtime/crew.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "runtime/workspace.h"
#include "inner_loop/plan/make_taps.h"
#include "task_conv2d/call.h"
#include "isa/dispatch.h"

using namespace mtmlk;

namespace {

AxisShape axis(const MtmlkTaskConv2d& c, int i) {
  return {c.size[i], c.out[i], c.kernel[i], c.stride[i], c.pad[i], c.dilation[i]};
}

int run(const MtmlkTaskConv2d& conv, bool backward) {
  const TaskKernels& kernels = task_kernels_of(conv.dtype);
  const int64_t channels = conv.channels / conv.groups, outputs = conv.outputs / conv.groups;
  const double pixels = double(conv.tasks * conv.samples) * double(conv.out[0] * conv.out[1]);
  const double work = pixels * double(conv.outputs * channels * conv.kernel[0] * conv.kernel[1]);
  const int threads = threads_for(work, conv.threads);
  TapStorage forward, back;
  if (!backward || conv.dw) make_forward_taps(axis(conv, 0), axis(conv, 1), channels, channels, forward);
  if (backward && conv.dx)
    make_backward_taps(axis(conv, 0), axis(conv, 1), round_up(outputs, kernels.lanes), outputs, back);
  Watch watch = start_watch();
  const int64_t own = round_up(kernels.conv2d_bytes(conv), 128);
  const int64_t sums = backward && conv.dw ? round_up(kernels.conv2d_sums(conv), 128) : 0;
  const Workspace workspace(sums + own * threads, &watch);
  if (!workspace.data()) return workspace.status();
  char* base = static_cast<char*>(workspace.data());
  const TaskConvCall call = {&conv, &forward.plan, &back.plan};
  const Crew crew = {threads, is_long(work) ? &watch : nullptr, base + sums, own};
  if (backward)
    kernels.conv2d_backward(call, base, crew);
  else
    kernels.conv2d_forward(call, crew);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

}  // namespace

extern "C" {

int mtmlk_task_conv2d(const MtmlkTaskConv2d* call) { return run(*call, false); }
int mtmlk_task_conv2d_back(const MtmlkTaskConv2d* call) { return run(*call, true); }

}  // extern "C"
